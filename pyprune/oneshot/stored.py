"""What blocks gave for each batch, kept for the passes of the next block: in memory, or in files of a folder."""

import copy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from pyprune.files import whole_file

# What a file can hold besides tensors, and be read from without running what is in it.
_PLAIN = (Tensor, int, float, str, bool, type(None))


class Stored(Protocol):
    """Outputs by what they are of and by batch. What is `put` is `fresh` until `turn`; then `get` returns it."""

    def put(self, key: str, batch: int, output: Any) -> None:
        """Take what a block gave for a batch."""

    def get(self, key: str, batch: int) -> Any:
        """Return what was put before the last `turn`; it is not to be written to."""

    def fresh(self, key: str, batch: int) -> Any:
        """Return what was put since the last `turn`."""

    def turn(self) -> None:
        """Let what was put take the place of what was there."""


class InMemory:
    """Outputs on the CPU.

    Example:
        >>> stored = InMemory()
        >>> stored.put("layers", 0, (torch.ones(1), None))
        >>> stored.turn()
        >>> stored.get("layers", 0)
        (tensor([1.]), None)
    """

    def __init__(self) -> None:
        self._there: dict[tuple[str, int], Any] = {}
        self._new: dict[tuple[str, int], Any] = {}

    def put(self, key: str, batch: int, output: Any) -> None:
        """Take what a block gave for a batch."""
        self._new[key, batch] = packed(output)

    def get(self, key: str, batch: int) -> Any:
        """Return what was put before the last `turn`; it is not to be written to."""
        return unpacked(self._there[key, batch])

    def fresh(self, key: str, batch: int) -> Any:
        """Return what was put since the last `turn`."""
        return unpacked(self._new[key, batch])

    def turn(self) -> None:
        """Let what was put take the place of what was there."""
        self._there.update(self._new)
        self._new.clear()


class InFolder:
    """Outputs in files, which are mapped when they are read.

    What was there before the last `turn` stays until `clean`, so that whoever takes down ``turns`` in between can
    begin again where that was.

    Args:
        folder: that there is.
        turns: of another such, which had the folder before.

    Example:
        >>> import tempfile
        >>> stored = InFolder(Path(tempfile.mkdtemp()))
        >>> stored.put("layers", 0, (torch.ones(1), None))
        >>> stored.turn()
        >>> stored.get("layers", 0), stored.turns
        ((tensor([1.]), None), {'layers': 1})
    """

    def __init__(self, folder: Path, turns: dict[str, int] | None = None) -> None:
        self.folder = folder
        self.turns = dict(turns or {})
        self._put: set[str] = set()

    @property
    def _next(self) -> int:
        return max(self.turns.values(), default=0) + 1

    def put(self, key: str, batch: int, output: Any) -> None:
        """Take what a block gave for a batch.

        Raises:
            TypeError: for what cannot be kept in a file.
        """
        strange = [leaf for leaf in tree_leaves(output) if not isinstance(leaf, _PLAIN)]
        if strange:
            raise TypeError(
                f"store is a folder, and blocks of {key} return a {type(strange[0]).__name__}, which is no tensor "
                'and cannot be kept in a file; give store="memory"'
            )
        write_file(self._path(self._next, batch), packed(output))
        self._put.add(key)

    def get(self, key: str, batch: int) -> Any:
        """Return what was put before the last `turn`; it is not to be written to."""
        return self._read(self.turns[key], batch)

    def fresh(self, key: str, batch: int) -> Any:
        """Return what was put since the last `turn`."""
        return self._read(self._next, batch)

    def turn(self) -> None:
        """Let what was put take the place of what was there."""
        self.turns.update(dict.fromkeys(self._put, self._next))
        self._put.clear()

    def clean(self) -> None:
        """Remove the files that nothing is read from any more."""
        used = {f"{turn:06d}" for turn in self.turns.values()}
        for path in self.folder.glob("*.pt"):
            if path.name.partition("-")[0] not in used:
                path.unlink()

    def _path(self, turn: int, batch: int) -> Path:
        return self.folder / f"{turn:06d}-{batch:06d}.pt"

    def _read(self, turn: int, batch: int) -> Any:
        return unpacked(read_file(self._path(turn, batch)))


def write_file(path: Path, content: Any) -> None:
    """Write tensors, and what holds them, to a file.

    Raises:
        OSError: if it cannot be written, for which torch has no error of its own.
    """
    with whole_file(path) as unfinished:
        try:
            torch.save(content, unfinished)
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written, perhaps because the disk is full: {error!s:.200}") from error


def read_file(path: Path) -> Any:
    """Return what `write_file` wrote; tensors are mapped.

    Raises:
        ValueError: if it is not there, or is something else.
    """
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # torch has no error of its own for what is no file of torch.save
        raise ValueError(
            f"{path} is lost or damaged, and a run that it is part of cannot go on ({type(error).__name__}: "
            f"{error!s:.200}); begin again, in another folder"
        ) from error


def copied(output: Any) -> Any:
    """Return a copy of an output, which may be written to."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), output)


def check_seen(name: str, output: Any) -> None:
    """Raise unless torch sees a tensor in what a block gives.

    Raises:
        ValueError: if all there is lies in objects that torch does not look into.
    """
    leaves = tree_leaves(output)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = " and ".join(sorted({type(leaf).__name__ for leaf in leaves})) or type(output).__name__
        raise ValueError(
            f"{name} returns a {kinds}, in which torch sees no tensor; let blocks return tensors, or tuples or dicts "
            "of them, or make the class known to torch: torch.export.register_dataclass does that for dataclasses"
        )


def packed(output: Any) -> tuple[Any, list[str]]:
    """Return an output with copies of its tensors on the CPU, and where these were."""
    leaves, structure = tree_flatten(output)
    devices = [str(leaf.device) if isinstance(leaf, Tensor) else "" for leaf in leaves]
    with torch.inference_mode(False):  # what is made under it could not be used outside of it
        copies = [
            leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf) for leaf in leaves
        ]
    return tree_unflatten(copies, structure), devices


def unpacked(stored: tuple[Any, list[str]]) -> Any:
    """Return the output again, where it was."""
    output, devices = stored
    remaining = iter([device for device in devices if device])
    return tree_map_only(Tensor, lambda tensor: tensor.to(next(remaining)), output)
