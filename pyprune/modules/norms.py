"""Which norms come after a layer, and so make something else of channels that are zero."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from pyprune.modules.activations import channel_dim
from pyprune.modules.evaluation import check_initialized, evaluating, forward, untouched, using
from pyprune.modules.undo import Before, undoing

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, _InstanceNorm)

# What leaves zeros zero, and each channel by itself.
_KEEP_ZERO = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "hardswish", "hardtanh"),
    *("elu", "celu", "selu", "tanh", "softsign", "clamp_min", "clone", "to", "float", "half", "bfloat16", "double"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)),
}
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


class _Followed(TorchFunctionMode):
    """Follows channels through a forward pass for as long as zeros stay zeros."""

    def __init__(self) -> None:
        super().__init__()
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

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        given = [self.channels(one) for one in (args[0] if name in _JOIN and args else args[:1])]
        result = func(*args, **(kwargs or {}))
        known = [channels for channels in given if channels is not None]
        if known and isinstance(result, Tensor) and (name in _KEEP_ZERO or name in _JOIN):
            layers = tuple(layer for channels in known for layer in channels.layers)
            joined = name in _JOIN or known[0].joined
            self.made(result, Channels(layers, known[0].dim, as_made=False, joined=joined))
        return result


def given_to_norms(
    model: nn.Module, layers: Iterable[nn.Module], inputs: Any, asked_by: str
) -> dict[nn.Module, list[Channels | None]]:
    """Run the model once; return for each norm what it was given at each call: channels of layers, or something else.

    The pass runs in evaluation mode without gradients, and leaves the model as it was.

    Raises:
        ValueError: if there are no inputs, in the name of what asked.
    """
    if inputs is None:
        raise ValueError(
            f"{asked_by} must know which BatchNorm follows which layer; give examples_inputs, for one forward pass"
        )
    check_initialized(model)
    followed = _Followed()
    given: dict[nn.Module, list[Channels | None]] = {}

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.layout is torch.strided:
            followed.made(output, Channels((layer,), channel_dim(layer, output)))

    def before_norm(norm: nn.Module, args: tuple[Any, ...]) -> None:
        channels = followed.channels(args[0]) if args else None
        if channels is not None and channels.dim != _channels_of(norm, args[0]):
            channels = replace(channels, as_made=False, joined=True)
        given.setdefault(norm, []).append(channels)

    layers, norms = list(layers), [norm for norm in model.modules() if isinstance(norm, NORMS)]
    before = Before(*layers, *norms, with_attributes=False)
    with undoing(before.restore), evaluating(model), untouched(model), using(followed):
        for layer in layers:
            layer.register_forward_hook(after_layer)
        for norm in norms:
            norm.register_forward_pre_hook(before_norm)
        forward(model, inputs)
    return given


def _channels_of(norm: nn.Module, tensor: Tensor) -> int:
    """Return along which dimension of its input a norm has a scale and shift of each entry; -1 if along several."""
    if type(norm) is not nn.LayerNorm:
        return 1  # subclasses of LayerNorm are those of images
    return tensor.dim() - 1 if len(norm.normalized_shape) == 1 else -1


def norms_after(
    model: nn.Module, layers: Iterable[nn.Module], inputs: Any, asked_by: str = "norms_after"
) -> dict[nn.Module, _BatchNorm]:
    """Run the model once; return, for those layers whose output goes into a BatchNorm as it is, that BatchNorm.

    One that follows several layers, or a layer that several follow, is left out.

    Raises:
        ValueError: if there are no inputs, in the name of what asked.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> norms_after(model, [model[0]], torch.ones(1, 1, 3, 3)) == {model[0]: model[1]}
        True
    """
    only: dict[_BatchNorm, nn.Module] = {}
    for norm, given in given_to_norms(model, layers, inputs, asked_by).items():
        sources = {channels.layers if channels is not None and channels.as_made else () for channels in given}
        if isinstance(norm, _BatchNorm) and len(sources) == 1 and len(source := sources.pop()) == 1:
            only[norm] = source[0]
    followed = list(only.values())
    return {layer: norm for norm, layer in only.items() if followed.count(layer) == 1}
