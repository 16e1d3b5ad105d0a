"""The state of an accelerated model, in a model that is not."""

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.checks import shown
from pyprune.console import listed
from pyprune.modules.attachments import check_module
from pyprune.modules.undo import Change
from pyprune.runtime.sparse_layer import LAYOUT, PARTS, SparseLayer, packed_in
from pyprune.runtime.sparse_layers import put, sparse_class

_M = TypeVar("_M", bound=nn.Module)


@torch.inference_mode(False)
@torch.no_grad()
def load_accelerated(model: _M, state_dict: Mapping[str, Tensor]) -> _M:
    """Load the ``state_dict()`` of an accelerated model into one of the same architecture, in place.

    Layers whose weights are packed in it become such layers, without measuring anything. Every offset and column is
    checked, because a wrong one would be read outside of its tensor.

    Args:
        model: dense, accelerated otherwise, or on the meta device, where nothing is copied.
        state_dict: all of it.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: if names, shapes or packed tensors do not fit. The model is then as it was.

    Example:
        >>> import copy, pyprune
        >>> model = nn.Sequential(nn.Linear(8, 8)).eval()
        >>> fresh = copy.deepcopy(model)
        >>> _ = pyprune.accelerate(model, torch.ones(1, 8), seconds=0)
        >>> torch.equal(load_accelerated(fresh, model.state_dict())(torch.ones(1, 8)), model(torch.ones(1, 8)))
        True
    """
    check_module(model)
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise TypeError(f"state_dict is {shown(state_dict)}; give the state_dict() of an accelerated model")
    state = dict(state_dict)
    with Change(model) as change:
        for prefix, module in model.named_modules():
            cls = type(module) if isinstance(module, SparseLayer) else sparse_class(module)
            if cls is None:
                continue
            name = f"{prefix}.{cls.packed_name}".removeprefix(".")
            if f"{name}_{LAYOUT}" not in state:
                continue
            if not isinstance(module, SparseLayer):
                _let_hold(module, name, state)
            assert isinstance(module, SparseLayer)
            try:
                packed_in(state, name, module.shape())
            except (TypeError, ValueError) as error:
                raise ValueError(f"state_dict has a damaged weight, {name}: {error}") from error
        _check_names(model, state)
        is_meta = any(one.is_meta for one in (*model.parameters(), *model.buffers()))
        change.finish(partial(model.load_state_dict, state, assign=is_meta))
    return model


def _let_hold(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Make a dense layer one with a packed weight, whose tensors are to come."""
    weight = module._parameters[name.rpartition(".")[2]]
    assert weight is not None
    nothing = torch.empty(0, device=weight.device)
    scale = nothing if f"{name}_scale" in state else None
    put(module, ops.SparseWeight(nothing, nothing, nothing, scale, ops.SPARSE_LAYOUTS[0], (0, 0)))


def _check_names(model: nn.Module, state: Mapping[str, object]) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"state_dict is of another model: it lacks {listed(missing) or 'nothing'}, and has "
            f"{listed(unknown) or 'nothing'} too much"
        )
    packed = {
        f"{prefix}.{module.packed_name}_{part}".removeprefix(".")
        for prefix, module in model.named_modules()
        if isinstance(module, SparseLayer)
        for part in (*PARTS, LAYOUT)
    }
    for name, tensor in expected.items():
        given = state[name]
        if not isinstance(tensor, Tensor) or name in packed:
            continue
        if not isinstance(given, Tensor) or given.shape != tensor.shape:
            shape = tuple(given.shape) if isinstance(given, Tensor) else shown(given)
            raise ValueError(f"state_dict has {name} of shape {shape}, and the model {tuple(tensor.shape)}")
