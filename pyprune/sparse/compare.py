"""What differs between two checkpoints, tensor by tensor."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.sparse.checkpoint import Checkpoint

_PIECE = 1 << 20


@dataclass
class Difference:
    """One tensor of two checkpoints.

    Attributes:
        status: "equal" (bit for bit), "changed", "only in the first", "only in the second", "shapes differ".
        zeros_gained, zeros_lost: elements that are zero in the second alone, and in the first alone.
        changed: elements whose value differs, those of zeros among them; NaN is equal to NaN, -0.0 to 0.0.
        largest: the largest difference.
        cosine: of the angle between both, as vectors; None if one is zero.
    """

    name: str
    status: str
    detail: str = ""
    zeros_gained: int = 0
    zeros_lost: int = 0
    changed: int = 0
    largest: float = 0.0
    cosine: float | None = None


def compare(
    first: Checkpoint, second: Checkpoint, seen: Callable[[str], object] = lambda name: None
) -> Iterator[Difference]:
    """Yield how each tensor of two checkpoints differs; packed tensors are those that they stand for.

    Example:
        >>> import tempfile
        >>> import pyprune
        >>> paths = [tempfile.mkdtemp() + "/m.safetensors" for _ in range(2)]
        >>> _ = pyprune.save_sparse({"w": torch.ones(4)}, paths[0])
        >>> _ = pyprune.save_sparse({"w": torch.tensor([1.0, 0.0, 1.0, 1.0])}, paths[1])
        >>> with Checkpoint(paths[0]) as first, Checkpoint(paths[1]) as second:
        ...     [one] = compare(first, second)
        >>> one.status, one.zeros_gained, one.largest
        ('changed', 1, 1.0)
    """
    for name in dict.fromkeys([*first, *second]):
        if name not in second.places:
            yield Difference(name, "only in the first")
        elif name not in first.places:
            yield Difference(name, "only in the second")
        elif first.shape(name) != second.shape(name):
            yield Difference(name, "shapes differ", f"{list(first.shape(name))}, {list(second.shape(name))}")
        else:
            yield _compare(name, first.view(name), second.view(name))
        seen(name)


def _compare(name: str, first: Tensor, second: Tensor) -> Difference:
    one = Difference(name, "changed")
    if first.dtype == second.dtype and torch.equal(_bytes(first), _bytes(second)):
        one.status = "equal"
        return one
    if first.dtype != second.dtype:
        one.detail = f"{first.dtype}, {second.dtype}".replace("torch.", "")
    product = squares = others = 0.0
    for a, b in zip(torch.split(first.reshape(-1), _PIECE), torch.split(second.reshape(-1), _PIECE), strict=True):
        x, y = a.to(torch.float64), b.to(torch.float64)
        one.zeros_gained += int(((y == 0) & (x != 0)).sum())
        one.zeros_lost += int(((x == 0) & (y != 0)).sum())
        differs = (x != y) & ~(x.isnan() & y.isnan())
        one.changed += int(differs.sum())
        if differs.any():
            largest = float((x - y)[differs].abs().max())
            one.largest = max(one.largest, largest) if not math.isnan(largest) else math.inf
        product, squares, others = product + float(x @ y), squares + float(x @ x), others + float(y @ y)
    if squares * others > 0 and math.isfinite(squares * others):
        one.cosine = product / math.sqrt(squares * others)
    return one


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
