"""Other models that are to have the same zeros: averages of the weights, and what adapters were merged into."""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pyprune.console import warn
from pyprune.modules.attachments import check_module, dense_parameters
from pyprune.modules.masks import Mask, changing_masks, masks_by_target
from pyprune.modules.sharding import local_part
from pyprune.modules.targets import Target, all_parameters
from pyprune.modules.undo import Change
from pyprune.modules.zeros import fold_all


@torch.no_grad()
def apply_masks(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    """Zero in a model what masks drop, by name; masks that it carries itself become these.

    Raises:
        TypeError, ValueError: if it is no module, lacks a parameter, or has it in another shape. Nothing is changed
            then.
    """
    check_module(model)
    there: dict[str, Target] = {owner.name: target for target in all_parameters(model) for owner in target.owners}
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
    carried = {name: attached for name in masks if isinstance(attached := there[name].attachment, Mask)}
    plain = [(there[name].parameter, mask) for name, mask in masks.items() if name not in carried]
    with Change() as change:
        with changing_masks(carried.values()):
            for name, attached in carried.items():
                attached.mask = masks[name].to(attached.mask.device, copy=True)
        change.finish(partial(fold_all, plain))


def reapply(model: nn.Module, other: nn.Module) -> None:
    """Zero in another model, by name, what the masks of this one drop.

    For an average of the weights (EMA, SWA) that was made before the masks or has old ones, or for weights that
    changed as a whole. Values under masks fade in an average, but do not become zero by themselves. A `Pruner` does
    this for averages of torch, timm, Lightning and Ultralytics that it finds, after the last update of its masks:
    those with the same names and shapes that point the same way.

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
    check_module(other, "other")
    apply_masks(masks, other)


def masks_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks that a model carries by the plain names of its parameters."""
    return {target.name: mask.mask for target, mask in masks_by_target(model).items()}


# Who keeps an average of a model: module, class, and the attribute with the average.
_KEEPERS = (
    ("torch.optim.swa_utils", "AveragedModel", "module"),  # Lightning's WeightAveraging has one
    ("lightning.pytorch.callbacks", "StochasticWeightAveraging", "_average_model"),
    ("pytorch_lightning.callbacks", "StochasticWeightAveraging", "_average_model"),
    ("timm.utils.model_ema", "ModelEma", "ema"),
    ("timm.utils.model_ema", "ModelEmaV2", "module"),
    ("timm.utils.model_ema", "ModelEmaV3", "module"),
    ("ultralytics.utils.torch_utils", "ModelEMA", "ema"),
)


def averages_of(model: nn.Module) -> list[nn.Module]:
    """Find the averages of a model that well-known classes keep, among all objects.

    An average has the names and shapes of the model and points the same way: that of another model, though it was
    built alike, does not. A warning says that there is such a one, because it may be an average after all.

    Example:
        >>> from pyprune import prune
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = nn.Linear(4, 64)
        >>> average = AveragedModel(model)
        >>> averages_of(prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)) == [average.module]
        True
    """
    kept_in: dict[type, str] = {}
    for module, name, attribute in _KEEPERS:
        if module in sys.modules and isinstance(found := getattr(sys.modules[module], name, None), type):
            kept_in |= dict.fromkeys(_with_subclasses(found), attribute)
    found_in = {
        id(average): average
        for keeper in gc.get_referrers(*kept_in)
        if type(keeper) in kept_in
        and isinstance(average := getattr(keeper, kept_in[type(keeper)], None), nn.Module)
        and average is not model
    }
    names = _names(model) if found_in else []
    alike = [one for one in found_in.values() if _names(one) == names and not _is_of_another(one, model)]
    averages = [one for one in alike if _points_the_same_way(one, model)]
    if len(averages) < len(alike):
        warn(
            "there is an average with the names and shapes of this model, but other weights. If it is one of this "
            "model, pyprune.reapply(model, average) gives it the zeros that the model has"
        )
    return averages


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    derived: type
    for derived in cls.__subclasses__():
        yield from _with_subclasses(derived)


# The cosine between an average and its model is close to 1; that of models with other random weights is close to 0.
_SAME_WAY = 0.3


def _is_of_another(average: nn.Module, model: nn.Module) -> bool:
    """Whether an average was copied from another model that has masks."""
    copies = {copied for mask in masks_by_target(model).values() for copied in mask.copies}
    carried = masks_by_target(average).values()
    return bool(carried) and copies.isdisjoint(carried)


@torch.no_grad()
def _points_the_same_way(average: nn.Module, model: nn.Module) -> bool:
    """Whether the weights that a model keeps point the same way in an average."""
    masks = masks_by_target(model)
    there = {owner.name: parameter for owner, parameter in dense_parameters(average)}
    products = torch.zeros(3, dtype=torch.float64)
    for target in masks:
        own, other = (
            local_part(one).detach().double().flatten().cpu() for one in (target.parameter, there[target.name])
        )
        if own.shape == other.shape:
            other = torch.where(own != 0, other, 0)
            products += torch.stack([own @ other, own @ own, other @ other])
    dot, square, other_square = products.tolist()
    return bool(dot >= _SAME_WAY * (square * other_square) ** 0.5)


def warn_of_copies(masks: Iterable[Mask]) -> None:
    """Warn if copies of a model, made when it had these masks, are written to like averages and have old ones."""
    if any(
        copied.parameter is not None and copied.is_written() and not _same(copied.mask, mask.mask)
        for mask in masks
        for copied in mask.copies
    ):
        warn(
            "a copy of the model has the masks that were on when it was made. If it is an average of the model, "
            "pyprune.reapply(model, average) gives it the zeros that the model has now"
        )


def _same(mask: Tensor, other: Tensor) -> bool:
    return mask.shape == other.shape and torch.equal(mask, other.to(mask.device))


def _names(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(owner.name, parameter.shape) for owner, parameter in dense_parameters(model)]
