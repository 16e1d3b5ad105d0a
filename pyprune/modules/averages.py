"""Other models that are to have the same zeros: averages of the weights, and what adapters were merged into."""

import gc
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import check_module, dense_parameters
from pyprune.modules.holding import hold_zeros
from pyprune.modules.masks import Mask
from pyprune.modules.sharding import local_part
from pyprune.modules.targets import Target, all_parameters, attachments_of

# torch.compile puts this into names; a checkpoint of the plain model does not have it.
_WRAPPED = "_orig_mod."


def plain_name(name: str) -> str:
    """Return the name that a parameter has without `torch.compile`.

    Example:
        >>> plain_name("_orig_mod.layer.weight")
        'layer.weight'
    """
    return name.replace(_WRAPPED, "")


@torch.no_grad()
def apply_masks(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    """Zero in a model what masks drop, by name; masks that it carries itself become these.

    Raises:
        TypeError, ValueError: if it is no module, lacks a parameter, or has it in another shape. Nothing is changed
            then.
    """
    check_module(model)
    there: dict[str, Target] = {
        plain_name(owner.name): target for target in all_parameters(model) for owner in target.owners
    }
    shapes = {name: tuple(local_part(target.parameter).shape) for name, target in there.items()}
    wrong = [
        f"{name} {tuple(mask.shape)} (there: {shapes.get(name, 'none')})"
        for name, mask in masks.items()
        if shapes.get(name) != mask.shape
    ]
    if wrong:
        raise ValueError(
            f"{type(model).__name__} does not have the parameters that are held: {', '.join(wrong)}. Give a "
            "model of the same architecture, without wrappers around it, its adapters merged and removed"
        )
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    carried: list[Mask] = []
    for name, mask in masks.items():
        target = there[name]
        weight, attached = local_part(target.parameter), target.attachment
        if isinstance(attached, Mask):
            attached.mask.copy_(mask)
            attached.parked = None
            carried.append(attached)
            continue
        tensors, kept = by_device.setdefault(weight.device, ([], []))
        tensors.append(weight)
        kept.append(mask.to(weight.device))
    for tensors, kept in by_device.values():
        ops.fold(tensors, kept)
    hold_zeros(carried)


def reapply(model: nn.Module, other: nn.Module) -> None:
    """Zero in another model, by name, what the masks of this one drop.

    For an average of the weights (EMA, SWA) that was made before the masks or has old ones, or for weights that
    changed as a whole. Values under masks fade in an average, but do not become zero by themselves. A `Pruner` does
    this for averages of torch, timm, Lightning and Ultralytics that it finds, whenever its masks change.

    Args:
        model: has masks.
        other: has parameters of the same names and shapes, of any dtype and device.

    Raises:
        TypeError, ValueError: if one of them is no module, ``model`` has no masks, or ``other`` lacks a parameter or
            has it in another shape. Nothing is changed then.

    Example:
        >>> import copy
        >>> from pyprune import prune
        >>> model = nn.Linear(4, 4)
        >>> average = copy.deepcopy(model)
        >>> _ = prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> reapply(model, average)
        >>> int((average.weight == 0).sum())
        12
    """
    check_module(model)
    masks = masks_by_name(model)
    if not masks:
        raise ValueError(f"{type(model).__name__} carries no masks; call this before pyprune.strip")
    apply_masks(masks, other)


def masks_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks that a model carries by the plain names of its parameters."""
    found = attachments_of(model).items()
    return {plain_name(target.name): mask.mask for target, mask in found if isinstance(mask, Mask)}


# Who keeps an average of a model, by class, and in which attribute.
_KEEPERS = {
    "AveragedModel": "module",  # torch.optim.swa_utils; Lightning's WeightAveraging has one
    "StochasticWeightAveraging": "_average_model",  # Lightning
    "ModelEma": "ema",  # timm
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "ModelEMA": "ema",  # Ultralytics
}


class Averages:
    """The averages of a model that well-known classes keep, found once among all objects."""

    def __init__(self, model: nn.Module) -> None:
        self._keepers: list[tuple[ref[Any], str]] = []
        names = _names(model)
        for found in gc.get_objects():
            attribute = _KEEPERS.get(type(found).__name__)
            average = None if attribute is None else getattr(found, attribute, None)
            if attribute is None or not isinstance(average, nn.Module) or average is model:
                continue
            if _names(average) == names:
                self._keepers.append((ref(found), attribute))

    def apply(self, model: nn.Module) -> None:
        """Give them the zeros of the model."""
        if not self._keepers:
            return
        masks = masks_by_name(model)
        for keeper, attribute in self._keepers:
            average = getattr(keeper(), attribute, None)
            if isinstance(average, nn.Module) and _names(average) == _names(model):
                apply_masks(masks, average)


def _names(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(plain_name(owner.name), parameter.shape) for owner, parameter in dense_parameters(model)]
