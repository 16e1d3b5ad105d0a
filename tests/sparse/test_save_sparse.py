import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pyprune
from pyprune import SparseFile, load_sparse, save_sparse
from tests.conftest import Unchanged
from tests.sparse.cases import DTYPES, assert_same, raw, some_bits

CODECS = (None, "zstd")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def assert_round_trip(tensors, path, **options):
    save_sparse(tensors, path, **options)
    found = load_sparse(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    with safe_open(path, "pt") as file:  # other readers, too, find every entry where it can lie
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_sparse_keeps_every_bit(path, dtype, codec):
    tensors = {str(n): some_bits((n,), dtype, (n % 5) / 4, n) for n in range(66)}
    shapes = [(), (1, 0), (7, 1), (33, 50), (8, 4, 3, 3), (5, 3, 2, 2, 2), (300, 7)]
    for zeros in (0, 0.5, 0.9, 1):
        tensors |= {f"{shape} {zeros}": some_bits(shape, dtype, zeros, len(shape)) for shape in shapes}
    for min_zeros in (0.0, 0.1):
        assert_round_trip(tensors, path, codec=codec, min_zeros=min_zeros)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_save_sparse_of_what_is_no_weight(path, dtype, codec):
    assert_round_trip({"a": torch.ones(300).to(dtype), "b": torch.zeros(300).to(dtype)}, path, codec=codec)


@pytest.mark.parametrize("codec", CODECS)
def test_save_sparse_of_layouts(path, codec):
    weight = torch.randn(8, 6, 5, 3) * (torch.rand(8, 6, 5, 3) < 0.3)
    weight = torch.where(weight == 0, 0, weight)
    views = {
        "t": weight.transpose(0, 1), "last": weight.contiguous(memory_format=torch.channels_last),
        "s": weight[::2, 1:], "grad": nn.Parameter(weight.clone()), "expanded": weight[:1].expand(8, 6, 5, 3),
    }  # fmt: skip
    save_sparse(views, path, codec=codec, min_zeros=0)
    for name, tensor in load_sparse(path).items():
        assert_same(tensor, views[name].detach())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_save_sparse_counts_negative_zeros_or_keeps_them(path, dtype, codec):
    weight = some_bits((64, 40), dtype, 0.5)
    data = weight.view(torch.uint8).reshape(64 * 40, -1).clone()
    data[torch.arange(64 * 40) % 7 == 3] = 0
    data[torch.arange(64 * 40) % 7 == 3, -1] = 0x80
    negative, positive = data.flatten().view(dtype).view(64, 40), data.clone()
    positive[torch.arange(64 * 40) % 7 == 3, -1] = 0
    written = save_sparse({"w": negative}, path, codec=codec)
    assert written.negative_zeros == {"w": 366}
    assert_same(load_sparse(path)["w"], positive.flatten().view(dtype).view(64, 40))
    kept = save_sparse({"w": negative}, path, codec=codec, keep_negative_zero=True)
    assert kept.negative_zeros == {}
    assert kept.kept["w"] == written.kept["w"] + 366
    assert_same(load_sparse(path)["w"], negative)


BLOCKS = {
    "4x1": ((64, 96), (4, 1)), "1x8": ((64, 96), (1, 8)), "16x16": ((64, 96), (16, 16)), "rows": ((64, 96), (1, 96)),
    "columns": ((64, 90), (64, 1)), "channels": ((64, 8, 3, 3), (1, 72)), "kernels": ((64, 8, 3, 3), (1, 9)),
    "4x1, the last ones smaller": ((70, 50), (4, 1)), "32x32, the last ones smaller": ((130, 70), (32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", BLOCKS)
def test_save_sparse_has_a_bit_for_a_block(path, name, codec):
    shape, (rows, columns) = BLOCKS[name]
    matrix = torch.randn(shape).reshape(shape[0], -1)
    units = torch.rand(-(-shape[0] // rows), -(-matrix.shape[1] // columns)) < 0.3
    units[0, 0] = True
    mask = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : matrix.shape[1]]
    weight = torch.where(mask, matrix, 0).reshape(shape).bfloat16()
    assert_round_trip({"w": weight}, path, codec=codec)
    with SparseFile(path) as file:
        assert file.tensors["w"].block == (rows, columns)
        assert file.tensors["w"].nnz == int(mask.sum())


def test_save_sparse_leaves_dense_what_would_not_be_smaller(path):
    few = torch.randn(100, 100)
    few.view(-1)[:900] = 0
    written = save_sparse({"few": few, "small": torch.zeros(8), "many": torch.eye(100)}, path)
    assert written.kept.keys() == {"many"}
    assert save_sparse({"few": few}, path, min_zeros=0.05).kept.keys() == {"few"}


def test_save_sparse_stores_tied_tensors_once(path):
    weight = torch.eye(64)
    written = save_sparse({"a": weight, "b": weight, "c": weight.clone(), "t": weight.t()}, path)
    assert written.kept.keys() == {"a", "c"} | {"t"}
    found = load_sparse(path)
    assert found["a"] is found["b"]
    assert found["a"] is not found["c"]
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    model[1].weight = model[0].weight
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    assert save_sparse(model, path).kept == {"0.weight": 800}
    assert load_sparse(path).keys() == {"0.weight", "1.weight"}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [64, 1500])  # the larger is packed in pieces
def test_save_sparse_of_what_is_conjugated_or_negated_when_it_is_read(path, size, codec):
    real = torch.randn(size, size)
    pair = torch.complex(real, real + 1)
    tensors = {"pair": pair, "conjugate": pair.conj(), "real": real, "negative": torch._neg_view(real)}
    for zeros in (False, True):
        if zeros:
            real[:, ::2] = pair[:, ::2] = 0
        save_sparse(tensors, path, codec=codec)
        found = load_sparse(path)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("point", [torch.tensor(128), torch.tensor([100]), torch.arange(100, 130).view(30, 1)])
def test_save_sparse_finds_the_zeros_of_a_zero_point(path, point):
    weight = torch.randint(0, 256, (30, 40), dtype=torch.uint8)
    weight = torch.where(torch.rand(30, 40) < 0.8, point.to(torch.uint8), weight)
    state = {"w": weight, "w_zero_point": point}
    for codec in CODECS:
        assert_round_trip(state, path, codec=codec)
        assert save_sparse(state, path, codec=codec).kept["w"] < 400


def test_save_sparse_is_as_small_as_the_bits_and_values(path):
    """At 0.9 zeros bfloat16 has 1 bit, and 16 for one element in ten: 0.325 bytes per weight."""
    weight = torch.randn(1000, 1000)
    [mask], _ = pyprune.ops.threshold([weight], 900_000)
    state = {"w": torch.where(mask, weight, 0).bfloat16()}
    plain, coded = save_sparse(state, path), save_sparse(state, path, codec="zstd")
    assert plain.file_bytes == os.path.getsize(path) - coded.file_bytes + plain.file_bytes
    assert plain.file_bytes <= 0.326 * 1e6
    assert coded.file_bytes <= 0.19 * 1e6
    assert plain.dense_bytes == coded.dense_bytes == 2e6


def test_save_sparse_of_a_masked_model_loads_into_a_plain_and_a_masked_one(path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))

    model = build()
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.7)
    before = Unchanged(model)
    written = save_sparse(model, path)
    before.check()
    assert written.kept.keys() == {"0.weight", "3.weight"}
    wanted = model.state_dict()
    plain, masked = build(), build()
    pyprune.prune(masked, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    masks = pyprune.get_config(masked)
    assert load_sparse(path, plain) is plain
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    load_sparse(path, masked)
    other = build()
    pyprune.load_from_config(other, masks)
    other.load_state_dict(wanted)
    for name, tensor in masked.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_save_sparse_uses_the_names_of_the_plain_model(path):
    model = nn.Sequential(nn.Linear(40, 40), nn.DataParallel(nn.Linear(40, 40)))
    save_sparse(nn.DataParallel(model), path)
    assert list(load_sparse(path)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)))
    load_sparse(path, wrapped)
    assert torch.equal(wrapped.module[1].weight, model[1].module.weight)


def test_save_sparse_leaves_names_of_others_alone(path):
    state = {"w": torch.eye(64), "w_shape": torch.ones(3), "v": torch.eye(64), "v_high": torch.ones(3)}
    for codec in CODECS:
        assert_round_trip(state, path, codec=codec)
        assert not save_sparse(state, path, codec=codec).kept


@pytest.mark.parametrize("codec", CODECS)
def test_save_sparse_is_refused_by_readers_that_do_not_know_it(path, codec):
    model = nn.Linear(64, 64, bias=False)
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    save_sparse(model, path, codec=codec)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        model.load_state_dict(load_file(path), strict=False)


@pytest.mark.parametrize("codec", CODECS)
def test_save_sparse_carries_metadata(path, codec):
    save_sparse({"w": torch.eye(64)}, path, codec=codec, metadata={"plan": '{"a": "ü"}'})
    with SparseFile(path) as file:
        assert file.metadata["plan"] == '{"a": "ü"}'
        assert file.metadata["format"] == "pt"


def test_save_sparse_without_metadata_is_read_by_the_names(path, tmp_path):
    state = {"w": torch.eye(70), "b": torch.ones(4), "rows": torch.ones(70, 40)}
    state["rows"][::2] = 0
    save_sparse(state, path)
    save_file(load_file(path), tmp_path / "other")
    found = load_sparse(tmp_path / "other")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert_same(found[name], tensor)
    state = {name: tensor.repeat(4, 4) for name, tensor in state.items() if tensor.dim() == 2}
    save_sparse(state, path, codec="zstd")
    save_file(load_file(path), tmp_path / "other")
    with pytest.raises(ValueError, match="it is coded, and the metadata that say how are lost"):
        load_sparse(tmp_path / "other")


def test_save_sparse_in_the_layout_of_compressed_tensors(path):
    """Read as compressed-tensors 0.3 to 0.14 do."""
    for shape in ((30, 21), (16, 64), (8, 6, 3, 3)):
        weight = torch.randn(shape) * (torch.rand(shape) < 0.3)
        state = {"fc.weight": weight, "fc.bias": torch.zeros(30), "embedding": torch.eye(64)}
        save_sparse(state, path, layout="compressed-tensors")
        found = load_file(path)
        assert found.keys() == {
            "fc.shape", "fc.compressed", "fc.bitmask", "fc.row_offsets", "fc.bias", "embedding"
        }  # fmt: skip
        assert found["fc.shape"].tolist() == list(shape)
        bits = torch.stack([found["fc.bitmask"] >> i & 1 for i in range(8)], -1).flatten(-2)[..., : shape[-1]].bool()
        dense = torch.zeros(shape)
        dense[bits] = found["fc.compressed"]
        assert torch.equal(dense, weight)
        counts = (weight != 0).sum(-1)
        assert torch.equal(found["fc.row_offsets"], counts.cumsum(0) - counts)
        for name, tensor in load_sparse(path).items():
            assert torch.equal(tensor, state[name])
        save_file(found, path)
        for name, tensor in load_sparse(path).items():
            assert torch.equal(tensor, state[name])


def test_load_sparse_reads_sparse_24_bitmask(path):
    weight = torch.randn(8, 12)
    mask = torch.tensor([True, False, False, True]).repeat(8, 3)
    bits = torch.nn.functional.pad(mask, (0, 4)).view(8, 2, 8).long()
    packed = (bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    state = {"m.compressed": weight[mask].view(8, 6), "m.shape": torch.tensor([[8], [12]]), "m.bitmask": packed}
    save_file(state, path)
    assert torch.equal(load_sparse(path)["m.weight"], torch.where(mask, weight, 0))


def test_save_sparse_without_zstandard_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install \"pyprune\[zstd\]\""):
        save_sparse({"w": torch.eye(64)}, path, codec="zstd")
    assert not path.exists()


def _gated():
    return pyprune.prune(nn.Linear(8, 8), "UNSTRUCTURED_REGULARIZATION_BASED")


REFUSED = {
    "gates": (_gated, r"strip\(model\) before"),
    "meta": (lambda: nn.Linear(3, 4, device="meta"), "meta device"),
    "no tensor": (lambda: {"w": [1.0]}, r"model\['w'\] is a list"),
    "no name": (lambda: {1: torch.ones(1)}, "names must be strings"),
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, r"to_dense\(\)"),
    "complex128": (lambda: {"w": torch.ones(3, dtype=torch.complex128)}, "w is torch.complex128"),
    "a name of safetensors": (lambda: {"__metadata__": torch.ones(3)}, "is no name of a tensor"),
    "no model": (lambda: 3, "give a torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_save_sparse_refuses(path, name):
    make, message = REFUSED[name]
    path.write_text("old")
    with pytest.raises((TypeError, ValueError), match=message):
        save_sparse(make(), path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_save_sparse_that_is_killed_leaves_the_old_file_or_the_new_one(path):
    code = (
        "import sys, torch, pyprune\n"
        "state = {str(i): torch.eye(600) * (i + 1) for i in range(40)}\n"
        "print(flush=True)\n"
        "while True:\n"
        "    pyprune.save_sparse(state, sys.argv[1], min_zeros=0)\n"
    )
    old = {"old": torch.eye(64)}
    for wait in (0.01, 0.05, 0.2):
        save_sparse(old, path)
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(load_sparse(path)) in (1, 40)


def test_written_bytes_are_those_of_the_file(path):
    state = {"w": torch.eye(100), "b": torch.ones(5)}
    assert save_sparse(state, path).file_bytes == os.path.getsize(path)
    assert raw(load_sparse(path)["b"]) == raw(state["b"])
