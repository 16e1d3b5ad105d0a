"""What blocks gave for each batch, kept for the passes of the next block: in memory, or in files of a folder."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


class Stored(Protocol):
    """Outputs by what they are of and by batch; `put` replaces what `get` returns only after `turn`."""

    def put(self, key: str, batch: int, output: Any) -> None:
        """Take what a block gave for a batch."""

    def get(self, key: str, batch: int) -> Any:
        """Return what was put before the last `turn`; it is not to be written to."""

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

    def turn(self) -> None:
        """Let what was put take the place of what was there."""
        self._there.update(self._new)
        self._new.clear()


def packed(output: Any) -> tuple[Any, list[str]]:
    """Return an output with copies of its tensors on the CPU, and where these were."""
    leaves, structure = tree_flatten(output)
    devices = [str(leaf.device) if isinstance(leaf, Tensor) else "" for leaf in leaves]
    with torch.inference_mode(False):  # what is made under it could not be used outside of it
        copies = [leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(copies, structure), devices


def unpacked(stored: tuple[Any, list[str]]) -> Any:
    """Return the output again, where it was."""
    output, devices = stored
    remaining = iter([device for device in devices if device])
    return tree_map_only(Tensor, lambda tensor: tensor.to(next(remaining)), output)
