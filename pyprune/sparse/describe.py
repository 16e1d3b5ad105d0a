"""What is in a checkpoint: zeros, patterns that hold, and how small it could be."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyprune import ops
from pyprune.sparse.checkpoint import Checkpoint

_PIECE = 1 << 20
_N_OF_M = ((1, 2), (1, 4), (2, 4), (4, 8))
_EXPONENT_BITS = {torch.float64: 11, torch.float32: 8, torch.bfloat16: 8, torch.float16: 5}


@dataclass
class TensorStats:
    """One tensor of a checkpoint; bytes of other forms are None where they are not for such tensors.

    Attributes:
        zeros: elements that are 0.0 or -0.0; ``negative_zeros`` are the latter.
        nonfinite: NaN and infinite ones.
        n_of_m: patterns along the last dimension that all groups keep, as "2:4".
        zero_rows, zero_columns: of the weight as a matrix, first dimension by all others.
        stored_bytes: in the file now.
        bitmask_bytes: with a bit for each element and the values that are not zero.
        bound_bytes: what coders without context can reach: entropy of mask and exponents, mantissas as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int
    zeros: int = 0
    negative_zeros: int = 0
    nonfinite: int = 0
    n_of_m: list[str] = field(default_factory=list)
    zero_rows: int = 0
    zero_columns: int = 0
    dense_bytes: int = 0
    bitmask_bytes: int | None = None
    bound_bytes: float | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def describe(checkpoint: Checkpoint, seen: Callable[[str], object] = lambda name: None) -> Iterator[TensorStats]:
    """Yield what there is to say of each tensor of a checkpoint, in its order; one is read at a time.

    Example:
        >>> import tempfile
        >>> import pyprune
        >>> path = tempfile.mkdtemp() + "/m.safetensors"
        >>> _ = pyprune.save_sparse({"w": torch.tensor([[0.0, 1.0, -0.0, 2.0]])}, path, min_zeros=1)
        >>> with Checkpoint(path) as checkpoint:
        ...     [one] = describe(checkpoint)
        >>> one.zeros, one.negative_zeros, one.n_of_m
        (2, 1, ['1:2', '2:4'])
    """
    for name, place in checkpoint.places.items():
        file = checkpoint.files[place.file]
        if name in file.tied:
            continue
        entries = file.header.entries
        stored = sum(entries[one].end - entries[one].begin for one in file.entries(name))
        found = TensorStats(name, str(checkpoint.dtype(name)).removeprefix("torch."), checkpoint.shape(name), stored)
        found.dense_bytes = found.size * checkpoint.dtype(name).itemsize
        tensor = checkpoint.view(name)
        if tensor.dtype in ops.WEIGHT_DTYPES:
            _describe(found, tensor)
        elif tensor.numel():
            found.zeros = int((tensor.view(-1) == 0).sum()) if tensor.dtype.itemsize > 1 else _zero_bytes(tensor)
        seen(name)
        yield found


def _describe(found: TensorStats, tensor: Tensor) -> None:
    exponents = np.zeros(1 << 12, np.int64)
    exponent_bits = _EXPONENT_BITS[tensor.dtype]
    bits = 8 * tensor.dtype.itemsize
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    for piece in torch.split(tensor.reshape(-1), _PIECE):
        words = piece.view(integers)
        magnitudes = words & torch.iinfo(integers).max
        zero = magnitudes == 0
        found.zeros += int(ops.count_zeros([piece]))
        found.negative_zeros += int((zero & (words != 0)).sum())
        exponent = (magnitudes >> (bits - 1 - exponent_bits))[~zero]
        counts = np.bincount(exponent.numpy(), minlength=len(exponents))
        found.nonfinite += int(counts[(1 << exponent_bits) - 1])
        exponents += counts
    kept = found.size - found.zeros
    found.bitmask_bytes = -(-found.size // 8) + kept * bits // 8
    mask = found.size * _entropy(np.array([kept, found.zeros]))
    found.bound_bytes = (mask + kept * (_entropy(exponents) + bits - exponent_bits)) / 8
    if tensor.dim() > 1 and found.zeros:
        _find_patterns(found, tensor)


def _find_patterns(found: TensorStats, tensor: Tensor) -> None:
    matrix = tensor.reshape(tensor.shape[0], -1)
    columns = matrix.shape[1]
    last = tensor.shape[-1]
    holds = [(n, m) for n, m in _N_OF_M if last % m == 0 and found.zeros >= (1 - n / m) * found.size]
    alive = torch.zeros(columns, dtype=torch.bool)
    for part in torch.split(matrix, max(1, _PIECE // max(1, columns))):
        kept = part != 0
        alive |= kept.any(0)
        found.zero_rows += int((~kept.any(1)).sum())
        holds = [(n, m) for n, m in holds if int(kept.view(-1, m).sum(1, dtype=torch.uint8).max()) <= n]
    found.zero_columns = int((~alive).sum())
    found.n_of_m = [f"{n}:{m}" for n, m in holds]


def _entropy(counts: "np.typing.NDArray[np.int64]") -> float:
    """Return the bits that each of so many things of each kind takes."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _zero_bytes(tensor: Tensor) -> int:
    data = tensor.reshape(-1).view(torch.uint8)
    if tensor.dtype.is_floating_point and "fnuz" not in str(tensor.dtype) and "e8m0" not in str(tensor.dtype):
        data = data & 0x7F
    return int((data == 0).sum())
