"""Fold masks into the weights and leave a plain model."""

import copy
from enum import Enum

import torch
from torch import nn

from pyprune import ops
from pyprune.masks import attach, detach
from pyprune.targets import check_prunable, masks_of


class StripFormat(str, Enum):
    """What `strip` leaves behind, under the names NNCF gives it.

    * ``IN_PLACE``: zeros in the weights, and nothing else.
    * ``NATIVE``: in NNCF, another form of its quantizers, with masks left on. pyprune has no quantizers.
    """

    IN_PLACE = "in_place"
    NATIVE = "native"


@torch.inference_mode(False)  # a copy made under inference_mode could not be trained
def strip(
    model: nn.Module, *, do_copy: bool = False, strip_format: StripFormat | str = StripFormat.IN_PLACE
) -> nn.Module:
    """Write zeros where the masks drop weights, and remove every trace of pruning.

    Classes of modules, names and order of parameters, the `Parameter` objects and their ``requires_grad`` are
    those of the dense model again: an optimizer goes on holding them, and a plain model loads the state_dict. The
    outputs do not change. A model without masks is returned as it is. After this, nothing keeps the zeros at
    zero in further training.

    Args:
        model: a model with masks.
        do_copy: work on a deep copy, and leave ``model`` as it is.
        strip_format: `StripFormat.IN_PLACE` or its value.

    Returns:
        ``model``, or its copy.

    Raises:
        TypeError, ValueError: for another format, or a masked weight that cannot be written to (one that was
            sharded, or got a second parametrization). The model is then as it was.

    Example:
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(4, 4), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> int(strip(linear).weight.count_nonzero()), type(linear).__name__
        (4, 'Linear')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if strip_format == StripFormat.NATIVE:
        raise ValueError(
            "strip_format NATIVE converts NNCF's quantizers and would leave the masks on; pyprune has no "
            "quantizers. Use StripFormat.IN_PLACE, which folds the masks into the weights"
        )
    if strip_format != StripFormat.IN_PLACE:
        raise ValueError(f"strip_format is {strip_format!r}; allowed is StripFormat.IN_PLACE")
    for target in masks_of(model):
        check_prunable(target)
        for owner in target.owners:
            if owner.foreign_steps:
                raise ValueError(
                    f"{owner.name} got another parametrization ({', '.join(owner.foreign_steps)}) over its "
                    "mask; remove that one first"
                )
    if do_copy:
        model = copy.deepcopy(model)
    masks = masks_of(model)
    try:
        # The last comes off first, so that attaching again keeps the order. Weights change when all else is done.
        for target in reversed(masks):
            detach(target.owners[::-1])
        for device in {mask.device for mask in masks.values()}:
            group = {target.parameter: mask for target, mask in masks.items() if mask.device == device}
            ops.fold(list(group), list(group.values()))
    except BaseException:
        attach((target.owners, mask) for target, mask in masks.items())
        raise
    return model
