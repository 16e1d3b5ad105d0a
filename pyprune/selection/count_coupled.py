"""How many coupled units of each group go: from ratios, limits and costs to counts."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from pyprune.methods.allocation import Amount, limits, removed_in_all
from pyprune.methods.coupled import Ints, Numbers, Pool, fewest, lowest, merged, rounded
from pyprune.methods.granularity import Coupled, RatioOf
from pyprune.methods.method import Method
from pyprune.methods.name_rules import by_name
from pyprune.methods.scope import group_of
from pyprune.selection.coupled import CoupledUnits, UnitsOfGroup


def coupled_counts(
    method: Method, amount: Amount, units: CoupledUnits, scores: Sequence[Numbers], gone: Sequence[int]
) -> list[int]:
    """Return how many units of each group go.

    Args:
        method, amount, units: as for `choose_coupled`.
        scores: of the units of each group; -inf for what is gone.
        gone: how many units of each group are.

    Raises:
        ValueError: for rules and limits that do not fit the groups, and a cost that cannot be reached.
    """
    how = method.granularity.coupled
    assert how is not None
    bounds = [
        (max(least, dropped), max(most, dropped))
        for (least, most), dropped in zip(_bounds(amount, how, units.chosen), gone, strict=True)
    ]
    pools = [
        Pool(groups, [scores[i] for i in groups], [bounds[i][0] for i in groups], [bounds[i][1] for i in groups])
        for groups in _competing(method, units.chosen)
    ]

    def lost(order: Ints) -> list[int]:
        """Return how many units each group loses if these go."""
        asked = np.bincount(order, minlength=len(scores)).tolist()
        return [
            max(least, rounded(len(one), count, how.round_to) if one.group.what == "channels" else count)
            for one, count, (least, _) in zip(units.chosen, asked, bounds, strict=True)
        ]

    if how.ratio_of != "units":
        order, cost = merged(pools), partial(_cost, units, how.ratio_of, scores)
        assert isinstance(amount.ratio, float)
        whole = cost(gone if amount.from_remaining else [0] * len(scores))
        allowed = round((1 - amount.ratio) * whole, 6)  # but for what 1 - ratio is off by
        count = fewest(len(order), lambda number: cost(lost(order[:number])) > allowed)
        if count is None:
            best = cost(lost(order))
            raise ValueError(
                f"{1 - amount.ratio:.4g} of the {how.ratio_of} are to be left, but without all units that may go "
                f"{best / whole:.4g} are ({best:,} of {whole:,}): ask for no less, or let more go (heads, width, "
                "min_units, round_to, max_ratio, ignored_scope)"
            )
        return lost(order[:count])
    taken = []
    for pool, ratio in zip(pools, _ratios(method, amount, units.chosen, pools), strict=True):
        removed = removed_in_all(pool.units, sum(gone[i] for i in pool.groups), amount, ratio)
        if amount.is_capped and not sum(pool.least) <= removed <= sum(pool.most):
            raise ValueError(
                f"{removed} of {pool.units} units are to go, but min_ratio, max_ratio and min_units allow "
                f"{sum(pool.least)} to {sum(pool.most)}; give another ratio, or other limits"
            )
        taken.append(pool.order()[:removed])
    return lost(np.concatenate(taken))


def _bounds(amount: Amount, how: Coupled, groups: Sequence[UnitsOfGroup]) -> list[tuple[int, int]]:
    """Return how many units of each group must go at least, and may at most."""
    names = [one.names for one in groups]
    low = by_name(amount.min_ratio, names, 0.0, "min_ratio", left_out=amount.left_out)
    high = by_name(amount.max_ratio, names, 1.0, "max_ratio", left_out=amount.left_out)
    bounds = []
    for one, min_ratio, max_ratio in zip(groups, low, high, strict=True):
        least, most = limits(len(one), min_ratio, max_ratio)
        most = min(most, max(0, len(one) - how.min_units))
        if least > most:
            raise ValueError(
                f"no number of the {len(one)} units of {one.name} is at least min_ratio {min_ratio} and at most "
                f"max_ratio {max_ratio} of them, and leaves min_units, {how.min_units}; give limits further apart"
            )
        bounds.append((least, most))
    return bounds


def _competing(method: Method, groups: Sequence[UnitsOfGroup]) -> list[list[int]]:
    """Return which groups have units that compete with each other."""
    keys: list[object] = list(range(len(groups)))
    if method.scope.name == "model":
        keys = [one.group.what for one in groups]
    elif method.scope.name == "group":
        keys = [group_of(method.scope, one.names) for one in groups]
    return [[i for i, key in enumerate(keys) if key == same] for same in dict.fromkeys(keys)]


def _ratios(method: Method, amount: Amount, groups: Sequence[UnitsOfGroup], pools: Sequence[Pool]) -> list[float]:
    """Return the ratio of the units of each pool."""
    assert amount.ratio is not None
    if method.scope.name == "tensor":
        return by_name(amount.ratio, [one.names for one in groups], 0.0, left_out=amount.left_out)
    names = [group_of(method.scope, groups[pool.groups[0]].names) or "" for pool in pools]
    return by_name(amount.ratio, names, 0.0, left_out=[name for name, _ in method.scope.groups])


def _cost(units: CoupledUnits, what: RatioOf, scores: Sequence[Numbers], removed: Sequence[int]) -> int:
    """Return how many parameters or multiply-accumulates are left without the lowest units of each group."""
    kept = [np.ones(len(group), bool) for group in units.found]
    for one, score, count in zip(units.chosen, scores, removed, strict=True):
        kept[one.number] = lowest(score, count)
    return units.found.macs(kept) if what == "macs" else units.found.parameters(kept)
