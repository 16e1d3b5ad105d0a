"""Save which weights carry masks, and put masks on a fresh model so that a checkpoint fits."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyprune.masks import attach
from pyprune.targets import Target, all_parameters, check_prunable, masks_of

_VERSION = 1


def get_config(model: nn.Module) -> dict[str, Any]:
    """Describe where the masks of a model are, in plain dicts and lists that torch.save and JSON take.

    The masks themselves are buffers, in ``model.state_dict()``.

    Example:
        >>> from pyprune import prune
        >>> get_config(prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5))
        {'version': 1, 'masks': [{'names': ['weight'], 'shape': [2, 4]}]}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    return {
        "version": _VERSION,
        "masks": [
            {"names": [owner.name for owner in target.owners], "shape": list(target.parameter.shape)}
            for target in masks_of(model)
        ],
    }


@torch.inference_mode(False)  # masks made under inference_mode could not be trained with
def load_from_config(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Put masks on a fresh dense model where ``config`` says, in place; return the model.

    The masks keep everything until ``model.load_state_dict`` brings the saved ones.

    Args:
        model: a dense model of the class and the sizes that were saved, with the same weights tied. It may be on
            the meta device; ``load_state_dict(..., assign=True)`` then brings the weights and the masks (and unties
            tied weights, as in a dense model).
        config: what `get_config` returned.

    Raises:
        TypeError, ValueError: if ``config`` is not such a dict or of another version, or does not fit the model.
            The model is then as it was.

    Example:
        >>> from pyprune import prune
        >>> pruned = prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> saved = {"state_dict": pruned.state_dict(), "config": get_config(pruned)}
        >>> fresh = load_from_config(nn.Linear(4, 2), saved["config"])
        >>> fresh.load_state_dict(saved["state_dict"])
        <All keys matched successfully>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    entries = _entries(config)
    for target in masks_of(model):
        raise ValueError(f"{target.name} carries a mask already; give a fresh dense model, or strip it first")
    by_name = {owner.name: target for target in all_parameters(model) for owner in target.owners}
    chosen = [_fitting(names, shape, by_name) for names, shape in entries]
    attach((target.owners, torch.ones_like(target.parameter, dtype=torch.bool)) for target in chosen)
    return model


def _entries(config: Mapping[str, Any]) -> list[tuple[list[str], list[int]]]:
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; give the dict that get_config returned")
    if config.get("version") != _VERSION:
        raise ValueError(
            f"config has version {config.get('version')!r}; this pyprune reads version {_VERSION}: give the dict "
            "that get_config returned, or use the pyprune that wrote it"
        )
    try:
        entries = [(list(entry["names"]), list(entry["shape"])) for entry in config["masks"]]
        for names, _ in entries:
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"{names} are no names")
    except (KeyError, TypeError) as error:
        raise ValueError(f"config is damaged ({error!r}); give the dict that get_config returned") from error
    return entries


def _fitting(names: list[str], shape: list[int], by_name: Mapping[str, Target]) -> Target:
    """Return the parameter that one entry of a config means, if it fits."""
    target = by_name.get(names[0]) if names else None
    if target is None:
        nearest = ", ".join(difflib.get_close_matches(names[0] if names else "", by_name, n=3, cutoff=0.0))
        raise ValueError(f"config masks {names}, which the model does not have; its nearest parameters: {nearest}")
    owned = [owner.name for owner in target.owners]
    if set(owned) != set(names):
        raise ValueError(
            f"config has one mask for {names}, the model one weight for {owned}; tie the weights as they were"
        )
    check_prunable(target, needs_values=False)
    if list(target.parameter.shape) != shape:
        raise ValueError(
            f"config has shape {shape} for {names[0]}, the model {list(target.parameter.shape)}; build the model "
            "with the sizes that were saved"
        )
    return target
