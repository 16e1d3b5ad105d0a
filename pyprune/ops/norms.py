"""L2 norms of a list of tensors, the same bits everywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.ops._library import WEIGHT_DTYPES, check_tensors, register_fake


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, accumulated in float64, as a float64 tensor of shape [len(tensors)].

    The order of the additions depends on the number of elements alone (``pyprune.ops.reference.norms`` spells it
    out), so the result is the same bits for any thread count, CPU capability and device. Neither large nor small
    values overflow or underflow on the way.

    Raises:
        TypeError, ValueError: for dtypes other than float32, float64, float16, bfloat16, or mixed devices.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.zeros(2)]).tolist()
        [5.0, 0.0]
    """
    check_tensors(tensors, "tensors", WEIGHT_DTYPES)
    if not tensors:
        return torch.empty(0, dtype=torch.float64)
    result: Tensor = torch.ops.pyprune.norms(list(tensors))
    return result


def inverse_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return 1 / norm of each tensor, finite and positive also where all elements are zero: scales for `threshold`.

    Where the norm is NaN it is 1: then masks mean nothing, and `threshold` counts what is not finite.

    Example:
        >>> inverse_norms([torch.tensor([3.0, 4.0])]).tolist()
        [0.2]
    """
    limits = torch.finfo(torch.float64)
    return norms(tensors).nan_to_num(nan=1.0).clamp(min=limits.tiny, max=limits.max).reciprocal()


def _fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


register_fake("pyprune::norms", _fake)
