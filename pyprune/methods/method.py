"""Pruning methods: importance x granularity x scope, and the names that some of them have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from pyprune.checks import check_bool, check_choice, check_number, shown
from pyprune.methods.allocation import Amount, check_ratio
from pyprune.methods.granularity import Granularity, element
from pyprune.methods.importance import Importance, custom, magnitude
from pyprune.methods.name_rules import check_rules
from pyprune.methods.scope import Scope, tensor
from pyprune.methods.scope import model as whole_model


class PruneMode(str, Enum):
    """Pruning methods under the names NNCF gives them where it has them; `prune` takes a member or its string.

    * ``UNSTRUCTURED_MAGNITUDE_LOCAL``: the elements with the smallest |w| of each weight tensor go.
    * ``UNSTRUCTURED_MAGNITUDE_GLOBAL``: the elements with the smallest |w| / ||W||_2 of the whole model go,
      where ||W||_2 is the norm of the tensor that holds w.
    * ``UNSTRUCTURED_REGULARIZATION_BASED``: a learned Bernoulli gate on every element; a loss sets the ratio.
    * ``UNSTRUCTURED_HARD_CONCRETE``: a learned hard-concrete gate on every element (not in NNCF).

    The first two are rows of the table ``METHODS``; any other combination is a `Method`.

    Example:
        >>> PruneMode("UNSTRUCTURED_MAGNITUDE_LOCAL")
        <PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL: 'UNSTRUCTURED_MAGNITUDE_LOCAL'>
    """

    UNSTRUCTURED_MAGNITUDE_LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
    UNSTRUCTURED_MAGNITUDE_GLOBAL = "UNSTRUCTURED_MAGNITUDE_GLOBAL"
    UNSTRUCTURED_REGULARIZATION_BASED = "UNSTRUCTURED_REGULARIZATION_BASED"
    UNSTRUCTURED_HARD_CONCRETE = "UNSTRUCTURED_HARD_CONCRETE"


@dataclass(frozen=True)
class Method:
    """How weights are chosen that go: those of least importance, in units of the granularity, within the scope.

    Args:
        importance: a function of `pyprune.importance`, or any function of a weight that returns scores of its shape.
        granularity: what goes as one; single elements by default.
        scope: what competes; the units of the whole model by default.

    Raises:
        TypeError, ValueError: for other types, or a combination that means nothing.

    Example:
        >>> from pyprune.methods import granularity, importance, scope
        >>> filters = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
        >>> filters.scope.name
        'tensor'
    """

    importance: Importance
    granularity: Granularity = field(default_factory=element)
    scope: Scope = field(default_factory=whole_model)

    def __post_init__(self) -> None:
        importance: object = self.importance
        if not isinstance(importance, Importance):
            if not callable(importance):
                raise TypeError(f"importance is a {type(importance).__name__}; give one of pyprune.importance")
            object.__setattr__(self, "importance", custom(importance, getattr(importance, "__name__", "custom")))
        for name, kind in (("granularity", Granularity), ("scope", Scope)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"{name} is {shown(value)}; give what a function of pyprune.{name} returns, called with ()"
                )
        cut = self.granularity.name
        if self.granularity.coupled is not None:
            if self.scope.name in ("row", "columns", "n_of_m"):
                raise ValueError(
                    f"scope is {self.scope.name}, and coupled units lie in rows of several weights; give "
                    "scope.tensor(), scope.model() or scope.group()"
                )
            return
        if self.importance.scores_of == "channels" and cut != 'channel("out")':
            raise ValueError(
                f'{self.importance.name} scores output channels, but the granularity is {cut}; give channel("out")'
            )
        if self.importance.scores_of == "rows" and not cut.startswith("channel"):
            raise ValueError(
                f"{self.importance.name} compares channels, but the granularity is {cut}; give channel()"
            )
        # A unit that spans all inputs, or outputs, has no neighbours along them.
        spans = {
            "in": cut == 'channel("out")' or cut.endswith(", channel)"),
            "out": cut == 'channel("in")' or cut.startswith("block(channel,"),
        }
        spans["both"] = spans["in"] or spans["out"]
        is_alone = {"row": cut == 'channel("out")', "n_of_m": spans[self.scope.dim]}.get(self.scope.name)
        if is_alone or (is_alone is not None and self.granularity.heads):
            raise ValueError(
                f"with granularity {cut} a channel has one unit, so nothing competes within scope "
                f"{self.scope.name}; give scope.tensor() or scope.model()"
            )


METHODS: Mapping[PruneMode, Method] = {
    PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL: Method(magnitude(), element(), tensor()),
    PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL: Method(magnitude(normalize="l2"), element(), whole_model()),
}


def check_mode(mode: PruneMode | str, name: str = "mode") -> PruneMode:
    """Return the member that ``mode`` names, in upper or lower case; ``name`` is that of the argument.

    Raises:
        TypeError, ValueError: if it names none.

    Example:
        >>> check_mode("UNSTRUCTURED_MAGNITUDE_GLOBAL") is PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        True
    """
    if isinstance(mode, Importance):
        raise TypeError(
            f"{name} is the importance {mode.name}, which does not say what goes as one, or what competes; give a "
            "Method with it, such as Method(importance.magnitude())"
        )
    if not isinstance(mode, str):
        raise TypeError(
            f"{name} is a {type(mode).__name__}; give a PruneMode or its name as a string (or a Method to what takes "
            "one)"
        )
    names = [member.value for member in PruneMode]
    if mode.upper() not in names:
        raise ValueError(f"{name} is {shown(mode)}; allowed are {', '.join(names)}")
    return PruneMode(mode.upper())


def check_amount(method: Method, amount: Amount) -> Amount:
    """Return the amount with its numbers checked.

    Raises:
        TypeError, ValueError: if it is out of range, or cannot be asked of the method.
    """
    for name in ("from_remaining", "dropped_stay"):
        check_bool(name, getattr(amount, name))
    scope = method.scope.name
    by_weight = isinstance(amount.ratio, Mapping)
    if by_weight and method.scope.weights_compete and scope != "group":
        raise ValueError(
            "a dict of ratios gives weights ratios of their own, so they do not compete; use scope.tensor()"
            + (', or among="tensor"' if scope == "n_of_m" else "")
        )
    coupled = method.granularity.coupled
    if by_weight and coupled is not None and coupled.ratio_of != "units":
        raise ValueError(
            f'ratio is a dict, but ratio_of="{coupled.ratio_of}" is about the whole model; give one number, or '
            'ratio_of="units"'
        )
    check_choice("allocation", amount.allocation, ("uniform", "erk", "er"))
    if amount.allocation != "uniform" and coupled is not None:
        raise ValueError(
            f'allocation="{amount.allocation}" goes by the shapes of weights, and coupled units lie in several; '
            "leave it out"
        )
    if amount.allocation != "uniform" and (by_weight or scope not in ("tensor", "row")):
        raise ValueError(
            f'allocation="{amount.allocation}" makes one ratio into one for each weight: use '
            "scope.tensor() or scope.row()"
        )
    if amount.allocation != "uniform" and amount.from_remaining:
        raise ValueError(
            f'allocation="{amount.allocation}" is about all weights; leave from_remaining out, or give ratios by name'
        )
    _check_limits(amount)
    if amount.is_capped and scope not in ("model", "group"):
        raise ValueError(
            f"min_ratio and max_ratio bound what a weight loses to others, but in scope {scope} none compete"
        )
    if amount.ratio is None and scope == "n_of_m":
        return amount
    most = method.scope.ratio
    if isinstance(amount.ratio, Mapping):
        check_rules("ratio", amount.ratio)
        ratios = {rule: _at_most(most, check_ratio(ratio), method) for rule, ratio in amount.ratio.items()}
        return replace(amount, ratio=ratios)
    return replace(amount, ratio=_at_most(most, check_ratio(amount.ratio), method))


def _check_limits(amount: Amount) -> None:
    for name in ("min_ratio", "max_ratio"):
        value = getattr(amount, name)
        if isinstance(value, Mapping):
            check_rules(name, value)
        for number in value.values() if isinstance(value, Mapping) else [value]:
            check_number(name, number, what="a fraction of a weight, from 0 to 1", least=0, most=1)


def _at_most(most: float | None, ratio: float, method: Method) -> float:
    """Return the ratio, but no more than there can be of N:M; a rounded one, as 0.67 for 1 of 3, is all of it."""
    if most is not None and ratio > most + 0.01:
        raise ValueError(
            f"ratio is {ratio:g}, but keeping {method.scope.keep} of {method.scope.of} removes at most {most:.4g}; "
            "give that, or less, by which some groups stay whole, or None"
        )
    return ratio if most is None else min(ratio, most)
