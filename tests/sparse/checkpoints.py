"""Checkpoints as they are found, for tests."""

import json

import torch
from safetensors.torch import save_file

from tests.ops.cases import adversarial


def save_sharded(folder, shards, **others):
    """Write a folder of shards, given as dicts of tensors, with their index and other files by their names."""
    folder.mkdir(parents=True)
    places, size = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b\n")
    for name, text in others.items():
        (folder / name).write_text(text)
    return folder


def language_model(kind="normal", dtypes=(torch.bfloat16,)):
    """Return the tensors of a small decoder in two shards."""
    shards, number = [], 0
    for layer in range(2):
        tensors = {}
        for name, shape in {"attn.q": (64, 48), "mlp.up": (96, 64), "mlp.down": (64, 96)}.items():
            weight = adversarial(shape, kind, dtypes[number % len(dtypes)], number) * (1 + number)
            tensors[f"model.layers.{layer}.{name}.weight"], number = weight, number + 1
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(64, dtype=dtypes[0])
        shards.append(tensors)
    shards[0]["model.embed_tokens.weight"] = adversarial((80, 64), "normal", dtypes[0], 99)
    shards[1]["model.conv.weight"] = adversarial((16, 8, 3, 3), kind, torch.float32, 7)
    shards[1]["lm_head.bias"] = torch.zeros(80)
    return shards
