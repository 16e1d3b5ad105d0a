import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.convert import compress_checkpoint, expand_checkpoint
from pyprune.sparse.new_checkpoint import whole_folder, write_like
from tests.sparse.checkpoints import language_model, save_sharded

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return save_sharded(tmp_path / "in", language_model("mostly zeros", (torch.bfloat16, torch.float32)))


def test_checkpoint_reads_files_folders_and_shards(tmp_path, folder):
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[0]) | load_file(shards[1])
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(tensors, alone / "model.safetensors")
    for path in (folder, folder / INDEX, alone, alone / "model.safetensors"):
        with Checkpoint(path) as checkpoint:
            assert set(checkpoint) == set(tensors)
            assert all(torch.equal(checkpoint.view(name), tensor) for name, tensor in tensors.items())
            assert {path.name for path in checkpoint.others()} == (
                {"config.json", "tokenizer"} if path.parent == folder or path == folder else set()
            )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "no name of a safetensors file"),
        ({"a": "/etc/passwd"}, "no name of a safetensors file"),
        ({"a": "config.json"}, "no name of a safetensors file"),
        ({"a": 3}, "no name of a safetensors file"),
        (["a"], 'has no "weight_map"'),
        ({"none.weight": "model-00001-of-00002.safetensors"}, "none.weight is to be in model-00001"),
    ],
)
def test_checkpoint_refuses_an_index_that_lies(folder, weight_map, message):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder)


def test_checkpoint_refuses_what_cannot_be_told(tmp_path, folder):
    (folder / INDEX).write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Checkpoint(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00003-of-00003.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="00003"):
        Checkpoint(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match="which is meant cannot be told"):
        Checkpoint(folder)
    twice = save_sharded(tmp_path / "twice", [{"a": torch.ones(1), "c": torch.ones(1)}, {"a": torch.ones(2)}])
    with pytest.raises(ValueError, match=r"a is in model-00001.* and in model-00002"):
        Checkpoint(twice)


@pytest.mark.parametrize("layout", ["pyprune", "compressed-tensors"])
def test_compress_and_expand_are_the_same_checkpoint(tmp_path, folder, layout):
    compress_checkpoint(folder, tmp_path / "packed", layout=layout, keep_negative_zero=True)
    expand_checkpoint(tmp_path / "packed", tmp_path / "dense")
    index = json.loads((tmp_path / "packed" / INDEX).read_text())
    for shard in set(index["weight_map"].values()):
        dense, before = load_file(tmp_path / "dense" / shard), load_file(folder / shard)
        assert dense.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(dense[name].view(torch.uint8), tensor.view(torch.uint8)), name
        entries = load_file(tmp_path / "packed" / shard)
        assert entries.keys() == {name for name, place in index["weight_map"].items() if place == shard}
    old = json.loads((folder / INDEX).read_text())
    assert json.loads((tmp_path / "dense" / INDEX).read_text()) == old | {
        "weight_map": dict(sorted(old["weight_map"].items()))
    }
    assert index["metadata"]["total_size"] < old["metadata"]["total_size"]
    assert (tmp_path / "dense" / "tokenizer" / "merges.txt").read_text() == "a b\n"


def test_expand_leaves_other_names_of_tied_tensors_to_the_metadata(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64, bias=False), "b": torch.nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    pyprune.save_sparse(model, tmp_path / "packed.safetensors", min_zeros=0)
    compress_checkpoint(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    expand_checkpoint(tmp_path / "again.safetensors", tmp_path / "dense.safetensors")
    assert list(load_file(tmp_path / "dense.safetensors")) == ["a.weight"]
    with Checkpoint(tmp_path / "dense.safetensors") as dense:
        assert dense.files[0].metadata["b.weight"] == "a.weight"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_checkpoint_is_whole_or_not_there(tmp_path, folder, error):
    def fail(file, path):
        path.write_bytes(b"half")
        raise error

    with Checkpoint(folder) as checkpoint, pytest.raises(error):
        write_like(checkpoint, tmp_path / "out", fail)
    with pytest.raises(error), whole_folder(tmp_path / "out"):
        raise error
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
