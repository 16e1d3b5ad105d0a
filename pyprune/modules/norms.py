"""Which norms come after a layer, and so make something else of channels that are zero."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pyprune.modules.activations import channel_dim
from pyprune.modules.channels import KEEP_ZERO, Channels, Followed
from pyprune.modules.evaluation import check_initialized, evaluating, forward, untouched, using
from pyprune.modules.undo import Before, undoing

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, _InstanceNorm)


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
    followed = Followed(KEEP_ZERO)
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
