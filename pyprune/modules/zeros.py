"""What is done to the zeros of many parameters at once: made, put back, looked after what wrote over them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import MASKS, Owner
from pyprune.modules.holding import HELD, Hold
from pyprune.modules.sharding import local_part


def holds_in(model: nn.Module) -> list[Hold]:
    """List what is held in a model, each once."""
    found: dict[Hold, None] = {}
    for module in model.modules():
        found |= dict.fromkeys(module.__dict__.get(MASKS, {}).values())
        # A tied weight may have its mask at a place outside of this model.
        held = (HELD.get(id(parameter)) for parameter in module._parameters.values() if parameter is not None)
        found |= dict.fromkeys(hold for hold in held if hold is not None)
    return list(found)


def check_places(model: nn.Module) -> None:
    """Raise if the parameter under a mask was taken away, as a parametrization does.

    Raises:
        ValueError: with the name of the weight and what is on it.
    """
    for name, module in model.named_modules():
        for attribute in module.__dict__.get(MASKS, {}):
            owner = Owner(f"{name}.{attribute}" if name else attribute, module, attribute)
            if attribute not in module._parameters and owner.foreign_steps:
                raise ValueError(
                    f"{owner.name} got another parametrization ({', '.join(owner.foreign_steps)}) over its mask; "
                    "remove that one first"
                )


def is_there(parameter: Tensor) -> bool:
    """Whether a parameter has values that can be written to."""
    return not parameter.is_meta and not parameter.is_inference()


def _by_device(holds: Iterable[Hold]) -> Iterator[list[Hold]]:
    groups: dict[torch.device, list[Hold]] = {}
    for hold in holds:
        if hold.parameter is not None and is_there(hold.parameter):
            groups.setdefault(hold.parameter.device, []).append(hold)
    yield from groups.values()


@torch.inference_mode(False)
@torch.no_grad()
def hold_zeros(holds: Iterable[Hold]) -> None:
    """Zero what masks drop, and park what was there, as after any change of masks: a call of a kernel per device.

    If it is interrupted, what is not zero any more is parked; and `pyprune.modules.undo` can go back.
    """
    holds = list(holds)
    for group in _by_device(holds):
        parking = [one for one in group if one.parks]
        for one in parking:
            one.parked = _weight(one).detach().new_empty(0)
        ops.park([_weight(one) for one in parking], [one.mask for one in parking], into=_parked(parking))
        if others := [one for one in group if not one.parks]:
            ops.fold([local_part(_weight(one)) for one in others], [one.local_mask for one in others])
    for one in holds:
        one.mask_changed()
        one.saw()
        one.is_raw = False


@torch.inference_mode(False)
@torch.no_grad()
def clear(holds: Iterable[Hold]) -> None:
    """Zero what masks drop where it is not zero; it is no raw value. Where it is zero, nothing is written."""
    for group in _by_device(holds):
        weights, masks = [local_part(_weight(one)) for one in group], [one.local_mask for one in group]
        written = list(itertools.compress(range(len(group)), ops.probe(weights, masks, None)))
        ops.fold([weights[i] for i in written], [masks[i] for i in written])
        for i in written:
            group[i].saw()


@torch.inference_mode(False)
@torch.no_grad()
def release(holds: Iterable[Hold]) -> None:
    """Put back what is parked; nothing is held until `hold_zeros`."""
    holds = list(holds)
    settle_written(holds)
    for group in _by_device(holds):
        parked = [one for one in group if one.parked is not None]
        for one in group:
            one.is_raw = True
        ops.unpark(
            [_weight(one) for one in parked],
            [one.mask for one in parked],
            [one.parked_there() for one in parked],
        )
        for one in group:
            one.parked = None
            one.saw()


def raw_values(hold: Hold) -> Tensor:
    """Return the values that a parameter had without zeros: itself if nothing is parked, else a new tensor."""
    settle_written([hold])
    weight = _weight(hold).detach()
    if hold.parked is None or hold.is_raw:
        return weight
    weight = weight.clone()
    ops.unpark([weight], [hold.mask], [hold.parked_there()])
    return weight


def settle_written(holds: Iterable[Hold]) -> None:
    """Do what the next forward pass would do for what was written to, before masks and raw values are looked at."""
    settle([hold for hold in holds if not hold.is_raw and hold.is_written()])


@torch.inference_mode(False)
@torch.no_grad()
def settle(holds: Sequence[Hold]) -> None:
    """Take what was written over zeros for the raw values, and zero it. A zero that was written changes nothing."""
    if not holds:
        return
    for one in holds:
        _ = one.mask  # follows a weight that was resized, and so does what is parked
        _settle_overwritten(one)  # an interruption left it
    for group in _by_device(holds):
        parking = [one for one in group if one.parks]
        into = [_weight(one).detach().new_empty(0) for one in parking]
        for one, values in zip(parking, into, strict=True):
            one.overwritten = values
        ops.park([_weight(one) for one in parking], [one.mask for one in parking], into=into)
        if others := [one for one in group if not one.parks]:
            ops.fold([local_part(_weight(one)) for one in others], [one.local_mask for one in others])
    for one in holds:
        _settle_overwritten(one)
        one.saw()


def _settle_overwritten(hold: Hold) -> None:
    written, parked = hold.overwritten, hold.parked
    if written is not None and written.numel():
        if parked is None:
            parked = written
        elif not hold.is_stepping:
            there = hold.parked_there()
            parked = torch.where(written != 0, written, there)
    vars(hold).update(parked=parked, overwritten=None)  # together, though someone may interrupt


def _parked(holds: Iterable[Hold]) -> list[Tensor]:
    return [hold.parked for hold in holds if hold.parked is not None]


def _weight(hold: Hold) -> nn.Parameter:
    assert hold.parameter is not None
    return hold.parameter


@torch.no_grad()
def fold_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Zero in each tensor what its mask drops: one call per device; of a sharded one in this rank's part."""
    calls: dict[tuple[torch.device, int], tuple[list[Tensor], list[Tensor]]] = {}
    seen: Counter[int] = Counter()
    for tensor, mask in pairs:
        part = local_part(tensor)
        # What load_state_dict(assign=True) untied is in the same memory, and one call must not get that twice.
        tensors, masks = calls.setdefault((tensor.device, seen[part.data_ptr()]), ([], []))
        seen[part.data_ptr()] += part.numel() > 0
        tensors.append(part)
        masks.append(mask.to(tensor.device))
    for tensors, masks in calls.values():
        ops.fold(tensors, masks)
