"""What attributes of a class with gates do: compute the gated weight, and refuse what would break it unnoticed."""

import functools
import sys
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune import ops
from pyprune.modules.attachments import gate_name


def computed_attributes(cls: type, attributes: tuple[str, ...]) -> dict[str, Any]:
    """Return what a class needs besides, so that these parameters of its instances are gated."""
    if not attributes:
        return {}
    namespace: dict[str, Any] = {name: _computed(name) for name in attributes}
    namespace["qconfig"] = property(_qconfig, _refuse_qconfig, _refuse_conversion)
    if issubclass(cls, (nn.Linear, nn.Embedding)) and "weight" in attributes:
        sizes = ("num_embeddings",) if issubclass(cls, nn.Embedding) else ("in_features", "out_features")
        namespace |= {size: _fixed(size) for size in sizes if not hasattr(cls, size)}
    if issubclass(cls, nn.RNNBase):
        namespace |= _OF_RNNS
    return namespace


def check_fits(name: str, gate: nn.Module | None, parameter: nn.Parameter | None) -> None:
    """Raise unless a parameter can be that of a gate."""
    shape = cast(Any, gate).shape
    if parameter is None or tuple(parameter.shape) != shape:
        given = "None" if parameter is None else f"a parameter of shape {tuple(parameter.shape)}"
        raise ValueError(
            f"{name} carries a gate for shape {shape}, and is to become {given}; call pyprune.strip first, and prune "
            "again after it"
        )
    # FSDP2 puts its shards here; the gate sees them whole.
    is_quantised = is_traceable_wrapper_subclass(parameter) and type(parameter).__name__ != "DTensor"
    if is_quantised or parameter.dtype not in ops.WEIGHT_DTYPES:
        raise ValueError(
            f"{name} carries a gate, and is to become a {type(parameter.data).__name__} of {parameter.dtype}; call "
            "pyprune.strip before quantising"
        )


def _sharded(attribute: str, raw: Tensor, reader: str) -> Tensor:
    """Return a sharded parameter to FSDP2, which asks for it before it makes it whole; nobody else can use it."""
    if reader.startswith("torch.distributed.fsdp"):
        return raw
    raise RuntimeError(
        f"{attribute} carries a gate and is sharded, and gates act on whole weights: read it in a forward pass under "
        "fully_shard, or its parameter as module.get_parameter(name). Tensor-parallel layers cannot have gates"
    )


@functools.cache
def _computed(attribute: str) -> property:
    gate = gate_name(attribute)

    def value(module: nn.Module) -> Tensor:
        raw = module._parameters.get(attribute)
        if raw is None:
            raw = module.__dict__[attribute]  # a replica of DataParallel has tensors
        if type(raw).__name__ == "DTensor":
            return _sharded(attribute, raw, sys._getframe(1).f_globals.get("__name__", ""))
        try:
            return cast(Tensor, cast(nn.Module, module._modules[gate])(raw))
        except AttributeError as error:
            # nn.Module would look for the attribute elsewhere, and find the raw one.
            raise RuntimeError(f"the gate on {attribute} failed: {error}") from error

    def replace(module: nn.Module, new: Any) -> None:
        if not module.__dict__.get("_is_replica"):
            raise ValueError(
                f"{attribute} of {type(module).__name__} is computed by a gate; assign a Parameter, or call "
                "pyprune.strip first"
            )
        module.__dict__[attribute] = new

    return property(value, replace)


def _qconfig(module: nn.Module) -> Any:
    if "qconfig" not in module.__dict__:
        raise AttributeError("qconfig")
    return module.__dict__["qconfig"]


def _refuse_qconfig(module: nn.Module, value: Any) -> None:
    # torch.ao swaps layers by their exact class, and would leave this one out without a word.
    if value is not None:
        raise ValueError(f"{type(module).__name__} has gates, and cannot be quantised; call pyprune.strip first")
    module.__dict__["qconfig"] = None


def _refuse_conversion(module: nn.Module) -> None:
    # quantize_dynamic knows layers by their exact class, too, and takes this off when it is done.
    raise ValueError(f"{type(module).__name__} has gates, and was not quantised; call pyprune.strip first")


@functools.cache
def _fixed(size: str) -> property:
    def value(module: nn.Module) -> Any:
        return module.__dict__[size]

    def change(module: nn.Module, new: Any) -> None:
        # Who resizes a layer, as transformers do, writes to ``weight.data`` before, which is lost here.
        if new != module.__dict__.get(size, new):
            raise ValueError(
                f"{type(module).__name__} has a gate on its weight, so {size} cannot change; call pyprune.strip "
                "first, and prune again after it"
            )
        module.__dict__[size] = new

    return property(value, change)


def _flat_weights(rnn: nn.RNNBase) -> list[Any]:
    if "_flat_weight_refs" not in rnn.__dict__:
        return []  # it is being unpickled
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def _set_on_rnn(rnn: nn.RNNBase, name: str, value: Any) -> None:
    # RNNBase would write it into the list too, for which all gates would be sampled.
    cls: Any = nn.Module if name in rnn.__dict__.get("_flat_weights_names", ()) else cast(Any, rnn)._dense_class
    cls.__setattr__(rnn, name, value)


def _nothing(rnn: nn.RNNBase, value: object = None) -> None:
    pass


# RNN modules run on a list of weights that they cache. While one is gated, the list is made anew at each reading: a
# cached one would go stale, and would hold tensors that are no leaves, which deepcopy refuses.
_OF_RNNS = {
    "_flat_weights": property(_flat_weights, _nothing),
    "_init_flat_weights": _nothing,
    "_update_flat_weights": _nothing,
    "flatten_parameters": _nothing,
    "__setattr__": _set_on_rnn,
}
