"""What belongs to an output channel besides its weights: the bias, and the BatchNorm that comes next."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyprune.modules.activations import channel_dim
from pyprune.modules.evaluation import check_initialized, evaluating, forward, untouched
from pyprune.modules.masks import NewFollower, NewMask
from pyprune.modules.targets import Target, by_place, is_transposed, output_layers
from pyprune.modules.undo import Before, undoing


def norms_after(
    model: nn.Module, layers: Iterable[nn.Module], inputs: Any, asked_by: str = "norms_after"
) -> dict[nn.Module, _BatchNorm]:
    """Run the model once; return, for those layers whose output goes into a BatchNorm as it is, that BatchNorm.

    One that follows several layers, or a layer that several follow, is left out. The pass runs in evaluation mode
    without gradients, and leaves the model as it was.

    Raises:
        ValueError: if there are no inputs, in the name of what asked.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> norms_after(model, [model[0]], torch.ones(1, 1, 3, 3)) == {model[0]: model[1]}
        True
    """
    if inputs is None:
        raise ValueError(
            f"{asked_by} must know which BatchNorm follows which layer; give examples_inputs, for one forward pass"
        )
    check_initialized(model)
    layers = list(layers)
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}
    # What each BatchNorm was given: a layer's output with its channels, or something else.
    given: dict[_BatchNorm, set[nn.Module | None]] = {}

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and channel_dim(layer, output) == 1:  # which BatchNorm takes for channels
            # The tensor is kept, so that its id stays its own; its version tells whether something wrote into it.
            made[id(output)] = (layer, output, output._version)

    def before_norm(norm: nn.Module, args: tuple[Any, ...]) -> None:
        layer, output, version = made.get(id(args[0]) if args else 0, (None, None, 0))
        changed = output is None or output._version != version
        given.setdefault(cast(_BatchNorm, norm), set()).add(None if changed else layer)

    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm)]
    with undoing(Before(*layers, *norms, with_attributes=False).restore), evaluating(model), untouched(model):
        for layer in layers:
            layer.register_forward_hook(after_layer)
        for norm in norms:
            norm.register_forward_pre_hook(before_norm)
        forward(model, inputs)
    only = {norm: next(iter(found)) for norm, found in given.items() if len(found) == 1}
    followed = list(only.values())
    return {layer: norm for norm, layer in only.items() if layer is not None and followed.count(layer) == 1}


def new_followers(model: nn.Module, masks: Mapping[Target, NewMask], inputs: Any) -> list[NewFollower]:
    """Plan masks for the biases of these targets' layers, and for scale and shift of the BatchNorm after them.

    They are to drop what belongs to output channels without a weight, so that such a channel is really zero. What
    carries such a mask already is left out.

    Raises:
        ValueError: if the model has BatchNorm and there are no inputs to see which layer it follows, if that
            BatchNorm has no scale and shift to mask, or if layers share a bias.
    """
    layers = {layer: target for target in masks for layer in output_layers(target)}
    norms: dict[nn.Module, _BatchNorm] = {}
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        norms = norms_after(model, layers, inputs, "zero_dead_channels")
    places = by_place(model)
    new: list[NewFollower] = []
    for layer, target in layers.items():
        norm = norms.get(layer)
        if norm is not None and not norm.affine:
            raise ValueError(
                f"zero_dead_channels cannot zero what the BatchNorm after {target.name} puts out: it has no scale "
                "and shift. Name the layer in ignored_scope, or leave the option out"
            )
        for module, attribute in [
            (layer, "bias"),
            *((norm, name) for name in ("weight", "bias") if norm is not None),
        ]:
            found = places.get((module, attribute))
            if found is None or found.attachment is not None:
                continue
            if len({owner.module for owner in found.owners}) > 1:
                names = ", ".join(owner.name for owner in found.owners)
                raise ValueError(
                    f"zero_dead_channels cannot mask {names}: layers with channels of their own share it. Name one "
                    "in ignored_scope, or leave the option out"
                )
            groups = cast(int, layer.groups) if is_transposed(layer) else 0
            new.append(NewFollower(found.owners, masks[target], groups))
    return new
