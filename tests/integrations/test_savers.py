"""Trainers that save a part of the model, or with code of their own: plain weights with zeros, at every save."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Recipe

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from sentence_transformers.sentence_transformer import losses  # noqa: E402

from pyprune.integrations.transformers import PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(5, 30, (24, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]
LAYERS = IgnoredScope(types=["Embedding"], patterns=[r".*(pooler|lm_head|lora_)"])


def arguments(folder, kind=transformers.TrainingArguments, **options):
    return kind(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def layer_weights(state):
    return {
        name: weight
        for name, weight in state.items()
        if weight.dim() == 2 and not any(part in name for part in ("embed", "pooler", "lm_head", "lora_"))
    }


def sparsity(state):
    weights = layer_weights(state).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def gradual(model, optimizer, steps_per_epoch):
    return pyprune.gmp(model, 0.5, optimizer, end=5, ignored_scope=LAYERS)


class SavesAPart(transformers.Trainer):
    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.model.state_dict(), Path(output_dir) / "decoder.pt")


def test_a_trainer_that_saves_a_part_saves_plain_weights_with_zeros(tmp_path):
    model = llama()
    names = list(model.model.state_dict())
    trainer = SavesAPart(model, arguments(tmp_path), train_dataset=DATA, callbacks=[PruningCallback(gradual)])
    trainer.train()
    found = {}
    for checkpoint in tmp_path.glob("checkpoint-*"):
        state = torch.load(checkpoint / "decoder.pt")
        assert list(state) == names
        found[int(checkpoint.name.split("-")[1])] = sparsity(state)
    assert 0 < found[3] < found[6]
    assert found[6] == found[9] == pytest.approx(0.5, abs=1e-3)
    assert sparsity(model.state_dict()) == found[9]
    model.model.load_state_dict(state)


def test_zeros_hold_while_adapters_train_and_are_merged(tmp_path):
    base = pyprune.strip(pyprune.prune(llama(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, ignored_scope=LAYERS))
    zero = {name: weight == 0 for name, weight in layer_weights(base.state_dict()).items()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    callback = PruningCallback(pyprune.keep_sparse, strip=False)
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, eval_strategy="epoch", load_best_model_at_end=True, learning_rate=1e-2),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=[callback],
    )
    trainer.train()
    factors = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(weight.abs().sum() > 0 for weight in factors)  # zero everywhere at first, and not held
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == 2
        peft.PeftModel.from_pretrained(llama(), checkpoint)
    before = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.detach().clone()
    merged = model.merge_and_unload()
    merged(input_ids=TOKENS[:2])
    state = layer_weights(merged.state_dict())
    assert state.keys() == zero.keys()
    assert all((weight[zero[name]] == 0).all() for name, weight in state.items())
    assert not torch.equal(state["model.layers.0.self_attn.q_proj.weight"], before)


def sentence_encoder(folder):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_the_trainer_of_sentence_transformers_ends_with_trained_weights_and_zeros(tmp_path):
    model = sentence_encoder(tmp_path / "base")
    texts = [" ".join("abcdefghijklmnopqrstuvwxy"[i : i + 4]) for i in range(20)]
    pairs = datasets.Dataset.from_dict({"anchor": texts, "positive": texts[::-1]})
    dense = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model,
        arguments(
            tmp_path / "out",
            sentence_transformers.SentenceTransformerTrainingArguments,
            eval_strategy="epoch",
            load_best_model_at_end=True,
            learning_rate=1e-6,
        ),
        train_dataset=pairs,
        eval_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[PruningCallback(gradual)],
    )
    trainer.train()
    best = int(Path(trainer.state.best_model_checkpoint).name.split("-")[1])
    model.save_pretrained(str(tmp_path / "final"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "final"), device="cpu")
    for found in (model, again):
        state = found.state_dict()
        assert state.keys() == dense.keys()
        assert sparsity(state) > (0.4 if best >= 6 else 0)
        for name, weight in layer_weights(state).items():
            kept = weight != 0
            torch.testing.assert_close(weight[kept], dense[name][kept], atol=1e-4, rtol=0)  # trained a little


def test_a_recipe_may_prune_below_adapters(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    recipe = "stages: [prune: {final: 0.5, end: 1, ignore: {types: [Embedding], patterns: ['.*(lm_head|lora_)']}}]"
    callback = PruningCallback(Recipe.from_string(recipe))
    transformers.Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[callback]).train()
    assert sparsity(model.state_dict()) == pytest.approx(0.5, abs=1e-3)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, nn.Linear)
