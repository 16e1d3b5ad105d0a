"""Zeros where a cut says that weights go, tensor after tensor."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyprune.checks import shown
from pyprune.ops._keys import Keys
from pyprune.ops._library import WEIGHT_DTYPES, check_scales, check_tensors
from pyprune.ops._memory import check_memory
from pyprune.ops.cut import Cut

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
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
        >>> weights = [torch.tensor([3.0, -1.0]), torch.tensor([2.0, 1.0, 0.5])]
        >>> drop(weights, pyprune.ops.cut(weights, removed=2)).ties
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
        if weight.is_contiguous():
            for piece in weight.view(-1).split(_PIECE):
                gone, cut = below(piece, cut, factor)
                piece.masked_fill_(gone, 0)
        else:
            gone, cut = below(weight, cut, factor)
            weight.masked_fill_(gone, 0)
    torch.autograd.graph.increment_version(list(weights))
    return cut


def below(tensor: Tensor, cut: Cut, scale: float | None = None) -> tuple[Tensor, Cut]:
    """Return which elements of a weight, or scores, go by a cut, and the cut for those that follow.

    Example:
        >>> gone, _ = below(torch.tensor([1.0, 3.0, 1.0]), Cut(0x3F800000, ties=1))
        >>> gone.tolist()
        [True, False, False]
    """
    keys = Keys(tensor.dtype, scale, cut.wide)
    integers = _INTEGERS[tensor.element_size()]
    flat = tensor.detach().reshape(-1)
    bits = flat.view(integers) & torch.iinfo(integers).max
    equal = keys.bits_up_to(cut.key)
    under = keys.bits_up_to(cut.key - 1)
    gone = bits <= (equal if cut.ties else under)
    if cut.ties and under < equal:
        tied = (bits > under) & gone
        count = int(tied.sum())
        if count > cut.ties:
            gone[tied.nonzero()[cut.ties :, 0]] = False
            count = cut.ties
        cut = replace(cut, ties=cut.ties - count)
    return gone.view(tensor.shape), cut
