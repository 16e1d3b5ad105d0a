"""How many of the units go: what a ratio means, and how it is shared out among weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pyprune.checks import check_number

Allocation = Literal["uniform", "erk", "er"]


@dataclass(frozen=True)
class Amount:
    """How much is asked for: what `prune` got.

    Args:
        ratio: fraction of the units to remove; or such a fraction by names or patterns of weights, or by groups;
            None for N:M in all groups.
        allocation: how one ratio becomes one for each weight.
        min_ratio, max_ratio: what at least and at most goes of each weight.
        from_remaining: whether the ratio is one of the units that are still kept, and others stay dropped.
        dropped_stay: whether units that are dropped stay so, though the ratio is one of all units.
        left_out: names that rules may mean though nothing is pruned there: of weights that are zero everywhere.
    """

    ratio: float | Mapping[str, float] | None = None
    allocation: Allocation = "uniform"
    min_ratio: float | Mapping[str, float] = 0.0
    max_ratio: float | Mapping[str, float] = 1.0
    from_remaining: bool = False
    dropped_stay: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def has_bases(self) -> bool:
        """Whether masks are pruned further, not chosen anew."""
        return self.from_remaining or self.dropped_stay

    @property
    def is_capped(self) -> bool:
        """Whether there are limits for single weights."""
        return self.min_ratio != 0 or self.max_ratio != 1


def check_ratio(ratio: object, name: str = "ratio") -> float:
    """Return ``ratio``, the fraction to remove, as a float in [0, 1).

    Raises:
        TypeError: if it is not a real number (a bool is not one).
        ValueError: if it is NaN, negative, or 1 and beyond.

    Example:
        >>> check_ratio(0)
        0.0
    """
    what = "the fraction of the weights to remove"
    return check_number(
        name,
        ratio,
        what=f"{what}, a number in [0, 1)",
        least=0,
        most=math.nextafter(1.0, 0.0),
        advice=f"it is {what}, and must be in [0, 1)",
    )


def removed_count(n: int, ratio: float) -> int:
    """Return how many of n competing units go: min(floor(ratio * n + 0.5), n - 1), and 0 of none.

    Example:
        >>> [removed_count(n, 0.5) for n in (0, 1, 2, 3, 10)]
        [0, 0, 1, 2, 5]
    """
    return max(0, min(math.floor(ratio * n + 0.5), n - 1))


def removed_in_all(n: int, gone: int, amount: Amount, ratio: float) -> int:
    """Return how many of n competing units are dropped in the end, if ``gone`` are already.

    Example:
        >>> removed_in_all(10, 4, Amount(from_remaining=True), 0.5), removed_in_all(10, 4, Amount(), 0.5)
        (7, 5)
    """
    if amount.from_remaining:
        return gone + removed_count(n - gone, ratio)
    return max(gone, removed_count(n, ratio))


def erk(shapes: Sequence[Sequence[int]], ratio: float) -> list[float]:
    """Return a ratio for each weight, such that thin layers keep more: the Erdos-Renyi-Kernel allocation.

    The density of a weight is in proportion to (sum of its sizes) / (product of its sizes), at most 1, and all
    together keep 1 - ratio of the elements.

    Papers: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity";
    Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners".

    Example:
        >>> [round(ratio, 3) for ratio in erk([(10, 10), (100, 100)], 0.5)]
        [0.0, 0.505]
    """
    sizes = [math.prod(shape) for shape in shapes]
    densities = [sum(shape) / size if size else 0.0 for shape, size in zip(shapes, sizes, strict=True)]
    return _in_proportion(sizes, densities, ratio)


def er(shapes: Sequence[Sequence[int]], channels: Sequence[tuple[int, int]], ratio: float) -> list[float]:
    """Return a ratio for each weight by the Erdos-Renyi allocation, which is `erk` blind to the size of kernels.

    The density of a weight is in proportion to (outputs + inputs) / (outputs * inputs).

    Args:
        shapes: of the weights.
        channels: the numbers of output and input channels of each.
        ratio: of all together.

    Paper: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity".

    Example:
        >>> [round(ratio, 3) for ratio in er([(8, 8, 3, 3), (32, 8)], [(8, 8), (32, 8)], 0.5)]
        [0.435, 0.647]
    """
    sizes = [math.prod(shape) for shape in shapes]
    densities = [(out + of) / (out * of) if out * of else 0.0 for out, of in channels]
    return _in_proportion(sizes, densities, ratio)


def _in_proportion(sizes: Sequence[int], densities: Sequence[float], ratio: float) -> list[float]:
    """Return ratios that leave densities in proportion to these, at most 1, and 1 - ratio of all."""
    dense: set[int] = set()
    while True:
        kept = (1 - ratio) * sum(sizes) - sum(sizes[i] for i in dense)
        rest = sum(densities[i] * sizes[i] for i in range(len(sizes)) if i not in dense)
        epsilon = kept / rest if rest else 0.0
        full = {i for i in range(len(sizes)) if i not in dense and epsilon * densities[i] > 1}
        if not full:
            break
        dense |= full
    return [0.0 if i in dense or not sizes[i] else max(0.0, 1 - epsilon * densities[i]) for i in range(len(sizes))]


def limits(n: int, min_ratio: float, max_ratio: float) -> tuple[int, int]:
    """Return the smallest and the largest number of n units that these ratios allow to go.

    Example:
        >>> limits(10, 0.25, 0.75)
        (3, 7)
    """
    # Products like 0.07 * 100 are off by a rounding error, which must not count as a unit.
    return math.ceil(round(min_ratio * n, 6)), math.floor(round(max_ratio * n, 6))
