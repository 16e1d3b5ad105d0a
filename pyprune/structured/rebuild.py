"""Make a fresh model as small as another one became."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from pyprune.checks import shown
from pyprune.modules.targets import attachments_of
from pyprune.modules.undo import Change
from pyprune.structured.compact import Kept, add_bias, holder_of, named_tensors, resizing, set_attribute
from pyprune.structured.models import check_model
from pyprune.structured.plan import Plan, check_plan, is_same, kind_of
from pyprune.structured.pretrained import settle_saving
from pyprune.structured.remembered import plan_of, remember
from pyprune.structured.replay import replay

_M = TypeVar("_M", bound=nn.Module)


@torch.inference_mode(False)
def rebuild(fresh_model: _M, plan: Plan | Mapping[str, Any]) -> _M:
    """Make a dense model as small as the one that a plan is of, in place; then it takes that one's state_dict.

    Args:
        fresh_model: what the same code makes of the same arguments as the model that was shrunk; its values do not
            matter. It may be on the meta device (then load by ``load_state_dict(..., assign=True)``), on another
            device, or of another floating-point type.
        plan: of `shrink` or `plan_of`; from a file with `Plan.load`. Or of `drop_blocks` or `drop_experts`, which is
            a dict. Of several, each one after the other, as they were made.

    Returns:
        ``fresh_model``, whose parameters have the small shapes, with the positions of its own values that are kept.

    Raises:
        TypeError: if ``plan`` is no `Plan`, or ``fresh_model`` no module.
        ValueError: if it is the plan of another model, or the model is wrapped, pruned, or small already. Then
            nothing has changed.

    Example:
        >>> from pyprune import Plan
        >>> plan = Plan({"weight": {0: [1]}}, {"weight": [2, 3]})
        >>> rebuild(nn.Linear(3, 2, bias=False), plan).weight.shape
        torch.Size([1, 3])
    """
    if isinstance(plan, Mapping):
        check_model(fresh_model, "rebuild", "fresh_model")
        return replay(fresh_model, plan)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {shown(plan)}; give a Plan, as of Plan.load(path) or shrink(...).plan")
    check_plan(plan)
    check_model(fresh_model, "rebuild", "fresh_model")
    if plan_of(fresh_model) is not None:
        raise ValueError(f"this {type(fresh_model).__name__} was shrunk or rebuilt already; give a fresh one")
    if attachments_of(fresh_model):
        raise ValueError("fresh_model has masks or gates on; rebuild it before, or strip it")
    kept = _kept(fresh_model, plan)
    _check_attributes(fresh_model, plan)
    layers = [_layer_without_bias(fresh_model, name) for name in plan.biases]
    with Change(fresh_model) as change, resizing(fresh_model, kept, change):
        for name, attribute, value, *_ in plan.attributes:
            set_attribute(fresh_model, name, attribute, value)
        for layer in layers:
            add_bias(layer)
        remember(fresh_model, plan)
        settle_saving(fresh_model)
        change.finish(lambda: None)  # from here on nothing is taken back
    return fresh_model


def _kept(model: nn.Module, plan: Plan) -> Kept:
    tensors = named_tensors(model)
    cls = type(model).__name__
    for name, shape in plan.shapes.items():
        found = tensors.get(name)
        if found is None:
            raise ValueError(f"the plan is of another model{_of(plan)}: this {cls} has no {name}")
        if list(found.shape) != list(shape):
            raise ValueError(
                f"the plan is of another model{_of(plan)}, or this one was shrunk already: {name} has shape "
                f"{tuple(found.shape)}, and {tuple(shape)} in the plan"
            )
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(id(tensor), name)
        if plan.tensors.get(name) != plan.tensors.get(other):
            raise ValueError(
                f"the plan is of another model{_of(plan)}: {other} and {name} are one tensor in this {cls}"
            )
    return Kept(
        {
            id(tensors[name]): {dim: torch.tensor(positions) for dim, positions in dims.items()}
            for name, dims in plan.tensors.items()
        }
    )


def _check_attributes(model: nn.Module, plan: Plan) -> None:
    for name, attribute, value, *old in plan.attributes:
        place = f"{name}.{attribute}".lstrip(".")
        try:
            holder, key = holder_of(model, name, attribute)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the plan is of another model{_of(plan)}: this one has no {place}") from error
        # What a config did not say may be said by it.
        if key not in holder and not (old == [None] and "." in attribute):
            raise ValueError(f"the plan is of another model{_of(plan)}: this one has no {place}")
        found = holder.get(key)
        if not is_same(found, old[0]) if old else kind_of(found) != kind_of(value):
            raise ValueError(
                f"the plan is of another model{_of(plan)}: {place} is {shown(found)}, and "
                + (f"{shown(old[0])} in the plan" if old else f"becomes {shown(value)} by the plan")
            )


def _layer_without_bias(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name.rpartition(".")[0])
    except AttributeError as error:
        raise ValueError(f"the plan is of another model: {error}") from error
    if getattr(layer, "bias", 0) is not None or not isinstance(getattr(layer, "weight", None), nn.Parameter):
        raise ValueError(
            f"the plan is of another model: it makes {name}, and this one has no layer there that lacks it"
        )
    return layer


def _of(plan: Plan) -> str:
    return f", a {plan.model}" if plan.model else ""
