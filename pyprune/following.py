"""What belongs to an output channel besides its weights: the bias, and the BatchNorm that comes next."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyprune.attachments import Owner
from pyprune.calibration import check_initialized, evaluating, forward, untouched
from pyprune.masks import FollowingMask, Mask
from pyprune.targets import Target, all_parameters, attachments_of, output_layers


def norms_after(model: nn.Module, layers: Iterable[nn.Module], inputs: Any) -> dict[nn.Module, _BatchNorm]:
    """Run the model once; return, for those layers whose output goes into a BatchNorm as it is, that BatchNorm.

    One that follows several layers, or a layer that several follow, is left out. The pass runs in evaluation mode
    without gradients, and leaves the model as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> norms_after(model, [model[0]], torch.ones(1, 1, 3, 3)) == {model[0]: model[1]}
        True
    """
    check_initialized(model)
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}
    pairs: set[tuple[nn.Module, _BatchNorm]] = set()

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            # The tensor is kept, so that its id stays its own; its version tells whether something wrote into it.
            made[id(output)] = (layer, output, output._version)

    def before_norm(norm: nn.Module, args: tuple[Any, ...]) -> None:
        layer, output, version = made.get(id(args[0]) if args else 0, (None, None, 0))
        if layer is not None and output is not None and output._version == version:
            pairs.add((layer, cast(_BatchNorm, norm)))

    hooks = [layer.register_forward_hook(after_layer) for layer in layers]
    hooks += [norm.register_forward_pre_hook(before_norm) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    try:
        with evaluating(model), untouched(model):
            forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer: norm
        for layer, norm in pairs
        if sum(one is layer for one, _ in pairs) == 1 and sum(other is norm for _, other in pairs) == 1
    }


def new_followers(
    model: nn.Module, targets: Iterable[Target], inputs: Any
) -> list[tuple[tuple[Owner, ...], FollowingMask]]:
    """Make masks for the biases of these targets' layers, and for scale and shift of the BatchNorm after them.

    They are to drop what belongs to output channels without a weight, so that such a channel is really zero;
    `update_followers` sees to that. What carries such a mask already is left out.

    Raises:
        ValueError: if the model has BatchNorm and there are no inputs to see which layer it follows.
    """
    targets = list(targets)
    layers = {layer: target for target in targets for layer in output_layers(target)}
    norms: dict[nn.Module, _BatchNorm] = {}
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        if inputs is None:
            raise ValueError(
                "zero_dead_channels must know which BatchNorm follows which layer; give examples_inputs, for one "
                "forward pass"
            )
        norms = norms_after(model, layers, inputs)
    places = {(id(owner.module), owner.attribute): other for other in all_parameters(model) for owner in other.owners}
    new: list[tuple[tuple[Owner, ...], FollowingMask]] = []
    for layer, target in layers.items():
        norm = norms.get(layer)
        candidates = [(layer, "bias"), *((norm, name) for name in ("weight", "bias") if norm is not None)]
        for module, attribute in candidates:
            found = places.get((id(module), attribute))
            if found is not None and found.attachment is None:
                alive = torch.ones_like(found.parameter, dtype=torch.bool)
                new.append((found.owners, FollowingMask(alive, target.name)))
    return new


def update_followers(model: nn.Module) -> None:
    """Set the masks of biases and BatchNorm parameters to what the masks of the weights have become."""
    attached = attachments_of(model)
    by_name = {target.name: target for target in attached}
    with torch.no_grad():
        for follower in attached.values():
            followed = by_name.get(follower.follows) if isinstance(follower, FollowingMask) else None
            carried = None if followed is None else attached[followed]
            if followed is not None and isinstance(carried, Mask):
                cast(FollowingMask, follower).mask.copy_(channels_alive(followed, carried.mask))


def channels_alive(target: Target, mask: Tensor) -> Tensor:
    """Say of each output channel of a layer whether it keeps a weight."""
    if not isinstance(target.owners[0].module, nn.modules.conv._ConvTransposeNd):
        return mask.flatten(1).any(1)
    # Its weight is (inputs, outputs of a group, ...), with the inputs of one group after the other.
    groups = target.owners[0].module.groups
    return mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1).any(3).any(1).flatten()
