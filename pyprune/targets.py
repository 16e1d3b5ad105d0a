"""Which parameters of a model are pruned, and who owns them."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune import ops
from pyprune.ignored_scope import IgnoredScope, ignored_by
from pyprune.masks import Owner, dense_modules, dense_parameters, shared_mask
from pyprune.tracing import used_as_weights

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
)
_ADVICE = ". To prune the other weights, name it in ignored_scope"


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter, its first name in the dense model, and every place that holds it (several if it is tied)."""

    name: str
    parameter: nn.Parameter
    owners: tuple[Owner, ...]

    @property
    def mask(self) -> Tensor | None:
        """The mask that the owners share, if they carry one."""
        mask = shared_mask(self.owners)
        return None if mask is None else mask.mask

    def is_among(self, names: Set[str]) -> bool:
        """Whether one of its names is among ``names``."""
        return not names.isdisjoint(owner.name for owner in self.owners)


def find_targets(
    model: nn.Module, ignored_scope: IgnoredScope | None = None, examples_inputs: Any = None
) -> list[Target]:
    """Find the weights to prune, by identity: a tied weight is one target with several owners.

    They are the weights of Linear, Conv and ConvTranspose layers, Embedding, EmbeddingBag, MultiheadAttention
    (all projections), RNN, LSTM, GRU and their cells, subclasses included; what carries a mask already; and, with
    ``examples_inputs``, what one forward pass takes as a weight (`used_as_weights`). Never biases or norms.

    Args:
        model: the model; masks on it do not change names or order of what is found.
        ignored_scope: weights to leave out.
        examples_inputs: a tensor, a tuple of positional or a mapping of keyword arguments for the model.

    Raises:
        TypeError, ValueError: if a weight cannot be pruned (lazy, meta, quantised, sharded, of another dtype
            or device, or computed by something else than a mask), if a rule of ``ignored_scope`` matches nothing,
            or if there is no weight to prune.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> [target.name for target in find_targets(model)]
        ['0.weight']
    """
    _check_arguments(model, ignored_scope, examples_inputs)
    parameters = all_parameters(model)
    layers = layer_weights(model)
    layer_names = {owner.name for owner in layers}
    names = layer_names.union(owner.name for target in parameters for owner in target.owners)
    classes = {name: _class_names(module) for name, module in dense_modules(model)}
    ignored = ignored_by(ignored_scope or IgnoredScope(), names, classes)
    for owner in layers:
        if not ignored(owner.name):
            _check_is_parameter(owner)
    used = set() if examples_inputs is None else _trace(model, parameters, examples_inputs)
    targets = [
        target
        for target in parameters
        if not any(ignored(owner.name) for owner in target.owners)
        and (target.parameter in used or target.mask is not None or target.is_among(layer_names))
    ]
    for target in targets:
        check_prunable(target, advice=_ADVICE)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no weight to prune: no linear, convolution, embedding, attention or "
            "recurrent layer outside the ignored scope. To find weights that are bare parameters, give "
            "examples_inputs"
        )
    return targets


def all_parameters(model: nn.Module) -> list[Target]:
    """List every parameter of a model once, pruned or not, in the order of the dense model."""
    owners: dict[nn.Parameter, tuple[Owner, ...]] = {}
    for owner, parameter in dense_parameters(model):
        owners[parameter] = (*owners.get(parameter, ()), owner)
    return [Target(places[0].name, parameter, places) for parameter, places in owners.items()]


def masks_of(model: nn.Module) -> dict[Target, Tensor]:
    """Return the masks that a model carries."""
    return {target: mask for target in all_parameters(model) if (mask := target.mask) is not None}


def layer_weights(model: nn.Module) -> list[Owner]:
    """List the places of weights that the types of the layers promise; they may hold no parameter."""
    return [
        Owner(f"{name}.{attribute}" if name else attribute, module, attribute)
        for name, module in dense_modules(model)
        for attribute in _weight_attributes(module)
    ]


def check_prunable(target: Target, *, advice: str = "") -> None:
    """Raise unless the kernels can read and write the parameter.

    Raises:
        TypeError, ValueError: with the name of the parameter and what to do.
    """
    parameter = target.parameter
    problem: Exception | None = None
    if is_lazy(parameter):
        problem = ValueError("is lazy and has no values yet; run one forward pass first")
    elif parameter.is_meta:
        problem = ValueError("is on the meta device and has no values; load the weights first")
    elif type(parameter).__name__ == "DTensor":
        problem = ValueError("is sharded; prune before, and strip on, an unsharded model")
    elif is_traceable_wrapper_subclass(parameter):
        problem = TypeError(
            f"is a {type(parameter).__name__}; only plain tensors can be pruned: prune before quantising"
        )
    elif parameter.is_quantized:
        problem = TypeError("is quantised; prune before quantising")
    elif parameter.dtype not in ops.WEIGHT_DTYPES:
        problem = TypeError(f"has dtype {parameter.dtype}; allowed are {', '.join(map(str, ops.WEIGHT_DTYPES))}")
    elif parameter.layout is not torch.strided:
        problem = TypeError(f"has layout {parameter.layout}; only dense (strided) weights can be pruned")
    elif parameter.device.type not in ("cpu", "cuda"):
        problem = ValueError(f"is on {parameter.device}; kernels exist for cpu and cuda: move the model")
    elif parameter.is_cuda and not ops.CUDA_KERNELS_LOADED:
        problem = ValueError(
            f"is on {parameter.device}, but pyprune was built without CUDA kernels (see "
            "pyprune.build_info()); move the model to the CPU, or rebuild with PYPRUNE_CUDA=ON"
        )
    if problem is not None:
        raise type(problem)(f"{target.name} {problem}{advice}")


def _check_arguments(model: object, ignored_scope: object, examples_inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if ignored_scope is not None and not isinstance(ignored_scope, IgnoredScope):
        raise TypeError(f"ignored_scope is a {type(ignored_scope).__name__}; give a pyprune.IgnoredScope")
    if examples_inputs is not None and not isinstance(examples_inputs, (Tensor, tuple, Mapping)):
        raise TypeError(
            f"examples_inputs is a {type(examples_inputs).__name__}; give a tensor, a tuple of positional "
            "arguments or a dict of keyword arguments"
        )


def _class_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in parametrize.type_before_parametrizations(module).__mro__]


def _is_quantised(module: nn.Module) -> bool:
    home = type(module).__module__
    if not home.startswith("torch.ao.nn.") or ".quantized" not in home:
        return False
    # Others in there, stubs and activations, are found in float models too.
    return hasattr(module, "weight") or hasattr(module, "get_weight")


def _weight_attributes(module: nn.Module) -> list[str]:
    """Name the weights that a layer of this type has; they may turn out not to be parameters."""
    names: Sequence[str] = ()
    if isinstance(module, _LAYERS) or _is_quantised(module):
        names = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(module, nn.RNNBase):
        names = [name for name in module._flat_weights_names if name.startswith("weight_")]
    elif isinstance(module, nn.RNNCellBase):
        names = ("weight_ih", "weight_hh")
    return [name for name in names if module._parameters.get(name, "computed") is not None]


def _check_is_parameter(owner: Owner) -> None:
    if _is_quantised(owner.module):
        raise TypeError(f"{owner.name} is quantised; prune before quantising{_ADVICE}")
    if owner.foreign_steps:
        steps = ", ".join(owner.foreign_steps)
        raise ValueError(
            f"{owner.name} has another parametrization ({steps}); fold it in with "
            f"torch.nn.utils.parametrize.remove_parametrizations first{_ADVICE}"
        )
    if owner.mask is None and owner.attribute not in owner.module._parameters:
        raise ValueError(
            f"{owner.name} is not a parameter: something computes it (torch.nn.utils.prune, an old-style "
            f"weight_norm or spectral_norm, FSDP). Prune before that, or remove it first{_ADVICE}"
        )


def _trace(model: nn.Module, parameters: Sequence[Target], inputs: Any) -> set[Tensor]:
    for target in parameters:
        # A forward pass would give them values, and that changes the model.
        if is_lazy(target.parameter):
            raise ValueError(f"{target.name} is lazy and has no values yet; run one forward pass first")
    return used_as_weights(model, inputs)
