"""What the config of a folder says after it was packed and made dense."""

import json

import pytest

from pyprune.sparse.convert import compress_checkpoint, expand_checkpoint
from tests.sparse.checkpoints import language_model, save_sharded

OURS = {"quant_method": "pyprune"}
THEIRS = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "quantization_status": "compressed",
    "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
}
QUANTISED = {**THEIRS, "config_groups": {"group_0": {"targets": ["Linear"]}}}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05, "pad_token_id": None}


def folder_of(path, config):
    shards = language_model()
    for tensors in shards:
        for weight in tensors.values():
            if weight.dim() == 2:
                weight[::2] = 0
    save_sharded(path, shards)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config, indent=2) + "\n")
    return path


@pytest.mark.parametrize(
    ("config", "packed", "dense"),
    [
        (LLAMA, {**LLAMA, "quantization_config": OURS}, LLAMA),
        ({"model_type": "llama"}, {"model_type": "llama", "quantization_config": OURS}, {"model_type": "llama"}),
        ({"architectures": ["A"]}, {"architectures": ["A"], "quantization_config": OURS}, {"architectures": ["A"]}),
        ({**LLAMA, "quantization_config": None}, {**LLAMA, "quantization_config": OURS}, LLAMA),
        ({**LLAMA, "quantization_config": OURS}, {**LLAMA, "quantization_config": OURS}, LLAMA),
        ({**LLAMA, "quantization_config": THEIRS}, {**LLAMA, "quantization_config": OURS}, LLAMA),
        # What is none of transformers' stays, to the byte.
        ('{"_class_name":   "UNet"}', None, None),
        ('["llama"]', None, None),
        ('{"model_type": ', None, None),
        ("", None, None),
    ],
)
def test_compress_says_so_in_the_config_and_expand_no_longer(config, packed, dense, tmp_path):
    source = folder_of(tmp_path / "in", config)
    compress_checkpoint(source, tmp_path / "packed")
    expand_checkpoint(tmp_path / "packed", tmp_path / "dense")
    for name, wanted in {"packed": packed, "dense": dense}.items():
        text = (tmp_path / name / "config.json").read_text()
        assert text == (config if wanted is None else json.dumps(wanted, indent=2) + "\n")


@pytest.mark.parametrize("entry", [{"quant_method": "gptq", "bits": 4}, QUANTISED, "int8"])
def test_compress_warns_of_a_config_that_is_quantised(entry, tmp_path):
    source = folder_of(tmp_path / "in", {**LLAMA, "quantization_config": entry})
    with pytest.warns(UserWarning, match="says that the model is quantised .* expand it before"):
        compress_checkpoint(source, tmp_path / "packed")
    expand_checkpoint(tmp_path / "packed", tmp_path / "dense")
    for name in ("packed", "dense"):
        assert (tmp_path / name / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_compress_names_what_compressed_tensors_is_to_read(tmp_path):
    source = folder_of(tmp_path / "in", LLAMA)
    compress_checkpoint(source, tmp_path / "packed", layout="compressed-tensors")
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    sparsity = entry.pop("sparsity_config")
    assert entry == {"quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed"}
    packed = [name for tensors in language_model() for name, one in tensors.items() if one.dim() == 2]
    assert {f"{name}.weight" for name in sparsity["targets"]} == set(packed)
    assert (sparsity["format"], sparsity["ignore"], sparsity["global_sparsity"]) == ("sparse-bitmask", [], 0.5)
    expand_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == LLAMA


def test_compress_of_a_folder_without_a_config_makes_none(tmp_path):
    source = folder_of(tmp_path / "in", LLAMA)
    (source / "config.json").unlink()
    compress_checkpoint(source, tmp_path / "packed")
    assert not (tmp_path / "packed" / "config.json").exists()
