"""Take positions out of tensors: the same `Parameter` objects with fewer values, and attributes that know."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.modules.attachments import parameters_of
from pyprune.modules.undo import Change, refill
from pyprune.structured.sizes import holders


@dataclass(frozen=True, eq=False)
class Kept:
    """Positions that are kept, by the id of a tensor and by dimension."""

    dims: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Mapping[int, Tensor]:
        """Positions of a tensor, by dimension; those that are not there keep all."""
        return self.dims.get(id(tensor), {})

    def cut(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        """What is kept of a tensor; ``like``: of one that has the positions of this other one."""
        return cut(tensor, self.of(tensor if like is None else like))


def cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Return what is kept of a tensor, of the same memory format.

    Example:
        >>> cut(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])}).tolist()
        [[0, 2], [3, 5]]
    """
    made = tensor
    for dim, positions in dims.items():
        made = made.index_select(dim, positions.to(made.device))
    if dims and tensor.dim() in (4, 5):
        wanted = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        if tensor.is_contiguous(memory_format=wanted) and not tensor.is_contiguous():
            made = made.contiguous(memory_format=wanted)
    return made


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def resizing(model: nn.Module, kept: Kept, change: Change, also: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let tensors of a model have only what is kept, and modules know it; if the body fails, they have all again.

    What the body gives ``also`` as their data is taken back, too, and attributes of objects that modules hold. Those
    of modules are brought back by the `Change` that is around this. Once that is finishing, nothing is taken back.
    """
    tensors = {id(tensor): tensor for tensor in named_tensors(model).values() if kept.of(tensor)}
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    others = [(tensor, tensor.data) for tensor in also]
    # Objects that modules share, as a config; what is in a module itself, the `Change` knows.
    shared = [(vars(holder), dict(vars(holder))) for _, prefix, holder in holders(model) if prefix]

    def undo() -> None:
        for attributes, values in shared:
            refill(attributes, values)
        for tensor, data in (*others, *before):
            give_data(tensor, data)

    try:
        try:
            with torch.no_grad():
                for tensor, data in before:
                    give_data(tensor, kept.cut(data, tensor))
            if before:  # gradients of one step are of one model
                for parameter in parameters_of(model):
                    parameter.grad = None
            dense = {id(tensor): data for tensor, data in before}
            for module in model.modules():
                update_known(module, dense)
            yield
        except BaseException:
            if not change.is_finishing:
                undo()
            raise
    except BaseException:  # also if that was interrupted, wherever it was
        if not change.is_finishing:
            undo()
        raise


def give_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data, of another shape perhaps; graphs of earlier steps do not keep it from training."""
    if tensor.shape != data.shape and tensor.requires_grad:
        # As long as a graph is alive, what accumulates gradients is too, and knows the old shape. Torch makes another
        # when the type changes.
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data


# ---- attributes of known layers ----


def update_known(module: nn.Module, before: Mapping[int, Tensor]) -> None:
    """Let a layer that torch or transformers made say the sizes that its tensors have now."""
    own = _own_tensors(module)
    if not any(id(one) in before for one in own.values()):
        return
    for names, update in _KNOWN:
        if any(cls.__name__ in names for cls in type(module).__mro__):
            update(module, own, {name: before.get(id(one), one) for name, one in own.items()})
            return


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer; if its weight is computed, what it is computed of has that name."""
    own = {name: one for name, one in (*module._parameters.items(), *module._buffers.items()) if one is not None}
    for name, parts in getattr(module, "parametrizations", {}).items():
        of = [*parts.parameters(recurse=False), *parts.buffers(recurse=False)]
        own[name] = max(of, key=lambda one: (one.dim(), one.numel()))
    for name in ("weight_v", "weight_orig"):  # the older weight_norm and spectral_norm
        if name in own:
            own.setdefault("weight", own[name])
    return own


_Tensors = Mapping[str, Tensor]


def _linear(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.out_features, module.in_features = now["weight"].shape


def _bilinear(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.out_features, module.in1_features, module.in2_features = now["weight"].shape


def _conv(module: Any, now: _Tensors, before: _Tensors) -> None:
    shape, old = now["weight"].shape, before["weight"].shape
    if module.groups > 1:
        module.groups = int(module.groups) * shape[0] // old[0]
    first, second = shape[0], shape[1] * module.groups
    module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)


def _batch_norm(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.num_features = len(next(one for one in now.values() if one.dim()))


def _layer_norm(module: Any, now: _Tensors, before: _Tensors) -> None:
    if hasattr(module, "normalized_shape"):  # others have a class of this name, too
        module.normalized_shape = tuple(now["weight"].shape)


def _group_norm(module: Any, now: _Tensors, before: _Tensors) -> None:
    count, old = len(now["weight"]), len(before["weight"])
    if module.num_groups > 1:
        module.num_groups = int(module.num_groups) * count // old
    module.num_channels = count


def _embedding(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.num_embeddings, module.embedding_dim = now["weight"].shape


def _prelu(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.num_parameters = now["weight"].numel()


def _recurrent(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.input_size = now["weight_ih_l0"].shape[1]
    if module.proj_size:
        module.proj_size, module.hidden_size = now["weight_hr_l0"].shape
    else:
        module.hidden_size = now["weight_hh_l0"].shape[1]


def _recurrent_cell(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.input_size, module.hidden_size = now["weight_ih"].shape[1], now["weight_hh"].shape[1]


def _conv1d(module: Any, now: _Tensors, before: _Tensors) -> None:
    module.nx, module.nf = now["weight"].shape


# By the names of classes, theirs or of what they inherit from.
_KNOWN: list[tuple[set[str], Callable[[Any, _Tensors, _Tensors], None]]] = [
    ({"Linear"}, _linear),
    ({"Bilinear"}, _bilinear),
    ({"_ConvNd"}, _conv),
    ({"_NormBase"}, _batch_norm),
    ({"LayerNorm", "RMSNorm"}, _layer_norm),
    ({"GroupNorm"}, _group_norm),
    ({"Embedding", "EmbeddingBag"}, _embedding),
    ({"PReLU"}, _prelu),
    ({"RNNBase"}, _recurrent),
    ({"RNNCellBase"}, _recurrent_cell),
    ({"Conv1D"}, _conv1d),
]  # fmt: skip


# ---- any attribute ----


def holder_of(model: nn.Module, name: str, attribute: str) -> tuple[dict[str, Any], str]:
    """Return the dict in which an attribute of a module lies, or of an object that it holds, and its key."""
    holder: Any = model.get_submodule(name)
    *path, key = attribute.split(".")
    for one in path:
        holder = vars(holder)[one]
    return vars(holder), key


def value_of(model: nn.Module, name: str, attribute: str) -> Any:
    """Return an attribute of a module; raises KeyError or AttributeError if there is none."""
    attributes, key = holder_of(model, name, attribute)
    return attributes[key]


def set_attribute(model: nn.Module, name: str, attribute: str, value: Any) -> None:
    """Give an attribute of a module another value; a list becomes what there was, a tuple or a list."""
    attributes, key = holder_of(model, name, attribute)
    attributes[key] = tuple(value) if isinstance(attributes.get(key), tuple) else value
    if key == "axes_lengths" and f"_{key}" in attributes:  # a layer of einops keeps it twice
        attributes[f"_{key}"] = tuple(value.items())


def add_bias(module: nn.Module) -> nn.Parameter:
    """Give a layer a bias of zeros, as many as it has outputs."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    count = getattr(module, "out_channels", None) or getattr(module, "out_features", None) or weight.shape[-1]
    bias = nn.Parameter(weight.new_zeros(count), requires_grad=weight.requires_grad)
    module.register_parameter("bias", bias)
    return bias


# ---- optimizers ----


def cut_state(optimizer: torch.optim.Optimizer, kept: Kept, shapes: Mapping[int, torch.Size]) -> list[str]:
    """Let the state of an optimizer fit parameters that are smaller; returns what did not, and is begun anew."""
    renewed = []
    if getattr(optimizer, "_numel_cache", None) is not None:  # LBFGS counts its parameters once
        vars(optimizer)["_numel_cache"] = None
    for parameter, state in optimizer.state.items():
        dims = kept.of(parameter)
        if not dims:
            continue
        shape = shapes[id(parameter)]
        odd = [
            key for key, one in state.items() if isinstance(one, Tensor) and one.numel() > 1 and one.shape != shape
        ]
        if odd and any(state[key].shape != parameter.shape for key in odd):
            renewed += odd
            state.clear()
            continue
        for key, one in state.items():
            if isinstance(one, Tensor) and one.shape == shape and one.numel() > 1:
                state[key] = cut(one, dims)
    return list(dict.fromkeys(renewed))
