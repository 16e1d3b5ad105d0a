"""What a model and its examples must be, to be traced and made smaller."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pyprune.checks import shown
from pyprune.modules.attachments import check_module, wrapped_name
from pyprune.modules.evaluation import check_initialized
from pyprune.modules.sharding import is_sharded


def check_model(model: nn.Module, what: str, name: str = "model") -> None:
    """Raise unless a model can be looked at as it is: not wrapped, sharded or quantised.

    Args:
        model: what a user gave.
        what: what is to be done, for messages: "shrink".
        name: of the argument.
    """
    check_module(model, name)
    for name, module in model.named_modules():
        wrapped = wrapped_name(module)
        if wrapped is not None:
            place = f"{name or 'the model'} is a {type(module).__name__}"
            raise ValueError(
                f"{place}, which wraps what is to become smaller; {what} the plain model first (it is at "
                f".{wrapped}), then compile it, or put it in parallel"
            )
        if ".quantized" in type(module).__module__ or ".ao.nn" in type(module).__module__:
            raise ValueError(f"{name} is a {type(module).__name__}, quantised already; {what} before quantising")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"the model is compiled (model.compile()); {what} it before")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"{name} is sharded; {what} the model before fully_shard or the like")
    check_initialized(model)


def check_values(model: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer is on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load them first")


def examples_of(examples: object, name: str = "examples") -> list[Any]:
    """Return examples as a list of what `forward` takes; ``name`` is that of the argument.

    Raises:
        TypeError: if there is no tensor in one of them.
        ValueError: if there is none, or one holds a NaN or infinity.

    Example:
        >>> import torch
        >>> examples_of(torch.ones(1)), examples_of([{"x": torch.ones(1)}, (torch.ones(1),)])
        ([tensor([1.])], [{'x': tensor([1.])}, (tensor([1.]),)])
    """
    found = list(examples) if isinstance(examples, list) else [examples]
    if not found:
        raise ValueError(f"{name} is an empty list; give inputs for at least one forward pass")
    for one in found:
        tensors = list(tensors_within(one))
        if not tensors:
            raise TypeError(
                f"{name} has {shown(one)}, without a tensor in it; give a tensor, a tuple of positional arguments, "
                "a dict of keyword arguments, or a list of these"
            )
        for tensor in tensors:
            is_number = tensor.is_floating_point() and tensor.device.type != "meta" and tensor.numel()
            if is_number and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} has NaN or infinity; give inputs as the model gets them")
    return found


def tensors_within(made: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model takes or returns: in mappings, sequences and plain objects."""
    yield from _inside(made, set())


def _inside(made: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
        return
    if id(made) in seen or isinstance(made, (str, bytes, int, float, nn.Module, type, type(None))):
        return
    seen.add(id(made))
    if isinstance(made, Mapping):
        parts: Iterable[Any] = list(made.values())
    elif isinstance(made, (list, tuple, set)):
        parts = list(made)
    else:
        parts = list(vars(made).values()) if hasattr(made, "__dict__") else []
    for part in parts:
        yield from _inside(part, seen)
