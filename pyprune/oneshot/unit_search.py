"""Which coupled units to keep: the search for a budget, and the exchange for units that make up for each other.

From Kwon et al. 2022, in pure numbers: importances are squares of gradients, and each unit of a group costs the same.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pyprune.methods.coupled import Flags, Numbers

_HALVINGS = 40
# Sums of costs are off by rounding; so much of the budget more is none.
_ROUNDING = 1e-9


def best_units(importances: Sequence[Numbers], costs: Sequence[float], budget: float) -> list[Flags]:
    """Keep the units of the greatest sum of importances that a budget allows, of each group at least one.

    Units of equal costs compete with each other, whatever group they are in. If there are two costs (heads and
    neurons), all numbers of the one are tried, with as many of the other as the rest of the budget allows, and the
    best is exact. If there are more, it begins with the units of the greatest importance for their cost, and tries
    pairs of costs so until no pair gives more.

    Args:
        importances: of the units of each group, 0 or more.
        costs: of one unit of each group, 0 or more.
        budget: what the units that are kept may cost; where even one of each group costs more, these are kept.

    Returns:
        Which units of each group are kept. Of equal ones the first go.

    Example:
        >>> heads, neurons = np.array([9.0, 1.0, 2.0]), np.array([3.0, 4.0, 5.0, 1.0])
        >>> [kept.tolist() for kept in best_units([heads, neurons], [3.0, 1.0], 6.0)]
        [[True, False, False], [True, True, True, False]]
    """
    kept = [np.zeros(len(own), bool) for own in importances]
    for own, flags in zip(importances, kept, strict=True):
        flags[_descending(own)[:1]] = True
    budget = budget * (1 + _ROUNDING) - sum(costs)
    classes: dict[float, list[int]] = {}
    for index, cost in enumerate(costs):
        classes.setdefault(float(f"{cost:.12g}"), []).append(index)
    prices = list(classes)
    places, sums = [], []
    for groups in classes.values():
        left = [(index, unit) for index in groups for unit in np.flatnonzero(~kept[index])]
        worth = np.array([importances[index][unit] for index, unit in left])
        order = _descending(worth)
        places.append([left[i] for i in order])
        sums.append(np.concatenate([[0.0], np.cumsum(worth[order])]))
    for some, count in zip(places, _counts(sums, prices, budget), strict=True):
        for index, unit in some[:count]:
            kept[index][unit] = True
    return kept


def _descending(importance: Numbers) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.argsort(importance, kind="stable")[::-1]


def _counts(sums: Sequence[Numbers], prices: Sequence[float], budget: float) -> list[int]:
    """Return how many units of each price are kept; ``sums`` are of the first 0, 1, 2, ... of them."""
    counts = _by_density(sums, prices, budget)
    improved = True
    while improved:
        improved = False
        for a in range(len(prices)):
            for b in range(a):
                rest = budget - sum(
                    count * price
                    for i, (count, price) in enumerate(zip(counts, prices, strict=True))
                    if i not in (a, b)
                )
                pair = _best_pair(sums[a], sums[b], prices[a], prices[b], rest)
                if pair is None:
                    continue
                now = sums[a][counts[a]] + sums[b][counts[b]]
                if sums[a][pair[0]] + sums[b][pair[1]] > now * (1 + 1e-12):
                    counts[a], counts[b] = pair
                    improved = True
    return counts


def _by_density(sums: Sequence[Numbers], prices: Sequence[float], budget: float) -> list[int]:
    steps = [(np.diff(own) / max(price, 1e-300), i) for i, (own, price) in enumerate(zip(sums, prices, strict=True))]
    density = np.concatenate([own for own, _ in steps])
    which = np.concatenate([np.full(len(own), i) for own, i in steps])
    counts = [0] * len(sums)
    for i in which[np.argsort(-density, kind="stable")]:
        if prices[i] <= budget:
            counts[i] += 1
            budget -= prices[i]
    return counts


def _best_pair(a: Numbers, b: Numbers, price: float, other: float, budget: float) -> tuple[int, int] | None:
    """Try all numbers of the units of one price with as many of the other as still fit."""
    numbers = np.arange(len(a))
    rest = budget - numbers * price
    numbers, rest = numbers[rest >= 0], rest[rest >= 0]
    if not len(numbers):
        return None
    others = (
        np.full(len(numbers), len(b) - 1) if other == 0 else np.minimum(rest / other, len(b) - 1).astype(np.int64)
    )
    best = int(np.argmax(a[numbers] + b[others]))
    return int(numbers[best]), int(others[best])


def units_within(
    importances: Sequence[Numbers],
    costs: Sequence[float],
    left: Callable[[Sequence[Flags]], int],
    allowed: float,
) -> list[Flags]:
    """Keep the units of the greatest importance with which no more than so much is left of a model's costs.

    Where weights have units of two groups, as in a chain of convolutions, a unit costs less the fewer there are of
    its neighbours. Then the budget of `best_units` is the largest that does, by halving.

    Args:
        importances, costs: as for `best_units`.
        left: says what the model costs, if only these units of each group are kept.
        allowed: what it may cost.

    Raises:
        ValueError: if that is not reached with one unit of each group.
    """
    everything = [np.ones(len(own), bool) for own in importances]
    whole = left(everything)
    if allowed >= whole:
        return everything
    low = sum(costs)
    high = sum(cost * len(own) for cost, own in zip(costs, importances, strict=True)) - (whole - allowed)
    kept = best_units(importances, costs, max(low, high))
    if left(kept) <= allowed:
        return kept
    kept = best_units(importances, costs, low)
    if (least := left(kept)) > allowed:
        raise ValueError(
            f"target_macs is {allowed / whole:.4g}, but with one unit of each group {least / whole:.4g} of the "
            f"multiply-accumulates are left ({least:,} of {whole:,}); ask for more"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        more = best_units(importances, costs, middle)
        if left(more) <= allowed:
            low, kept = middle, more
        else:
            high = middle
    return kept


def exchanged(gradients: Numbers, kept: Flags) -> Flags:
    """Exchange units of a group for others, so that what those that go do together is less.

    What goes is judged by ``||sum of their gradients||^2``, the Fisher information with the terms of pairs: two units
    that make up for each other can go together, and two that do the same cannot. Of those that are kept, each comes
    to those that go in turn, the least important first, and the one of these goes back without which least is lost.
    So what is lost never becomes more.

    Args:
        gradients: (losses, units).
        kept: which units are kept; as many are then.

    Example:
        >>> gradients = np.array([[1.0, 1.1, -1.2, 9.0]])
        >>> exchanged(gradients, np.array([False, False, True, True])).tolist()
        [True, False, False, True]
    """
    goes = ~kept
    if not goes.any() or not kept.any():
        same: Flags = kept.copy()
        return same
    fisher = gradients.T @ gradients
    own = fisher.diagonal()
    together = fisher @ goes
    for unit in np.argsort(own, kind="stable"):
        if not kept[unit]:
            continue
        now = together + fisher[unit]
        goes[unit] = True
        # What is lost without each of them is less by this, or by nothing where it has just come.
        saved = np.where(goes, 2 * now - own, -np.inf)
        back = int(np.argmax(saved))
        if saved[back] <= saved[unit]:
            goes[unit] = False
            continue
        goes[back] = False
        together = now - fisher[back]
    stays: Flags = ~goes
    return stays
