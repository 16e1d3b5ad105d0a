"""The layers that `reconstruct` solves: which there are, and what of the dense model's outputs they are to make."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyprune.checks import shown
from pyprune.modules.attachments import Attachment, Owner, dense_modules
from pyprune.modules.holding import Hold
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.layers import weight_layouts
from pyprune.modules.sharding import is_sharded
from pyprune.modules.targets import Target, all_parameters, ignored_in
from pyprune.structured.unfolding import channel_dim, groups_of, is_layer, matrix_of, weight_of

Kept = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer of the pruned model, and the one of the dense model that it comes from.

    Args:
        name: of the layer.
        layer: of the pruned model.
        dense: of the dense model.
        outputs: which output channels of the dense layer are left; None for all.
        mask: of the weight, as a matrix; None if nothing is masked.
        bias_mask: of the bias, as a row.
        alive: bool, which output channels are not zero because of masks; None for all.
    """

    name: str
    layer: nn.Module
    dense: nn.Module
    outputs: Tensor | None = None
    mask: Tensor | None = None
    bias_mask: Tensor | None = None
    alive: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the pruned model's layer."""
        return cast(nn.Parameter, self.layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of that layer, if it has one."""
        return cast(nn.Parameter | None, self.layer.bias)

    def tensors(self) -> list[Tensor]:
        """Return what is written to."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self) -> Tensor:
        """Return the weight as a matrix of float64: (groups, inputs of a group, outputs of a group)."""
        return matrix_of(self.layer, self.weight.detach()).double()

    def bias_row(self) -> Tensor | None:
        """Return the bias as float64: (groups, outputs of a group)."""
        return None if self.bias is None else self.bias.detach().double().view(groups_of(self.layer), -1)

    def before_and_now(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias as they are in the dense model, of outputs that are left, and as they are now."""

        def rows(layer: nn.Module) -> Tensor:
            weight = cast(Tensor, layer.weight).detach()
            return matrix_of(layer, weight).mT.flatten(0, 1)

        def left(tensor: Tensor) -> Tensor:
            return tensor if self.outputs is None else tensor[self.outputs.to(tensor.device)]

        pairs = [(left(rows(self.dense)), rows(self.layer))]
        if self.bias is not None:
            bias = cast(Tensor | None, self.dense.bias)  # a shrunk layer may have one that took over a constant
            pairs.append((torch.zeros_like(self.bias) if bias is None else left(bias.detach()), self.bias.detach()))
        return pairs

    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Give the layer this weight and bias; what masks drop of the bias stays as it is."""
        weight = weight_of(self.layer, matrix, self.weight.shape).to(self.weight.dtype)
        there = self.bias_row()
        if bias is not None and there is not None and self.bias_mask is not None:
            bias = bias.where(self.bias_mask, there)
        new = [weight] if bias is None else [weight, bias.to(self.weight.dtype)]
        if not all(bool(tensor.isfinite().all()) for tensor in new):
            raise ValueError(
                f"the weights that {self.name} would need are not finite in {self.weight.dtype}; give more batches, "
                "a larger damping, or name it in ignored_scope"
            )
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.view_as(self.bias))

    def wanted(self, made: Tensor) -> Tensor:
        """Return what the layer is to make where the dense one made this."""
        dim = channel_dim(self.layer)
        if self.outputs is not None:
            made = made.index_select(dim, self.outputs.to(made.device))
        if self.alive is not None:
            made = made.movedim(dim, -1).where(self.alive.to(made.device), 0).movedim(-1, dim)
        return made


def kept_by(plan: Any) -> Kept:
    """Return what a plan keeps: of each tensor, by its dimensions, the positions in the dense model.

    Raises:
        TypeError, ValueError: for what is no plan.
    """
    plan = getattr(plan, "plan", plan)
    tensors = plan.get("tensors") if isinstance(plan, Mapping) else getattr(plan, "tensors", None)
    if plan is None:
        return {}
    if not isinstance(tensors, Mapping):
        raise TypeError(f"plan is {shown(plan)}; give the plan of shrink, or a dict with its 'tensors'")
    try:
        return {
            str(name): {int(dim): torch.as_tensor(kept, dtype=torch.long) for dim, kept in dims.items()}
            for name, dims in tensors.items()
        }
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the tensors of plan are to be {{name: {{dim: kept positions}}}}: {error}") from error


def find_readers(
    dense: nn.Module, model: nn.Module, kept: Kept, scope: IgnoredScope | None
) -> tuple[list[list[Reader]], dict[str, str]]:
    """Find the layers to solve, those that share a weight together, and why others are left out.

    Raises:
        ValueError: for a layer that does not fit the one in the dense model, a weight that both models share, or one
            that cannot be written.
    """
    there = dict(dense_modules(dense))
    dense_parameters = {id(target.parameter) for target in all_parameters(dense)}
    ignored = ignored_in(model, scope)
    targets = {owner.name: target for target in all_parameters(model) for owner in target.owners}
    found: dict[nn.Parameter, list[Reader]] = {}
    skipped: dict[str, str] = {}
    for name, layer in dense_modules(model):
        for attribute, layout in weight_layouts(layer).items():
            full = f"{name}.{attribute}" if name else attribute
            target = targets.get(full)
            names = [full] if target is None else [owner.name for owner in target.owners]
            if layout.is_table or any(map(ignored, names)):
                continue
            why = _why_not(layer, target, there.get(name))
            if why or target is None:
                skipped[full] = why
                continue
            readers = found.setdefault(target.parameter, [])
            if any(one.layer is layer for one in readers):
                continue
            _check_writable(target, dense_parameters)
            readers.append(_reader(name, layer, there[name], target, kept))
    return list(found.values()), skipped


def _why_not(layer: nn.Module, target: Target | None, dense: nn.Module | None) -> str:
    """Say why a layer cannot be solved, or nothing."""
    if not is_layer(layer):
        return f"a {type(layer).__name__} is not solved"
    if target is None:
        return "its weight is computed from others"
    if any(not is_layer(owner.module) or owner.attribute != "weight" for owner in target.owners):
        others = [owner.name for owner in target.owners if not is_layer(owner.module)]
        return f"it is tied to {', '.join(others)}"
    if any(geometry(owner.module) != geometry(layer) for owner in target.owners):
        return "layers of several kinds share its weight"
    if isinstance(target.attachment, Attachment) and not isinstance(target.attachment, Hold):
        return "it has a gate, which pyprune.strip takes off"
    if dense is None or not is_layer(dense):
        return "the dense model has no such layer"
    if "weight" not in dense._parameters:
        return "its weight in the dense model is computed from others"
    return ""


def geometry(layer: nn.Module) -> Any:
    """Return what says how a layer uses its weight: layers that agree in it make the same samples of an input."""
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    return channel_dim(layer), isinstance(layer, _ConvTransposeNd), *(str(getattr(layer, one, None)) for one in names)


def _check_writable(target: Target, dense_parameters: set[int]) -> None:
    problem = ""
    if id(target.parameter) in dense_parameters:
        problem = "is in the dense model, too; give a copy of the dense model"
    elif target.parameter.is_meta:
        problem = "is on the meta device and has no values"
    elif target.parameter.is_inference():
        problem = "was made under torch.inference_mode; build or load the model outside it"
    elif is_sharded(target.parameter):
        problem = "is sharded; reconstruct the model before FSDP"
    elif not target.parameter.is_floating_point():
        problem = f"is {target.parameter.dtype}; reconstruct before quantisation"
    if problem:
        raise ValueError(f"{target.name} {problem}")


def _reader(name: str, layer: nn.Module, dense: nn.Module, target: Target, kept: Kept) -> Reader:
    full = f"{name}.weight" if name else "weight"
    dims = next((kept[owner.name] for owner in target.owners if owner.name in kept), {})
    outputs = _kept_outputs(dense, dims)
    count = _outputs_of(dense) if outputs is None else len(outputs)
    if count != _outputs_of(layer):
        raise ValueError(
            f"{full} has {_outputs_of(layer)} outputs, and {count} of the dense model's {_outputs_of(dense)} are "
            f"left {'by the plan' if kept else 'without a plan'}; give the plan by which this model was shrunk"
        )
    if (
        outputs is not None
        and len(outputs)
        and not 0 <= int(outputs.min()) <= int(outputs.max()) < _outputs_of(dense)
    ):
        raise ValueError(f"the plan keeps outputs of {full} that the dense model does not have")
    hold = target.attachment
    if not isinstance(hold, Hold):
        return Reader(name, layer, dense, outputs)
    mask = matrix_of(layer, hold.mask)
    bias = cast(nn.Parameter | None, layer.bias)
    on_bias = None if bias is None else Owner("", layer, "bias").attachment
    bias_mask = on_bias.mask.view(mask.shape[0], -1) if isinstance(on_bias, Hold) else None
    alive = mask.any(1)
    if bias is not None:  # what is dead stays dead
        alive = alive | (bias.detach() != 0).view_as(alive)
    return Reader(
        name,
        layer,
        dense,
        outputs,
        None if mask.all() else mask,
        bias_mask,
        None if alive.all() else alive.flatten(),
    )


def _outputs_of(layer: nn.Module) -> int:
    groups, _, outputs = matrix_of(layer, cast(Tensor, layer.weight).detach()).shape
    return groups * outputs


def _kept_outputs(dense: nn.Module, dims: Mapping[int, Tensor]) -> Tensor | None:
    """Return which output channels of a layer are left where these positions of its weight are; None for all."""
    if not isinstance(dense, _ConvTransposeNd):
        return dims.get(0 if isinstance(dense, (nn.Linear, _ConvNd)) else 1)
    if not dims:
        return None
    inputs, outputs = dense.weight.shape[:2]
    groups = torch.arange(dense.groups)
    if 0 in dims and dense.groups > 1:  # whole groups go with their inputs
        groups = dims[0].div(inputs // dense.groups, rounding_mode="floor")
        groups = torch.unique(groups)
    return (groups[:, None] * outputs + dims.get(1, torch.arange(outputs))).flatten()
