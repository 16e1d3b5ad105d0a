"""Choose the masks of a model's weights: from targets to unit groups, and back."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.console import listed, warn
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method
from pyprune.methods.name_rules import all_above, meaning, nearest_to
from pyprune.methods.scope import group_of
from pyprune.methods.unit_groups import Member, UnitGroup, Weight
from pyprune.modules.masks import Mask, NewMask, channels_alive
from pyprune.modules.targets import Target
from pyprune.modules.zero_weights import are_zero
from pyprune.selection.attention import find_attention, names_of
from pyprune.selection.choose_coupled import choose_coupled
from pyprune.selection.choose_units import choose_units, ratios_of
from pyprune.selection.coupled import CoupledUnits


def prunable_targets(method: Method, targets: Sequence[Target], left_out: Sequence[str] = ()) -> list[Target]:
    """Leave out the targets that the groups of a scope do not name, or that heads have no part in.

    Args:
        method: with the granularity and the scope.
        targets: what was found.
        left_out: names that groups may have, too, and that are no targets: of weights that are zero everywhere.
    """
    heads = method.granularity.heads
    if heads is not None:
        within = set(names_of(find_attention(targets, heads)))
        targets = [target for target in targets if target.name in within]
    if method.scope.name != "group":
        return list(targets)
    names = {target: [owner.name for owner in target.owners] for target in targets}
    every = [*(name for some in names.values() for name in some), *left_out]
    known = all_above(every)
    for group, rules in method.scope.groups:
        for rule in rules:
            if meaning(rule, known) is None:
                raise ValueError(f"{rule!r:.80} of group {group!r} matches no weight {nearest_to(rule, every)}")
    return [target for target, some in names.items() if group_of(method.scope, some) is not None]


def left_out_by(method: Method, found: Sequence[Target], targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Say why `prunable_targets` left out what is not among ``targets``, for `warn_of_missed`."""
    chosen = set(targets)
    why: dict[str, list[Target]] = {}
    for target in found:
        if target not in chosen:
            names = [owner.name for owner in target.owners]
            in_no_group = method.scope.name == "group" and group_of(method.scope, names) is None
            why.setdefault("in no group of the scope" if in_no_group else "no part of attention heads", []).append(
                target
            )
    return why


@dataclass(frozen=True)
class Choice:
    """New masks, and what says whether they mean anything."""

    masks: dict[Target, NewMask]
    what: str
    nonfinite: list[tuple[list[str], Tensor]]

    def check(self) -> None:
        """Raise ValueError if a score was NaN or infinite. This waits for the device.

        Raises:
            ValueError: with the names of the weights.
        """
        bad = [
            f"{count} in {name}"
            for names, counts in self.nonfinite
            for name, count in zip(names, counts.tolist(), strict=True)
            if count
        ]
        if bad:
            raise ValueError(
                f"NaN or infinite {self.what}: {', '.join(bad)}. Repair them, or name them in ignored_scope"
            )

    def tell(self, model: nn.Module, ends: Collection[nn.Module]) -> None:
        """Warn of layers without a weight, and of outputs of the model without one. This waits for the device.

        Args:
            model: the model.
            ends: the layers that put out what the model does.
        """
        empty = are_zero([new.mask for new in self.masks.values()])
        if any(empty):
            names = [target.name for target, is_empty in zip(self.masks, empty, strict=True) if is_empty]
            warn(
                f"the masks drop all of {listed(names)}: nothing goes through these layers any more. Give a "
                "max_ratio, such as 0.9, or let the units of each weight compete among themselves: scope.tensor()"
            )
        cut = [
            target.name
            for target, new in self.masks.items()
            if new.unit is not None
            and any(owner.module in ends and owner.module is not model for owner in target.owners)
            and target.layout.outputs is not None
            and int(ops.count_zeros([channels_alive(new.mask, target.layout)])) > 0
        ]
        if cut:
            warn(
                f"outputs of the last layer, {listed(cut)}, are pruned: where the model puts them out, as classes, "
                "they are constant. To keep them, name it in ignored_scope"
            )


def choose_masks(
    method: Method,
    amount: Amount,
    targets: Sequence[Target],
    statistics: Mapping[Target, Tensor | None],
    *,
    into: Mapping[Target, Tensor] | None = None,
    unit_groups: Sequence[UnitGroup] | None = None,
    coupled: CoupledUnits | None = None,
) -> Choice:
    """Choose new masks for targets by a method, from their weights and statistics; nothing is put on them yet.

    Args:
        method, amount: how and how much, from `pyprune.methods.method.check_amount`.
        targets: between which weights.
        statistics: what the importance was measured from, of each target that it needs it for.
        into: bool tensors to write the masks to, laid out as the weights; new ones if None.
        unit_groups: what `unit_groups_of` returns for these, where it is known from before.
        coupled: the units, if they are coupled; all its targets get new tensors.
    """
    what = "weights" if method.importance.power is not None else f"scores by {method.importance.name}"
    if coupled is not None:
        found = choose_coupled(method, amount, coupled, statistics)
        masks = {
            target: NewMask(target.owners, mask, on_target=target.parameter.dim() > 1)
            for target, mask in found.masks.items()
        }
        return Choice(masks, what, [(found.names, found.nonfinite)])
    if unit_groups is None:
        unit_groups = unit_groups_of(method, amount, targets, statistics)
    by_name = {target.name: target for target in targets}
    # Ratios by name or size are about all weights, wherever they are.
    ratios = ratios_of(method, amount, unit_groups)
    chosen: dict[Target, NewMask] = {}
    nonfinite: list[tuple[list[str], Tensor]] = []
    for together in _by_device(method, unit_groups):
        part = amount if ratios is None else replace(amount, ratio={c.name: ratios[c.name] for c in together})
        members = [member for unit_group in together for member in unit_group.members]
        owners = [by_name[member.weight.name] for member in members]
        selected = choose_units(method, together, part, None if into is None else [into[target] for target in owners])
        for target, member, mask in zip(owners, members, selected.masks, strict=True):
            unit = None if method.granularity.name == "element" else member.block
            chosen[target] = NewMask(target.owners, mask, unit)
        nonfinite.append(([unit_group.name for unit_group in together], selected.nonfinite))
    return Choice(chosen, what, nonfinite)


def units_of(method: Method, targets: Sequence[Target]) -> dict[str, tuple[int, ...] | None]:
    """Return the size of what goes as one, by the name of the weight; None for single elements, and coupled units."""
    if method.granularity.name in ("element", "coupled"):
        return {target.name: None for target in targets}
    unit_groups = unit_groups_of(method, Amount(), targets, {})
    return {member.weight.name: member.block for unit_group in unit_groups for member in unit_group.members}


def unit_groups_of(
    method: Method, amount: Amount, targets: Sequence[Target], statistics: Mapping[Target, Tensor | None]
) -> list[UnitGroup]:
    """Cut weights into the units of a method: a group for each weight, or for the heads of a layer."""

    def weight_of(target: Target) -> Weight:
        carried = target.attachment if amount.has_bases else None
        base = carried.mask if isinstance(carried, Mask) else None
        if amount.from_remaining and base is None:  # what was stripped has zeros where a mask was
            base = target.parameter.detach() != 0
        return Weight(
            target.name,
            target.parameter,
            target.layout,
            base,
            statistics.get(target),
            tuple(owner.name for owner in target.owners),
        )

    heads = method.granularity.heads
    if heads is None:
        weights = [weight_of(target) for target in targets]
        return [UnitGroup(w.name, (Member(w, method.granularity.block_of(w)),)) for w in weights]
    return [
        UnitGroup(name, tuple(Member(weight_of(target), block, stacked) for target, block, stacked in parts))
        for name, parts in find_attention(targets, heads).items()
    ]


def _by_device(method: Method, unit_groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """Split what does not compete by device; raise if what does is on several."""
    devices: dict[torch.device, list[UnitGroup]] = {}
    for unit_group in unit_groups:
        places = {member.weight.values.device for member in unit_group.members}
        if len(places) > 1:
            raise ValueError(f"the weights of {unit_group.name} are on several devices; move them to one")
        devices.setdefault(places.pop(), []).append(unit_group)
    if method.scope.weights_compete and len(devices) > 1:
        raise ValueError(
            f"the weights are on {', '.join(map(str, devices))}; they compete with each other and must be on one "
            "device. Move the model, or use a local mode (UNSTRUCTURED_MAGNITUDE_LOCAL, scope.tensor())"
        )
    return list(devices.values())
