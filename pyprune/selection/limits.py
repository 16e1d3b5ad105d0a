"""Global selection in which each weight has a least and a most that it may lose."""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyprune import ops


def capped_threshold(
    weights: Sequence[Tensor],
    removed: int,
    *,
    least: Sequence[int],
    most: Sequence[int],
    normalize: bool = False,
    scales: Tensor | None = None,
    bases: Sequence[Tensor | None] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Mask out exactly ``removed`` elements, of weight i at least ``least[i]`` and at most ``most[i]``.

    All weights compete, as in `pyprune.ops.threshold`. Go through their elements in ascending order of (score,
    tensor, index), and let n_i be how many of weight i lie below a cut. The cut is where
    sum_i clamp(n_i, least_i, most_i) == removed, and weight i loses its clamped number: what a cap takes away or
    forces is shared among the others.

    Takes a global threshold per round, mostly one to three rounds, and a local threshold of the weights at a cap.
    Each round reads its counts, on CUDA one small synchronisation.

    Args:
        weights, normalize, scales, bases, masks: as in `pyprune.ops.threshold`. What a base lacks counts as removed.
        removed: how many elements to drop in all.
        least, most: numbers of elements, one per weight. A most beyond the size of its weight caps nothing.

    Returns:
        The masks (True = kept) and the number of non-finite elements of each weight. Where one is not zero the masks
        mean nothing.

    Raises:
        TypeError, ValueError: as `pyprune.ops.threshold` does, and if the caps cannot be met.

    Example:
        >>> weights = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])]
        >>> masks, _ = capped_threshold(weights, 3, least=[0, 0], most=[2, 2])
        >>> [mask.tolist() for mask in masks]
        [[False, False, True], [False, True]]
    """
    if normalize and scales is not None:
        raise ValueError("give scales, or normalize=True, not both")
    removed = operator.index(removed)
    low, high = _limits(weights, removed, least, most, bases)
    if masks is None:
        masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    if normalize:
        scales = ops.inverse_norms(weights)

    def threshold(chosen: Sequence[bool], count: int | list[int]) -> tuple[Tensor, Tensor]:
        """Write the masks of some weights; the others become empty, so that the order of scores stays as it is."""

        def some(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [one if here else one.new_empty(0) for one, here in zip(tensors, chosen, strict=True)]

        bases_of_some = bases and [base if here else None for base, here in zip(bases, chosen, strict=True)]
        found, nonfinite = ops.threshold(some(weights), count, scales=scales, bases=bases_of_some, masks=some(masks))
        return nonfinite, ops.count_zeros(found)

    nonfinite = torch.zeros(len(weights), dtype=torch.int64, device=weights[0].device if weights else None)

    def count_lost(chosen: Sequence[bool], count: int) -> list[int] | None:
        nonlocal nonfinite
        found, zeros = threshold(chosen, count)
        nonfinite = torch.maximum(nonfinite, found)
        bad, masked = torch.stack([nonfinite, zeros]).tolist()
        return None if any(bad) else masked

    shares = capped_counts(removed, low, high, count_lost)
    if shares is None:
        return list(masks), nonfinite
    lost, at_cap = shares
    if any(at_cap):
        found, _ = threshold(at_cap, [loss if here else 0 for loss, here in zip(lost, at_cap, strict=True)])
        nonfinite = torch.maximum(nonfinite, found)
    return list(masks), nonfinite


def capped_counts(
    removed: int,
    low: Sequence[int],
    high: Sequence[int],
    count_lost: Callable[[Sequence[bool], int], list[int] | None],
) -> tuple[list[int], list[bool]] | None:
    """Return how many elements each weight loses, and which do not lose what the last count said.

    Args:
        removed: how many go in all.
        low, high: how many each loses at least and at most.
        count_lost: takes which weights compete, and how many elements go of these, and returns how many each loses;
            or None to give up.

    Example:
        >>> capped_counts(3, [0, 0], [1, 9], lambda chosen, count: [count * chosen[0], count * (not chosen[0])])
        ([1, 2], [True, False])
    """
    free = [at_least < at_most for at_least, at_most in zip(low, high, strict=True)]
    lost, masked = list(low), [-1] * len(low)
    while any(free):
        left = removed - sum(loss for loss, is_free in zip(lost, free, strict=True) if not is_free)
        counted = count_lost(free, left)
        if counted is None:
            return None
        masked = counted
        competing = [i for i, is_free in enumerate(free) if is_free]
        for i in competing:
            lost[i] = min(max(masked[i], low[i]), high[i])
        excess = sum(lost[i] for i in competing) - left
        if excess == 0:
            break
        # The cut can only rise if too few went, and fall if too many: weights at that cap stay there for good.
        for i in competing:
            free[i] = masked[i] > low[i] if excess > 0 else masked[i] < high[i]
    return lost, [not is_free or loss != now for is_free, loss, now in zip(free, lost, masked, strict=True)]


def _limits(
    weights: Sequence[Tensor],
    removed: int,
    least: Sequence[int],
    most: Sequence[int],
    bases: Sequence[Tensor | None] | None,
) -> tuple[list[int], list[int]]:
    """Return what each weight loses at least and at most, with what its base lacks, or raise if that cannot be."""
    if not len(least) == len(most) == len(weights):
        raise ValueError(
            f"got {len(least)} least and {len(most)} most for {len(weights)} weights; give one per weight"
        )
    low = [operator.index(count) for count in least]
    high = [min(operator.index(count), weight.numel()) for count, weight in zip(most, weights, strict=True)]
    for i, (at_least, at_most) in enumerate(zip(low, high, strict=True)):
        if not 0 <= at_least <= at_most:
            raise ValueError(
                f"least[{i}] is {at_least} and most[{i}] {most[i]}, of {weights[i].numel()} elements; "
                "0 <= least <= most must hold, and least <= the number of elements"
            )
    reason = "least"
    if bases is not None:
        ops.check_bases(bases, weights)
        lacking = ops.count_zeros([weights[0].new_ones(0) if base is None else base for base in bases]).tolist()
        for i, lacks in enumerate(lacking):
            if lacks > high[i]:
                raise ValueError(
                    f"bases[{i}] lacks {lacks} elements, and most[{i}] is {most[i]}; what a base lacks is removed: "
                    f"allow {lacks} or more"
                )
        low = [max(at_least, lacks) for at_least, lacks in zip(low, lacking, strict=True)]
        reason = "least, or what the bases lack,"
    if not sum(low) <= removed <= sum(high):
        raise ValueError(
            f"removed is {removed}, but {reason} comes to {sum(low)} in all, and most (or the size of the weights) "
            f"to {sum(high)}; give a number between these, or other caps"
        )
    return low, high
