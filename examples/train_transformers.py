"""Prune a small GPT-2 in the Hugging Face Trainer, by a recipe; then train the result on other text, its zeros held.

The model has random weights, and learns docstrings of Python's own library, character by character; then its source.

Run it with ``make transformers``, or ``pip install "pyprune[transformers]"`` and
``python examples/train_transformers.py``: about 30 s.
"""

import argparse
import asyncio
import collections
import inspect
import json
import os
import tempfile
import unittest
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import below: nothing is fetched

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import pyprune
from pyprune.integrations.transformers import PruningCallback

LENGTH = 64
MODULES = (argparse, asyncio, collections, json, unittest)

RECIPE = pyprune.Recipe.from_string("""
epochs: 6
stages:
  - prune:
      start: 1
      end: 4
      frequency: 0.25
      final: 0.8
      scope: model
      ignore: {names: [transformer.wte, transformer.wpe]}  # the output layer is tied to wte, and stays dense with it
""")

Block = dict[str, torch.Tensor]


def docstrings() -> str:
    members = (member for module in MODULES for _, member in inspect.getmembers(module))
    return "\n".join(dict.fromkeys(filter(None, map(inspect.getdoc, members))))


def source() -> str:
    return "\n".join(inspect.getsource(module) for module in MODULES)


def blocks(text: str, size: int) -> tuple[list[Block], list[Block]]:
    """Cut a text into blocks of characters, to train on and to evaluate with."""
    tokens = torch.tensor([min(ord(character), 127) for character in text[:size]])
    rows = [{"input_ids": row, "labels": row} for row in tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)]
    return [row for i, row in enumerate(rows) if i % 10], rows[::10]


def train(
    model: GPT2LMHeadModel,
    data: tuple[list[Block], list[Block]],
    callback: PruningCallback,
    folder: Path,
    epochs: int,
    checkpoint: Path | None = None,
) -> Trainer:
    training, evaluation = data
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=training, eval_dataset=evaluation, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # `show` prints less
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def show(trainer: Trainer) -> None:
    for line in trainer.state.log_history:
        if "eval_loss" in line:
            sparsity = line.get("pruning_sparsity", 0.0)
            print(
                f"epoch {line['epoch']:.0f}   sparsity {sparsity:6.2%}   loss on other blocks {line['eval_loss']:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the text, to see that it runs")
    size = 4_000 if parser.parse_args().quick else 40_000
    texts = blocks(docstrings(), size)
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(1)  # so small a model keeps more of them waiting for each other
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    # The layers of GPT-2 are no torch.nn.Linear; a forward pass on these finds their weights.
    example = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("Docstrings, pruned on the way:")
        model = GPT2LMHeadModel(config)
        callback = PruningCallback(RECIPE, examples_inputs=example)
        show(train(model, texts, callback, folder / "pruned", RECIPE.num_epochs))

        middle = sorted((folder / "pruned").iterdir(), key=lambda path: path.stat().st_mtime)[2]
        again = GPT2LMHeadModel(config)
        callback = PruningCallback(RECIPE, examples_inputs=example, resume_from=middle)
        train(again, texts, callback, folder / "resumed", RECIPE.num_epochs, middle)
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        print("Gone on with from the third checkpoint, it ends with the same weights, bit for bit.")

        model.save_pretrained(folder / "plain")
        transferred = GPT2LMHeadModel.from_pretrained(folder / "plain")
        print("\nSource, with the zeros of that model held:")
        callback = PruningCallback(pyprune.keep_sparse, examples_inputs=example)
        show(train(transferred, blocks(source(), size), callback, folder / "transferred", 2))
        for before, after in zip(model.parameters(), transferred.parameters(), strict=True):
            assert torch.equal(before == 0, after == 0) or not (before == 0).any()


if __name__ == "__main__":
    main()
