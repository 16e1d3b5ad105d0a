"""Which parameters of a model are pruned, and who owns them."""

from collections.abc import Callable, Container, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune import ops
from pyprune.console import listed, warn
from pyprune.methods.layout import Layout
from pyprune.modules.attachments import (
    Attachment,
    Owner,
    check_module,
    dense_modules,
    dense_parameters,
    shared_attachment,
)
from pyprune.modules.evaluation import check_initialized, check_inputs
from pyprune.modules.ignored_scope import IgnoredScope, ignored_by
from pyprune.modules.layers import holds_constants, is_quantised, weight_layouts
from pyprune.modules.memory import overlapping, overlaps_itself
from pyprune.modules.sharding import is_sharded, local_part
from pyprune.modules.tracing import BOTH, one_layout, used_as_weights
from pyprune.modules.uses import MOVED
from pyprune.modules.zero_weights import are_zero

_ADVICE = ". To prune the other weights, name it in ignored_scope"


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter, its first name in the dense model, and every place that holds it (several if it is tied).

    ``used_as`` is what its dimensions count by a forward pass that was looked at.
    """

    name: str
    parameter: nn.Parameter
    owners: tuple[Owner, ...]
    used_as: Layout | None = None

    @property
    def attachment(self) -> Attachment | None:
        """The mask or gate that the owners share, if they carry one."""
        return shared_attachment(self.owners)

    @property
    def layout(self) -> Layout:
        """What the dimensions of the weight count: by how it is used, or else by the layers that have it."""
        used, layers = self.used_as, [weight_layouts(owner.module).get(owner.attribute) for owner in self.owners]
        known = [layout for layout in layers if layout is not None]
        if self.parameter.dim() < 2:
            return Layout()
        if used is not None and (not known or used.problem in (BOTH, MOVED) or (used.is_clear and not used.is_table)):
            return used
        bare = "it is in no layer that is known; give examples_inputs, to see how it is used"
        return one_layout(known) if known else Layout(None, None, problem=bare)

    def is_among(self, names: Set[str]) -> bool:
        """Whether one of its names is among ``names``."""
        return not names.isdisjoint(owner.name for owner in self.owners)


def find_targets(
    model: nn.Module,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    *,
    shards: bool = False,
) -> list[Target]:
    """Find the weights to prune, by identity: a tied weight is one target with several owners.

    They are the weights of Linear, Bilinear, Conv and ConvTranspose layers, Embedding, EmbeddingBag,
    MultiheadAttention (all projections), RNN, LSTM, GRU and their cells, subclasses included; layers of other
    libraries that look like them, and experts of transformers (`weight_layouts`); what carries a mask or gate
    already; and, with ``examples_inputs``, what one forward pass takes as a weight (`used_as_weights`). Never biases,
    norms or constants (`holds_constants`); and what is zero everywhere only where the scope lets it compete: a
    warning names the others.

    Args:
        model: the model; what is attached to it does not change names or order of what is found.
        ignored_scope: weights to leave out.
        examples_inputs: a tensor, a tuple of positional or a mapping of keyword arguments for the model.
        shards: find sharded weights too, for who works on the part of each rank (`local_part`).

    Raises:
        TypeError, ValueError: if a weight cannot be pruned (lazy, meta, quantised, sharded, of another dtype
            or device, with sparse gradients, in memory that another parameter uses too, or computed by something
            else than a mask or gate), if a rule of ``ignored_scope`` matches nothing, or if there is no weight to
            prune.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> [target.name for target in find_targets(model)]
        ['0.weight']
    """
    return find_targets_and_zeros(model, ignored_scope, examples_inputs, shards=shards)[0]


def find_targets_and_zeros(
    model: nn.Module,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    *,
    shards: bool = False,
    within: Container[nn.Module] | None = None,
) -> tuple[list[Target], tuple[str, ...]]:
    """Return what `find_targets` finds, and the names of what it leaves out as zero, which rules may mean.

    If modules are given that it is to be ``within``, what has no place in one of them is not looked at.
    """
    _check_arguments(model, ignored_scope, examples_inputs)
    survey = _survey(model, ignored_scope)
    for owner in survey.layers:
        if not survey.ignored(owner.name) and (within is None or owner.module in within):
            _check_is_parameter(owner)
    targets = [
        target
        for target in _choose(model, survey, examples_inputs)
        if within is None or any(owner.module in within for owner in target.owners)
    ]
    for target in targets:
        part = local_part(target.parameter) if shards else target.parameter
        check_prunable(replace(target, parameter=cast(nn.Parameter, part)), advice=_ADVICE)
    _check_apart(survey.parameters, targets)
    every = targets
    if ignored_scope is None or ignored_scope.all_zero:
        targets = _without_zeros(targets)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no weight to prune: no linear, convolution, embedding, attention or "
            "recurrent layer outside the ignored scope"
            + (
                ". To find weights that are bare parameters, give examples_inputs"
                if examples_inputs is None
                else ", and no parameter is the weight of a product in the forward pass of examples_inputs"
            )
        )
    kept = set(targets)
    return targets, tuple(owner.name for target in every if target not in kept for owner in target.owners)


def choose_targets(
    model: nn.Module, ignored_scope: IgnoredScope | None = None, examples_inputs: Any = None
) -> list[Target]:
    """List what `find_targets` finds, but do not ask whether it can be pruned, and find nothing without an error."""
    _check_arguments(model, ignored_scope, examples_inputs)
    return _choose(model, _survey(model, ignored_scope), examples_inputs)


@dataclass(frozen=True)
class _Survey:
    """What there is to choose from, and what not to choose."""

    parameters: list[Target]
    layers: list[Owner]
    ignored: Callable[[str], bool]


def _survey(model: nn.Module, scope: IgnoredScope | None) -> _Survey:
    parameters = all_parameters(model)
    layers = layer_weights(model)
    constants = {
        f"{name}.{inside}".lstrip(".")
        for name, module in dense_modules(model)
        if holds_constants(module)
        for inside, _ in module.named_parameters()
    }
    if scope is None:
        return _Survey(parameters, layers, constants.__contains__)
    names = {owner.name for owner in layers}.union(owner.name for target in parameters for owner in target.owners)
    classes = {name: _class_names(module) for name, module in dense_modules(model)}
    ignored = ignored_by(scope, names, classes)
    return _Survey(parameters, layers, lambda name: name in constants or ignored(name))


def _choose(model: nn.Module, survey: _Survey, examples_inputs: Any) -> list[Target]:
    layer_names = {owner.name for owner in survey.layers}
    used: dict[nn.Parameter, Layout] = {}
    if examples_inputs is not None:
        check_initialized(model)
        used = used_as_weights(model, examples_inputs)
    return [
        replace(target, used_as=used.get(target.parameter))
        for target in survey.parameters
        if not any(survey.ignored(owner.name) for owner in target.owners)
        and (target.parameter in used or _is_attached_to(target) or target.is_among(layer_names))
    ]


def _without_zeros(targets: list[Target]) -> list[Target]:
    """Leave out weights that are zero everywhere and carry no mask or gate, and name them."""
    zero = are_zero([target.parameter for target in targets])
    empty = [t for t, is_zero in zip(targets, zero, strict=True) if is_zero and not _is_attached_to(t)]
    if empty and len(empty) == len(targets):
        raise ValueError(
            f"every weight to prune is zero everywhere: {listed([target.name for target in empty])}. Load the "
            "weights first, or let them compete by IgnoredScope(all_zero=False)"
        )
    if empty:
        warn(
            "zero everywhere, and left out as if ignored, because what is masked as a whole never trains: "
            f"{listed([target.name for target in empty])}. IgnoredScope(all_zero=False) lets them compete"
        )
    return [target for target in targets if target not in empty]


def ignored_in(model: nn.Module, scope: IgnoredScope | None) -> Callable[[str], bool]:
    """Return what says of the name of a parameter of a model whether a scope ignores it."""
    return _survey(model, scope).ignored


def _is_attached_to(target: Target) -> bool:
    return target.attachment is not None and target.attachment.on_target


def by_place(model: nn.Module) -> dict[tuple[nn.Module, str], Target]:
    """Return every parameter of a model by the modules and attributes that hold it."""
    return {(owner.module, owner.attribute): target for target in all_parameters(model) for owner in target.owners}


def output_layers(target: Target) -> list[nn.Module]:
    """Return the layers that have the weight, whose outputs are its output channels."""
    found = []
    for owner in target.owners:
        layout = weight_layouts(owner.module).get("weight") if owner.attribute == "weight" else None
        # Experts in one weight give what only some of them make.
        if layout is not None and not layout.is_table and layout.outputs in (0, 1) and layout.inputs in (0, 1, None):
            found.append(owner.module)
    return found


def all_parameters(model: nn.Module) -> list[Target]:
    """List every parameter of a model once, pruned or not, in the order of the dense model."""
    owners: dict[nn.Parameter, tuple[Owner, ...]] = {}
    for owner, parameter in dense_parameters(model):
        owners[parameter] = (*owners.get(parameter, ()), owner)
    return [Target(places[0].name, parameter, places) for parameter, places in owners.items()]


def attachments_of(model: nn.Module) -> dict[Target, Attachment]:
    """Return the masks and gates that the weights of a model carry."""
    return {target: found for target in all_parameters(model) if (found := target.attachment) is not None}


def layer_weights(model: nn.Module) -> list[Owner]:
    """List the places of weights that the types of the layers promise; they may hold no parameter."""
    return [
        Owner(f"{name}.{attribute}" if name else attribute, module, attribute)
        for name, module in dense_modules(model)
        for attribute in weight_layouts(module)
    ]


def check_coupled(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise unless parameters that lose units together, biases and scales among them, can all carry masks.

    Raises:
        TypeError, ValueError: with the name of the parameter and what to do.
    """
    modules = {owner.module for target in targets for owner in target.owners}
    for owner in layer_weights(model):
        inside = {owner.module}
        if owner.foreign_steps:
            inside.add(owner.module.parametrizations[owner.attribute])  # type: ignore[index,arg-type]
        if inside & modules:
            _check_is_parameter(owner)
    for target in targets:
        check_prunable(target, advice=_ADVICE)
    _check_apart(all_parameters(model), targets)


def check_prunable(target: Target, *, advice: str = "", needs_values: bool = True) -> None:
    """Raise unless the kernels can read and write the parameter, and its owners can train with one mask or gate.

    Raises:
        TypeError, ValueError: with the name of the parameter and what to do.
    """
    check_readable(target, advice=advice, needs_values=needs_values)
    problem = ""
    if target.parameter.is_inference():
        problem = "was made under torch.inference_mode; build or load the model outside it"
    elif overlaps_itself(target.parameter):
        problem = "has elements that share memory (an expanded tensor); give it .contiguous() memory"
    elif any(isinstance(o.module, (nn.Embedding, nn.EmbeddingBag)) and o.module.sparse for o in target.owners):
        problem = "has sparse gradients, which masks and gates cannot pass on; set sparse=False on its layer"
    elif len({owner.attachment for owner in target.owners} - {None}) > 1:
        names = ", ".join(owner.name for owner in target.owners)
        problem = (
            f"was tied after pruning: {names} are one weight with several masks or gates. Untie, strip, then tie"
        )
    if problem:
        raise ValueError(f"{target.name} {problem}{advice}")


def check_readable(target: Target, *, advice: str = "", needs_values: bool = True) -> None:
    """Raise unless the kernels can read the parameter (its values may be missing if nobody needs them).

    Raises:
        TypeError, ValueError: with the name of the parameter and what to do.
    """
    problem = _problem(target.parameter, needs_values)
    if problem is not None:
        raise type(problem)(f"{target.name} {problem}{advice}")


def is_readable(target: Target) -> bool:
    """Whether the kernels can read the parameter."""
    return _problem(target.parameter) is None


def _problem(parameter: nn.Parameter, needs_values: bool = True) -> Exception | None:
    problem: Exception | None = None
    if is_lazy(parameter):
        problem = ValueError("is lazy and has no values yet; run one forward pass first")
    elif isinstance(parameter, FakeTensor) and needs_values:
        problem = ValueError("is a fake tensor and has no values; prune the real model, outside of FakeTensorMode")
    elif parameter.is_meta and needs_values:
        problem = ValueError("is on the meta device and has no values; load the weights first")
    elif is_sharded(parameter):
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
    elif parameter.device.type not in ("cpu", "cuda", "meta"):
        problem = ValueError(f"is on {parameter.device}; kernels exist for cpu and cuda: move the model")
    elif parameter.is_cuda and not ops.CUDA_KERNELS_LOADED:
        problem = ValueError(
            f"is on {parameter.device}, but {ops.CUDA_PROBLEM} (see pyprune.build_info()). Or move the model to "
            "the CPU"
        )
    return problem


def _check_apart(parameters: Sequence[Target], targets: Sequence[Target]) -> None:
    """Raise if a target shares memory with another parameter: zeros folded into one would appear in both."""
    chosen = {target.parameter for target in targets}
    names: dict[Tensor, str] = {
        target.parameter: target.name for target in parameters if _problem(target.parameter) is None
    }
    for one, other in overlapping(list(names)):
        if one in chosen or other in chosen:
            raise ValueError(
                f"{names[one]} and {names[other]} are different parameters that share memory; give one of them a "
                "copy, or make both the same Parameter object. To prune the other weights, name both in ignored_scope"
            )


def _check_arguments(model: object, ignored_scope: object, examples_inputs: object) -> None:
    check_module(model)
    check_ignored_scope(ignored_scope)
    check_inputs(examples_inputs)


def check_ignored_scope(ignored_scope: object) -> None:
    """Raise TypeError unless it is an `IgnoredScope` or None."""
    if ignored_scope is not None and not isinstance(ignored_scope, IgnoredScope):
        raise TypeError(f"ignored_scope is a {type(ignored_scope).__name__}; give a pyprune.IgnoredScope")


def _class_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in parametrize.type_before_parametrizations(module).__mro__]


def _check_is_parameter(owner: Owner) -> None:
    if is_quantised(owner.module):
        raise TypeError(f"{owner.name} is quantised; prune before quantising{_ADVICE}")
    if owner.foreign_steps:
        steps = ", ".join(owner.foreign_steps)
        raise ValueError(
            f"{owner.name} has another parametrization ({steps}); fold it in with "
            f"torch.nn.utils.parametrize.remove_parametrizations first{_ADVICE}"
        )
    if isinstance(owner.module, torch.jit.ScriptModule):
        raise ValueError(f"{owner.name} is in a part that torch.jit compiled; prune before that{_ADVICE}")
    if owner.attachment is None and owner.attribute not in owner.module._parameters:
        raise ValueError(
            f"{owner.name} is not a parameter: something computes it (torch.nn.utils.prune, an old-style "
            f"weight_norm or spectral_norm, FSDP). Prune before that, or remove it first{_ADVICE}"
        )
