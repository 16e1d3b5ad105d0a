"""Save which weights carry masks and gates, and put them on a fresh model so that a checkpoint fits."""

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from pyprune.checks import shown
from pyprune.methods.layout import Layout, channels_shape
from pyprune.modules.attachments import Attachment, check_module, gate_name
from pyprune.modules.config_entries import VERSION, damaged, entries_of
from pyprune.modules.forward_pass import attach_and_share
from pyprune.modules.gates import HardConcreteGate, StochasticGate, check_gates
from pyprune.modules.mask_states import pack_bits, state_of, unpack_bits
from pyprune.modules.masks import FollowingMask, Mask
from pyprune.modules.targets import Target, all_parameters, attachments_of, check_prunable
from pyprune.modules.undo import Change
from pyprune.modules.unit_gates import UnitGates
from pyprune.modules.watching import watch
from pyprune.modules.zeros import hold_zeros, holds_in, settle_written

_M = TypeVar("_M", bound=nn.Module)

_KINDS = {kind.__name__: kind for kind in (StochasticGate, HardConcreteGate)}


def get_config(model: nn.Module) -> dict[str, Any]:
    """Describe the masks and gates of a model: what its state_dict lacks to go on with.

    The state_dict of a model with masks is that of a plain model with zeros. This has the masks, as bits, and what is
    parked under them; of gates only where they are, because their logits are in the state_dict.

    Returns:
        Dicts and lists of numbers, strings and tensors on the CPU, for `torch.save` (``weights_only`` reads it).

    Raises:
        TypeError, ValueError: if ``model`` is no module, or has gates of a class that is not pyprune's, or such that
            torch's parametrize put on.

    Example:
        >>> from pyprune import prune
        >>> config = get_config(prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5))
        >>> config["version"], config["masks"][0]["names"], len(config["masks"][0]["parked"])
        (2, ['weight'], 4)
    """
    check_module(model)
    check_gates(model)
    masks: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    settle_written(holds_in(model))
    attached = attachments_of(model)
    followed = {attachment: target.name for target, attachment in attached.items()}
    for target, attachment in attached.items():
        entry = {"names": [owner.name for owner in target.owners], "shape": list(target.parameter.shape)}
        if isinstance(attachment, Mask):
            state = {key: value for key, value in state_of(attachment).items() if key not in ("shape", "followers")}
            if isinstance(attachment, FollowingMask):
                name = followed.get(attachment.source)
                if name is None:  # the weight was stripped by itself, and there is nothing to follow
                    continue
                layout = attachment.layout
                state |= {"follows": name, "outputs": layout.outputs, "groups": layout.groups}
            elif not attachment.on_target:
                state["on_target"] = False
            masks.append(entry | state | {"parks": attachment.parks})
        elif isinstance(attachment, UnitGates):
            raise TypeError(
                f"{target.name} carries gates of coupled units, which a config cannot describe; build the model "
                "anew, put gates on by the same call of prune, and load the state_dict"
            )
        elif isinstance(attachment, StochasticGate):
            gates.append(entry | _describe(target, attachment))
    return {"version": VERSION, "masks": masks, "gates": gates}


@torch.inference_mode(False)  # masks made under inference_mode could not be trained with
def load_from_config(model: _M, config: Mapping[str, Any]) -> _M:
    """Put masks and gates on a fresh dense model where ``config`` says, in place; return the model.

    Masks are those that were saved, with what is parked under them; ``model.load_state_dict`` brings the rest, before
    or after.

    Args:
        model: a dense model of the class and the sizes that were saved, with the same weights tied. It may be on
            the meta device; ``load_state_dict(..., assign=True)`` then brings the weights, masks and logits (and
            unties tied weights, as in a dense model).
        config: what `get_config` returned.

    Raises:
        TypeError, ValueError: if ``config`` is not such a dict or of another version, or does not fit the model,
            or if gates are to go into DistributedDataParallel. The model is then as it was.

    Example:
        >>> from pyprune import prune
        >>> pruned = prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> saved = {"state_dict": pruned.state_dict(), "config": get_config(pruned)}
        >>> fresh = load_from_config(nn.Linear(4, 2), saved["config"])
        >>> fresh.load_state_dict(saved["state_dict"])
        <All keys matched successfully>
    """
    check_module(model)
    by_name = {owner.name: target for target in all_parameters(model) for owner in target.owners}
    masks, gates = entries_of(config, by_name.keys())
    for target in attachments_of(model):
        raise ValueError(f"{target.name} carries a mask or gate already; give a fresh dense model, or strip it first")
    attachments: dict[Target, Attachment] = {}
    # Followers after the masks that they follow.
    for entry in sorted(masks, key=lambda entry: "follows" in entry):
        target = _fitting(entry["names"], entry["shape"], by_name)
        if "follows" in entry:
            followed = by_name.get(entry["follows"])
            source = None if followed is None else attachments.get(followed)
            attachments[target] = _mask(entry, _follower(entry, source))
        else:
            attachments[target] = _mask(entry)
    for entry in gates:
        target = _fitting(entry["names"], entry["shape"], by_name)
        attachments[target] = _gate(entry, target.parameter)
    parked = {found: found.parked for found in attachments.values() if isinstance(found, Mask)}
    for mask in parked:
        mask.parked = None  # the weights are those of the fresh model yet
    with Change(model) as change:
        attach_and_share(model, [(target.owners, attachment) for target, attachment in attachments.items()])
        hold_zeros(parked)
        watch(model)
        change.finish(partial(_park, parked))
    return model


def _park(parked: Mapping[Mask, torch.Tensor | None]) -> None:
    for mask, values in parked.items():
        mask.parked = values


def upgrade_checkpoint(
    state_dict: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint of pyprune 0.1.0, which had parametrizations, as one of this version.

    Args:
        state_dict: of the model with masks or gates.
        config: what `get_config` returned for it.

    Returns:
        The state_dict of the model as it is now (dense names, zeros where masks drop, logits of gates as
        ``NAME_mask.logits``), and the config for `load_from_config`.

    Raises:
        TypeError, ValueError: if they are not such a checkpoint.

    Example:
        >>> old = {
        ...     "parametrizations.weight.original": torch.tensor([1.0, 2.0]),
        ...     "parametrizations.weight.0.mask": torch.tensor([True, False]),
        ... }
        >>> names = {"names": ["weight"], "shape": [2]}
        >>> state_dict, config = upgrade_checkpoint(old, {"version": 1, "masks": [names], "gates": []})
        >>> state_dict["weight"].tolist(), config["masks"][0]["parked"].tolist()
        ([1.0, 0.0], [2.0])
    """
    for argument, given in (("state_dict", state_dict), ("config", config)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} is {shown(given)}; give the two, both dicts, that pyprune 0.1.0 saved")
    version = config.get("version")
    if type(version) is not int or version != 1:
        raise ValueError(f"config has version {shown(version)}; only version 1 is brought up to date")
    state = dict(state_dict)
    try:
        masks = [dict(entry) for entry in config["masks"]]
        for entry in masks:
            for name in entry["names"]:
                raw, mask = state.pop(_old_key(name, "original")), state.pop(_old_key(name, "0.mask"))
                if raw.shape != mask.shape or mask.dtype is not torch.bool:
                    raise ValueError(f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}")
                state[name] = torch.where(mask, raw, torch.zeros_like(raw))
                entry |= {"bits": pack_bits(mask), "parked": raw[~mask].cpu(), "parks": True}
        for entry in config.get("gates", ()):
            for name in entry["names"]:
                state[name] = state.pop(_old_key(name, "original"))
                state[gate_name(name) + ".logits"] = state.pop(_old_key(name, "0.logits"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"state_dict and config do not belong together, or are damaged: {shown(error)}") from error
    return state, {**config, "version": VERSION, "masks": masks}


def _old_key(name: str, what: str) -> str:
    prefix, _, attribute = name.rpartition(".")
    return f"{prefix}.parametrizations.{attribute}.{what}".removeprefix(".")


def _describe(target: Target, gate: StochasticGate) -> dict[str, Any]:
    kind = type(gate).__name__
    if _KINDS.get(kind) is not type(gate):
        raise TypeError(f"{target.name} carries a {kind}; a config can describe {', '.join(_KINDS)}")
    # The weights of the fresh model may be of another dtype than those that were saved.
    dtype = "float32" if gate.logits.dtype == torch.float32 else "weight"
    return {"kind": kind, "options": gate.options() | {"gate_shape": list(gate.gate_shape), "dtype": dtype}}


def _mask(entry: Mapping[str, Any], following: Mask | None = None) -> Mask:
    """Return the mask of an entry, or what follows another one, with its state."""
    unit, bits = entry.get("unit"), unpack_bits(entry["bits"], entry["shape"])
    if following is not None and not torch.equal(following.mask, bits):
        raise damaged(f"the mask of {entry['names'][0]} is not that of the dead channels of {entry['follows']}")
    mask = following or Mask(bits, None if unit is None else tuple(unit), on_target=entry.get("on_target", True))
    mask.parks = entry.get("parks", True)
    mask.parked = None if entry["parked"] is None else entry["parked"].clone()
    return mask


def _follower(entry: Mapping[str, Any], source: Attachment | None) -> Mask:
    groups, outputs, follows = entry["groups"], entry.get("outputs"), entry["follows"]
    if outputs is None:  # as pyprune wrote it before: 0 groups where outputs come first
        outputs, groups = min(1, groups), max(1, groups)
    layout = Layout(outputs, None, groups)
    if (
        not isinstance(source, Mask)
        or not outputs < source.mask.dim()
        or source.mask.dim() < 2
        or groups < 1
        or source.mask.shape[0] % groups
        or math.prod(channels_shape(tuple(source.mask.shape), layout, "out")) != math.prod(entry["shape"])
    ):
        raise damaged(f"the mask of {entry['names'][0]} follows {follows!r}, which has none, or other channels")
    return FollowingMask(source, layout, entry["shape"])


def _gate(entry: Mapping[str, Any], weight: nn.Parameter) -> Attachment:
    kind, options, dtypes = (
        entry.get("kind"),
        entry.get("options"),
        {"float32": torch.float32, "weight": weight.dtype},
    )
    try:
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"its kind is {shown(kind)}; this pyprune knows {', '.join(_KINDS)}")
        if not isinstance(options, Mapping) or options.get("dtype") not in list(dtypes):
            raise ValueError(f"its options are {shown(options)}; they must name a dtype, {' or '.join(dtypes)}")
        values = {**options, "dtype": dtypes[options["dtype"]]}
        return _KINDS[kind](weight.shape, device=weight.device, **values)
    except (TypeError, ValueError) as error:
        names = ", ".join(entry["names"])
        raise damaged(f"the gate of {names}: {error}") from error


def _fitting(names: Sequence[str], shape: Sequence[int], by_name: Mapping[str, Target]) -> Target:
    """Return the parameter that one entry of a config means, if it fits."""
    target = by_name.get(names[0]) if names else None
    if target is None:
        nearest = ", ".join(difflib.get_close_matches(names[0] if names else "", by_name, n=3, cutoff=0.0))
        raise ValueError(f"config names {names}, which the model does not have; its nearest parameters: {nearest}")
    owned = [owner.name for owner in target.owners]
    if set(owned) != set(names):
        raise ValueError(f"config has {names} as one weight, the model {owned}; tie the weights as they were")
    check_prunable(target, needs_values=False)
    if list(target.parameter.shape) != list(shape):
        raise ValueError(
            f"config has shape {shape} for {names[0]}, the model {list(target.parameter.shape)}; build the model "
            "with the sizes that were saved"
        )
    return target
