"""What belongs to an output channel besides its weights: the bias, and the norms that come next."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pyprune.console import listed, warn
from pyprune.methods.layout import Layout, channels_shape
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.layers import bias_of, weight_layouts
from pyprune.modules.masks import NewFollower, NewMask
from pyprune.modules.norms import NORMS, Norms, see_norms
from pyprune.modules.targets import Target, by_place, ignored_in, output_layers


def new_followers(
    model: nn.Module, masks: Mapping[Target, NewMask], inputs: Any, ignored_scope: IgnoredScope | None = None
) -> list[NewFollower]:
    """Plan masks for the biases of these targets' layers, and for scale and shift of the norms after them.

    They are to drop what belongs to output channels without a weight, so that such a channel is really zero. What
    carries such a mask already is left out, and what is ignored stays as it is. Warnings name that, and norms after
    which dead channels are not zero.

    Raises:
        ValueError: if the model has BatchNorm and there are no inputs to see which layer it follows, if that
            BatchNorm has no scale and shift to mask, or if layers share a bias.
    """
    norms = _norms_of(model, {layer: target for target in masks for layer in output_layers(target)}, inputs)
    ignored = ignored_in(model, ignored_scope)
    places = by_place(model)
    new: list[NewFollower] = []
    left: list[str] = []
    shared: list[str] = []
    for target in masks:
        for owner in target.owners:
            layout = weight_layouts(owner.module).get(owner.attribute, target.layout)
            follow = [(owner.module, bias_of(owner.attribute))]
            if owner.attribute == "weight":
                follow += [(norm, name) for norm in norms.get(owner.module, ()) for name in ("weight", "bias")]
            for module, attribute in follow:
                found = places.get((module, attribute))
                if found is None or found.attachment is not None:
                    continue
                if not _has_channels(found, target, layout):
                    shared += [found.name] if layout.outputs is not None and not layout.is_table else []
                    continue
                if any(ignored(place.name) for place in found.owners):
                    left.append(found.name)
                    continue
                if len({place.module for place in found.owners}) > 1:
                    names = " and ".join(place.name for place in found.owners)
                    raise ValueError(
                        f"zero_dead_channels cannot mask the bias of {target.name}, because it is one parameter under"
                        f" several names, {names}, and other uses of it may have other dead channels. Name "
                        f"{target.name} in ignored_scope, or leave the option out"
                    )
                new.append(NewFollower(found.owners, masks[target], layout, found.parameter.shape))
    if shared:
        warn(
            f"zero_dead_channels leaves {listed(list(dict.fromkeys(shared)))} as they are, because they belong to "
            "several weights: what they add to dead channels is not zero"
        )
    if left:
        warn(
            f"zero_dead_channels leaves {listed(left)} as they are, because ignored_scope names them: what they add "
            "to dead channels is not zero"
        )
    return new


def _norms_of(model: nn.Module, layers: Mapping[nn.Module, Target], inputs: Any) -> dict[nn.Module, list[nn.Module]]:
    """Return the norms that have the channels of one layer each, by that layer; warn of others."""
    there: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, NORMS)}
    if inputs is None and not any(isinstance(norm, _BatchNorm) for norm in there):
        if there:
            warn(
                f"zero_dead_channels does not know which layers {listed(list(there.values()))} follow, and after a "
                "norm dead channels are not zero; give examples_inputs, for one forward pass"
            )
        return {}
    followed: dict[nn.Module, list[nn.Module]] = {}
    mixed: list[nn.Module] = []
    seen = see_norms(model, layers, inputs, "zero_dead_channels") if inputs is not None or there else Norms({}, {})
    for norm, at_each_call in seen.given.items():
        channels = [one for one in at_each_call if one is not None]
        sources = {layer for one in channels for layer in one.layers}
        if not sources:
            continue
        if len(sources) > 1 or len(channels) < len(at_each_call) or any(one.joined for one in channels):
            mixed.append(norm)
        elif getattr(norm, "weight", None) is not None:
            followed.setdefault(sources.pop(), []).append(norm)
        elif isinstance(norm, _BatchNorm):
            raise ValueError(
                f"zero_dead_channels cannot zero what the BatchNorm after {layers[sources.pop()].name} puts out: it "
                "has no scale and shift. Name the layer in ignored_scope, or leave the option out"
            )
        elif not isinstance(norm, _InstanceNorm) or norm.track_running_stats:  # which leaves zeros zero
            mixed.append(norm)
    behind = [there[norm] for norm in mixed] + [name for norm, name in seen.reviving.items() if norm not in mixed]
    if behind:
        warn(
            f"zero_dead_channels does not reach behind {listed(behind)}, where dead "
            "channels are not zero: these norms have no scale and shift, or not of the channels of one layer alone"
        )
    return followed


def _has_channels(bias: Target, target: Target, layout: Layout) -> bool:
    """Whether a parameter has one value for each output channel of a weight, and nothing else makes these outputs."""
    if target.parameter.dim() < 2 or layout.outputs is None or layout.is_table:
        return False
    if any(isinstance(owner.module, (nn.RNNBase, nn.RNNCellBase)) for owner in target.owners):
        return False  # a gate has two weights
    channels = channels_shape(tuple(target.parameter.shape), layout, "out")
    return bias.parameter.numel() == math.prod(channels)
