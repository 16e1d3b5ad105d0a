"""LAMP: magnitudes that compare between weights, because each is divided by what would be left of its weight."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune import ops

_SMALL = 8192  # elements that are sorted at once
# Of the range that is looked at: four standard deviations of a median's rank in a sample, on either side.
_WIDTH = 2.0


@torch.no_grad()
def lamp_scores(weight: Tensor) -> Tensor:
    """Return the LAMP score of each element, float32 in [0, 1].

    score(w) = w^2 / sum of w'^2 over w and all elements that come after it in a stable ascending sort by magnitude.
    So the largest has a score of 1, and the order within a weight is that of |w|. Zeros have a score of 0.

    Paper: Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning".

    Example:
        >>> lamp_scores(torch.tensor([3.0, -1.0, 0.0, 2.0])).mul(70).round().tolist()
        [70.0, 5.0, 0.0, 22.0]
    """
    ordered, order = weight.abs().flatten().sort(stable=True)
    scores = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
    scores[order] = _ordered_scores(ordered)
    return scores.view(weight.shape)


def _ordered_scores(magnitudes: Tensor, above: float = 0.0) -> Tensor:
    """Return the scores of ascending magnitudes, of a weight whose larger ones have the norm ``above``."""
    if magnitudes.numel() == 0:
        return magnitudes.float()
    # Divided by the largest number, squares stay in range.
    unit = max(above, magnitudes[-1].item()) or 1.0
    squares = (magnitudes.double() / unit).square()
    sums = squares.flip(0).cumsum(0).flip(0) + (above / unit) ** 2
    return (squares / sums).nan_to_num(0.0).float()


@torch.no_grad()
def lamp_removed(weights: Sequence[Tensor], removed: int) -> list[int]:
    """Return how many elements of each weight go if all of them compete by LAMP score and ``removed`` go.

    Within a weight LAMP orders like the magnitude: ``ops.threshold(weights, lamp_removed(weights, removed))`` gives
    the masks. Ties go in the order of the list. Only magnitudes near the cut are sorted; a sample tells where it is.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device.
        removed: how many elements go in all.

    Raises:
        TypeError, ValueError: as `pyprune.ops.threshold` does, and if an element is not finite.

    Example:
        >>> lamp_removed([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 1.0, 1.0])], 3)
        [1, 2]
    """
    sizes = [weight.numel() for weight in weights]
    if not 0 <= removed <= sum(sizes):
        raise ValueError(f"cannot remove {removed} of {sum(sizes)} elements; allowed are 0 to {sum(sizes)}")
    norms = ops.norms(weights).tolist()
    for index, norm in enumerate(norms):
        if not math.isfinite(norm):
            raise ValueError(
                f"weights[{index}] has NaN or infinite elements, so LAMP cannot rank it; repair or leave out"
            )
    samples = [_sample(weight) for weight in weights]
    stands_for = [size / max(len(sample), 1) for size, sample in zip(sizes, samples, strict=True)]
    scores = [_estimated_scores(*one) for one in zip(samples, norms, stands_for, strict=True)]
    guess = _first(scores, stands_for, removed)
    width = _WIDTH
    while True:
        # The elements whose rank in their weight is in [low, high) are looked at.
        low, high = [], []
        for count, size, sample in zip(guess, sizes, samples, strict=True):
            half = math.ceil(width * size / math.sqrt(len(sample))) if len(sample) < size else size
            low.append(max(round(count) - half, 0))
            high.append(min(round(count) + half, size))
        left = removed - sum(low)
        inside = _scores_between(weights, low, high)
        if 0 <= left <= sum(len(score) for score in inside):
            going = _first(inside, [1.0] * len(weights), left)
            found = [begin + int(count) for begin, count in zip(low, going, strict=True)]
            # With a score on either side of the cut, nothing outside of the range can be on the wrong side.
            if all((begin < count or begin == 0) and (count < end or end == size)
                   for begin, count, end, size in zip(low, found, high, sizes, strict=True)):  # fmt: skip
                return found
        width *= 4


def _sample(weight: Tensor) -> Tensor:
    """Return magnitudes from places that must not follow a pattern which the weight has too, ascending."""
    flat = weight.detach().reshape(-1)
    if len(flat) > _SMALL:
        size = max(_SMALL, int(len(flat) ** (2 / 3)))
        places = torch.randint(len(flat), (size,), generator=torch.Generator().manual_seed(size))
        flat = flat[places.to(flat.device)]
    return _ascending(flat)


def _estimated_scores(sample: Tensor, norm: float, stands_for: float) -> Tensor:
    """Return the scores of the magnitudes in a sample of a weight with this norm.

    What lies above is the rest of the norm, because a sample tells little of the few largest magnitudes.
    """
    squares = (sample.double() / (norm or 1.0)).square()
    below = (squares.cumsum(0) - squares) * stands_for
    return (squares / (1 - below).clamp(min=squares)).nan_to_num(0.0).float()


def _ascending(values: Tensor) -> Tensor:
    """Return the magnitudes in order, on the CPU. Integers sort faster, by their digits."""
    magnitudes = values.abs().cpu()
    if magnitudes.dtype == torch.float64:
        return magnitudes.sort().values
    return magnitudes.float().view(torch.int32).sort(stable=True).values.view(torch.float32)


def _scores_between(weights: Sequence[Tensor], low: list[int], high: list[int]) -> list[Tensor]:
    """Return the scores of the elements with the ranks [low, high) of each weight, ascending."""
    from_low, _ = ops.threshold(weights, low)
    from_high, _ = ops.threshold(weights, high)
    scores = []
    for weight, lower, upper in zip(weights, from_low, from_high, strict=True):
        above = ops.norms([weight.masked_fill(~upper, 0)]).item()
        scores.append(_ordered_scores(_ascending(weight[lower ^ upper]), above))
    return scores


def _first(scores: Sequence[Tensor], stand_for: Sequence[float], count: int) -> list[float]:
    """Return how many of each list are among the ``count`` smallest of all, where each score stands for some."""
    if not scores:
        return []
    lengths = torch.tensor([len(score) for score in scores])
    # Scores are not negative, so their bits order like them.
    order = torch.cat(list(scores)).view(torch.int32).sort(stable=True).indices
    owners = torch.arange(len(scores)).repeat_interleave(lengths)[order]
    factors = torch.tensor(stand_for, dtype=torch.float64)
    going = factors[owners].cumsum(0) <= count
    return (torch.bincount(owners[going], minlength=len(scores)) * factors).tolist()
