"""Which units stay: counts from ratios, scope by scope, and masks of units from the kernels."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import Amount, er, erk, limits, removed_in_all
from pyprune.methods.lamp import lamp_removed
from pyprune.methods.method import Method
from pyprune.methods.name_rules import by_name
from pyprune.methods.scope import group_of
from pyprune.methods.unit_groups import UnitGroup, reduce_units, spread_units
from pyprune.selection.limits import capped_threshold
from pyprune.selection.neighbours import count_of_rows, keep_in_rows, keep_n_of_m, outputs_first
from pyprune.selection.scores import is_magnitude_of_elements, keys


@dataclass(frozen=True)
class Selected:
    """What stays: a mask (True = kept) for each member of each unit group, in order.

    ``nonfinite`` counts the NaN and infinite scores of each unit group; if there are any, the masks mean nothing.
    Reading it is the only synchronisation with the device that most scopes need.
    """

    masks: list[Tensor]
    nonfinite: Tensor


@torch.no_grad()
def choose_units(
    method: Method, unit_groups: Sequence[UnitGroup], amount: Amount, masks: Sequence[Tensor] | None = None
) -> Selected:
    """Choose which units stay: of those that compete, the ones with the highest scores, as many as the amount says.

    Args:
        method: how.
        unit_groups: whose units; on one device where they compete with each other.
        amount: how much goes, from `pyprune.methods.method.check_amount`.
        masks: bool tensors to write, one for each member of each unit group, which share no memory with bases; new
            ones if None.

    Raises:
        TypeError, ValueError: for an amount, a rule or scores that do not fit these weights.

    Example:
        >>> from pyprune.methods.unit_groups import Member, Weight
        >>> from pyprune.methods.method import METHODS, PruneMode
        >>> weights = [Weight("a", torch.tensor([3.0, -1.0])), Weight("b", torch.tensor([0.1, 0.2]))]
        >>> unit_groups = [UnitGroup(weight.name, (Member(weight, (1,)),)) for weight in weights]
        >>> selected = choose_units(METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL], unit_groups, Amount(0.5))
        >>> [mask.tolist() for mask in selected.masks]
        [[True, False], [False, True]]
    """
    bases = _unit_bases(method, unit_groups) if amount.has_bases else [None] * len(unit_groups)
    of_elements = method.granularity.name == "element"
    selected = _SELECT[method.scope.name](_Units(method, unit_groups, bases, amount, masks if of_elements else None))
    if of_elements:
        return selected
    members = [member for unit_group in unit_groups for member in unit_group.members]
    if masks is None:
        masks = [torch.empty_like(member.weight.values, dtype=torch.bool) for member in members]
    spread_units(unit_groups, selected.masks, masks)
    for member, mask in zip(members, masks, strict=True):
        if amount.has_bases and member.weight.base is not None:
            mask &= member.weight.base  # a unit that is kept may have lost elements before
    return Selected(list(masks), selected.nonfinite)


def ratios_of(method: Method, amount: Amount, unit_groups: Sequence[UnitGroup]) -> dict[str, float] | None:
    """Return the ratio of each unit group by its name, if they may have different ones and do not compete.

    Raises:
        ValueError: if a ratio is for a name that there is not.
    """
    if method.scope.weights_compete or amount.ratio is None:
        return None
    if isinstance(amount.ratio, Mapping):
        names = [unit_group.names for unit_group in unit_groups]
        ratios = by_name(amount.ratio, names, 0.0, left_out=amount.left_out)
    elif amount.allocation != "uniform":
        weights = [unit_group.weight for unit_group in unit_groups]
        shapes = [tuple(weight.values.shape) for weight in weights]
        if amount.allocation == "erk":
            ratios = erk(shapes, amount.ratio)
        else:
            channels = [
                (shape[weight.out_dim], shape[weight.in_dim]) if len(shape) > 1 else (1, math.prod(shape))
                for weight, shape in zip(weights, shapes, strict=True)
            ]
            ratios = er(shapes, channels, amount.ratio)
    else:
        return None
    return dict(zip([unit_group.name for unit_group in unit_groups], ratios, strict=True))


@dataclass(frozen=True)
class _Units:
    """The units that compete, and how much of them goes; what is selected has a mask of units for each unit group."""

    method: Method
    unit_groups: Sequence[UnitGroup]
    bases: Sequence[Tensor | None]  # of units
    amount: Amount
    masks: Sequence[Tensor] | None = None  # to write; new ones if None

    @property
    def names(self) -> list[tuple[str, ...]]:
        return [unit_group.names for unit_group in self.unit_groups]

    @property
    def sizes(self) -> list[int]:
        return [torch.Size(unit_group.unit_shape).numel() for unit_group in self.unit_groups]

    @property
    def known_bases(self) -> Sequence[Tensor | None] | None:
        return self.bases if any(base is not None for base in self.bases) else None

    def subset(self, chosen: Sequence[int]) -> "_Units":
        return replace(
            self,
            unit_groups=[self.unit_groups[i] for i in chosen],
            bases=[self.bases[i] for i in chosen],
            masks=None if self.masks is None else [self.masks[i] for i in chosen],
        )

    def ratios(self) -> list[float]:
        """Return the ratio of each unit group."""
        known = ratios_of(self.method, self.amount, self.unit_groups)
        assert known is not None or isinstance(self.amount.ratio, float)
        return [self.amount.ratio if known is None else known[c.name] for c in self.unit_groups]  # type: ignore[misc]

    def dropped(self) -> list[int]:
        """Return how many units of each unit group are pruned already."""
        there = [(i, base) for i, base in enumerate(self.bases) if base is not None]
        counts = [0] * len(self.bases)
        if there:
            for (i, _), count in zip(there, ops.count_zeros([base for _, base in there]).tolist(), strict=True):
                counts[i] = count
        return counts


def _among_all(units: _Units) -> Selected:
    method, amount, sizes, dropped = units.method, units.amount, units.sizes, units.dropped()
    assert isinstance(amount.ratio, float)
    removed = removed_in_all(sum(sizes), sum(dropped), amount, amount.ratio)
    bases = units.known_bases
    is_lamp = method.importance.normalize == "lamp" and is_magnitude_of_elements(method)
    if is_lamp and method.importance.power == 1 and bases is None and not amount.is_capped:
        # Within a weight LAMP orders like |w|, so the weights' counts are all there is to find.
        weights = [unit_group.weight.values for unit_group in units.unit_groups]
        finite = bool(ops.norms(weights).isfinite().all())
        return Selected(*ops.threshold(weights, lamp_removed(weights, removed) if finite else 0, masks=units.masks))
    key = keys(method, units.unit_groups, compared=True)
    if not amount.is_capped:
        return Selected(
            *ops.threshold(
                key.tensors,
                removed,
                scales=key.scales,
                normalize=key.normalize,
                bases=bases,
                masks=units.masks,
            )
        )
    bounds = _bounds(units, sizes, dropped, removed)
    return Selected(
        *capped_threshold(
            key.tensors,
            removed,
            least=[least for least, _ in bounds],
            most=[most for _, most in bounds],
            scales=key.scales,
            normalize=key.normalize,
            bases=bases,
            masks=units.masks,
        )
    )


def _bounds(units: _Units, sizes: Sequence[int], dropped: Sequence[int], removed: int) -> list[tuple[int, int]]:
    """Return how many units of each unit group must go at least, and may at most."""
    low = by_name(units.amount.min_ratio, units.names, 0.0, "min_ratio", left_out=units.amount.left_out)
    high = by_name(units.amount.max_ratio, units.names, 1.0, "max_ratio", left_out=units.amount.left_out)
    bounds = []
    for (name, *_), size, gone, min_ratio, max_ratio in zip(units.names, sizes, dropped, low, high, strict=True):
        least, most = limits(size, min_ratio, max_ratio)
        if least > most:
            raise ValueError(
                f"no number of the {size} units of {name} is at least min_ratio {min_ratio} and at most max_ratio "
                f"{max_ratio} of them; give limits further apart"
            )
        # What was pruned before stays so, whatever the limits say.
        bounds.append((max(least, gone), max(most, gone)))
    fewest, all_most = sum(least for least, _ in bounds), sum(most for _, most in bounds)
    if not fewest <= removed <= all_most:
        raise ValueError(
            f"{removed} of {sum(sizes)} units are to go, but min_ratio and max_ratio allow {fewest} to {all_most}; "
            "give another ratio, or other limits"
        )
    return bounds


def _in_groups(units: _Units) -> Selected:
    amount = units.amount
    assert amount.ratio is not None
    sets: dict[str, list[int]] = {}
    for i, names in enumerate(units.names):
        sets.setdefault(group_of(units.method.scope, names) or "", []).append(i)
    # Rules are about all weights; each group gets the numbers of its own.
    low = by_name(amount.min_ratio, units.names, 0.0, "min_ratio", left_out=amount.left_out)
    high = by_name(amount.max_ratio, units.names, 1.0, "max_ratio", left_out=amount.left_out)
    ratios = by_name(amount.ratio, list(sets), 0.0, left_out=[name for name, _ in units.method.scope.groups])
    masks: dict[int, Tensor] = {}
    nonfinite: dict[int, Tensor] = {}
    for chosen, ratio in zip(sets.values(), ratios, strict=True):
        part = units.subset(chosen)
        own = replace(amount, ratio=ratio)
        if amount.is_capped:
            called = [unit_group.name for unit_group in part.unit_groups]
            own = replace(
                own,
                min_ratio=dict(zip(called, [low[i] for i in chosen], strict=True)),
                max_ratio=dict(zip(called, [high[i] for i in chosen], strict=True)),
            )
        selected = _among_all(replace(part, amount=own))
        masks.update(zip(chosen, selected.masks, strict=True))
        nonfinite.update(zip(chosen, selected.nonfinite, strict=True))
    order = range(len(units.unit_groups))
    return Selected([masks[i] for i in order], torch.stack([nonfinite[i] for i in order]))


def _by_tensor(units: _Units) -> Selected:
    removed = [
        removed_in_all(size, dropped, units.amount, ratio)
        for size, ratio, dropped in zip(units.sizes, units.ratios(), units.dropped(), strict=True)
    ]
    key = keys(units.method, units.unit_groups, compared=False)
    return Selected(*ops.threshold(key.tensors, removed, bases=units.known_bases, masks=units.masks))


def _by_row(units: _Units) -> Selected:
    sizes, kept = [], []
    for unit_group, base, ratio in zip(units.unit_groups, units.bases, units.ratios(), strict=True):
        shape = unit_group.unit_shape
        columns = torch.Size(shape).numel() // max(1, count_of_rows(unit_group))
        left = columns if base is None else _left_in_rows(base, unit_group)
        sizes.append(max(1, columns))
        kept.append(columns - removed_in_all(columns, columns - left, units.amount, ratio))
    return Selected(
        *keep_in_rows(units.method, units.unit_groups, units.bases, units.masks, sizes, kept, along="row")
    )


def _left_in_rows(base: Tensor, unit_group: UnitGroup) -> int:
    left = outputs_first(base, unit_group).flatten(2).sum(2) if base.dim() > 1 else base.sum().reshape(1)
    if left.numel() and left.min() != left.max():
        raise ValueError(
            f"the rows of {unit_group.name} have from {int(left.min())} to {int(left.max())} units left; to lose "
            "more within scope row they need equally many: use scope.tensor(), or choose among all units"
        )
    return int(left.max()) if left.numel() else 0


def _n_of_m(units: _Units) -> Selected:
    ratios = None if units.amount.ratio is None else units.ratios()
    return Selected(*keep_n_of_m(units.method, units.unit_groups, units.bases, units.masks, units.amount, ratios))


def _in_columns(units: _Units) -> Selected:
    raise ValueError(
        "scope is columns, by which solvers choose as they go from column to column (pyprune.solvers); give "
        "scope.tensor() or scope.row()"
    )


_SELECT: Mapping[str, Callable[[_Units], Selected]] = {
    "model": _among_all,
    "tensor": _by_tensor,
    "row": _by_row,
    "columns": _in_columns,
    "n_of_m": _n_of_m,
    "group": _in_groups,
}


def _unit_bases(method: Method, unit_groups: Sequence[UnitGroup]) -> list[Tensor | None]:
    """Say which units are still kept, in part at least; None for unit groups that carry no masks."""
    if method.granularity.name == "element":
        return [unit_group.weight.base for unit_group in unit_groups]
    masked = [c for c in unit_groups if any(member.weight.base is not None for member in c.members)]
    tensors = [
        torch.ones_like(member.weight.values, dtype=torch.bool) if member.weight.base is None else member.weight.base
        for unit_group in masked
        for member in unit_group.members
    ]
    kept = dict(zip(map(id, masked), reduce_units(masked, tensors, None, "max"), strict=True))
    return [kept[id(unit_group)] > 0 if id(unit_group) in kept else None for unit_group in unit_groups]
