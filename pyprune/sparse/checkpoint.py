"""A checkpoint as users have it: a safetensors file, a folder with one, or a folder of shards with their index."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyprune.checks import check_path, shown
from pyprune.sparse.reading import SparseFile

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
_MOST_INDEX = 100_000_000  # bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its name and the number of its file."""

    name: str
    file: int


class Checkpoint:
    """All tensors of a checkpoint, each read when it is asked for. Close it, or use it in a ``with``.

    Args:
        path: of a safetensors file; of a folder with one; or of a folder of several and their index
            (``model.safetensors.index.json``), or of that index.

    Attributes:
        files: the open files, in the order of their names.
        places: where each tensor is, by its name: in the order of the files, and of ``in_order`` in each.

    Raises:
        FileNotFoundError: if there is nothing, or a file is missing that the index names.
        ValueError: if it cannot be told which files are meant, if one is damaged, or they contradict the index.

    Example:
        >>> import tempfile
        >>> import pyprune
        >>> folder = tempfile.mkdtemp()
        >>> _ = pyprune.save_sparse({"w": torch.eye(64)}, Path(folder, "model.safetensors"))
        >>> with Checkpoint(folder) as checkpoint:
        ...     print(list(checkpoint.places), checkpoint.shape("w"))
        ['w'] (64, 64)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("path", path)
        self.path = Path(path)
        self.folder, self.index_file, names = _find(self.path)
        self.files: list[SparseFile] = []
        self.places: dict[str, Place] = {}
        try:
            for name in names:
                self.files.append(SparseFile(self.folder / name if self.folder else self.path))
            self._find_tensors()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._file(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._file(name).shape(name)

    def view(self, name: str) -> Tensor:
        """Return a tensor, which is not to be written: as it lies in its file, if that is possible."""
        return self._file(name).view(name)

    def others(self) -> list[Path]:
        """List the files of the folder that hold no tensors of it: configs, tokenizers and folders."""
        if self.folder is None:
            return []
        taken = {file.path.name for file in self.files} | ({self.index_file.name} if self.index_file else set())
        return sorted(path for path in self.folder.iterdir() if path.name not in taken)

    def index(self) -> dict[str, Any] | None:
        """Return the index of shards, or None if there is none."""
        return None if self.index_file is None else _read_index(self.index_file)

    def _file(self, name: str) -> SparseFile:
        if name not in self.places:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self.files[self.places[name].file]

    def _find_tensors(self) -> None:
        for number, file in enumerate(self.files):
            for name in [*in_order(file), *file.tied]:
                if name in self.places:
                    other = self.files[self.places[name].file].path.name
                    raise ValueError(f"{self.path}: {name} is in {other} and in {file.path.name}; it must be in one")
                self.places[name] = Place(name, number)
        if self.index_file is None:
            return
        for name, shard in _read_index(self.index_file)["weight_map"].items():
            at = next((file for file in self.files if file.path.name == shard), None)
            if at is None or name not in at.header.entries:
                raise ValueError(f"{self.index_file}: {name} is to be in {shard}, and is not")


def in_order(file: SparseFile) -> list[str]:
    """List the tensors of a file as they are pruned and written: larger types first, and then as they lie."""
    entries = file.header.entries

    def place(name: str) -> tuple[int, int]:
        return -file.dtype(name).itemsize, entries[file.tensors[name].names.values].begin

    return sorted(file.tensors, key=place)


def _find(path: Path) -> tuple[Path | None, Path | None, list[str]]:
    """Return the folder, or None for a single file; the index, if there is one; and the names of the files."""
    if path.name.endswith(INDEX) and path.is_file():
        return _sharded(path)
    if path.is_file():
        return None, None, [path.name]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: there is no such file or folder; give a safetensors file, or a folder of them"
        )
    indices = sorted(one for one in path.iterdir() if one.name.endswith(INDEX))
    files = sorted(one.name for one in path.iterdir() if one.name.endswith(SUFFIX) and not one.name.startswith("."))
    if len(indices) == 1:
        return _sharded(indices[0])
    if not indices and len(files) == 1:
        return path, None, files
    found = [one.name for one in indices] or files
    if found:
        raise ValueError(
            f"{path} has {', '.join(found[:5])}, and which is meant cannot be told; give the path of one"
        )
    raise FileNotFoundError(f"{path} has no safetensors file in it; convert others before, by save_pretrained say")


def _sharded(index: Path) -> tuple[Path, Path, list[str]]:
    return index.parent, index, sorted(set(_read_index(index)["weight_map"].values()))


def _read_index(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_INDEX:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, which is too much for an index")
    try:
        fields = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    shards = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(shards, dict):
        raise ValueError(f'{path} has no "weight_map", which says in what file each tensor is')
    for name, shard in shards.items():
        # A name that climbs out of the folder would read, and write, somewhere else.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(SUFFIX):
            raise ValueError(f"{path}: {name} is to be in {shown(shard)}, which is no name of a safetensors file")
    return dict(fields)
