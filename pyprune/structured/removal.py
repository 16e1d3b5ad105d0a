"""Try a removal, compare what the model computes, and find out what cannot go."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyprune.modules.evaluation import forward
from pyprune.modules.undo import Change
from pyprune.structured import attributes
from pyprune.structured.attributes import Setting
from pyprune.structured.compact import Kept, add_bias, cut, resizing
from pyprune.structured.comparison import (
    check_expected,
    class_that_failed,
    difference_of,
    in_double,
    line_of,
    looking,
    to_double,
)
from pyprune.structured.coordinates import Flags
from pyprune.structured.groups import CoupledGroups
from pyprune.structured.models import tensors_within
from pyprune.structured.norms_of_width import Rescaled, rescaled_norms
from pyprune.structured.readers import Dead
from pyprune.structured.seen import Trace
from pyprune.structured.shrunk import Held


@dataclass(frozen=True)
class Found:
    """What can go: units of each group, the attributes that change, and what was held."""

    gone: list[Flags]
    settings: list[Setting]
    guessed: list[Setting] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    difference: float = 0.0


class _TakeBack(Exception):
    """Ends an attempt, with how much outputs differed, or what failed."""

    def __init__(self, difference: float, problem: str) -> None:
        super().__init__(problem)
        self.difference = difference
        self.problem = problem


class Removal:
    """What is known of a model that is to become smaller."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        seen: Trace,
        groups: CoupledGroups,
        dead: Dead,
        most: float,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.seen = seen
        self.groups = groups
        self.units = seen.coordinates.units()
        self.dead = dead
        self.most = most
        self._shapes = {id(member.tensor): member.tensor.shape for group in groups for member in group.members}
        folds: list[Any] = [model.get_submodule(fold.module) for fold in dead.folds.values()]
        self._dense: dict[str, Tensor] = {
            fold.module: module.weight.data for fold, module in zip(dead.folds.values(), folds, strict=True)
        }
        self.biases: list[Tensor] = [module.bias for module in folds if module.bias is not None]
        self.expected = [[one.clone() for one in tensors_within(made)] for made in seen.outputs]
        self._failed_in = ""
        self._in_double: tuple[list[Any], list[list[Tensor]]] | None = None
        check_expected(self.expected)

    def find(self, gone: list[Flags]) -> Found:
        """Find what of this can go: all of it, or all but the kinds of groups without which the model fails."""
        found = self._try(gone)
        if found is not None:
            return found
        kinds: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            if gone[index].any():
                kinds.setdefault(group.kind, []).append(index)
        if not kinds:  # nothing was changed, and yet it differs
            difference, problem = self._differs(gone, [])
            raise ValueError(
                "the model does not compute the same twice with the same examples "
                f"({problem or f'outputs differ by {difference:.1e}'}); it cannot be verified. Give verify=math.inf "
                "to go without"
            )
        none = [np.zeros_like(one) for one in gone]
        found, held = self._try(none), []
        if found is None:
            return self.find(none)
        for kind, members in kinds.items():
            more = [gone[index] if index in members else one for index, one in enumerate(found.gone)]
            attempt = self._try(more)
            if attempt is None:
                held.append(Held(kind, len(members), self._problem))
            else:
                found = attempt
        return replace(found, held=held)

    def kept(self, gone: Sequence[Flags]) -> Kept:
        """Positions of each tensor that are left without some units."""
        removed: dict[int, dict[int, list[Any]]] = {}
        for group, flags in zip(self.groups, gone, strict=True):
            if not flags.any():
                continue
            for member in group.members:
                removed.setdefault(id(member.tensor), {}).setdefault(member.dim, []).append(
                    member.indices[flags].ravel()
                )
        return Kept(
            {
                key: {
                    dim: _others(self._shapes[key][dim], np.concatenate(parts)) for dim, parts in sorted(dims.items())
                }
                for key, dims in removed.items()
            }
        )

    def norms(self, gone: Sequence[Flags]) -> tuple[list[Rescaled], list[str]]:
        """Norms over axes that lose entries: what they become, and the names of those that cannot be the same."""
        alive = self._alive(gone)
        names = dict.fromkeys(
            name for coords, name in self.seen.coordinates.inexact_in if not alive[self.units[coords]].all()
        )
        if not names:
            return [], []
        return rescaled_norms([(name, self.model.get_submodule(name)) for name in names], self.kept(gone))

    def settle(self, gone: Sequence[Flags], settings: Sequence[Setting], norms: Sequence[Rescaled]) -> list[str]:
        """Give attributes, norms and biases of a model that was cut their values; returns names of new biases."""
        attributes.apply(self.model, settings)
        for norm in norms:
            weight = norm.module.weight
            assert isinstance(weight, Tensor)
            weight.data = cut(norm.weight, self.kept(gone).of(weight))
            vars(norm.module).update(norm.epsilons)
        return self._fold(gone)

    # ---- attempts ----

    def _try(self, gone: list[Flags]) -> Found | None:
        """Find attributes that let the model compute the same without some units; None if there are none."""
        settings = self._settings(gone)
        difference, self._problem = self._differs(gone, settings)
        if self._is_right(difference, gone):
            return Found(gone, settings, difference=difference)
        problem = self._problem
        guesses = self._guess(gone, settings)
        if guesses is None:
            self._problem = problem
            return None
        for kind in list(guesses):  # what is not needed is not believed
            rest = [one for other, several in guesses.items() if other != kind for one in several]
            if self._is_right(self._differs(gone, [*settings, *rest])[0], gone):
                del guesses[kind]
        guessed = [one for several in guesses.values() for one in several]
        difference, _ = self._differs(gone, [*settings, *guessed])
        return Found(gone, [*settings, *guessed], guessed, difference=difference)

    def _guess(self, gone: list[Flags], settings: Sequence[Setting]) -> dict[tuple[str, str], list[Setting]] | None:
        """Guess attributes by their values: in classes whose forward fails, one after the other, or all at once."""
        guesses = attributes.guesses(self.model, self.kept(gone), settings)
        chosen: dict[tuple[str, str], list[Setting]] = {}
        while more := {
            kind: one for kind, one in guesses.items() if kind[0] == self._failed_in and kind not in chosen
        }:
            chosen |= more
            difference, self._problem = self._differs(gone, [*settings, *(s for one in chosen.values() for s in one)])
            if self._is_right(difference, gone):
                return chosen
        if not guesses or len(chosen) == len(guesses):
            return None
        difference, self._problem = self._differs(gone, [*settings, *(s for one in guesses.values() for s in one)])
        return guesses if self._is_right(difference, gone) else None

    def _is_right(self, difference: float, gone: Sequence[Flags]) -> bool:
        return difference <= self._most(gone) and difference < math.inf

    def _most(self, gone: Sequence[Flags]) -> float:
        """How much outputs may differ: as they like if a norm cannot be what it was."""
        return math.inf if self.norms(gone)[1] else self.most

    def _alive(self, gone: Sequence[Flags]) -> Flags:
        alive = np.ones(len(self.units), bool)
        for group, flags in zip(self.groups, gone, strict=True):
            alive[group.coords[flags]] = False
        return alive

    def _settings(self, gone: Sequence[Flags]) -> list[Setting]:
        alive, units = self._alive(gone), self.units
        changes = attributes.new_sizes(
            self.seen.sizes, lambda coords: alive[units[coords]], attributes.old_value(self.model)
        )
        return attributes.settings(self.model, changes)

    def _differs(self, gone: Sequence[Flags], settings: Sequence[Setting]) -> tuple[float, str]:
        """How much outputs differ without some units (infinitely if the model fails), and what the problem is."""
        difference, problem = self._attempt(gone, settings, self.inputs, self.expected)
        if self._most(gone) < difference < math.inf:  # another function, or rounding that the model makes much of?
            if self._in_double is None:
                self._in_double = self._outputs_in_double()
            inputs, expected = self._in_double
            exact, _ = self._attempt(gone, settings, inputs, expected, double=True) if expected else (math.inf, "")
            if exact <= self.most:
                return exact, ""
        return difference, problem

    def _attempt(
        self,
        gone: Sequence[Flags],
        settings: Sequence[Setting],
        inputs: Sequence[Any],
        expected: Sequence[Sequence[Tensor]],
        *,
        double: bool = False,
    ) -> tuple[float, str]:
        norms, _ = self.norms(gone)
        try:
            with Change(self.model) as change, resizing(self.model, self.kept(gone), change, self.biases):
                self.settle(gone, settings, norms)
                with in_double(self.model) if double else nullcontext():
                    raise _TakeBack(*self._compare(inputs, expected))
        except _TakeBack as result:
            return result.difference, result.problem

    def _outputs_in_double(self) -> tuple[list[Any], list[list[Tensor]]]:
        """Inputs and outputs in float64; nothing if the model does not take that."""
        inputs = [tree_map(to_double, one) for one in self.inputs]
        try:
            with in_double(self.model), looking(self.model):
                return inputs, [list(tensors_within(forward(self.model, one, "examples"))) for one in inputs]
        except Exception:  # as below
            return inputs, []

    def _compare(self, inputs: Sequence[Any], wanted: Sequence[Sequence[Tensor]]) -> tuple[float, str]:
        worst = 0.0
        self._failed_in = ""
        try:
            with looking(self.model):
                for one, expected in zip(inputs, wanted, strict=True):
                    made = list(tensors_within(forward(self.model, one, "examples")))
                    worst = max(worst, difference_of(expected, made))
        except Exception as error:  # whatever a stranger's forward does when sizes do not fit
            self._failed_in = class_that_failed(error)
            return math.inf, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{line_of(error)}"
        return worst, f"outputs differ by {worst:.1e} of their largest value"

    # ---- constants ----

    def _fold(self, gone: Sequence[Flags]) -> list[str]:
        """Add what constants contribute to the biases of what reads them."""
        if not self.dead.folds:
            return []
        removed = np.zeros(len(self.units), bool)
        for group, flags in zip(self.groups, gone, strict=True):
            removed[group.coords[flags]] = True
        kept = self.kept(gone)
        new: list[str] = []
        for fold in self.dead.folds.values():
            chosen = removed[fold.labels]
            if not chosen.any():
                continue
            module: Any = self.model.get_submodule(fold.module)
            weight, out = self._dense[fold.module], 1 - fold.dim
            entries = torch.from_numpy(fold.entries[chosen]).to(weight.device)
            values = torch.from_numpy(fold.values[chosen]).to(weight.device)
            read = weight.index_select(fold.dim, entries).movedim(fold.dim, -1).double() @ values
            # What is left first is the outputs: (out, in, kernel ...) or (in, out).
            more = read.flatten(1).sum(1) if read.dim() > 1 else read
            more = cut(more, {0: kept.of(module.weight)[out]} if out in kept.of(module.weight) else {})
            if module.bias is None:
                add_bias(module)
                new.append(f"{fold.module}.bias".lstrip("."))
            module.bias.data = (module.bias.detach().double() + more).to(module.bias.dtype)
        return new


def _others(size: int, removed: Any) -> Tensor:
    keep = np.ones(size, bool)
    keep[removed] = False
    return torch.from_numpy(np.flatnonzero(keep))
