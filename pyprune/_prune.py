"""Prune a model by magnitude, once."""

from typing import Any

import torch
from torch import Tensor, nn

from pyprune.ignored_scope import IgnoredScope
from pyprune.masks import attach
from pyprune.methods import PruneMode, check_mode, check_ratio, global_magnitude, local_magnitude
from pyprune.targets import Target, find_targets


@torch.inference_mode(False)  # masks made under inference_mode could not be trained with
def prune(
    model: nn.Module,
    mode: PruneMode | str,
    *,
    ratio: float | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
) -> nn.Module:
    """Mask the weights of least magnitude, in place, and return the model.

    Exactly ``min(floor(ratio * n + 0.5), n - 1)`` elements go: of every tensor of n elements in local mode, of
    the n elements of all tensors together in global mode. Of equals, the one in the first tensor, and there the
    one with the lowest index, goes first.

    The masks are computed from the raw weights at every call, and a weight under a mask keeps its value (momentum
    and weight decay still move it): what was dropped can come back. A tensor that a later call ignores keeps
    the mask it has.

    While a mask is on, assigning to the attribute (``layer.weight = ...``, as code that ties weights does)
    raises; write to ``layer.parametrizations.weight.original``. Prune before the forward pass or after the
    backward pass: between them, backward fails, because autograd sees that masks were updated in place.

    Args:
        model: the model. Its weights stay the same `Parameter` objects, now under ``parametrizations``.
        mode: a `PruneMode` or its name.
        ratio: fraction of the elements to remove, in [0, 1).
        ignored_scope: weights to leave out.
        examples_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model. If given,
            one forward pass also finds weights that are bare parameters.

    Raises:
        TypeError, ValueError: for arguments out of range, weights that cannot be pruned, NaN or infinity in a
            weight, and, in global mode, weights on several devices. The model is then as it was.
        NotImplementedError: for `PruneMode.UNSTRUCTURED_REGULARIZATION_BASED`.

    Papers: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"; Kozlov et
    al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> prune(linear, PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5).weight.tolist()
        [[0.0, 0.0], [3.0, 4.0]]
    """
    mode = check_mode(mode)
    fraction = check_ratio(ratio)
    targets = find_targets(model, ignored_scope, examples_inputs)
    devices = dict.fromkeys(target.parameter.device for target in targets)
    if mode is PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL and len(devices) > 1:
        raise ValueError(
            f"the weights are on {', '.join(map(str, devices))}; in global mode they compete with each other "
            "and must be on one device. Move the model, or use UNSTRUCTURED_MAGNITUDE_LOCAL"
        )
    method = local_magnitude if mode is PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL else global_magnitude
    masks: dict[Target, Tensor] = {}
    nonfinite: dict[str, int] = {}
    for device in devices:
        group = [target for target in targets if target.parameter.device == device]
        new_masks, counts = method([target.parameter for target in group], fraction)
        masks.update(zip(group, new_masks, strict=True))
        nonfinite.update(zip([target.name for target in group], counts.tolist(), strict=True))
    bad = [f"{count} in {name}" for name, count in nonfinite.items() if count]
    if bad:
        raise ValueError(f"NaN or infinite weights: {', '.join(bad)}. Repair them, or name them in ignored_scope")
    attach((target.owners, mask) for target, mask in masks.items())
    return model
