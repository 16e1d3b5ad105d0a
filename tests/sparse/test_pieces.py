"""Large tensors are packed piece by piece, into the same file as whole ones."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pyprune import importance
from pyprune.methods.method import Method
from pyprune.sparse import pieces, prune_files, writing
from pyprune.sparse.encoding import Options
from pyprune.sparse.reading import SparseFile
from pyprune.sparse.writing import Source, write_sparse

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8,
    torch.int64, torch.bool,
)  # fmt: skip


def some(dtype, zeros, change=lambda tensor: None):
    torch.manual_seed(0)
    tensor = torch.randn(300, 37) * 3
    tensor[torch.rand(300, 37) < zeros] = 0
    change(tensor)
    return tensor.to(dtype)


def negative(tensor):
    tensor[torch.rand(300, 37) < 0.3] = -0.0


def in_blocks(tensor):
    tensor[torch.rand(300) < 0.5] = 0


def behind(tensor):
    tensor[100:] = 0


TENSORS = {
    **{f"{zeros} zeros": lambda dtype, zeros=zeros: some(dtype, zeros) for zeros in (0, 0.05, 0.5, 0.97, 1)},
    "-0.0": lambda dtype: some(dtype, 0.3, negative),
    "blocks": lambda dtype: some(dtype, 0, in_blocks),
    "blocks behind the first rows": lambda dtype: some(dtype, 0.6, behind),
    "few rows": lambda dtype: some(dtype, 0, in_blocks)[:100],
    "a row": lambda dtype: some(dtype, 0.5).view(-1),
    "a kernel": lambda dtype: some(dtype, 0.5).view(-1)[: 300 * 36].view(300, 4, 3, 3),
}
OPTIONS = {
    "as usual": Options(),
    "keep -0.0": Options(keep_negative_zero=True),
    "all sparse": Options(min_zeros=0.0),
    "most zeros": Options(min_zeros=0.9),
    "zstd": Options(codec="zstd"),
    "compressed-tensors": Options(layout="compressed-tensors"),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TENSORS)
def test_write_sparse_of_pieces_is_that_of_whole_tensors(tmp_path, monkeypatch, name, options):
    monkeypatch.setattr(writing, "LARGE", 0)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    tensors = {f"{dtype}.weight": TENSORS[name](dtype) for dtype in DTYPES}
    sources = [Source.of(key, tensor) for key, tensor in tensors.items()]
    assert all(source.pieces is not None for source in sources)
    written = write_sparse(tmp_path / "pieces", sources, OPTIONS[options])
    whole = write_sparse(tmp_path / "whole", [replace(one, pieces=None) for one in sources], OPTIONS[options])
    assert written == whole
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    with SparseFile(tmp_path / "pieces") as file:
        for key, tensor in tensors.items():
            assert file.read(key).tolist() == tensor.tolist()


def test_write_sparse_refuses_pieces_that_change(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "LARGE", 0)
    tensor = some(torch.float32, 0.5)

    def changing():
        yield tensor.view(-1).clone()
        tensor[:5] = 1

    with pytest.raises(ValueError, match=r"w of shape .* got .* bytes"):
        write_sparse(tmp_path / "w", [Source("w", tensor.dtype, tensor.shape, lambda: tensor, changing)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_prune_files_packs_pieces_as_whole_tensors(tmp_path, monkeypatch, dtype, normalize):
    source = tmp_path / "dense.safetensors"
    torch.manual_seed(0)
    # Ties, which go in the order of the weights, whether these are asked for once or twice.
    state = {f"{number}.weight": torch.randint(-5, 6, (300, 40)).to(dtype) for number in range(4)}
    save_file(state | {"norm.weight": torch.ones(77), "embed.weight": torch.randn(50, 8)}, source)
    method = Method(importance.magnitude(normalize=normalize))
    for large, name in ((0, "pieces"), (1 << 40, "whole")):
        monkeypatch.setattr(writing, "LARGE", large)
        monkeypatch.setattr("pyprune.sparse.out_of_core._PIECE", 1000)
        told = []
        prune_files.prune_files(
            source, tmp_path / name, method, 0.5, compress=Options(), seen=lambda *what, told=told: told.append(what)
        )
        assert [name for what, name in told if what == "written"] == [*state]
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


_MEASURE = """
import sys
from pyprune import importance
from pyprune.methods.method import Method
from pyprune.sparse.encoding import Options
from pyprune.sparse.prune_files import prune_files

def peak():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous"))

import threading
method, peaks, done = Method(importance.magnitude()), [], threading.Event()
prune_files(sys.argv[1], sys.argv[2], method, 0.5, compress=Options())
before = peak()

def watch():
    while not done.wait(0.002):
        peaks.append(peak())

thread = threading.Thread(target=watch)
thread.start()
prune_files(sys.argv[3], sys.argv[4], method, 0.5, compress=Options())
done.set()
thread.join()
print(max(peaks) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_prune_files_packs_in_memory_that_does_not_grow_with_a_weight(tmp_path):
    save_file({"a.weight": torch.randn(64, 64).bfloat16()}, tmp_path / "small.safetensors")
    large = {
        "wide.weight": torch.randn(2**13, 2**12).bfloat16(),
        "embed.weight": torch.randn(2**12, 2**12).bfloat16(),
    }
    save_file(large, tmp_path / "large.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("small", "small_out", "large", "large_out")]
    found = subprocess.run([sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 48 << 20  # of 100 MB
