"""One ratio becomes one for each weight: blocks lose what an allocation says, and all together exactly the ratio."""

import math
from collections.abc import Callable, Mapping, Sequence

from pyprune.methods.allocation import limits


def share_out(
    sizes: Sequence[Mapping[str, int]],
    shares: Sequence[float],
    ratio: float,
    *,
    max_ratio: float = 1.0,
    scales: bool = False,
) -> dict[str, float]:
    """Return a ratio for each weight, such that floor(ratio * n + 0.5) of all n elements go, if each goes by itself.

    Shares are shifted alike, or scaled, until their mean over the elements is the ratio; what would be below 0 or
    above ``max_ratio`` stays there, and the others make up for it. The counts that come of it are rounded down, and
    those with the largest remainders get one more (of equal ones the first).

    Args:
        sizes: of each block, how many elements each weight has, by its name.
        shares: of each block, what it would lose.
        ratio: what all lose.
        max_ratio: what a weight loses at most. One element always stays.
        scales: whether shares, which then are positive, are scaled.

    Raises:
        ValueError: if the ratio is above ``max_ratio``.

    Example:
        >>> share_out([{"a": 10}, {"b": 8, "c": 2}], [0.2, 0.6], 0.5)
        {'a': 0.3, 'b': 0.75, 'c': 0.5}
        >>> share_out([{"a": 10}, {"b": 10}], [0.5, 1.5], 0.6, scales=True)
        {'a': 0.3, 'b': 0.9}
    """
    if ratio > max_ratio:
        raise ValueError(f"ratio is {ratio:g}, and at most {max_ratio:g} of a weight can go; ask for less")
    totals = [sum(block.values()) for block in sizes]
    of_blocks = _within(shares, totals, ratio, max_ratio, scales)
    exact = {name: one * n for one, block in zip(of_blocks, sizes, strict=True) for name, n in block.items()}
    elements = {name: n for block in sizes for name, n in block.items()}
    most = {name: max(0, min(limits(n, 0, max_ratio)[1], n - 1)) for name, n in elements.items()}
    counts = {name: min(math.floor(one), most[name]) for name, one in exact.items()}
    missing = min(math.floor(ratio * sum(totals) + 0.5), sum(most.values())) - sum(counts.values())
    in_turn = sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name])
    while missing > 0:
        for name in [name for name in in_turn if counts[name] < most[name]][:missing]:
            counts[name] += 1
            missing -= 1
    return {name: counts[name] / n if n else 0.0 for name, n in elements.items()}


def _within(shares: Sequence[float], totals: Sequence[int], ratio: float, most: float, scales: bool) -> list[float]:
    """Return shares whose mean over the elements is the ratio, each in [0, most]."""
    if not sum(totals):
        return [0.0] * len(shares)

    def moved(by: float) -> list[float]:
        return [min(max(one * by if scales else one + by, 0.0), most) for one in shares]

    low, high = (0.0, most / min(shares)) if scales else (-max(shares), most - min(shares))

    def excess(by: float) -> float:
        return math.fsum(one * n for one, n in zip(moved(by), totals, strict=True)) - ratio * sum(totals)

    return moved(_root(excess, low, high))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function that never falls is 0: halving an interval until floats are exhausted."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high
