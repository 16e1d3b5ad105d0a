"""Masks that keep the largest elements of each group of neighbours: N:M, and a number of elements per row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.checks import shown
from pyprune.ops._library import (
    WEIGHT_DTYPES,
    check_bases,
    check_int64,
    check_masks,
    check_one_each,
    check_tensor,
    check_tensors,
    register_fake,
)
from pyprune.ops._memory import check_memory


@torch.no_grad()
def group_masks(
    weights: Sequence[Tensor],
    sizes: int | Sequence[int],
    kept: int | Sequence[int],
    *,
    row_dims: int | Sequence[int] = 1,
    factors: Sequence[Tensor | None] | None = None,
    bases: Sequence[Tensor | None] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Keep exactly the ``kept`` largest scores |w|, or |w| * factor, of each group of ``sizes`` neighbours in a row.

    The first ``row_dims`` dimensions of a weight say which row an element is in, the others, flattened in C order,
    which column. Each row is cut into groups of so many consecutive columns; the last one may be shorter, and keeps
    up to ``kept`` all the same, as if the row went on with zeros. 2:4 along the inputs of a linear layer is
    ``sizes=4, kept=2``; along the input channels of a convolution it is the same of ``weight.movedim(1, -1)`` with
    ``row_dims=3``. With as many columns as a row has, ``kept`` of each row stay.

    Of equal scores the lowest column goes first, as in a stable ascending sort: the highest is kept last. So the
    count is exact, and the masks are the same bits on every device and for any number of threads.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device, any strides.
        sizes: columns in a group, at least 1; of all weights, or one for each.
        kept: how many of each group stay, from 0 to the size of a group; of all weights, or one for each.
        row_dims: how many dimensions say which row, fewer than the weight has (0: all of it is one row); of all
            weights, or one for each.
        factors: for each weight a tensor of one factor per column, finite and not negative (others count as 0, and
            nothing is said), or None. float64 for float64 weights; float32 for others, whose score is
            float32(|w|) * factor rounded to float32.
        bases: for each weight a bool tensor of its shape, or None. Elements where it is False go before all others,
            and never stay, even if fewer than ``kept`` do.
        masks: bool tensors to write, shaped like the weights, each with memory of its own; new ones (with the
            weights' layout) if None.

    Returns:
        The masks (True = kept), and an int64 tensor of shape [len(weights)] that counts the NaN and infinite elements
        of each weight. Where one is not zero the masks mean nothing. Reading it is the caller's only
        synchronisation with the device.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, shapes that disagree, masks that share memory with
            each other or with what is read, or impossible numbers.

    Example:
        >>> masks, bad = group_masks([torch.tensor([[3.0, -1.0, 2.0, 0.5, 1.0, 1.0]])], sizes=4, kept=2)
        >>> masks[0].int().tolist()
        [[1, 0, 1, 0, 1, 1]]
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    sizes, kept, row_dims = (
        _one_per_weight(numbers, name, len(weights))
        for numbers, name in ((sizes, "sizes"), (kept, "kept"), (row_dims, "row_dims"))
    )
    for index, (weight, size, keep, dims) in enumerate(zip(weights, sizes, kept, row_dims, strict=True)):
        if size < 1:
            raise ValueError(f"sizes is {shown(size)} for weights[{index}]; a group has at least 1 column")
        if not 0 <= keep <= size:
            raise ValueError(f"kept is {keep} of groups of {size} for weights[{index}]; allowed are 0 to {size}")
        if not 0 <= dims < weight.dim():
            raise ValueError(
                f"row_dims is {dims} for weights[{index}] of shape {tuple(weight.shape)}; it must be at least 0 and "
                "less than the number of dimensions, because the other dimensions are the columns"
            )
    factors = _factors(factors, weights, row_dims)
    bases = _one_or_none_per_weight(bases, "bases", weights)
    check_bases(bases, weights)
    if masks is None:
        masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    else:
        check_masks(masks, weights)
        check_memory({"masks": masks}, {"weights": weights, "factors": factors, "bases": bases})
    if not weights:
        return [], torch.empty(0, dtype=torch.int64)
    nonfinite = torch.ops.pyprune.group_masks(list(weights), sizes, kept, row_dims, factors, bases, list(masks))
    # Let autograd notice masks that a graph still needs.
    torch.autograd.graph.increment_version(list(masks))
    return list(masks), nonfinite


def _one_per_weight(numbers: int | Sequence[int], name: str, count: int) -> list[int]:
    if isinstance(numbers, (str, bytes)):
        raise TypeError(f"{name} is {shown(numbers)}; give an int, or one per weight")
    if not isinstance(numbers, Sequence):
        return [check_int64(name, numbers)] * count
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} numbers for {count} weights; give one per weight, or one int")
    return [check_int64(f"{name}[{index}]", number) for index, number in enumerate(numbers)]


def _factors(
    factors: Sequence[Tensor | None] | None, weights: Sequence[Tensor], row_dims: Sequence[int]
) -> list[Tensor | None]:
    found = _one_or_none_per_weight(factors, "factors", weights)
    for index, (factor, weight, dims) in enumerate(zip(found, weights, row_dims, strict=True)):
        if factor is None:
            continue
        columns = weight.shape[dims:].numel()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        check_tensor(factor, "factors", WEIGHT_DTYPES, index=index)
        if factor.shape != (columns,) or factor.dtype != dtype or factor.device != weight.device:
            raise ValueError(
                f"factors[{index}] is {factor.dtype} of shape {tuple(factor.shape)} on {factor.device}; expected "
                f"{dtype} of shape ({columns},), one per column of weights[{index}], on {weight.device}"
            )
    return found


def _one_or_none_per_weight(
    tensors: Sequence[Tensor | None] | None, name: str, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    if tensors is None:
        return [None] * len(weights)
    check_one_each(tensors, name, weights, what="one or None")
    return list(tensors)


def _fake(
    weights: list[Tensor],
    sizes: list[int],
    kept: list[int],
    row_dims: list[int],
    factors: list[Tensor | None],
    bases: list[Tensor | None],
    masks: list[Tensor],
) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=torch.int64)


register_fake("pyprune::group_masks", _fake)
