"""Groups of coupled units: what can be removed from a model as a whole, and what stays and why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.console import as_html, as_text, listed
from pyprune.modules.unit_gates import opened
from pyprune.modules.zeros import holds_in, settle_written
from pyprune.structured.coordinates import NONE, Coords, Flags
from pyprune.structured.costs import Costs
from pyprune.structured.models import check_model, examples_of
from pyprune.structured.seen import Trace, Traced
from pyprune.structured.trace import trace

What = Literal["channels", "heads", "groups"]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor that loses entries with the units of a group.

    Args:
        name: of the parameter or buffer.
        names: all of its names, if it is tied.
        tensor: itself.
        dim: the axis.
        indices: which entries along it each unit has: (units, entries).
        reads: whether the entries are what a weight reads, and not what it makes.
    """

    name: str
    names: tuple[str, ...]
    tensor: Tensor
    dim: int
    indices: Coords
    reads: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Units that lie in the same axes of the same tensors.

    Args:
        members: those axes.
        what: "channels", "heads" of attention, or "groups" of a convolution.
        parameters: how many floats one unit has.
        macs: how many multiply-accumulates go with one unit, in the forward passes of the examples.
        inexact: why the model is another one without units that are zero ("" if it is the same).
        kind: of what modules it is, for messages: "Conv2d.weight in Bottleneck".
    """

    members: tuple[Member, ...]
    what: What
    parameters: float
    macs: float
    inexact: str
    kind: str
    coords: Coords

    def __len__(self) -> int:
        return len(self.members[0].indices)

    @property
    def units(self) -> int:
        """How many units it has."""
        return len(self)

    @property
    def is_exact(self) -> bool:
        """Whether a unit that is zero can go, and the model computes what it did."""
        return not self.inexact

    def zero_units(self) -> Flags:
        """Say which units are zero in all of the group's parameters."""
        zero = np.ones(len(self), bool)
        for member in self.members:
            if isinstance(member.tensor, nn.Parameter):
                used = (member.tensor.detach() != 0).movedim(member.dim, 0)
                rows = used.reshape(len(used), -1).any(1).cpu().numpy()
                zero &= ~rows[member.indices].any(1)
        return zero

    @property
    def name(self) -> str:
        """The weight that makes it: the first member that does not read."""
        makers = [member for member in self.members if member.tensor.dim() > 1 and not member.reads]
        return (makers or [*self.members])[0].name


@dataclass(frozen=True)
class Stay:
    """Entries along an axis that cannot be removed."""

    name: str
    dim: int
    entries: int
    size: int
    why: str


class CoupledGroups(Sequence[Group]):
    """What `coupled_groups` found: groups, and what stays (``stays``); ``str()`` is a table.

    Args:
        groups: each with two units or more.
        stays: axes with entries that are in no group.
        unknown: operations that no rule knows, and how often they were.
        parameters, macs: of the whole model, the latter in the forward passes of the examples.
    """

    def __init__(self, groups: list[Group], stays: list[Stay], seen: Trace, costs: Costs) -> None:
        self._groups = groups
        self.stays = stays
        self.unknown = dict(seen.unknown)
        self._costs = costs

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def parameters(self, kept: Sequence[Flags] | None = None) -> int:
        """Floats in the model's parameters, if only these units of each group are kept."""
        return self._costs.parameters(kept)

    def macs(self, kept: Sequence[Flags] | None = None) -> int:
        """Multiply-accumulates of the examples' forward passes, if only these units of each group are kept."""
        return self._costs.macs(kept)

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("group", "units", "of", "members", "parameters", "MACs", "", box=None, pad_edge=False)
        for column in (1, 4, 5):
            table.columns[column].justify = "right"
        for group in self._groups:
            members = list(dict.fromkeys(member.name for member in group.members if member.tensor.dim() > 1))
            table.add_row(
                group.name,
                str(group.units),
                group.what,
                listed(members),
                f"{group.parameters:,.0f}",
                f"{group.macs:,.0f}",
                "" if group.is_exact else f"inexact: {group.inexact}",
            )
        lines = [as_text(table), "parameters and MACs are those of one unit"]
        reasons: dict[str, list[str]] = {}
        for stay in self.stays:
            reasons.setdefault(stay.why, []).append(f"{stay.name} ({stay.entries} of {stay.size} along {stay.dim})")
        lines += [f"stays, {why}: {listed(names)}" for why, names in reasons.items()]
        return "\n".join(line for line in lines if line)

    def _repr_html_(self) -> str:
        return as_html(str(self))


@torch.inference_mode(False)
def coupled_groups(model: nn.Module, examples: Any) -> CoupledGroups:
    """Find what can only be removed together: units along axes of parameters and buffers, and what stays.

    The model runs once on each example, in evaluation, without gradients, and is as it was then. Rules on axes say
    what each operation ties (additions, products, heads of attention, views that cut and join axes, ...); an
    operation that no rule knows keeps what it touches, and is named.

    Args:
        model: a plain model, with masks and gates or without, of any dtype, also on the meta device; not compiled,
            sharded, or in parallel.
        examples: a tensor, a tuple of positional arguments, a dict of keyword arguments; or a list of these, if the
            model takes other ways with other inputs. What none of them reaches stays.

    Returns:
        The groups, a sequence of ``Group``; ``str()`` is a table, ``stays`` says what cannot be removed, and why.

    Raises:
        TypeError, ValueError: for examples that the model does not take, or have NaN in them, and models that are
            wrapped, sharded or quantised.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> (group,) = coupled_groups(model, torch.ones(1, 4))
        >>> group.units, [(member.name, member.dim) for member in group.members]
        (8, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])
    """
    check_model(model, "look at")
    inputs = examples_of(examples)
    settle_written(holds_in(model))  # what was written under masks, before it is seen
    with opened(model):
        return groups_of(model, trace(model, inputs))


def groups_of(model: nn.Module, seen: Trace) -> CoupledGroups:
    """Make groups of what a trace has seen."""
    ties = seen.coordinates
    units = ties.units()
    why_stays = _reasons(units, ties.stays)
    why_inexact = _reasons(units, ties.inexact)
    heads, grouped = (
        {label for coords in several for label in units[coords.ravel()].tolist()}
        for several in (ties.heads, ties.groups)
    )
    stays = np.zeros(ties.count, bool)
    stays[NONE] = True
    stays[[*why_stays]] = True
    axes = [
        (one, dim, units[coords])
        for one in seen.tensors
        for dim, coords in enumerate(one.coords)
        if coords is not None
    ]
    by_signature = _signatures(axes, stays)
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    in_order = [_sorted(own) for _, _, own in axes]
    groups: list[Group] = []
    for signature, labels in by_signature.items():
        if len(labels) == 1:  # something must be left
            continue
        order = np.asarray(labels)
        members = tuple(
            Member(
                one.name, one.names, one.tensor, dim, _indices(*in_order[index], order), ties.is_read(one.coords[dim])
            )
            for index, (one, dim, _) in ((index, axes[index]) for index, _ in signature)
        )
        if members[0].tensor.dim() == 1 and all(not isinstance(member.tensor, nn.Parameter) for member in members):
            continue  # buffers alone
        first = labels[0]
        what: What = "heads" if first in heads else "groups" if first in grouped else "channels"
        inexact = next((why_inexact[label] for label in labels if label in why_inexact), "")
        groups.append(Group(members, what, 0.0, 0.0, inexact, _kind(members, classes), order))
    costs = Costs(seen, [group.coords for group in groups], units)
    for index, group in enumerate(groups):
        parameters, macs = costs.of_one(index, len(group))
        groups[index] = replace(group, parameters=parameters, macs=macs)
    in_groups = np.zeros(ties.count, bool)
    for group in groups:
        in_groups[group.coords] = True
    found = []
    for one, dim, own in axes:
        out = own[~in_groups[own]]
        if len(out):
            reasons = Counter(
                why_stays.get(int(label), "a single unit, and something must be left") for label in np.unique(out)
            )
            found.append(Stay(one.name, dim, len(out), len(own), reasons.most_common(1)[0][0]))
    return CoupledGroups(groups, found, seen, costs)


def _reasons(units: Coords, given: Iterable[tuple[Coords, str]]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for coords, why in given:
        for label in np.unique(units[coords]).tolist():
            reasons.setdefault(label, why)
    return reasons


def _signatures(axes: list[tuple[Traced, int, Coords]], stays: Flags) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Sort units by the axes they lie in, and with how many entries."""
    parts = []
    for index, (_, _, own) in enumerate(axes):
        labels, counts = np.unique(own[~stays[own]], return_counts=True)
        parts.append(np.stack([labels, np.full(len(labels), index), counts], 1))
    rows = np.concatenate(parts) if parts else np.empty((0, 3))
    if not len(rows):
        return {}
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    labels, starts = np.unique(rows[:, 0], return_index=True)
    found: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for label, part in zip(labels.tolist(), np.split(rows[:, 1:], starts[1:]), strict=True):
        found.setdefault(tuple(map(tuple, part.tolist())), []).append(label)
    return found


def _sorted(own: Coords) -> tuple[Coords, Coords]:
    """Where the entries of an axis lie in the order of their units, and these units."""
    order = np.argsort(own, kind="stable")
    return order, own[order]


def _indices(order: Coords, ordered: Coords, labels: Coords) -> Coords:
    """Which entries of an axis each unit has, as rows; all have the same number."""
    starts = np.searchsorted(ordered, labels)
    count = int(np.searchsorted(ordered, labels[0], "right")) - int(starts[0])
    return np.asarray(order[starts[:, None] + np.arange(count)])


def _kind(members: Sequence[Member], classes: dict[str, str]) -> str:
    """Class of the first member's module and of its parent, and which of its axes."""
    first = next((member for member in members if member.tensor.dim() > 1), members[0])
    owner, _, leaf = first.name.rpartition(".")
    parent, _, child = owner.rpartition(".")
    child = "" if child.isdigit() else f".{child}"
    return f"{classes.get(parent, '')}{child} ({classes.get(owner, '')}.{leaf}, {first.dim})"
