"""Where the channels that layers put out are in a forward pass."""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What leaves zeros zero, and each channel by itself.
KEEP_ZERO = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "hardswish", "hardtanh"),
    *("elu", "celu", "selu", "tanh", "softsign", "clamp_min", "clone", "to", "float", "half", "bfloat16", "double"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)),
}
# What is only put into another form.
KEEP_MEANING = KEEP_ZERO | {"softmax", "log_softmax", "sigmoid", "logsigmoid", "softplus", "add", "mul", "div"}
_JOIN = {"cat", "concat", "concatenate"}


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels of layers that lie in a tensor.

    Args:
        layers: whose.
        dim: along which dimension.
        as_made: whether they are what a layer put out, as it was.
        joined: whether other channels lie beside them.
    """

    layers: tuple[nn.Module, ...]
    dim: int
    as_made: bool = True
    joined: bool = False


class Followed(TorchFunctionMode):
    """Follows channels through a forward pass, by the functions that keep what one wants of them.

    Args:
        keep: names of functions that keep it, and each channel by itself.
    """

    def __init__(self, keep: Set[str]) -> None:
        super().__init__()
        self.keep = keep
        # By storage, which views share. The tensors are kept, so that no other gets their memory; their versions
        # tell whether something wrote into them.
        self._known: dict[int, tuple[Tensor, int, Channels]] = {}

    def made(self, tensor: Tensor, channels: Channels) -> None:
        """Know from now on what channels lie in a tensor."""
        self._known[tensor.untyped_storage().data_ptr()] = tensor, tensor._version, channels

    def channels(self, tensor: object) -> Channels | None:
        """Return what channels lie in a tensor or a view, if that is known."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None
        whole, version, channels = self._known.get(tensor.untyped_storage().data_ptr(), (None, 0, None))
        if whole is None or channels is None or whole._version != version:
            return None
        if tensor.shape == whole.shape and tensor.stride() == whole.stride():
            return channels
        size, step = whole.shape[channels.dim], whole.stride(channels.dim)
        dims = [dim for dim in range(tensor.dim()) if (tensor.shape[dim], tensor.stride(dim)) == (size, step)]
        return replace(channels, dim=dims[0]) if len(dims) == 1 else None

    def layers(self, tensor: object) -> tuple[nn.Module, ...]:
        """Return whose channels lie in a tensor, wherever."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return ()
        whole, version, channels = self._known.get(tensor.untyped_storage().data_ptr(), (None, 0, None))
        return channels.layers if channels is not None and whole is not None and whole._version == version else ()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        given = [self.channels(one) for one in (args[0] if name in _JOIN and args else args[:1])]
        result = func(*args, **(kwargs or {}))
        known = [channels for channels in given if channels is not None]
        if known and isinstance(result, Tensor) and (name in self.keep or name in _JOIN):
            layers = tuple(layer for channels in known for layer in channels.layers)
            joined = name in _JOIN or known[0].joined
            self.made(result, Channels(layers, known[0].dim, as_made=False, joined=joined))
        return result
