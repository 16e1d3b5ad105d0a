"""Count zeros in a list of masks or weights in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.ops._library import WEIGHT_DTYPES, check_tensors, register_fake


@torch.no_grad()
def count_zeros(tensors: Sequence[Tensor]) -> Tensor:
    """Return how many elements of each tensor are zero (-0.0 counts, False counts), int64 of shape [len(tensors)].

    Raises:
        TypeError, ValueError: for dtypes other than bool, float32, float64, float16, bfloat16, or mixed devices.

    Example:
        >>> count_zeros([torch.tensor([True, False]), torch.tensor([0.0, -0.0])]).tolist()
        [1, 2]
    """
    check_tensors(tensors, "tensors", (torch.bool, *WEIGHT_DTYPES))
    if not tensors:
        return torch.empty(0, dtype=torch.int64)
    result: Tensor = torch.ops.pyprune.count_zeros(list(tensors))
    return result


def _fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.int64)


register_fake("pyprune::count_zeros", _fake)
