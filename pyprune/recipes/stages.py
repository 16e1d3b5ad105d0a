"""The stages of a recipe, and how they are read."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal

from pyprune.checks import shown
from pyprune.methods import granularity, importance, schedules, scope
from pyprune.methods.allocation import Amount, check_ratio
from pyprune.methods.granularity import Granularity
from pyprune.methods.importance import Importance
from pyprune.methods.method import Method, check_amount
from pyprune.methods.name_rules import check_rules
from pyprune.methods.schedules import Ratio, Schedule
from pyprune.methods.scope import Scope
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.recipes.yaml_source import Place

# Enough steps per epoch to try a schedule on before the number is known.
_MANY = 10**6
_MOST_EPOCHS = 1e9


@dataclass(frozen=True)
class Stage:
    """What is done with the zeros of a model over a range of epochs.

    Args:
        kind: "prune" and "ac_dc" set masks by a schedule, "constant" holds the zeros that are there.
        start, end: in epochs; a constant stage may have no end, and alone it holds the zeros of its start.
        where: file, line and field, for messages.
        schedule: makes the schedule of a number of steps per epoch.
        method: how weights are chosen.
        ignored_scope: weights to leave out.
        keywords: further arguments of the `Pruner`.
        final: the ratio that it leaves.

    Example:
        >>> Stage("constant").end is None
        True
    """

    kind: Literal["prune", "ac_dc", "constant"]
    start: float = 0.0
    end: float | None = None
    where: str = "the stage"
    schedule: Callable[[int], Schedule] | None = None
    method: Method | None = None
    ignored_scope: IgnoredScope | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    final: Ratio = 0.0


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """Return the nearest number of steps.

    Example:
        >>> steps_of(0.5, 25)
        13
    """
    return math.floor(epochs * steps_per_epoch + 0.5)


def read_stages(place: Place) -> tuple[Stage, ...]:
    """Read a list of stages, each of which begins where the one before ends, or later.

    Raises:
        ValueError: for what is wrong, with the line where it stands.

    Example:
        >>> from pyprune.recipes.yaml_source import read
        >>> text = "- prune: {final: 0.9, end: 10}\\n- constant"
        >>> [(stage.kind, stage.start) for stage in read_stages(read(text, "recipe.yaml"))]
        [('prune', 0.0), ('constant', 10.0)]
    """
    stages: list[Stage] = []
    for item in place.items():
        kind, body = item.choice(_KINDS)
        before = stages[-1] if stages else Stage("constant", end=0.0)
        if before.end is None:
            raise body.error(f"{before.where} has no end, and nothing can follow it; give it one")
        pruned = next((stage for stage in reversed(stages) if stage.kind != "constant"), None)
        stage = _KINDS[kind](body, before.end, pruned)
        place = body.pairs().get("start", body)
        if stage.start < before.end or (stages and kind != "constant" and stage.start == before.start):
            raise place.error(
                f"the stage begins at epoch {stage.start:g}, and {before.where} lasts from {before.start:g} to "
                f"{before.end:g}; stages follow each other"
            )
        if stages and stages[0].kind == "constant":
            raise body.error(
                f"{stages[0].where} holds the zeros of a model without masks, and only by itself; before another "
                "stage put masks on them with {prune: {schedule: one_shot, final: the sparsity that there is}}"
            )
        if stages and stage.ignored_scope is not None and kind == "constant":
            raise body.error("the masks of the stages before are held, all of them; leave ignore out")
        stages.append(stage)
    if not stages:
        raise place.error("there are no stages; give at least one")
    return tuple(stages)


def by_epoch(place: Place) -> dict[float, Place]:
    """Return the places of a dict whose keys are epochs."""
    found: dict[float, Place] = {}
    for written, value in place.pairs().items():
        try:
            epoch = float(written)
        except ValueError:
            epoch = math.nan
        if not 0 <= epoch <= _MOST_EPOCHS:
            raise value.error(
                f"{written!r:.80} is not a number of epochs; give a dict by epoch, as {{0: 0.3, 5: 0.5}}"
            )
        if epoch in found:
            raise value.error(f"epoch {epoch:g} is in line {found[epoch].line + 1} already; give it once")
        found[epoch] = value
    return found


def _functions(module: ModuleType, kind: type, *without: str) -> dict[str, Callable[..., Any]]:
    """Return the functions of a module that make one of a kind, by name."""
    found = inspect.getmembers(module, inspect.isfunction)
    made = ((name, function) for name, function in found if function.__annotations__.get("return") is kind)
    return {name: function for name, function in made if name not in without}


# What "custom" and "given" take cannot be written in YAML.
_IMPORTANCES = _functions(importance, Importance, "custom", "given")
_GRANULARITIES = _functions(granularity, Granularity)
_SCOPES = _functions(scope, Scope, "columns")  # which only solvers take

_PRUNER = ("allocation", "min_ratio", "max_ratio", "reintroduce", "zero_dead_channels")
_WHAT = ("importance", "granularity", "scope", "ignore", *_PRUNER)
# The fields that each schedule needs, and those that it can do without.
_TIMING = {
    **dict.fromkeys(
        ("linear", "cubic", "agp", "inverse_cubic", "exponential", "cosine", "cube", "polynomial"),
        (("final", "end"), ("start", "initial", "frequency")),
    ),
    "one_shot": (("final",), ("start",)),
    "multi_step": ((), ()),
}
_ALTERNATING = (("final", "end", "frequency"), ("start",))


def _prune(body: Place, earliest: float, pruned: Stage | None) -> Stage:
    named = body.pairs().get("schedule")
    name, arguments = named.choice(_TIMING) if named else ("cubic", None)
    needed, other = _TIMING[name]
    fields = body.fields(("schedule", *needed, *other, *_WHAT), needed)
    if name == "multi_step" and arguments:
        ratios = {epoch: _ratios(place) for epoch, place in by_epoch(arguments).items()}
        if not ratios:
            raise arguments.error("it has no ratios; give some by epoch, as {0: 0.3, 5: 0.5}")
        return _stage("prune", body, fields, min(ratios), max(ratios), partial(_multi_step, ratios))
    known = ("power",) if name == "polynomial" else ()
    options = {key: place.value() for key, place in (arguments.fields(known, known) if arguments else {}).items()}
    if pruned is not None and "initial" in other and "initial" not in fields:
        options["initial"] = _ratio_left(pruned, body, fields)
    return _curve_stage("prune", body, fields, earliest, partial(getattr(schedules, name), **options))


def _ac_dc(body: Place, earliest: float, _: object) -> Stage:
    needed, other = _ALTERNATING
    # All weights come back in a dense phase: "reintroduce" would say nothing.
    allowed = (*needed, *other, *(key for key in _WHAT if key != "reintroduce"))
    fields = body.fields(allowed, needed)
    return _curve_stage("ac_dc", body, fields, earliest, schedules.alternating)


def _constant(body: Place, earliest: float, _: object) -> Stage:
    fields = body.fields(("start", "end", "ignore"))
    start, end = _span(fields, earliest)
    return Stage("constant", start, end, str(body), ignored_scope=_ignored_scope(fields))


_KINDS = {"prune": _prune, "ac_dc": _ac_dc, "constant": _constant}


def _ratio_left(pruned: Stage, body: Place, fields: dict[str, Place]) -> float:
    """Return the ratio that the stage before leaves in the weights of this one, so that it reopens nothing."""
    by_name = isinstance(_ratios(fields["final"]), dict)
    if isinstance(pruned.final, dict) or by_name or pruned.ignored_scope != _ignored_scope(fields):
        raise body.error(
            f"it lacks initial: {pruned.where} leaves not the same ratio in all weights that are pruned here; give "
            "the ratio at which the stage begins (0 lets all weights back)"
        )
    return pruned.final


def _curve_stage(
    kind: Literal["prune", "ac_dc"],
    body: Place,
    fields: dict[str, Place],
    earliest: float,
    make: Callable[..., Schedule],
) -> Stage:
    start, end = _span(fields, earliest)
    epochs = {"start": start} if end is None else {"start": start, "end": end}
    if "frequency" in fields:
        epochs["frequency"] = fields["frequency"].number("a number of epochs", above=True, most=_MOST_EPOCHS)
    if "initial" in fields:
        make = partial(make, initial=_ratios(fields["initial"]))
    in_steps = partial(_in_steps, partial(make, _ratios(fields["final"])), epochs)
    return _stage(kind, body, fields, start, start if end is None else end, in_steps)


def _stage(
    kind: Literal["prune", "ac_dc"],
    body: Place,
    fields: dict[str, Place],
    start: float,
    end: float,
    make: Callable[[int], Schedule],
) -> Stage:
    method = body.checked(
        Method,
        _made(fields.get("importance"), _IMPORTANCES, "magnitude"),
        _made(fields.get("granularity"), _GRANULARITIES, "element"),
        _made(fields.get("scope"), _SCOPES, "model" if kind == "ac_dc" else "tensor"),
    )
    keywords = {key: _by_name(fields[key]) for key in _PRUNER if key in fields}
    for flag in ("reintroduce", "zero_dead_channels"):
        if not isinstance(keywords.get(flag, False), bool):
            raise fields[flag].error(f"{shown(keywords[flag])} is neither true nor false")
    schedule = body.checked(make, _MANY)
    limits = {key: keywords[key] for key in ("allocation", "min_ratio", "max_ratio") if key in keywords}
    final = schedule(schedule.end or 0)
    body.checked(check_amount, method, Amount(final, **limits))
    return Stage(kind, start, end, str(body), make, method, _ignored_scope(fields), keywords, final)


def _in_steps(make: Callable[..., Schedule], epochs: Mapping[str, float], steps_per_epoch: int) -> Schedule:
    steps = {name: steps_of(value, steps_per_epoch) for name, value in epochs.items()}
    if "frequency" in steps:
        steps["frequency"] = max(1, steps["frequency"])
    return make(**steps)


def _multi_step(ratios: Mapping[float, Ratio], steps_per_epoch: int) -> Schedule:
    epochs: dict[int, float] = {}
    for epoch in sorted(ratios):
        step = steps_of(epoch, steps_per_epoch)
        if step in epochs:
            raise ValueError(f"epochs {epochs[step]:g} and {epoch:g} are both step {step}; leave one of them out")
        epochs[step] = epoch
    return schedules.multi_step({step: ratios[epoch] for step, epoch in epochs.items()})


def _made(place: Place | None, makers: Mapping[str, Callable[..., Any]], otherwise: str) -> Any:
    """Return an importance, granularity or scope."""
    if place is None:
        return makers[otherwise]()
    name, arguments = place.choice(makers)
    parameters = inspect.signature(makers[name]).parameters
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    given = {key: _argument(key, argument) for key, argument in arguments.fields(parameters, needed).items()}
    return arguments.checked(makers[name], **given)


def _argument(name: str, place: Place) -> Any:
    """Return an argument of an importance, granularity or scope; what names weights is text."""
    if name == "groups":
        return {group: rules.texts() for group, rules in place.pairs().items()}
    return place.texts() if name == "names" else place.value()


def _ignored_scope(fields: Mapping[str, Place]) -> IgnoredScope | None:
    if "ignore" not in fields:
        return None
    flags = ("validate", "all_zero")
    rules = fields["ignore"].fields(("names", "patterns", "types", *flags))
    given = {key: place.value() if key in flags else place.texts() for key, place in rules.items()}
    return fields["ignore"].checked(IgnoredScope, **given)


def _span(fields: Mapping[str, Place], earliest: float) -> tuple[float, float | None]:
    start = fields["start"].number("a number of epochs", most=_MOST_EPOCHS) if "start" in fields else earliest
    if "end" not in fields:
        return start, None
    end = fields["end"].number("a number of epochs", most=_MOST_EPOCHS)
    if end <= start:
        raise fields["end"].error(f"the stage ends at epoch {end:g}, but starts at {start:g}")
    return start, end


def _ratio(place: Place) -> float:
    return place.checked(check_ratio, place.value())


def _ratios(place: Place) -> Ratio:
    found = _by_name(place)
    if isinstance(found, dict):
        return {rule: place.checked(check_ratio, ratio, rule) for rule, ratio in found.items()}
    return _ratio(place)


def _by_name(place: Place) -> Any:
    """Return a value, or values by the names of weights."""
    if place.node.id == "mapping":
        found = {rule: value.value() for rule, value in place.pairs().items()}
        place.checked(check_rules, place.name.rpartition(".")[2], list(found))
        return found
    return place.value()
