"""From a sensitivity analysis to a ratio for each target."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Literal

from pyprune.analysis.group_costs import GroupCosts
from pyprune.analysis.sensitivity_result import SensitivityResult
from pyprune.checks import check_bool, check_choice, check_count
from pyprune.methods.allocation import check_ratio, limits
from pyprune.methods.tolerance import check_drop
from pyprune.structured.groups import CoupledGroups

# (ratio, drop), rising in both; the first is (0, 0).
Curve = Sequence[tuple[float, float]]


def allocation_from_sensitivity(
    result: SensitivityResult,
    target_ratio: float | None = None,
    *,
    target_params: float | None = None,
    target_macs: float | None = None,
    groups: CoupledGroups | None = None,
    round_to: int = 1,
    rule: Literal["least", "equal"] = "least",
    max_drop: float | None = None,
    max_ratio: float = 0.95,
    monotonic_fit: bool = False,
) -> dict[str, float]:
    """Share a ratio, or a cost that is to be left, out among the targets by what pruning each of them costs.

    Between measured ratios drops are interpolated; beyond the largest one that was measured nothing is assumed, and
    no target goes further. A ratio that does worse than a larger one of the same target does not stand in its way.

    The drops of targets that are pruned together come to something else: train after pruning. A score that can tell
    small differences gives better ratios than accuracy, which many ratios do not change: a loss, or the distance to
    the outputs of the model as it was.

    Args:
        result: what `sensitivity` returned.
        target_ratio: fraction of all weights of these targets to remove, in [0, 1); or give one of the next two.
        target_params, target_macs: of coupled units: the fraction of the whole model's parameters or
            multiply-accumulates that is to be left, in (0, 1], counted as they are once the units are removed. It is
            met from below, by about a unit.
        groups: what `coupled_groups` found in the model that was analysed: what its units cost.
        round_to: the number of channels that remain is rounded up to a multiple of this, as by
            ``granularity.coupled(round_to=...)``; with ``groups``.
        rule: "least" makes the sum of the drops as small as it can be: where a weight costs least, it goes first.
            Small layers, by which little is won, are spared. "equal" looks for the smallest drop d at which the
            targets, each pruned by itself to the largest ratio whose drop is at most d, lose enough together.
        max_drop: what a target pruned by itself may cost, in units of the score; any drop if None.
        max_ratio: what a target loses at most.
        monotonic_fit: first fit rising drops to those of each target, by least squares, where a measurement is noisy.
            If not, a drop counts as the least of it and those at all larger ratios.

    Returns:
        A ratio for each target by its name, for ``prune(model, Method(..., scope=scope.tensor()), ratio=...)``. They
        are whole numbers of units, and off the target together by less than about one unit.

    Raises:
        TypeError, ValueError: for wrong arguments, and if the targets cannot lose as much within these limits; it
            says how much they can.

    ``rule="equal"`` with ``target_macs`` is what AIMET calls greedy selection of compression ratios.

    Example:
        >>> from pyprune.analysis.sensitivity_result import SensitivityTarget
        >>> robust = SensitivityTarget(100, 100, {0.5: 0.9, 0.9: 0.8})
        >>> fragile = SensitivityTarget(100, 100, {0.5: 0.7, 0.9: 0.0})
        >>> allocation_from_sensitivity(SensitivityResult(0.9, {"a": robust, "b": fragile}), 0.6)
        {'a': 0.9, 'b': 0.3}
    """
    if not isinstance(result, SensitivityResult):
        raise TypeError(f"result is a {type(result).__name__}; give what pyprune.sensitivity returned")
    if not result.targets:
        raise ValueError("result has no targets; run the analysis to its end")
    check_choice("rule", rule, ("least", "equal"))
    check_bool("monotonic_fit", monotonic_fit)
    cap, tolerated = check_ratio(max_ratio, "max_ratio"), check_drop("max_drop", max_drop)
    targets = {"target_ratio": target_ratio, "target_params": target_params, "target_macs": target_macs}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'none'} of {', '.join(targets)} given; give one of them")
    (what,) = given
    share = _least_drops if rule == "least" else _equal_drops
    curves = {name: _curve(result, name, cap, tolerated, monotonic_fit) for name in result.targets}
    multiple = check_count("round_to", round_to, least=1)
    if what != "target_ratio":
        costs = GroupCosts(result, groups, what, targets[what], multiple)
        most = costs.linear({name: curve[-1][0] for name, curve in curves.items()})
        return costs.least(lambda goal: share(curves, costs.weights, goal), most, _limits(tolerated, cap))
    if groups is not None or multiple > 1:
        raise ValueError(
            "groups and round_to are for target_params and target_macs; leave them out with target_ratio"
        )
    wanted = check_ratio(target_ratio, "target_ratio")
    weights = {name: target.weights for name, target in result.targets.items()}
    goal = wanted * sum(weights.values())
    most = sum(curve[-1][0] * weights[name] for name, curve in curves.items())
    # A rounding error must not put the very ratios that were measured out of reach.
    if most < goal * (1 - 1e-9):
        reachable = most / sum(weights.values())
        raise ValueError(
            f"target_ratio is {wanted:g}, but within {_limits(tolerated, cap)} the targets can lose {reachable:.4f} "
            "of their weights; ask for less, or widen the limits (larger ratios take another sensitivity analysis)"
        )
    return _whole_units(result, share(curves, weights, goal), curves, goal)


def _curve(result: SensitivityResult, name: str, cap: float, max_drop: float | None, is_fitted: bool) -> Curve:
    """Return ratios and what at least they cost: no ratio costs more than a larger one, and pruning is no gain."""
    drops = {ratio: result.drop(name, ratio) for ratio in result.targets[name].scores if ratio > 0}
    if is_fitted:
        drops = {ratio: drop for ratio, drop in drops.items() if math.isfinite(drop)}
        drops = dict(zip(drops, rising(list(drops.values())), strict=True))
    points = [(0.0, 0.0), *((ratio, max(0.0, drop)) for ratio, drop in drops.items())]
    costs = list(accumulate((drop for _, drop in reversed(points)), min))[::-1]
    curve = [(ratio, cost) for (ratio, _), cost in zip(points, costs, strict=True) if cost < math.inf]
    curve = _cut(curve, cap)
    return curve if max_drop is None else _cut(curve, _ratio_at(curve, max_drop))


def rising(values: Sequence[float]) -> list[float]:
    """Return the values nearest to these that do not fall, by the sum of squared differences: isotonic regression.

    Example:
        >>> rising([1.0, 3.0, 2.0, 4.0])
        [1.0, 2.5, 2.5, 4.0]
    """
    runs: list[tuple[float, int]] = []  # a mean, and of how many
    for value in values:
        mean, size = value, 1
        while runs and runs[-1][0] > mean:
            before, count = runs.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        runs.append((mean, size))
    return [mean for mean, size in runs for _ in range(size)]


def _cut(curve: Curve, most: float) -> list[tuple[float, float]]:
    """Return a curve that ends at a ratio, if it went on."""
    inside = [point for point in curve if point[0] <= most]
    (ratio, cost), beyond = inside[-1], curve[len(inside) :]
    if beyond and ratio < most:
        next_ratio, next_cost = beyond[0]
        inside.append((most, cost + (next_cost - cost) * (most - ratio) / (next_ratio - ratio)))
    return inside


def _ratio_at(curve: Curve, drop: float) -> float:
    """Return the largest ratio that costs no more than ``drop``."""
    i = max(i for i, (_, cost) in enumerate(curve) if cost <= drop)
    ratio, cost = curve[i]
    if i + 1 == len(curve):
        return ratio
    next_ratio, next_cost = curve[i + 1]
    return ratio + (next_ratio - ratio) * (drop - cost) / (next_cost - cost)


def _least_drops(curves: Mapping[str, Curve], weights: Mapping[str, float], goal: float) -> dict[str, float]:
    """Take pieces of the curves, those first whose weights cost least, until enough is taken."""
    pieces = [
        ((next_cost - cost) / (next_ratio - ratio) / weights[name], next_ratio - ratio, name)
        for name, curve in curves.items()
        for (ratio, cost), (next_ratio, next_cost) in pairwise(_convex(curve))
        if weights[name]
    ]
    ratios = dict.fromkeys(curves, 0.0)
    missing = goal
    for _, alike in groupby(sorted(pieces), key=lambda piece: piece[0]):
        group = list(alike)
        size = sum(length * weights[name] for _, length, name in group)
        part = min(1.0, missing / size)
        for _, length, name in group:
            ratios[name] += part * length
        missing -= part * size
    return ratios


def _convex(curve: Curve) -> Curve:
    """Return the corners of the convex curve below: a piece that costs much is worth it if the next costs little."""
    corners: list[tuple[float, float]] = []
    for ratio, cost in curve:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], (ratio, cost)):
            corners.pop()
        corners.append((ratio, cost))
    return corners


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _equal_drops(curves: Mapping[str, Curve], weights: Mapping[str, float], goal: float) -> dict[str, float]:
    """Halve the interval of the drop that all targets may cost, until nothing lies between."""

    def ratios_at(drop: float) -> dict[str, float]:
        return {name: _ratio_at(curve, drop) for name, curve in curves.items()}

    def removed(ratios: Mapping[str, float]) -> float:
        return sum(ratio * weights[name] for name, ratio in ratios.items())

    below, above = 0.0, max(curve[-1][1] for curve in curves.values())
    low, high = ratios_at(below), ratios_at(above)
    if removed(low) >= goal:
        low, high = dict.fromkeys(curves, 0.0), low
    else:
        while below < (middle := (below + above) / 2) < above:
            ratios = ratios_at(middle)
            if removed(ratios) < goal:
                low, below = ratios, middle
            else:
                high, above = ratios, middle
    # Where a curve is flat, its ratio jumps at one drop. Part of the way is right, and costs no more.
    gap = removed(high) - removed(low)
    part = min(1.0, max(0.0, (goal - removed(low)) / gap)) if gap > 0 else 1.0
    return {name: low[name] + part * (high[name] - low[name]) for name in curves}


def _whole_units(
    result: SensitivityResult, ratios: Mapping[str, float], curves: Mapping[str, Curve], goal: float
) -> dict[str, float]:
    """Round to numbers of units that `prune` removes exactly, together as near to the goal as they go."""
    units = {name: target.units for name, target in result.targets.items()}
    size = {name: target.weights / max(1, target.units) for name, target in result.targets.items()}
    exact = {name: ratio * units[name] for name, ratio in ratios.items()}
    counts = {name: math.floor(round(count, 6)) for name, count in exact.items()}
    missing = goal - sum(counts[name] * size[name] for name in counts)
    for name in sorted(counts, key=lambda name: counts[name] - exact[name]):
        _, most = limits(units[name], 0.0, curves[name][-1][0])
        if missing >= size[name] / 2 and counts[name] < most:
            counts[name] += 1
            missing -= size[name]
    return {name: count / max(1, units[name]) for name, count in counts.items()}


def _limits(max_drop: float | None, cap: float) -> str:
    drop = "" if max_drop is None else f"max_drop {max_drop:g}, "
    return f"{drop}max_ratio {cap:g} and the largest ratios that were measured"
