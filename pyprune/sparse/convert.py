"""Checkpoints made smaller, and dense again."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from pyprune.checks import check_bool, check_choice
from pyprune.sparse.checkpoint import Checkpoint, in_order
from pyprune.sparse.codec import zstd
from pyprune.sparse.dense_file import Dense, write_dense
from pyprune.sparse.encoding import Options
from pyprune.sparse.format import CODECS, KEY, LAYOUTS
from pyprune.sparse.new_checkpoint import write_like
from pyprune.sparse.pieces import pieces_of
from pyprune.sparse.reading import SparseFile
from pyprune.sparse.writing import Source, Written, write_sparse

Seen = Callable[[str], object]  # is told of each tensor that is done


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    codec: str | None = None,
    layout: str = "pyprune",
    keep_negative_zero: bool = False,
    seen: Seen = lambda name: None,
) -> list[Written]:
    """Write a checkpoint of which tensors with zeros are packed; return what `save_sparse` does, for each file.

    Args:
        source: a safetensors file, a folder with one, or of shards with their index.
        target: where nothing is: a file if source is one, otherwise a folder.
        codec, layout, keep_negative_zero: as in `save_sparse`.
        seen: is told of each tensor that is read.

    Raises:
        TypeError, ValueError, FileExistsError, FileNotFoundError: if it cannot be read, or written there.
        ImportError: if the codec's package is missing.
    """
    if codec is not None:
        check_choice("codec", codec, CODECS)
    check_choice("layout", layout, LAYOUTS)
    options = Options(codec, layout, check_bool("keep_negative_zero", keep_negative_zero))
    if codec is not None:
        zstd()
    written: list[Written] = []

    def write(file: SparseFile, path: Path) -> None:
        sources = [_source(file, name, seen) for name in file.tensors]
        written.append(write_sparse(path, sources, options, tied=file.tied, metadata=others(file)))

    with Checkpoint(source) as checkpoint:
        write_like(checkpoint, target, write)
    return written


def expand_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, seen: Seen = lambda name: None
) -> None:
    """Write the dense checkpoint, of which no tensor is packed. Other names of tied tensors are left out of it.

    They are in the metadata, where ``safetensors.torch.load_model`` looks for them.

    Raises:
        TypeError, ValueError, FileExistsError, FileNotFoundError: if it cannot be read, or written there.
    """

    def write(file: SparseFile, path: Path) -> None:
        def pieces(name: str) -> Iterator[Tensor]:
            yield file.read(name)
            seen(name)

        write_dense(path, [dense(file, name, partial(pieces, name)) for name in in_order(file)], others(file))

    with Checkpoint(source) as checkpoint:
        write_like(checkpoint, target, write)


def dense(file: SparseFile, name: str, pieces: Callable[[], Iterable[Tensor]]) -> Dense:
    """Return what a tensor of a file becomes."""
    return Dense(name, file.dtype(name), file.shape(name), pieces)


def others(file: SparseFile) -> dict[str, str]:
    """Return the metadata that are not about how tensors are packed, with the other names of those that are tied."""
    kept = {key: value for key, value in file.metadata.items() if key != KEY}
    return {"format": "pt"} | file.tied | kept


def _source(file: SparseFile, name: str, seen: Seen) -> Source:
    waiting = [name]

    def read() -> Tensor:
        tensor = file.view(name)
        if waiting:
            seen(waiting.pop())
        return tensor

    pieces = (lambda: pieces_of(read())) if file.is_view(name) else None
    return Source(name, file.dtype(name), file.shape(name), read, pieces)
