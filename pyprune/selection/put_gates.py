"""Put learned gates on a model: on all elements of its weights, or one on each coupled unit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from pyprune.checks import shown
from pyprune.console import listed, warn
from pyprune.methods.allocation import Amount, check_ratio
from pyprune.methods.granularity import Coupled, Granularity
from pyprune.methods.importance import magnitude
from pyprune.methods.method import METHODS, Method, PruneMode
from pyprune.methods.scope import tensor
from pyprune.modules.attachments import Attachment, Owner
from pyprune.modules.coverage import warn_of_missed
from pyprune.modules.forward_pass import attach_and_share
from pyprune.modules.gates import HardConcreteGate, StochasticGate, gates_of
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.targets import Target, find_targets
from pyprune.modules.undo import Change
from pyprune.modules.unit_gates import UnitGates, UnitsAlong
from pyprune.selection.choose_masks import choose_masks
from pyprune.selection.coupled import find_coupled
from pyprune.selection.find_prunable import check_kind

_KINDS = {
    PruneMode.UNSTRUCTURED_REGULARIZATION_BASED: StochasticGate,
    PruneMode.UNSTRUCTURED_HARD_CONCRETE: HardConcreteGate,
}


def put_gates(
    model: nn.Module,
    mode: PruneMode,
    amount: Amount,
    units: Method | None,
    ignored_scope: IgnoredScope | None,
    examples_inputs: Any,
    same_on_all_ranks: bool,
) -> None:
    """Do what `prune` says of learned gates."""
    kind = _KINDS[mode]
    if amount.ratio is not None:
        check_ratio(amount.ratio)
    if units is not None:
        gates = _gates_of_units(model, units, kind, ignored_scope, examples_inputs, same_on_all_ranks)
    else:
        gates = _gates_of_elements(model, kind, ignored_scope, examples_inputs, same_on_all_ranks)
    if amount.ratio is not None:
        warn(f"ratio does nothing in mode {mode.value}: the target belongs to RBLoss or LagrangianLoss")
    with Change(model):
        attach_and_share(model, gates)


def _gates_of_elements(
    model: nn.Module,
    kind: type[StochasticGate],
    ignored_scope: IgnoredScope | None,
    examples_inputs: Any,
    same_on_all_ranks: bool,
) -> list[tuple[Sequence[Owner], Attachment]]:
    targets = find_targets(model, ignored_scope, examples_inputs)
    check_kind(targets, kind)
    warn_of_missed(model, ignored_scope, targets, has_inputs=examples_inputs is not None)
    # Masks that drop nothing are made, and what is not finite is found on the way.
    choose_masks(METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL], Amount(0.0), targets, {}).check()
    return [(target.owners, target.attachment or _new_gate(target, kind, same_on_all_ranks)) for target in targets]


def _gates_of_units(
    model: nn.Module,
    method: Method,
    kind: type[StochasticGate],
    ignored_scope: IgnoredScope | None,
    examples_inputs: Any,
    same_on_all_ranks: bool,
) -> list[tuple[Sequence[Owner], Attachment]]:
    """Return gates for coupled units: one module for each group, and what lets its parameters feel them."""
    units = find_coupled(model, method, ignored_scope, examples_inputs)
    check_kind(units.targets, UnitGates)
    there = [target for target in units.targets if target.attachment is not None]
    kinds = {type(gate) for target in there for gate in gates_of(cast(UnitGates, target.attachment))}
    if (there and len(there) < len(units.targets)) or kinds - {kind}:
        raise ValueError(
            f"{listed([target.name for target in there])} carry gates of other units, or of another kind, than this "
            "call would put on; strip the model first"
        )
    if there:
        return [(target.owners, cast(UnitGates, target.attachment)) for target in there]
    choose_masks(method, Amount(0.0), units.targets, {}, coupled=units).check()
    parts: dict[Target, list[UnitsAlong]] = {target: [] for target in units.targets}
    for one in units.chosen:
        device = one.parts[0].target.parameter.device
        gate = kind((len(one),), same_on_all_ranks=same_on_all_ranks, device=device)
        for part in one.parts:
            parts[part.target].append(UnitsAlong(gate, part.dim, part.units_along(len(one)).to(device)))
    return [
        (target.owners, UnitGates(target.parameter.shape, along, on_target=target.parameter.dim() > 1))
        for target, along in parts.items()
    ]


def units_of_gates(name: str, method: Method | None, granularity: Granularity | None) -> Method | None:
    """Return a method with the coupled units that gates are for; None if they are on elements."""
    if granularity is None:
        return None
    if not isinstance(granularity, Granularity):
        raise TypeError(f"granularity is {shown(granularity)}; give granularity.coupled()")
    if method is not None:
        raise ValueError(
            f"granularity is for learned gates, and mode {name} chooses masks; give a Method with this granularity"
        )
    if granularity.coupled is None:
        raise ValueError(
            f"granularity is {granularity.name}; gates are put on elements, or on granularity.coupled() units. For "
            "blocks and channels of one weight see attach_gate"
        )
    if replace(granularity.coupled, heads=True, width=False) != Coupled():
        warn("of granularity.coupled gates take heads and width alone: a loss trains them")
    return Method(magnitude(), granularity, tensor())


def _new_gate(target: Target, kind: type[StochasticGate], same_on_all_ranks: bool) -> StochasticGate:
    weight = target.parameter
    return kind(weight.shape, same_on_all_ranks=same_on_all_ranks, device=weight.device)
