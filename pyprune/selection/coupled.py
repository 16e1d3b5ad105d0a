"""Coupled units as masks need them: which groups a method prunes, and in which parameters their units lie."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyprune import ops
from pyprune.console import listed, warn
from pyprune.methods.coupled import Flags
from pyprune.methods.importance import Importance
from pyprune.methods.method import Method
from pyprune.methods.name_rules import all_above, meaning, nearest_to
from pyprune.methods.scope import Scope, group_of
from pyprune.modules.attachments import check_module
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask, masks_in
from pyprune.modules.targets import Target, all_parameters, check_coupled, check_ignored_scope, ignored_in
from pyprune.structured.groups import CoupledGroups, Group, coupled_groups
from pyprune.structured.models import examples_of

_NO_HEADS = "heads=False"


@dataclass(frozen=True, eq=False)
class Part:
    """Where the units of a group lie in one parameter: at which indices along a dimension, (units, entries)."""

    target: Target
    dim: int
    indices: Tensor
    reads: bool

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight, and no bias or scale."""
        return self.target.parameter.dim() > 1

    def per_unit(self, entries: Tensor) -> Tensor:
        """Return what entries along the dimension come to in each unit: (units, entries of one)."""
        return entries[self.indices.to(entries.device)]

    def units_along(self, otherwise: int) -> Tensor:
        """Return which unit each entry along the dimension is in; ``otherwise`` if it is in none."""
        units = torch.full((self.target.parameter.shape[self.dim],), otherwise)
        units[self.indices] = torch.arange(len(self.indices))[:, None]
        return units

    def is_kept(self, mask: Tensor) -> Tensor:
        """Return which units a mask of the parameter keeps an element of."""
        entries = ops.unit_scores([mask], [self.block], p=None, reduction="max")[0].flatten()
        return self.per_unit(entries).amax(1) > 0

    @property
    def block(self) -> tuple[int, ...]:
        """The size of what lies at one index along the dimension."""
        shape = self.target.parameter.shape
        return tuple(1 if dim == self.dim else max(1, size) for dim, size in enumerate(shape))


@dataclass(frozen=True, eq=False)
class UnitsOfGroup:
    """A group of coupled units that is pruned, and the parameters that they lie in."""

    number: int  # among all groups of the model
    group: Group
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.group)

    @property
    def name(self) -> str:
        """The weight that makes it."""
        return self.group.name

    @property
    def weights(self) -> list[Part]:
        """What scores are from."""
        return [part for part in self.parts if part.is_weight]

    def dropped(self, *, zeros_count: bool = False) -> Flags:
        """Return which units the masks of all weights drop; without a mask zeros do if ``zeros_count``."""
        alive = np.zeros(len(self), bool)
        for part in self.weights:
            mask = part.target.attachment
            if isinstance(mask, Mask):
                alive |= part.is_kept(mask.mask).cpu().numpy()
            elif zeros_count:  # as after `strip`
                alive |= part.is_kept(part.target.parameter.detach() != 0).cpu().numpy()
            else:
                alive[:] = True
        return ~alive

    @cached_property
    def names(self) -> tuple[str, ...]:
        """By what rules may call it: all names of the weights that make it."""
        made = [part for part in self.weights if not part.reads] or self.weights
        return tuple(dict.fromkeys([self.name, *(owner.name for part in made for owner in part.target.owners)]))


@dataclass(frozen=True, eq=False)
class CoupledUnits:
    """What a method prunes of a model by coupled units, and what else is coupled.

    Args:
        found: all groups of the model.
        chosen: those that are pruned.
        others: those that are left as they are.
    """

    found: CoupledGroups
    chosen: tuple[UnitsOfGroup, ...]
    others: tuple[UnitsOfGroup, ...]

    @cached_property
    def targets(self) -> list[Target]:
        """All parameters that lose units, each once."""
        return list(dict.fromkeys(part.target for units in self.chosen for part in units.parts))

    def only(self, name: str) -> "CoupledUnits":
        """Return the same with one of the groups that are pruned."""
        chosen = tuple(units for units in self.chosen if units.name == name)
        others = tuple(units for units in self.chosen if units.name != name)
        return replace(self, chosen=chosen, others=(*self.others, *others))

    def measured(self, rule: Importance) -> list[Target]:
        """Return the weights that an importance needs a statistic of."""
        return list(dict.fromkeys(part.target for units in self.chosen for part in parts_scored(units, rule)))


def parts_scored(
    units: UnitsOfGroup, rule: Importance, statistics: Mapping[Target, Tensor | None] | None = None
) -> list[Part]:
    """Return the parameters by which an importance scores the units of a group, by statistics if they are known."""
    if rule.needs == "norm scale":
        return [part for part in units.parts if _is_scale(part.target)]
    parts = units.weights
    if rule.needs == "input norm":
        parts = [part for part in parts if part.reads]
    elif rule.scores_of in ("channels", "rows"):  # of what makes the units
        parts = [part for part in parts if not part.reads]
    if statistics is None or rule.needs in ("none", "given"):
        return parts
    return [part for part in parts if _fits(part, rule, statistics.get(part.target))]


def _fits(part: Part, rule: Importance, statistic: Tensor | None) -> bool:
    """Whether there is a statistic, with a number for each channel if it is one of channels."""
    if statistic is None or rule.scores_of != "channels":
        return statistic is not None
    return statistic.numel() == part.target.parameter.shape[part.dim]


def check_scored(units: CoupledUnits, rule: Importance, statistics: Mapping[Target, Tensor | None]) -> None:
    """Raise ValueError if there is a group without a statistic to score it by."""
    missing = [one.name for one in units.chosen if not parts_scored(one, rule, statistics)]
    if missing:
        raise ValueError(
            f"calibration has nothing to score {listed(missing)} by; calibrate with the same ignored_scope and "
            "examples_inputs, or name what lacks in ignored_scope"
        )


def _is_scale(target: Target) -> bool:
    return any(isinstance(owner.module, _BatchNorm) and owner.attribute == "weight" for owner in target.owners)


def find_coupled(
    model: nn.Module, method: Method, ignored_scope: IgnoredScope | None, examples_inputs: Any
) -> CoupledUnits:
    """Find the coupled units that a method prunes, by a forward pass; warn of groups that are left out.

    Raises:
        TypeError, ValueError: without examples, if there is no group to prune, and for parameters that cannot carry
            masks.
    """
    how = method.granularity.coupled
    assert how is not None
    check_module(model)
    check_ignored_scope(ignored_scope)
    if examples_inputs is None:
        raise ValueError(
            "granularity.coupled finds what goes together in a forward pass, and examples_inputs is None; give "
            "inputs of the model: a tensor, a tuple, a dict, or a list of these"
        )
    examples_of(examples_inputs, "examples_inputs")
    found = coupled_groups(model, examples_inputs)
    targets = {id(target.parameter): target for target in all_parameters(model)}
    every = [_units_of(number, group, targets) for number, group in enumerate(found)]
    ignored = ignored_in(model, ignored_scope)
    left: dict[str, list[str]] = {}
    could: list[UnitsOfGroup] = []
    for units in every:
        why = _why_not(units, method, ignored)
        if why is None:
            could.append(units)
        else:
            left.setdefault(why, []).append(units.name)
    reasons = [f"{listed(names)} ({why})" for why, names in left.items()]
    chosen = _of_scope(could, method.scope) if could else []
    if not chosen:
        raise ValueError(_nothing(model, found, reasons))
    pruned = CoupledUnits(found, tuple(chosen), tuple(units for units in every if units not in chosen))
    check_coupled(model, pruned.targets)
    # Where all carry masks it was said before.
    if left.keys() - {_NO_HEADS} and not all(target.attachment for target in pruned.targets):
        warn(f"coupled units of these groups are left alone: {'; '.join(reasons)}")
    return pruned


def _units_of(number: int, group: Group, targets: Mapping[int, Target]) -> UnitsOfGroup:
    parts = (
        Part(targets[id(member.tensor)], member.dim, torch.from_numpy(member.indices), member.reads)
        for member in group.members
        if id(member.tensor) in targets
    )
    return UnitsOfGroup(number, group, tuple(parts))


def _why_not(units: UnitsOfGroup, method: Method, ignored: Callable[[str], bool]) -> str | None:
    """Say why a group is left alone."""
    how = method.granularity.coupled
    assert how is not None
    if not units.weights:
        return "they lie in no weight of two dimensions or more"
    if units.group.what == "heads" and not how.heads:
        return _NO_HEADS
    if not units.group.is_exact and not how.width:
        return f"width=False; the model is another one without them: {units.group.inexact}"
    if any(ignored(owner.name) for part in units.parts for owner in part.target.owners):
        return "a part of the group is in ignored_scope"
    if not parts_scored(units, method.importance):
        return f"importance {method.importance.name} has nothing to score them by"
    return None


def _of_scope(every: Sequence[UnitsOfGroup], scope: Scope) -> list[UnitsOfGroup]:
    if scope.name != "group":
        return list(every)
    names = [name for units in every for name in units.names]
    known = all_above(names)
    for group, rules in scope.groups:
        for rule in rules:
            if meaning(rule, known) is None:
                raise ValueError(f"{rule!r:.80} of group {group!r} matches no weight {nearest_to(rule, names)}")
    return [units for units in every if group_of(scope, units.names) is not None]


def _nothing(model: nn.Module, found: CoupledGroups, reasons: Sequence[str]) -> str:
    stays = Counter(stay.why for stay in found.stays)
    why = [*reasons, *(f"{number} axes stay: {why}" for why, number in stays.most_common(3))]
    return (
        f"{type(model).__name__} has no coupled units to prune: {'; '.join(why) or 'no axis can lose entries'}. "
        "print(pyprune.coupled_groups(model, examples)) says more"
    )


def check_no_coupled(model: nn.Module, method: Method, *, stay: bool) -> None:
    """Raise ValueError if weights could come back whose biases and norms stay dropped as those of coupled units.

    Args:
        model: the model.
        method: by which masks are to be chosen.
        stay: whether what is dropped stays so.
    """
    if method.granularity.coupled is None and not stay and any(_goes_along(mask) for mask in masks_in(model)):
        raise ValueError(
            "the model carries masks of coupled units, on biases and norms too, and other masks would let their "
            "weights back alone; choose among what remains (from_remaining=True, reintroduce=False), prune by "
            "granularity.coupled again, or strip the model first"
        )


def check_follows(method: Method, zero_dead_channels: bool) -> None:
    """Raise ValueError if biases and norms of coupled units were to follow their weights a second time."""
    if method.granularity.coupled is not None and zero_dead_channels:
        raise ValueError(
            "zero_dead_channels masks biases and norms of dead channels, which granularity.coupled does by itself; "
            "leave it out"
        )


def _goes_along(mask: Mask) -> bool:
    return type(mask) is Mask and not mask.on_target and bool((~mask.mask).any())
