"""Checkpoints of a masked model that are those of the plain model, and what they leave out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyprune.modules.attachments import Owner
from pyprune.modules.dead_channels import update_followers
from pyprune.modules.masks import FollowingMask, Mask
from pyprune.modules.targets import Target, attachments_of


def keep_plain(model: nn.Module) -> list[RemovableHandle]:
    """Make ``state_dict`` and ``load_state_dict`` of a model with masks those of the model that `strip` would leave.

    Trainers save and load a model by themselves, and into models without masks: with these hooks
    ``from_pretrained`` and ``load_from_checkpoint`` work. Loading drops what is zero in the checkpoint.

    Example:
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> hooks = keep_plain(linear)
        >>> sorted(linear.state_dict())
        ['bias', 'weight']
    """
    return [
        model.register_state_dict_post_hook(_to_plain),
        model.register_load_state_dict_pre_hook(_from_plain),
        model.register_load_state_dict_post_hook(lambda module, _: update_followers(module)),
    ]


def masked_state(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return what a plain checkpoint lacks: the masks, and what the raw weights are where they drop.

    Example:
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> {name: list(part) for name, part in masked_state(linear).items()}
        {'masks': ['weight'], 'dropped': ['weight']}
    """
    masks = _masks(model)
    return {
        "masks": {target.name: attached.mask.cpu() for target, attached in masks.items()},
        "dropped": {
            target.name: target.parameter.detach()[~attached.mask].cpu() for target, attached in masks.items()
        },
    }


def load_masked_state(model: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Bring masks and raw weights to what `masked_state` returned, on a model that got the plain checkpoint.

    Raises:
        ValueError: if other weights carry masks.
    """
    masks = {target.name: (target.parameter, attached) for target, attached in _masks(model).items()}
    saved = state["masks"]
    different = sorted(set(masks) ^ set(saved)) + [
        name for name in set(masks) & set(saved) if masks[name][1].mask.shape != saved[name].shape
    ]
    if different:
        raise ValueError(
            f"the masks of the checkpoint and of the model differ in {', '.join(different[:8])}; resume with the "
            "model and the pruning that were saved"
        )
    with torch.no_grad():
        for name, (parameter, attached) in masks.items():
            attached.mask.copy_(saved[name])
            dropped = state["dropped"][name].to(parameter.device, parameter.dtype)
            parameter.masked_scatter_(~attached.mask, dropped)


def _masks(model: nn.Module) -> dict[Target, Mask]:
    return {target: attached for target, attached in attachments_of(model).items() if isinstance(attached, Mask)}


def _attached_names(owner: Owner, prefix: str) -> tuple[str, str]:
    """Return where a state_dict has the raw weight and the mask of an owner."""
    path = prefix + owner.name.removesuffix(owner.attribute) + f"parametrizations.{owner.attribute}."
    return path + "original", path + "0.mask"


@torch.no_grad()
def _to_plain(model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for target, attached in _masks(model).items():
        value = attached(target.parameter)
        for owner in target.owners:
            raw, mask = _attached_names(owner, prefix)
            del state[raw], state[mask]
            state[prefix + owner.name] = value


def _from_plain(model: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    for target, attached in _masks(model).items():
        for owner in target.owners:
            if prefix + owner.name in state:
                value = state.pop(prefix + owner.name)
                raw, mask = _attached_names(owner, prefix)
                state[raw] = value
                # A bias that is zero by chance is not dropped; those masks follow the weights'.
                state[mask] = attached.mask if isinstance(attached, FollowingMask) else value != 0
