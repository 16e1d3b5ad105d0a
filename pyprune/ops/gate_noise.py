"""The noise of the gates, for tests and for references: the kernels draw it themselves and never store it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyprune.checks import LARGEST_INT, check_count, shown
from pyprune.ops._library import check_int64, register_fake
from pyprune.ops.gate import check_seed


def gate_noise(shape: Sequence[int], seed: Tensor, *, stream: int = 0) -> Tensor:
    """Return the uniform numbers in (0, 1) that gates of this shape draw, float32 on the seed's device.

    Number i, in the order of the flat index, is (k + 0.5) / 2**23, where k is the upper 23 bits of word i % 4 of
    Philox4x32-10 with the seed as key and (i // 4, stream), 64 bits each, as counter: the same bits on every
    device.

    Paper: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".

    Raises:
        TypeError: if ``seed`` is not an int64 tensor of one element, or for what are no integers.
        ValueError: for sizes that are negative or too large, and for a stream of more than 64 bits.

    Example:
        >>> gate_noise((2, 3), torch.tensor(0)).shape
        torch.Size([2, 3])
    """
    check_seed(seed)
    stream = check_int64("stream", stream)
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape is {shown(shape)}; give a sequence of integers")
    for size in shape:
        if not isinstance(size, torch.SymInt):
            check_count("shape", size, what="sizes that are integers and not negative")
    if math.prod(shape) > LARGEST_INT // 4:
        raise ValueError(f"shape is {shown(tuple(shape))}; no memory holds that many numbers")
    result: Tensor = torch.ops.pyprune.gate_noise(seed, list(shape), stream)
    return result


def _fake(seed: Tensor, size: list[Any], stream: int) -> Tensor:
    return seed.new_empty(size, dtype=torch.float32)


register_fake("pyprune::gate_noise", _fake)
