"""Save which weights carry masks and gates, and put them on a fresh model so that a checkpoint fits."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyprune.modules.attachments import Attachment, check_module
from pyprune.modules.forward_pass import attach_and_share
from pyprune.modules.gates import HardConcreteGate, StochasticGate, check_gates
from pyprune.modules.masks import FollowingMask, Mask
from pyprune.modules.targets import Target, all_parameters, attachments_of, check_prunable

_VERSION = 1
_KINDS = {kind.__name__: kind for kind in (StochasticGate, HardConcreteGate)}


def get_config(model: nn.Module) -> dict[str, Any]:
    """Describe where the masks and gates of a model are, in plain dicts and lists that torch.save and JSON take.

    The masks themselves are buffers, and the logits of gates parameters, in ``model.state_dict()``.

    Raises:
        TypeError, ValueError: if ``model`` is no module, or has gates of a class that is not pyprune's, or such that
            torch's parametrize put on.

    Example:
        >>> from pyprune import prune
        >>> get_config(prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5))
        {'version': 1, 'masks': [{'names': ['weight'], 'shape': [2, 4]}], 'gates': []}
    """
    check_module(model)
    check_gates(model)
    masks: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    attached = attachments_of(model)
    followed = {attachment: target.name for target, attachment in attached.items()}
    for target, attachment in attached.items():
        entry = {"names": [owner.name for owner in target.owners], "shape": list(target.parameter.shape)}
        if isinstance(attachment, FollowingMask):
            name = followed.get(attachment.source)
            if name is not None:  # else the weight was stripped by itself, and there is nothing to follow
                masks.append(entry | {"follows": name, "groups": attachment.groups})
        elif isinstance(attachment, Mask):
            masks.append(entry | ({} if attachment.unit is None else {"unit": list(attachment.unit)}))
        elif isinstance(attachment, StochasticGate):
            gates.append(entry | _describe(target, attachment))
    return {"version": _VERSION, "masks": masks, "gates": gates}


@torch.inference_mode(False)  # masks made under inference_mode could not be trained with
def load_from_config(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Put masks and gates on a fresh dense model where ``config`` says, in place; return the model.

    They keep everything until ``model.load_state_dict`` brings the saved ones.

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
    masks, gates = _entries(config)
    for target in attachments_of(model):
        raise ValueError(f"{target.name} carries a mask or gate already; give a fresh dense model, or strip it first")
    by_name = {owner.name: target for target in all_parameters(model) for owner in target.owners}
    attachments: dict[Target, Attachment] = {}
    # Followers after the masks that they follow.
    for entry in sorted(masks, key=lambda entry: "follows" in entry):
        target = _fitting(entry["names"], entry["shape"], by_name)
        if "follows" in entry:
            followed = by_name.get(entry["follows"])
            attachments[target] = _follower(entry, None if followed is None else attachments.get(followed))
        else:
            attachments[target] = _mask(entry, target.parameter)
    for entry in gates:
        target = _fitting(entry["names"], entry["shape"], by_name)
        attachments[target] = _gate(entry, target.parameter)
    attach_and_share(model, [(target.owners, attachment) for target, attachment in attachments.items()])
    for attachment in attachments.values():
        if isinstance(attachment, FollowingMask):
            attachment.link()
    return model


def _describe(target: Target, gate: StochasticGate) -> dict[str, Any]:
    kind = type(gate).__name__
    if _KINDS.get(kind) is not type(gate):
        raise TypeError(f"{target.name} carries a {kind}; a config can describe {', '.join(_KINDS)}")
    # The weights of the fresh model may be of another dtype than those that were saved.
    dtype = "float32" if gate.logits.dtype == torch.float32 else "weight"
    return {"kind": kind, "options": gate.options() | {"gate_shape": list(gate.gate_shape), "dtype": dtype}}


def _mask(entry: Mapping[str, Any], weight: nn.Parameter) -> Attachment:
    all_kept, unit = torch.ones_like(weight, dtype=torch.bool), entry.get("unit")
    if unit is None:
        return Mask(all_kept)
    if len(unit) != weight.dim() or not all(isinstance(size, int) and size > 0 for size in unit):
        names = ", ".join(entry["names"])
        raise ValueError(f"config has units of {unit!r} for {names}; give the dict that get_config returned")
    return Mask(all_kept, tuple(unit))


def _follower(entry: Mapping[str, Any], source: Attachment | None) -> Attachment:
    groups = entry.get("groups")
    if not isinstance(source, Mask) or not isinstance(groups, int) or source.mask.dim() < 2:
        names = ", ".join(entry["names"])
        raise ValueError(
            f"config says that the mask of {names} follows {entry['follows']!r}, which has none; give the dict that "
            "get_config returned"
        )
    return FollowingMask(source, groups)


def _gate(entry: Mapping[str, Any], weight: nn.Parameter) -> Attachment:
    kind, options, dtypes = (
        entry.get("kind"),
        entry.get("options"),
        {"float32": torch.float32, "weight": weight.dtype},
    )
    try:
        if kind not in _KINDS:
            raise ValueError(f"its kind is {kind!r}; this pyprune knows {', '.join(_KINDS)}")
        if not isinstance(options, Mapping) or options.get("dtype") not in dtypes:
            raise ValueError(f"its options are {options!r}; they must name a dtype, {' or '.join(dtypes)}")
        values = {**options, "dtype": dtypes[options["dtype"]]}
        return _KINDS[kind](weight.shape, device=weight.device, **values)
    except (TypeError, ValueError) as error:
        names = ", ".join(entry["names"])
        raise ValueError(
            f"config has a damaged gate for {names}: {error}; give the dict that get_config returned"
        ) from error


def _entries(config: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return those of masks and those of gates."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; give the dict that get_config returned")
    if config.get("version") != _VERSION:
        raise ValueError(
            f"config has version {config.get('version')!r}; this pyprune reads version {_VERSION}: give the dict "
            "that get_config returned, or use the pyprune that wrote it"
        )
    try:
        masks, gates = list(config["masks"]), list(config.get("gates", ()))
        for entry in (*masks, *gates):
            list(entry["shape"])
            if not all(isinstance(name, str) for name in entry["names"]):
                raise TypeError(f"{entry['names']} are no names")
    except (KeyError, TypeError) as error:
        raise ValueError(f"config is damaged ({error!r}); give the dict that get_config returned") from error
    return masks, gates


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
