"""Exact k-smallest masks over a list of weights, without concatenating or sorting them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.checks import LARGEST_INT, check_bool, check_count, shown
from pyprune.ops._library import (
    WEIGHT_DTYPES,
    check_bases,
    check_masks,
    check_scales,
    check_tensors,
    register_fake,
)
from pyprune.ops._memory import check_memory
from pyprune.ops.norms import inverse_norms


@torch.no_grad()
def threshold(
    weights: Sequence[Tensor],
    removed: int | Sequence[int],
    *,
    scales: Tensor | None = None,
    normalize: bool = False,
    masks: Sequence[Tensor] | None = None,
    bases: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Mask out exactly the smallest scores |w|, |w| * scale, or |w| / ||w||_2, of a list of weights.

    With an int, the weights compete with each other and ``removed`` elements of all of them go. With a sequence,
    weight i loses ``removed[i]`` elements of its own. Scores are rounded to float32 and compared (to float64 if one
    of the weights is float64). Ties go lowest (tensor, flat index) first, so the count is exact and the masks are
    the same bits on every device and for any number of threads.

    Scores that were computed elsewhere are passed in place of the weights; they must not be negative.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device, any strides.
        removed: how many elements to drop, in all or of each weight, those that the bases lack included.
        scales: float64 tensor of shape [len(weights)], positive and finite, on the weights' device. On a GPU its
            values are not looked at; what is not positive and finite there counts as 0.
        normalize: divide by the norm of each weight, as ``scales=1 / norms(weights)`` does, but on the CPU without
            reading the weights a second time (unless one is float64). An all-zero weight has scores of zero.
        masks: bool tensors to write, shaped like the weights, each with memory of its own; new ones (with the
            weights' layout) if None.
        bases: masks to prune further, shaped like the weights; None in place of one that keeps everything. Where a
            base is False the element goes before all others, whatever its score, and is never kept: if ``removed`` is
            less than the number of those, just those go. Norms are those of the whole weight all the same.
            A base must not share memory with a mask that is written; on CUDA one whose layout is not that of its
            mask is copied.

    Returns:
        The masks (True = kept), and an int64 tensor of shape [len(weights)] that counts the NaN and infinite elements
        of each weight. Where one is not zero the masks mean nothing. Reading it is the caller's
        only synchronisation with the device.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, shapes that disagree, masks that share memory with
            each other or with what is read, or an impossible count.

    Example:
        >>> masks, bad = threshold([torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])], removed=2)
        >>> [mask.tolist() for mask in masks]
        [[True, False], [True, False]]

        Half of what is left of a weight that was pruned before:

        >>> (mask,), _ = threshold([torch.arange(6.0)], removed=4, bases=[torch.arange(6) % 3 > 0])
        >>> mask.tolist()
        [False, False, False, False, True, True]
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    counts = _counts(removed, [weight.numel() for weight in weights])
    check_bool("normalize", normalize)
    if normalize and scales is not None:
        raise ValueError("give scales, or normalize=True, not both")
    if scales is not None:
        check_scales(scales, weights)
    fresh = masks is None
    if masks is None:
        masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    check_masks(masks, weights)
    if bases is not None:
        check_bases(bases, weights)
    if not fresh:
        check_memory({"masks": masks}, {"weights": weights, "bases": bases, "scales": scales})
    if not weights:
        return [], torch.empty(0, dtype=torch.int64)
    starts = [] if bases is None else _laid_out(bases, masks)
    if normalize and _in_one_read(weights, removed):
        nonfinite = torch.ops.pyprune.normalized_threshold(list(weights), counts[0], list(masks), starts)
    else:
        if normalize:
            scales = inverse_norms(weights)
        nonfinite = torch.ops.pyprune.threshold(list(weights), scales, counts, list(masks), starts)
    # Let autograd notice masks that a graph still needs.
    torch.autograd.graph.increment_version(list(masks))
    return list(masks), nonfinite


def _counts(removed: int | Sequence[int], sizes: list[int]) -> list[int]:
    if isinstance(removed, (str, bytes)):
        raise TypeError(f"removed is {shown(removed)}; give an int, or one per weight")
    each = isinstance(removed, Sequence)
    counts, limits = (removed, sizes) if isinstance(removed, Sequence) else ([removed], [sum(sizes)])
    if len(counts) != len(limits):
        raise ValueError(
            f"removed has {len(counts)} counts for {len(limits)} weights; give one per weight, or one int"
        )
    result = []
    for index, (count, limit) in enumerate(zip(counts, limits, strict=True)):
        name = f"removed[{index}]" if each else "removed"
        if type(count) is not int:
            count = check_count(name, count, least=-LARGEST_INT, what="an integer")
        if not 0 <= count <= limit:
            raise ValueError(f"{name}: cannot remove {shown(count)} of {limit} elements; allowed are 0 to {limit}")
        result.append(count)
    return result


def _laid_out(bases: Sequence[Tensor | None], masks: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the bases, on CUDA in the layout of the masks: there a kernel knows one place for both."""
    result = []
    for base, mask in zip(bases, masks, strict=True):
        if base is not None and base.is_cuda and base.stride() != mask.stride():
            base = torch.empty_strided(mask.shape, mask.stride(), dtype=torch.bool, device=mask.device).copy_(base)
        result.append(base)
    return result


def _in_one_read(weights: Sequence[Tensor], removed: int | Sequence[int]) -> bool:
    together = not isinstance(removed, Sequence)
    return together and all(weight.is_cpu and weight.dtype != torch.float64 for weight in weights)


def _fake(
    weights: list[Tensor],
    scales: Tensor | None,
    removed: list[int],
    masks: list[Tensor],
    bases: list[Tensor | None],
) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=torch.int64)


def _fake_normalized(weights: list[Tensor], removed: int, masks: list[Tensor], bases: list[Tensor | None]) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=torch.int64)


register_fake("pyprune::threshold", _fake)
register_fake("pyprune::normalized_threshold", _fake_normalized)
