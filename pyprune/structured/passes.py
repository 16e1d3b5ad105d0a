"""Passes of a model over examples: with hooks that see all arguments, and how far their outputs are apart."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten_with_path

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import shown
from pyprune.console import listed
from pyprune.modules.evaluation import evaluating, forward, layers_apart, untouched
from pyprune.modules.undo import Before, undoing
from pyprune.structured.models import check_model, check_values, examples_of

# Outputs that differ by less, relative to their norm, are the same.
SAME = 1e-4
Hooks = Iterable[tuple[nn.Module, Callable[..., Any]]]


def check_removable(model: nn.Module) -> None:
    """Raise unless parts of a model can be removed: it is plain (`check_model`), and its parameters have values."""
    check_model(model, "prune")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise ValueError(f"{name} is compiled; prune the model before, then compile it")
    check_values(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_number = tensor.is_floating_point() or tensor.is_complex() or not isinstance(tensor, nn.Parameter)
        if is_traceable_wrapper_subclass(tensor) or not is_number:
            kind = f"{type(tensor).__name__}, {tensor.dtype}"
            raise ValueError(f"{name} is quantised ({kind}); prune the model before, then quantise it")


def check_examples(examples: object) -> list[Any]:
    """Return the inputs that examples are: one, a list of several, or a `Dataset`.

    Raises:
        TypeError, ValueError: as `examples_of`.
    """
    if isinstance(examples, Dataset):
        examples = list(batches_of(examples, None, "Reading", names=("examples", "count")))
    inputs = examples_of(examples)
    for one in inputs:
        if not isinstance(one, (Tensor, tuple, Mapping)):
            raise TypeError(
                f"examples has {shown(one)}; an example is a tensor, a tuple of positional arguments or a dict of "
                "keyword arguments"
            )
    return inputs


@contextmanager
def hooked(model: nn.Module, before: Hooks = (), after: Hooks = ()) -> Iterator[None]:
    """Let hooks see the arguments of modules, keyword ones too, in passes that leave the model as it was.

    Kernels that run several layers as one are off, so that passes with and without hooks are the same.
    """
    was = Before(model, with_attributes=False)
    with undoing(was.restore), evaluating(model), untouched(model), layers_apart(model):
        for module, hook in before:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in after:
            module.register_forward_hook(hook, with_kwargs=True)
        yield


def first_argument(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Return what a module is called with first, by position or by name."""
    return args[0] if args else next(iter(keywords.values()), None)


Outputs = dict[str, list[Tensor]]


def outputs_of(model: nn.Module, inputs: Any) -> Outputs:
    """Return the floating tensors of a model's output on the CPU, by its entries; to be called under `hooked`."""
    found: Outputs = {}
    for path, leaf in tree_flatten_with_path(forward(model, inputs, "examples"))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.setdefault(str(path[0]) if path else "", []).append(leaf.cpu())
    return found


def all_outputs(
    model: nn.Module, examples: Iterable[Any], before: Hooks = (), after: Hooks = (), *, may_be_nan: bool = False
) -> list[Outputs]:
    """Return the outputs of a model for each example.

    Raises:
        ValueError: if there is no floating tensor in them, or NaN, unless that may be.
    """
    with hooked(model, before, after):
        found = [outputs_of(model, inputs) for inputs in examples]
    for outputs in found:
        if not outputs:
            raise ValueError(
                f"{type(model).__name__} gives no floating tensor for the examples, so nothing tells what a removal "
                "does to it; wrap it in a module that returns a tensor"
            )
        wrong = [name for name, tensors in outputs.items() if any(bool(one.isnan().any()) for one in tensors)]
        if wrong and not may_be_nan:
            raise ValueError(f"the outputs for the examples have NaN in them ({listed(wrong)}); give other examples")
    return found


def difference(found: Iterable[Outputs], expected: Iterable[Outputs]) -> float:
    """Return how far outputs are apart, relative to the norm of those that were expected; infinity if incomparable.

    Entries with another number of tensors are left out: there are as many caches and hidden states as layers.

    Example:
        >>> difference([{"": [torch.tensor([3.0, 5.0])]}], [{"": [torch.tensor([3.0, 4.0])]}])
        0.2
    """
    error, norm, compared = 0.0, 0.0, 0
    for one, other in zip(found, expected, strict=True):
        for name, tensors in other.items():
            pairs = list(zip(one.get(name, []), tensors, strict=False))
            if len(one.get(name, [])) != len(tensors) or any(a.shape != b.shape for a, b in pairs):
                continue
            for a, b in pairs:
                apart = torch.where(a == b, 0, a.double() - b)  # infinity is the same as infinity
                error += float(apart.square().sum())
                norm += float(torch.where(b.isfinite(), b, 0).double().square().sum())
                compared += 1
    if not compared or math.isnan(error):
        return math.inf
    return math.sqrt(error / norm) if norm else (0.0 if error == 0 else math.inf)
