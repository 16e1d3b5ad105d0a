"""Write zeros where masks say so, in place, for a list of weights in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.ops._library import WEIGHT_DTYPES, check_masks, check_tensors


@torch.no_grad()
def fold(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set ``weights[i][~masks[i]] = 0`` in place. Kept elements are not touched, whatever they hold.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device, any strides without overlap.
        masks: one bool tensor per weight, of its shape.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, or shapes that disagree.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> fold([weight], [torch.tensor([True, False])])
        >>> weight.tolist()
        [1.0, 0.0]
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    check_masks(masks, weights)
    if weights:
        torch.ops.pyprune.fold(list(weights), list(masks))
        # Let autograd notice weights that a graph still needs.
        torch.autograd.graph.increment_version(list(weights))


def _fake(weights: list[Tensor], masks: list[Tensor]) -> None:
    return None


torch.library.register_fake("pyprune::fold", _fake)
