"""What was removed from a model, as data: positions that are kept, and attributes with their new values."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyprune.checks import shown
from pyprune.files import whole_file
from pyprune.modules.undo import Change
from pyprune.structured.compact import Kept, named_tensors, resizing, set_attribute, value_of
from pyprune.structured.models import check_model
from pyprune.structured.replay import replay

_M = TypeVar("_M", bound=nn.Module)
_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """How to make the dense model as small as the shrunk one is.

    Args:
        tensors: by the name of a parameter or buffer, and by dimension, the positions that are kept.
        shapes: of these tensors in the dense model.
        attributes: [name of a module, attribute, new value].
        biases: parameters that the dense model does not have: they took over constants.
        removed: modules that are gone, or replaced by an identity.
        model: the class of the model.
    """

    tensors: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: list[list[Any]] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    model: str = ""

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"pyprune_plan": _VERSION, **vars(self)})

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Make it of JSON.

        Raises:
            ValueError: if that is no plan, or one of a newer version.
        """
        try:
            values = json.loads(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"this is no plan of pyprune: {error}") from error
        if not isinstance(values, dict) or "pyprune_plan" not in values:
            raise ValueError("this is no plan of pyprune; give what Plan.to_json() returned, or Plan.save() wrote")
        version = values.pop("pyprune_plan")
        if version != _VERSION or set(values) - set(vars(Plan())):
            raise ValueError(f"this plan has version {shown(version)}; this pyprune reads {_VERSION}. Update pyprune")
        values["tensors"] = {
            name: {int(dim): list(kept) for dim, kept in dims.items()} for name, dims in values["tensors"].items()
        }
        return Plan(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as a whole or not at all."""
        with whole_file(path) as temporary:
            Path(temporary).write_text(self.to_json())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Read what `save` wrote."""
        return Plan.from_json(Path(path).read_text())


@torch.inference_mode(False)
def rebuild(fresh_model: _M, plan: Plan | Mapping[str, Any]) -> _M:
    """Make a dense model as small as the one that a plan is of, in place; then it takes that one's state_dict.

    Args:
        fresh_model: what the same code makes of the same arguments as the model that was shrunk; its values do not
            matter.
        plan: of `shrink`; from a file with `Plan.load`. Or of `drop_blocks` or `drop_experts`, which is a dict.

    Returns:
        ``fresh_model``, whose parameters have the small shapes, with the positions of its own values that are kept.

    Raises:
        TypeError: if ``plan`` is no `Plan`.
        ValueError: if it is the plan of another model. Then nothing has changed.

    Example:
        >>> from pyprune import Plan, rebuild
        >>> plan = Plan(tensors={"weight": {0: [1]}}, shapes={"weight": [2, 3]})
        >>> rebuild(nn.Linear(3, 2, bias=False), plan).weight.shape
        torch.Size([1, 3])
    """
    if isinstance(plan, Mapping):
        check_model(fresh_model, "rebuild", "fresh_model")
        return replay(fresh_model, plan)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {shown(plan)}; give a Plan, as of Plan.load(path) or shrink(...).plan")
    check_model(fresh_model, "rebuild", "fresh_model")
    tensors = named_tensors(fresh_model)
    for name, shape in plan.shapes.items():
        found = tensors.get(name)
        if found is None:
            raise ValueError(f"the plan is of another model: {type(fresh_model).__name__} has no {name}")
        if list(found.shape) != list(shape):
            raise ValueError(
                f"the plan is of another model, or this one was shrunk already: {name} has shape "
                f"{tuple(found.shape)}, and {tuple(shape)} in the plan"
            )
    for name, dims in plan.tensors.items():
        for dim, kept in dims.items():
            size = plan.shapes[name][dim]
            if not kept or min(kept) < 0 or max(kept) >= size:
                raise ValueError(f"the plan is damaged: positions of {name} along {dim} are not in 0 to {size - 1}")
    for name, attribute, _ in plan.attributes:
        try:
            value_of(fresh_model, name, attribute)
        except (AttributeError, KeyError) as error:
            raise ValueError(f"the plan is of another model: {name} has no attribute {attribute}") from error
    kept_by: dict[str, dict[int, Tensor]] = {
        name: {dim: torch.tensor(kept) for dim, kept in dims.items()} for name, dims in plan.tensors.items()
    }
    left = Kept({id(tensors[name]): dims for name, dims in kept_by.items()})
    with Change(fresh_model) as change, resizing(fresh_model, left, change):
        for name, attribute, value in plan.attributes:
            set_attribute(fresh_model, name, attribute, value)
        for name in plan.biases:
            module = fresh_model.get_submodule(name.rpartition(".")[0])
            add_bias(module)
        change.finish(lambda: None)  # from here on nothing is taken back
    return fresh_model


def add_bias(module: nn.Module) -> nn.Parameter:
    """Give a layer a bias of zeros, as many as it has outputs."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    count = getattr(module, "out_channels", None) or getattr(module, "out_features", None) or weight.shape[-1]
    bias = nn.Parameter(weight.new_zeros(count), requires_grad=weight.requires_grad)
    module.register_parameter("bias", bias)
    return bias
