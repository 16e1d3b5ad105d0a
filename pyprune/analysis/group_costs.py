"""What is left of a model's parameters or multiply-accumulates when groups of coupled units are pruned to ratios."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np

from pyprune.analysis.sensitivity_result import SensitivityResult
from pyprune.checks import check_number, shown
from pyprune.methods.coupled import rounded
from pyprune.structured.groups import CoupledGroups, Group

_HALVINGS = 50


class GroupCosts:
    """Costs of a model whose groups of coupled units were analysed, and the cost that is to be left.

    Args:
        result: an analysis of coupled units; a target is a group, by its name.
        groups: of the same model.
        what: "target_params" or "target_macs".
        target: the fraction that is to be left.
        round_to: of the numbers of channels that remain.

    Raises:
        TypeError, ValueError: if the target is no fraction, or the analysis is of other groups.
    """

    def __init__(
        self, result: SensitivityResult, groups: CoupledGroups | None, what: str, target: object, round_to: int
    ) -> None:
        fraction = "the fraction of the model that is to be left, a number in (0, 1]"
        self._target = check_number(what, target, what=fraction, least=math.nextafter(0.0, 1.0), most=1)
        if not isinstance(groups, CoupledGroups):
            raise TypeError(
                f"groups is {shown(groups)}; {what} counts by them: give pyprune.coupled_groups(model, examples)"
            )
        self._what, self._groups, self._round_to = what, groups, round_to
        self._by_name: dict[str, list[Group]] = {name: [] for name in result.targets}
        for group in groups:
            if group.name in self._by_name and len(group) == result.targets[group.name].units:
                self._by_name[group.name].append(group)
        other = [name for name, found in self._by_name.items() if not found]
        if other:
            raise ValueError(
                f"result has the target {other[0]} of {result.targets[other[0]].units:,} units, and groups has not; "
                "give an analysis with granularity.coupled(), and groups of the same model"
            )

    @cached_property
    def weights(self) -> dict[str, float]:
        """What all units of each target cost, each alone."""
        return {
            name: sum(len(one) * (one.macs if self._what == "target_macs" else one.parameters) for one in found)
            for name, found in self._by_name.items()
        }

    def linear(self, ratios: Mapping[str, float]) -> float:
        """What goes with these ratios, if every unit that goes saves what it saves alone."""
        return sum(ratio * self.weights[name] for name, ratio in ratios.items())

    def left(self, counts: Mapping[str, int]) -> int:
        """What the model costs without so many units of each target."""
        removed = {id(one): counts[name] for name, found in self._by_name.items() for one in found}
        kept = [np.arange(len(group)) >= removed.get(id(group), 0) for group in self._groups]
        return self._groups.macs(kept) if self._what == "target_macs" else self._groups.parameters(kept)

    def least(self, ratios_at: Callable[[float], Mapping[str, float]], most: float, limits: str) -> dict[str, float]:
        """Return the ratios, in whole numbers of units, by which the least goes that leaves the target.

        Args:
            ratios_at: ratios by which more goes the larger its argument is.
            most: the largest argument.
            limits: what keeps it from being larger, for messages.
        """
        whole = self.left(dict.fromkeys(self._by_name, 0))
        allowed = round(self._target * whole, 6)
        low, high = 0.0, most
        counts = self._counts(ratios_at(high))
        if (best := self.left(counts)) > allowed:
            raise ValueError(
                f"{self._what} is {self._target:g}, but within {limits} at least {best / whole:.4f} is left; ask for "
                "more, or widen the limits (larger ratios take another sensitivity analysis)"
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fewer = self._counts(ratios_at(middle))
            if self.left(fewer) > allowed:
                low = middle
            else:
                counts, high = fewer, middle
        while True:  # what else fits: units of targets that went at the same moment, or are cheap
            for name, count in counts.items():
                if count and self.left(fewer := {**counts, name: self._rounded(name, count - 1)}) <= allowed:
                    counts = fewer
                    break
            else:
                break
        return {name: count / len(self._by_name[name][0]) for name, count in counts.items()}

    def _counts(self, ratios: Mapping[str, float]) -> dict[str, int]:
        return {
            name: self._rounded(name, math.floor(round(ratio * len(self._by_name[name][0]), 6)))
            for name, ratio in ratios.items()
        }

    def _rounded(self, name: str, removed: int) -> int:
        """So many or fewer, so that a multiple of channels remains."""
        group = self._by_name[name][0]
        return rounded(len(group), removed, self._round_to) if group.what == "channels" else removed
