"""Load a sparse file, as tensors or into a model."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyprune.modules.attachments import check_module
from pyprune.modules.memory import overlaps_itself
from pyprune.modules.undo import Change
from pyprune.modules.zeros import holds_in
from pyprune.sparse.model_state import plain_names
from pyprune.sparse.reading import SparseFile

M = TypeVar("M", bound=nn.Module)


@overload
def load_sparse(path: str | os.PathLike[str], model: None = None) -> dict[str, Tensor]: ...


@overload
def load_sparse(path: str | os.PathLike[str], model: M) -> M: ...


def load_sparse(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor] | nn.Module:
    """Return the dense tensors of a file that `save_sparse` wrote, or load them into a model.

    Every byte is checked: lengths, counts and checksums, before memory is taken for a tensor. Other safetensors files
    are read, too, dense ones and those of compressed-tensors ("sparse-bitmask", "sparse-24-bitmask").

    Args:
        path: of the file.
        model: whose ``load_state_dict`` gets them, dense or with masks on; what is in the file and what is in the
            model must be the same names and shapes. Masks stay on, and what is loaded over their zeros is parked.

    Returns:
        The model; without one, its tensors by their names, on the CPU. Tied tensors are one object.

    Raises:
        ValueError: if the file is damaged or cut off, with the name of the tensor, or does not fit the model, or the
            model has tensors that cannot be written (on the meta device, expanded ...). The model is then as it was;
            also if code of its own that loads it raises.
        TypeError: for what is no path or no model.

    Example:
        >>> import tempfile, pyprune, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = pyprune.save_sparse({"weight": torch.eye(64), "bias": torch.ones(64)}, path)
        >>> pyprune.load_sparse(path)["weight"].sum().item()
        64.0
        >>> int(pyprune.load_sparse(path, nn.Linear(64, 64)).weight.count_nonzero())
        64
    """
    if model is not None:
        check_module(model)
    with SparseFile(path) as file:
        if model is None:
            tensors = _read(file, file.tensors)
            return tensors | {alias: tensors[name] for alias, name in file.tied.items()}
        wrapped = {plain: name for name, plain in plain_names(model).items()}
        there = model.state_dict()
        by_plain = {plain: there[name] for plain, name in wrapped.items()}
        # A tensor of a class of its own may refuse to be written, as one in shards does.
        foreign = _loads_itself(model) or any(type(one) is not Tensor for one in by_plain.values())
        _check_writable(by_plain, meta=foreign)
        _check_fits(file, by_plain)
        is_plain = not foreign and not any(holds_in(model))
        places = _places(file, {name: there[wrapped[name]] for name in file.tensors}) if is_plain else {}
        for name in places:
            file.check(name)
        tensors = places | _read(file, [name for name in file.tensors if name not in places])
        state = {wrapped[name]: tensors[file.tied.get(name, name)] for name in file.names}

        def load() -> None:
            for name, place in places.items():
                file.read_into(name, place)
            model.load_state_dict(state)

        # What torch alone loads does not fail any more. What others may refuse halfway needs copies to go back to.
        values = [one for one in (*model.parameters(), *model.buffers()) if foreign and not _unwritable(one)]
        with Change(model, values=values) as change:
            if foreign:
                load()
            else:
                change.finish(load)
    return model


def _loads_itself(model: nn.Module) -> bool:
    """Whether others than torch look at what is loaded, and may refuse it, or compare it with what was there."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules")
        or type(module).load_state_dict is not nn.Module.load_state_dict
        or type(module).set_extra_state is not nn.Module.set_extra_state
        or not vars(module).keys().isdisjoint(("load_state_dict", "_load_from_state_dict"))
        for module in model.modules()
    )


def _places(file: SparseFile, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a model that can be written as they are read: torch then loads them into themselves."""
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.is_cpu)
    return {
        name: tensor
        for name, tensor in state.items()
        if file.is_direct(name)
        and type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.dtype == file.dtype(name)
        and owners[tensor.untyped_storage().data_ptr()] == 1
    }


def _read(file: SparseFile, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: file.read(name) for name in names}


def _check_writable(state: Mapping[str, object], *, meta: bool) -> None:
    """Raise if torch would refuse to write one of these, after others; ``meta``: whether the meta device will do."""
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and (why := _unwritable(tensor)) and not (meta and tensor.is_meta):
            raise ValueError(f"{name} of the model {why}")


def _unwritable(tensor: Tensor) -> str:
    """Return why a tensor cannot be written, and what to do; nothing if it can."""
    if is_lazy(tensor):
        return "has no shape yet; call the model once before"
    if tensor.is_meta:
        return 'is on the meta device; give it memory before: model.to_empty(device="cpu")'
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode(), where alone it can be written; load there, or make it outside"
    if tensor.layout is not torch.strided:
        return f"is {tensor.layout}; make it dense before"
    if overlaps_itself(tensor):
        return "has elements that share memory, as expanded ones do; clone() it before"
    return ""


def _check_fits(file: SparseFile, state: dict[str, Tensor]) -> None:
    names = set(file.names)
    wrong = [
        f"{name} {file.shape(name)} in the file, {tuple(state[name].shape)} in the model"
        for name in file.names
        if name in state and file.shape(name) != tuple(state[name].shape)
    ]
    for what, found in (
        ("the model lacks", [name for name in file.names if name not in state]),
        ("the file lacks", [name for name in state if name not in names]),
        ("shapes differ:", wrong),
    ):
        if found:
            raise ValueError(f"{file.path} does not fit the model: {what} {_some(found)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
