"""Write zeros where masks say so, in place, for a list of weights in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.ops._blocks import check_blocks
from pyprune.ops._library import WEIGHT_DTYPES, check_masks, check_tensors, check_unit_masks, register_fake
from pyprune.ops._memory import check_memory


@torch.no_grad()
def fold(weights: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Sequence[int]] | None = None) -> None:
    """Set ``weights[i][~masks[i]] = 0`` in place. Kept elements are not touched, whatever they hold.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device, any strides without overlap.
        masks: one bool tensor per weight, of its shape; with blocks, of shape ``ceil(size / block)``.
        blocks: for each weight, the sizes of the units that share an element of its mask, one per dimension (see
            `unit_scores`). No element mask is made.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, shapes that disagree, or weights that share memory.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> fold([weight], [torch.tensor([True, False])])
        >>> weight.tolist()
        [1.0, 0.0]
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    if blocks is None:
        check_masks(masks, weights)
    else:
        checked = check_blocks(blocks, weights, "weights")
        check_unit_masks(masks, "masks", checked, weights)
    check_memory({"weights": weights}, {"masks": masks})
    if weights:
        if blocks is None:
            torch.ops.pyprune.fold(list(weights), list(masks))
        else:
            torch.ops.pyprune.fold_units(list(weights), list(masks), [size for block in checked for size in block])
        # Let autograd notice weights that a graph still needs.
        torch.autograd.graph.increment_version(list(weights))


def _fake(weights: list[Tensor], masks: list[Tensor]) -> None:
    return None


def _fake_units(weights: list[Tensor], unit_masks: list[Tensor], blocks: list[int]) -> None:
    return None


register_fake("pyprune::fold", _fake)
register_fake("pyprune::fold_units", _fake_units)
