"""From a sensitivity analysis to a ratio for each target."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from pyprune.allocation import check_ratio, limits
from pyprune.sensitivity_result import SensitivityResult

# (ratio, drop), rising in both; the first is (0, 0) or less.
Curve = Sequence[tuple[float, float]]


def allocation_from_sensitivity(
    result: SensitivityResult, target_ratio: float, *, max_drop: float | None = None, max_ratio: float = 0.95
) -> dict[str, float]:
    """Share a ratio out among the targets, such that each of them loses what costs the same.

    It is the smallest drop d for which the targets, each pruned by itself to the largest ratio whose drop is at most
    d, lose together ``target_ratio`` of their weights. Between measured ratios drops are interpolated; beyond the
    largest one that was measured nothing is assumed, and no target goes further. A ratio that does worse than a
    larger one of the same target does not stand in its way. The drops of targets that are pruned together add up to
    something else: train after pruning.

    Args:
        result: what `sensitivity` returned.
        target_ratio: fraction of all weights of these targets to remove, in [0, 1).
        max_drop: how large d may be, in units of the score; any if None.
        max_ratio: what a target loses at most.

    Returns:
        A ratio for each target by its name, for ``prune(model, Method(..., scope=scope.tensor()), ratio=...)``. They
        are whole numbers of units, and off the target together by less than about one unit.

    Raises:
        TypeError, ValueError: for wrong arguments, and if the targets cannot lose as much within these limits; it
            says how much they can.

    Example:
        >>> from pyprune.sensitivity_result import SensitivityTarget
        >>> robust = SensitivityTarget(100, 100, {0.5: 0.9, 0.9: 0.8})
        >>> fragile = SensitivityTarget(100, 100, {0.5: 0.8, 0.9: 0.0})
        >>> allocation_from_sensitivity(SensitivityResult(0.9, {"a": robust, "b": fragile}), 0.7)
        {'a': 0.9, 'b': 0.5}
    """
    if not isinstance(result, SensitivityResult):
        raise TypeError(f"result is a {type(result).__name__}; give what pyprune.sensitivity returned")
    if not result.targets:
        raise ValueError("result has no targets; run the analysis to its end")
    wanted, cap = check_ratio(target_ratio, "target_ratio"), check_ratio(max_ratio, "max_ratio")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"max_drop is {max_drop}; give what the score may lose, 0 or more")
    curves = {name: _curve(result, name, cap) for name in result.targets}
    total = sum(target.weights for target in result.targets.values())

    def ratios_at(drop: float) -> dict[str, float]:
        return {name: _ratio_at(curve, drop) for name, curve in curves.items()}

    def removed(ratios: Mapping[str, float]) -> float:
        return sum(ratio * result.targets[name].weights for name, ratio in ratios.items())

    below, above = 0.0, max(drop for curve in curves.values() for _, drop in curve if drop < math.inf)
    if max_drop is not None:
        above = min(above, max_drop)
    low, high = ratios_at(below), ratios_at(above)
    goal = wanted * total
    # A rounding error must not put the very ratios that were measured out of reach.
    if removed(high) < goal * (1 - 1e-9):
        raise ValueError(_out_of_reach(wanted, removed(high) / total, max_drop, cap))
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
    share = min(1.0, max(0.0, (goal - removed(low)) / gap)) if gap > 0 else 1.0
    return _whole_units(result, {name: low[name] + share * (high[name] - low[name]) for name in curves}, goal, cap)


def _curve(result: SensitivityResult, name: str, cap: float) -> Curve:
    """Return ratios and what at least they cost: no ratio costs more than a larger one, and pruning is no gain."""
    scores = result.targets[name].scores
    points = [(0.0, 0.0), *((ratio, max(0.0, result.drop(name, ratio))) for ratio in scores if ratio > 0)]
    lowest = list(accumulate((drop for _, drop in reversed(points)), min))[::-1]
    curve = list(zip((ratio for ratio, _ in points), lowest, strict=True))
    beyond = [point for point in curve if point[0] > cap]
    curve = curve[: len(curve) - len(beyond)]
    (ratio, drop), (next_ratio, next_drop) = curve[-1], (beyond or curve)[0]
    if ratio < cap < next_ratio:
        curve.append((cap, drop + (next_drop - drop) * (cap - ratio) / (next_ratio - ratio)))
    return curve


def _ratio_at(curve: Curve, drop: float) -> float:
    """Return the largest ratio that costs no more than ``drop``."""
    if drop < 0:
        return 0.0
    i = max(i for i, (_, cost) in enumerate(curve) if cost <= drop)
    ratio, cost = curve[i]
    if i + 1 == len(curve) or curve[i + 1][1] == math.inf:
        return ratio
    next_ratio, next_cost = curve[i + 1]
    return ratio + (next_ratio - ratio) * (drop - cost) / (next_cost - cost)


def _whole_units(result: SensitivityResult, ratios: Mapping[str, float], goal: float, cap: float) -> dict[str, float]:
    """Round to numbers of units that `prune` removes exactly, together as near to the goal as they go."""
    units = {name: target.units for name, target in result.targets.items()}
    size = {name: target.weights / max(1, target.units) for name, target in result.targets.items()}
    exact = {name: ratio * units[name] for name, ratio in ratios.items()}
    counts = {name: math.floor(round(count, 6)) for name, count in exact.items()}
    missing = goal - sum(counts[name] * size[name] for name in counts)
    for name in sorted(counts, key=lambda name: counts[name] - exact[name]):
        _, most = limits(units[name], 0.0, min(cap, max(result.targets[name].scores)))
        if missing >= size[name] / 2 and counts[name] < most:
            counts[name] += 1
            missing -= size[name]
    return {name: count / max(1, units[name]) for name, count in counts.items()}


def _out_of_reach(wanted: float, reachable: float, max_drop: float | None, cap: float) -> str:
    within = f"max_ratio {cap:g} and the largest ratios that were measured"
    if max_drop is not None:
        within = f"max_drop {max_drop:g}, {within}"
    return (
        f"target_ratio is {wanted:g}, but within {within} the targets can lose {reachable:.4f} of their weights; ask "
        "for less, or widen the limits (larger ratios take another sensitivity analysis)"
    )
