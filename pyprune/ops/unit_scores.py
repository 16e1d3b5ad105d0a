"""Scores of blocks of weights, for a list of tensors in one call."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pyprune.checks import check_choice, check_number
from pyprune.ops._blocks import check_blocks, units_along
from pyprune.ops._library import WEIGHT_DTYPES, check_tensors, register_fake

Reduction = Literal["sum", "mean", "max"]


@torch.no_grad()
def unit_scores(
    tensors: Sequence[Tensor],
    blocks: Sequence[Sequence[int]],
    *,
    p: float | None = 1.0,
    reduction: Reduction = "sum",
) -> list[Tensor]:
    """Reduce ``|x|**p`` over each unit of each tensor: its blocks of size ``blocks[i]``, which tile it.

    The last unit of a dimension is smaller where the block's size does not divide that of the tensor; a block that
    reaches beyond the tensor covers the dimension. No root is taken, so ``p=2`` gives sums of squares.

    Sums are accumulated in float64, in an order that the shape and the block alone decide
    (``pyprune.ops.reference.unit_scores`` spells it out). So the result is the same bits for any thread count, CPU
    capability, memory layout and device, with one exception: powers other than 1 and 2 are as exact as the platform's
    ``pow``, and their last bits may differ between CPU and GPU. A maximum is raised to the power once. NaN and
    infinity propagate; a NaN is always the same quiet one, and a zero always positive.

    Args:
        tensors: float32, float64, float16 or bfloat16 tensors on one device, any strides; or bool, with ``p=None``.
        blocks: for each tensor, the sizes of its units, one per dimension: ``(1, I, h, w)`` for the output channels
            of a convolution, ``(4, 1)`` for blocks of four neighbours in a column.
        p: the power, positive and finite; or None for x itself, with its sign.
        reduction: "sum", "mean" (over the elements that the unit really has) or "max".

    Returns:
        For each tensor its scores, contiguous, of shape ``ceil(size / block)``: float32, or float64 for float64 and
        for bool, whose sums are counts and exact.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, blocks that do not fit, a bad power or reduction.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
        >>> unit_scores([weight], [(1, 2)], p=1)[0].tolist()
        [[3.0, 3.0], [9.0, 6.0]]
        >>> unit_scores([weight], [(2, 1)], p=None, reduction="mean")[0].tolist()
        [[2.5, 1.5, -1.5]]
    """
    if p is not None:
        what = "a positive finite power, or None for the elements with their sign"
        p = check_number("p", p, what=what, least=0, open_ends=True)
    check_choice("reduction", reduction, get_args(Reduction))
    check_tensors(tensors, "tensors", WEIGHT_DTYPES if p is not None else (torch.bool, *WEIGHT_DTYPES))
    checked = check_blocks(blocks, tensors, "tensors")
    if not tensors:
        return []
    sizes = [size for block in checked for size in block]
    scores: list[Tensor] = torch.ops.pyprune.unit_scores(
        list(tensors), sizes, p, get_args(Reduction).index(reduction)
    )
    return scores


def _fake(tensors: list[Tensor], blocks: list[int], p: float | None, reduction: int) -> list[Tensor]:
    scores = []
    for tensor in tensors:
        block, blocks = blocks[: tensor.dim()], blocks[tensor.dim() :]
        dtype = torch.float64 if tensor.dtype in (torch.float64, torch.bool) else torch.float32
        scores.append(tensor.new_empty(units_along(tensor.shape, block), dtype=dtype))
    return scores


register_fake("pyprune::unit_scores", _fake)
