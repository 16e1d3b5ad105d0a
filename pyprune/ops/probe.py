"""Look whether weights still have the zeros of their masks, without reading them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.checks import check_count
from pyprune.ops._library import WEIGHT_DTYPES, check_masks, check_tensors, register_fake


@torch.no_grad()
def probe(weights: Sequence[Tensor], masks: Sequence[Tensor], turn: int | None = 0) -> list[bool]:
    """Say of each weight whether its mask drops something that may not be zero, by a look at 128 of its elements.

    Neither answer is a proof: what wrote to a whole weight is seen at once, what wrote to a few elements after many
    turns. Small weights are looked at wholly. -0.0 is not zero here.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device. On a GPU all are True, unless
            all elements are looked at.
        masks: one bool tensor per weight, of its shape, True = kept.
        turn: other elements are looked at for each number; None looks at all, and then the answer is a proof.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, or shapes that disagree.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> probe([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])], [mask, mask])
        [False, True]
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    check_masks(masks, weights)
    if turn is not None:
        check_count("turn", turn)
    if not weights:
        return []
    if not weights[0].is_cpu:
        if turn is not None:
            return [True] * len(weights)
        return [bool(torch.where(mask, 0, weight).any()) for weight, mask in zip(weights, masks, strict=True)]
    found: list[int] = torch.ops.pyprune.probe(list(weights), list(masks), -1 if turn is None else turn).tolist()
    return [count != 0 for count in found]


def _fake(weights: list[Tensor], masks: list[Tensor], turn: int) -> Tensor:
    return torch.empty(len(weights), dtype=torch.int64)


register_fake("pyprune::probe", _fake)
