"""Zeros where a cut says that weights go, tensor after tensor."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from pyprune.checks import shown
from pyprune.ops._keys import Keys, magnitude_bits
from pyprune.ops._library import WEIGHT_DTYPES, check_scales, check_tensors
from pyprune.ops._memory import check_memory
from pyprune.ops.count_zeros import count_zeros
from pyprune.ops.cut import Cut
from pyprune.ops.fold import fold

_PIECE = 1 << 18  # elements, of which all that is needed on the way stays in cache


@torch.no_grad()
def drop(weights: Sequence[Tensor], cut: Cut, *, scales: Tensor | None = None) -> Cut:
    """Zero in place what goes by a `cut`; return the cut for those that follow, whose ties are those that are left.

    The weights of a cut come in their order, all at once or one after the other: then what goes is what `threshold`
    drops. Zeros are +0.0.

    Args:
        weights: of the cut, or the next of them; or parts of them, in the order of the flat index.
        cut: where the threshold lies.
        scales: those of these weights.

    Raises:
        TypeError, ValueError: for other tensors than `cut` takes, or such that share memory.

    Example:
        >>> from pyprune import ops
        >>> weights = [torch.tensor([3.0, -1.0]), torch.tensor([2.0, 1.0, 0.5])]
        >>> drop(weights, ops.cut(weights, removed=2)).ties
        0
        >>> [weight.tolist() for weight in weights]
        [[3.0, 0.0], [2.0, 1.0, 0.0]]
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    if not isinstance(cut, Cut):
        raise TypeError(f"cut is {shown(cut)}; give what pyprune.ops.cut returned")
    if scales is not None:
        check_scales(scales, weights)
    check_memory({"weights": weights})
    factors = [None] * len(weights) if scales is None else scales.tolist()
    for weight, factor in zip(weights, factors, strict=True):
        pieces = torch.split(weight.detach().view(-1), _PIECE) if weight.is_contiguous() else [weight.detach()]
        for piece in pieces:
            mask, cut = kept_by(cut, piece, factor)
            fold([piece], [mask])
    torch.autograd.graph.increment_version(list(weights))
    return cut


def kept_by(cut: Cut, tensor: Tensor, scale: float | None = None) -> tuple[Tensor, Cut]:
    """Return the mask of a weight, or of scores, by a cut, and the cut for those that follow.

    Example:
        >>> mask, _ = kept_by(Cut(0x3F800000, ties=1), torch.tensor([1.0, 3.0, 1.0]))
        >>> mask.tolist()
        [False, True, True]
    """
    keys = Keys(tensor.dtype, scale, cut.wide)
    bits = magnitude_bits(tensor)
    under, equal = _bounds(keys, cut.key)
    if not cut.ties or under == equal:
        return (bits > under).view(tensor.shape), cut
    stays, may_stay = bits > equal, bits > under
    gone, fewest = count_zeros([stays, may_stay]).tolist()
    if gone - fewest > cut.ties:
        stays |= may_stay
        stays[(may_stay & (bits <= equal)).nonzero()[: cut.ties, 0]] = False
        gone = fewest + cut.ties
    return stays.view(tensor.shape), replace(cut, ties=cut.ties - (gone - fewest))


@lru_cache(maxsize=8)
def _bounds(keys: Keys, key: int) -> tuple[int, int]:
    """Return up to which bits magnitudes go for sure, and up to which they may; a weight comes in many pieces."""
    return (keys.bits_up_to(key - 1), keys.bits_up_to(key)) if key >= 0 else (-1, -1)
