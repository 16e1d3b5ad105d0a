"""Which norms come after a layer, and so make something else of channels that are zero."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pyprune.modules.activations import channel_dim
from pyprune.modules.channels import KEEP_ZERO, Channels, Followed
from pyprune.modules.evaluation import check_initialized, look

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, _InstanceNorm)


@dataclass(frozen=True, eq=False)
class Norms:
    """What the norms of a model have to do with the channels of layers.

    Args:
        given: what each norm was given at each call: channels of layers, or something else.
        reviving: the norms, with their names, that make something else of a channel that is zero in all layers before
            them, though it is not known whose channels they are.
    """

    given: dict[nn.Module, list[Channels | None]]
    reviving: dict[nn.Module, str]


def see_norms(model: nn.Module, layers: Iterable[nn.Module], inputs: Any, asked_by: str) -> Norms:
    """Run the model once, as if the first channel of each of the layers were dead, and see what norms are given.

    The pass runs in evaluation mode without gradients, and leaves the model as it was.

    Raises:
        ValueError: if there are no inputs, in the name of what asked.
    """
    if inputs is None:
        raise ValueError(
            f"{asked_by} must know which BatchNorm follows which layer; give examples_inputs, for one forward pass"
        )
    check_initialized(model)
    followed = Followed(KEEP_ZERO)
    seen = Norms({}, {})
    layers = list(layers)
    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, NORMS) or ("Norm" in type(module).__name__ and not list(module.children()))
    }

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.layout is torch.strided:
            dim = channel_dim(layer, output)
            output.select(dim, 0).zero_()
            followed.made(output, Channels((layer,), dim))

    def before_norm(norm: nn.Module, args: tuple[Any, ...]) -> None:
        channels = followed.channels(args[0]) if args else None
        if channels is not None and channels.dim != _channels_of(norm, args[0]):
            channels = replace(channels, as_made=False, joined=True)
        if isinstance(norm, NORMS):
            seen.given.setdefault(norm, []).append(channels)

    def after_norm(norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(output, Tensor) or not isinstance(args[0], Tensor) or output.dim() < 2:
            return
        dim = _channels_of(norm, args[0])
        channels = seen.given[norm][-1] if norm in seen.given else None
        if channels is not None and not channels.joined and isinstance(getattr(norm, "weight", None), Tensor):
            output.select(dim, 0).zero_()  # its scale and shift will be masked
            followed.made(output, replace(channels, as_made=False))
        elif channels is None and dim >= 0 and args[0].shape == output.shape:
            was_dead = not args[0].select(dim, 0).any()
            if was_dead and output.select(dim, 0).any():
                seen.reviving[norm] = norms[norm]

    look(
        model,
        inputs,
        followed,
        before=[(norm, before_norm) for norm in norms],
        after=[*((layer, after_layer) for layer in layers), *((norm, after_norm) for norm in norms)],
    )
    return seen


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
    for norm, given in see_norms(model, layers, inputs, asked_by).given.items():
        sources = {channels.layers if channels is not None and channels.as_made else () for channels in given}
        if isinstance(norm, _BatchNorm) and len(sources) == 1 and len(source := sources.pop()) == 1:
            only[norm] = source[0]
    followed = list(only.values())
    return {layer: norm for norm, layer in only.items() if followed.count(layer) == 1}
