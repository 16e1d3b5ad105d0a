"""Passes of a model over examples: with hooks that see all arguments, and how far their outputs are apart."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten_with_path

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import shown
from pyprune.console import listed
from pyprune.modules.attachments import check_module, wrapped_name
from pyprune.modules.evaluation import evaluating, forward, recurrence_unfused, untouched
from pyprune.modules.layers import is_quantised
from pyprune.modules.sharding import is_sharded
from pyprune.modules.undo import Before, undoing

# Outputs that differ by less, relative to their norm, are the same.
SAME = 1e-4
Hooks = Iterable[tuple[nn.Module, Callable[..., Any]]]


def check_removable(model: object, what: str) -> None:
    """Raise unless parts of a model can be removed: it is not wrapped, compiled, sharded, quantised, or without values.

    Args:
        what: is to be removed, for the message.
    """
    check_module(model)
    assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        place = f"{name} is" if name else "model is"
        if wrapped_name(module) is not None:
            raise ValueError(f"{place} in {type(module).__name__}; drop {what} of the plain model, then wrap it")
        if module._compiled_call_impl is not None:
            raise ValueError(f"{place} compiled; drop {what} first, then compile it")
        if is_quantised(module):
            raise ValueError(f"{place} quantised ({type(module).__name__}); drop {what} first, then quantise it")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} is lazy and has no values yet; run one forward pass first")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load them first")
        if is_sharded(tensor):
            raise ValueError(f"{name} is sharded; drop {what} first, then shard the model")
        is_number = tensor.is_floating_point() or tensor.is_complex()
        if is_traceable_wrapper_subclass(tensor) or (isinstance(tensor, nn.Parameter) and not is_number):
            raise ValueError(
                f"{name} is quantised ({type(tensor).__name__}, {tensor.dtype}); drop {what} first, then quantise"
            )


def check_examples(examples: object) -> list[Any]:
    """Return the inputs that examples are: one, a list of several, or a `Dataset`."""
    if isinstance(examples, Dataset):
        return list(batches_of(examples, None, "Reading", names=("examples", "count")))
    several = examples if isinstance(examples, list) else [examples]
    if not several:
        raise ValueError("examples is []; give at least one input of the model")
    for one in several:
        if not isinstance(one, (Tensor, tuple, Mapping)):
            raise TypeError(
                f"examples {'has' if several is examples else 'is'} {shown(one)}; an example is a tensor, a tuple of "
                "positional arguments or a dict of keyword arguments; several go into a list"
            )
    return several


@contextmanager
def hooked(model: nn.Module, before: Hooks = (), after: Hooks = ()) -> Iterator[None]:
    """Let hooks see the arguments of modules, keyword ones too, in passes that leave the model as it was.

    Kernels that run several layers as one are off, so that passes with and without hooks are the same.
    """
    was = Before(model, with_attributes=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    with (
        undoing(lambda: torch.backends.mha.set_fastpath_enabled(fast)),
        undoing(was.restore),
        evaluating(model),
        untouched(model),
        recurrence_unfused(),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
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
    """Return the floating tensors of a model's output, by its entries; to be called under `hooked`."""
    found: Outputs = {}
    for path, leaf in tree_flatten_with_path(forward(model, inputs, "examples"))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.setdefault(str(path[0]) if path else "", []).append(leaf)
    return found


def all_outputs(model: nn.Module, examples: Iterable[Any], before: Hooks = (), after: Hooks = ()) -> list[Outputs]:
    """Return the outputs of a model for each example.

    Raises:
        ValueError: if there is no floating tensor in them, or NaN.
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
        if wrong:
            raise ValueError(f"the outputs for the examples have NaN in them ({listed(wrong)}); give other examples")
    return found


def difference(found: Iterable[Outputs], expected: Iterable[Outputs]) -> float:
    """Return how far outputs are apart, relative to the norm of those that were expected; infinity if incomparable.

    Entries with another number of tensors are left out: there are as many caches and hidden states as there are layers.

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
