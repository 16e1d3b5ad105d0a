"""Which ratio to prune to at which step, and when to compute masks anew: pure functions.

A step is whatever the caller counts, optimizer steps or epochs. Each function returns a `Schedule`: between ``start``
and ``end`` masks are computed anew every ``frequency`` steps, the last time at ``end``. What they have in common:

* ``final``: the ratio at the end, in [0, 1); or a dict of ratios by name or pattern of weights, as for `prune`.
* ``end``: the step from which on the ratio is ``final``; after ``start``.
* ``start``: the first step with masks, from 0; before it the ratio is 0.
* ``initial``: the ratio at ``start``, in [0, 1); or a dict of ratios, by the same names as ``final`` if that is one.
* ``frequency``: how many steps lie between two updates, at least 1.

All raise TypeError or ValueError for what is out of range.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from pyprune.checks import check_count, check_items, check_number, shown
from pyprune.methods.allocation import check_ratio
from pyprune.methods.name_rules import check_rules

Ratio = float | dict[str, float]
_MOST_PHASES = 100_000
_PAIRS = 'a dict of ratios by name, or pairs of these, as [("fc1", 0.5), ("fc2", 0.8)]'
# From the share of the way, in [0, 1], the initial and the final ratio to the ratio.
Curve = Callable[[float, float, float], float]


@dataclass(frozen=True)
class Schedule:
    """A ratio for each step, ``schedule(step)``, and the steps at which masks are due.

    The functions of this module make them.

    Args:
        name: what it is called.
        ratio_at: takes a step at which masks are due and returns the ratio.
        start, end: the first and the last step at which masks are due; no last one if None.
        frequency: how many steps lie between.
        steps: the steps at which masks are due, if they are not a regular grid.

    Example:
        >>> schedule = cubic(0.9, end=10)
        >>> [round(schedule(step), 4) for step in (0, 1, 5, 10, 99)]
        [0.0, 0.2439, 0.7875, 0.9, 0.9]
        >>> [step for step in range(30) if linear(0.5, start=4, end=10, frequency=4).is_due(step)]
        [4, 8, 10]
    """

    name: str
    ratio_at: Callable[[int], Ratio] = field(repr=False)
    start: int
    end: int | None
    frequency: int = 1
    steps: tuple[int, ...] = ()

    def __call__(self, step: int) -> Ratio:
        """Return the ratio of the last update up to ``step``; 0 before the first."""
        now = check_step(step)
        if now < self.start:
            return nothing_of(self.ratio_at(self.start))
        if self.end is not None and now >= self.end:
            return self.ratio_at(self.end)
        if self.steps:
            return self.ratio_at(self.steps[bisect.bisect(self.steps, now) - 1])
        return self.ratio_at(now - (now - self.start) % self.frequency)

    def is_due(self, step: int) -> bool:
        """Whether masks are to be computed anew at ``step``."""
        now = check_step(step)
        if self.steps:
            return now in self.steps
        if now < self.start or (self.end is not None and now > self.end):
            return False
        return now == self.end or (now - self.start) % self.frequency == 0


def one_shot(final: float | Mapping[str, float], *, start: int = 0) -> Schedule:
    """Prune to ``final`` once, at ``start``.

    Example:
        >>> [one_shot(0.7, start=2)(step) for step in range(4)]
        [0.0, 0.0, 0.7, 0.7]
    """
    ratio, first = check_ratios(final), check_step(start, "start")
    return Schedule("one_shot", partial(_constant, ratio), first, first)


def constant(final: float | Mapping[str, float], *, end: int, start: int = 0, frequency: int = 1) -> Schedule:
    """Hold the ratio from ``start`` on, while masks follow the weights until ``end``.

    Example:
        >>> constant(0.7, end=4)(1)
        0.7
    """
    ratio = check_ratios(final)
    return Schedule("constant", partial(_constant, ratio), *_check_span(start, end, frequency))


def linear(
    final: float | Mapping[str, float],
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """initial + (final - initial) x, where x is the share of the way from ``start`` to ``end``.

    Example:
        >>> [round(linear(0.9, end=4)(step), 4) for step in range(5)]
        [0.0, 0.225, 0.45, 0.675, 0.9]
    """
    return _curve("linear", partial(_power, 1.0), final, end, start, initial, frequency)


def cubic(
    final: float | Mapping[str, float],
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """initial + (final - initial) (1 - (1 - x)^3): fast, then slow. The schedule of gradual magnitude pruning.

    Paper: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".

    Example:
        >>> [round(cubic(0.8, end=4)(step), 4) for step in range(5)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8]
    """
    return _curve("cubic", _cubic, final, end, start, initial, frequency)


# Automated gradual pruning, as the paper calls it.
agp = cubic


def inverse_cubic(
    final: float | Mapping[str, float],
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """initial + (final - initial) (1 - (1 - x)^(1/3)): slow, then fast.

    Example:
        >>> [round(inverse_cubic(0.9, end=4)(step), 4) for step in range(5)]
        [0.0, 0.0823, 0.1857, 0.333, 0.9]
    """
    return _curve("inverse_cubic", _inverse_cubic, final, end, start, initial, frequency)


def exponential(
    final: float | Mapping[str, float],
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """1 - (1 - initial) ((1 - final) / (1 - initial))^x: the same share of what is left goes every time.

    Example:
        >>> [round(exponential(0.9, end=4)(step), 4) for step in range(5)]
        [0.0, 0.4377, 0.6838, 0.8222, 0.9]
    """
    return _curve("exponential", _exponential, final, end, start, initial, frequency)


def cosine(
    final: float | Mapping[str, float],
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """initial + (final - initial) (1 - cos(pi x / 2)): slow, then fast.

    Example:
        >>> [round(cosine(0.9, end=4)(step), 4) for step in range(5)]
        [0.0, 0.0685, 0.2636, 0.5556, 0.9]
    """
    return _curve("cosine", _cosine, final, end, start, initial, frequency)


def cube(
    final: float | Mapping[str, float],
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """initial + (final - initial) x^3: slow, then fast. Neural Compressor's "cube", the opposite of `cubic`.

    Example:
        >>> [round(cube(0.9, end=4)(step), 4) for step in range(5)]
        [0.0, 0.0141, 0.1125, 0.3797, 0.9]
    """
    return _curve("cube", partial(_power, 3.0), final, end, start, initial, frequency)


def polynomial(
    final: float | Mapping[str, float],
    *,
    power: float,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
) -> Schedule:
    """initial + (final - initial) x^power, for a positive power.

    Example:
        >>> [polynomial(0.5, power=2, end=4)(step) for step in range(5)]
        [0.0, 0.03125, 0.125, 0.28125, 0.5]
    """
    exponent = check_number("power", power, what="a positive number", least=0, open_ends=True)
    return _curve("polynomial", partial(_power, exponent), final, end, start, initial, frequency)


def multi_step(steps: Mapping[int, float | Mapping[str, float]]) -> Schedule:
    """Take the ratio of the last step that has begun: that of the greatest key up to now. It may fall, too.

    Args:
        steps: ratio in [0, 1), or dict of ratios, from each of these steps on.

    Example:
        >>> [multi_step({2: 0.3, 5: 0.5})(step) for step in (0, 2, 4, 5, 100)]
        [0.0, 0.3, 0.3, 0.5, 0.5]
    """
    if not isinstance(steps, Mapping):
        raise TypeError(f"steps is a {type(steps).__name__}; give a dict from step to ratio, as {{0: 0.3, 5: 0.5}}")
    if not steps:
        raise ValueError("steps is empty; give a dict from step to ratio, as {0: 0.3, 5: 0.5}")
    ratios = {
        check_step(step, "a key of steps"): check_ratios(ratio, f"steps[{step}]") for step, ratio in steps.items()
    }
    due = tuple(sorted(ratios))
    return Schedule("multi_step", ratios.__getitem__, due[0], due[-1], steps=due)


def in_turn(
    ratios: Mapping[str, float] | Iterable[tuple[str, float]], *, start: int = 0, frequency: int = 1
) -> Schedule:
    """Prune one name after the other: at ``start`` the first has its ratio, ``frequency`` steps later the second.

    With `pyprune.iterative_prune` the model is trained after each of them.

    Args:
        ratios: of weights or groups, by name or pattern; in this order. Later ones of the same name replace earlier.
        start, frequency: as above.

    Example:
        >>> schedule = in_turn([("fc1", 0.5), ("fc2", 0.8)])
        >>> schedule(0), schedule(1)
        ({'fc1': 0.5, 'fc2': 0.0}, {'fc1': 0.5, 'fc2': 0.8})
    """
    first, step = check_step(start, "start"), check_step(frequency, "frequency", least=1)
    items = check_items("ratios", ratios.items() if isinstance(ratios, Mapping) else ratios, _PAIRS)
    if any(not isinstance(item, (tuple, list)) or len(item) != 2 for item in items):
        raise TypeError(f"ratios is {shown(ratios)}; give {_PAIRS}")
    if not items:
        raise ValueError(f"ratios is empty; give {_PAIRS}")
    check_rules("ratios", [name for name, _ in items])
    final = {name: check_ratio(ratio, f"ratios[{name!r}]") for name, ratio in items}
    names = [*final]
    planned: dict[int, Ratio] = {
        first + turn * step: {**final, **dict.fromkeys(names[turn + 1 :], 0.0)} for turn in range(len(names))
    }
    due = tuple(planned)
    return Schedule("in_turn", planned.__getitem__, due[0], due[-1], step, due)


def alternating(final: float | Mapping[str, float], *, end: int, frequency: int, start: int = 0) -> Schedule:
    """Alternate between 0 (a dense phase, which comes first) and ``final`` every ``frequency`` steps: AC/DC.

    The last stretch, of ``frequency`` steps or fewer before ``end``, is always pruned. Masks are due where a phase
    begins, and hold through it.

    Paper: Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks".

    Example:
        >>> [alternating(0.9, end=20, frequency=5)(step) for step in (0, 5, 10, 15, 20)]
        [0.0, 0.9, 0.0, 0.9, 0.9]
        >>> [alternating(0.9, end=25, frequency=5)(step) for step in (0, 5, 10, 15, 20)]
        [0.0, 0.9, 0.0, 0.9, 0.9]
    """
    first, last, length = _check_span(start, end, frequency)
    ratio = check_ratios(final)
    if (last - first) / length > _MOST_PHASES:
        raise ValueError(
            f"frequency is {length}, which makes more than {_MOST_PHASES:,} phases up to {last}; give more"
        )
    dense = nothing_of(ratio)
    ratios: dict[int, Ratio] = {}
    for phase, step in enumerate(range(first, last, length)):
        wanted = dense if phase % 2 == 0 and last - step > length else ratio
        if not ratios or wanted != list(ratios.values())[-1]:
            ratios[step] = wanted
    due = tuple(ratios)
    return Schedule("alternating", ratios.__getitem__, due[0], due[-1], length, due)


def custom(
    function: Callable[[int], Ratio], *, start: int = 0, end: int | None = None, frequency: int = 1
) -> Schedule:
    """Take the ratio from a function of the step; masks are due every ``frequency`` steps, without ``end`` for ever.

    Example:
        >>> custom(lambda step: min(0.1 * step, 0.5), frequency=2)(3)
        0.2
    """
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; give a function from step to ratio")
    first, step = check_step(start, "start"), check_step(frequency, "frequency", least=1)
    last = None if end is None else check_step(end, "end", least=first)
    return Schedule(getattr(function, "__name__", "custom"), partial(_from_function, function), first, last, step)


def as_schedule(schedule: Schedule | Callable[[int], Ratio]) -> Schedule:
    """Return a schedule; of another function one by which masks are due at every step.

    Raises:
        TypeError: if it is neither.

    Example:
        >>> as_schedule(lambda step: 0.5)(0)
        0.5
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not callable(schedule):
        raise TypeError(
            f"schedule is {shown(schedule)}; give one of pyprune.schedules, or a function from step to ratio"
        )
    return custom(schedule)


def check_step(step: object, name: str = "step", *, least: int = 0) -> int:
    """Return ``step`` as an int.

    Raises:
        TypeError: if it is not an integer (a bool is not one).
        ValueError: if it is below ``least``.

    Example:
        >>> check_step(3)
        3
    """
    return check_count(name, step, least=least)


def check_ratios(ratio: object, name: str = "final") -> Ratio:
    """Return a ratio as a float in [0, 1), or each of a mapping.

    Raises:
        TypeError, ValueError: for one that is none.

    Example:
        >>> check_ratios({"fc": 0})
        {'fc': 0.0}
    """
    if isinstance(ratio, Mapping):
        check_rules(name, ratio)
        return {rule: check_ratio(value, f"{name}[{rule!r}]") for rule, value in ratio.items()}
    return check_ratio(ratio, name)


def is_pruned(ratio: Ratio) -> bool:
    """Whether a ratio, or one of a dict, is not 0.

    Example:
        >>> is_pruned({"fc": 0.0}), is_pruned(0.5)
        (False, True)
    """
    return any(ratio.values()) if isinstance(ratio, dict) else ratio != 0


def nothing_of(ratio: Ratio) -> Ratio:
    """Return the ratio that prunes nothing, by the same names.

    Example:
        >>> nothing_of({"fc": 0.5}), nothing_of(0.5)
        ({'fc': 0.0}, 0.0)
    """
    return dict.fromkeys(ratio, 0.0) if isinstance(ratio, dict) else 0.0


def _check_span(start: int, end: int, frequency: int) -> tuple[int, int, int]:
    first, last, step = (
        check_step(start, "start"),
        check_step(end, "end"),
        check_step(frequency, "frequency", least=1),
    )
    if last <= first:
        raise ValueError(f"start is {first} and end {last}; the end must come after the start (or use one_shot)")
    return first, last, step


def _curve(name: str, curve: Curve, final: object, end: int, start: int, initial: object, frequency: int) -> Schedule:
    span = _check_span(start, end, frequency)
    ratios, first = check_ratios(final), check_ratios(initial, "initial")
    if isinstance(ratios, dict) and isinstance(first, dict) and set(ratios) != set(first):
        raise ValueError(
            f"initial has ratios for {', '.join(sorted(first))}, final for {', '.join(sorted(ratios))}; give both "
            "for the same names"
        )
    return Schedule(name, partial(_along, curve, ratios, first, span[0], span[1]), *span)


def _along(curve: Curve, final: Ratio, initial: Ratio, start: int, end: int, step: int) -> Ratio:
    if not isinstance(final, dict):
        if not isinstance(initial, dict):
            return _between(curve, final, initial, start, end, step)
        final = dict.fromkeys(initial, final)
    first = initial if isinstance(initial, dict) else dict.fromkeys(final, initial)
    return {rule: _between(curve, value, first[rule], start, end, step) for rule, value in final.items()}


def _between(curve: Curve, final: float, initial: float, start: int, end: int, step: int) -> float:
    if step in (start, end):
        return initial if step == start else final  # exactly, not rounded by the formula
    ratio = curve((step - start) / (end - start), initial, final)
    return min(max(min(initial, final), ratio), max(initial, final))


def _constant(ratio: Ratio, step: int) -> Ratio:
    return ratio


def _from_function(function: Callable[[int], Ratio], step: int) -> Ratio:
    return check_ratios(function(step), f"the ratio of step {step}")


def _power(power: float, x: float, initial: float, final: float) -> float:
    return initial + (final - initial) * math.pow(x, power)


def _cubic(x: float, initial: float, final: float) -> float:
    return initial + (final - initial) * (1 - (1 - x) ** 3)


def _inverse_cubic(x: float, initial: float, final: float) -> float:
    return initial + (final - initial) * (1 - math.pow(1 - x, 1 / 3))


def _exponential(x: float, initial: float, final: float) -> float:
    return 1 - (1 - initial) * math.pow((1 - final) / (1 - initial), x)


def _cosine(x: float, initial: float, final: float) -> float:
    return initial + (final - initial) * (1 - math.cos(math.pi * x / 2))
