"""Network slimming: train the scales of BatchNorm small, then remove the channels that have small ones."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyprune.checks import check_number
from pyprune.modules.attachments import check_module
from pyprune.modules.targets import by_place


def slimming_loss(model: nn.Module, weight: float = 1e-4) -> Tensor:
    """Return weight * sum of |gamma| over the scales of all BatchNorm layers, to be added to the loss.

    After such a training, ``Method(importance.batch_norm_scale(), granularity.channel("out"))`` prunes the output
    channels with the smallest scales of the whole model.

    Args:
        model: with BatchNorm layers.
        weight: what a scale of 1 costs; 0 or more.

    Returns:
        A tensor without dimensions, whose gradient reaches the scales.

    Raises:
        TypeError, ValueError: for another weight, or a model without a scale.

    Paper: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> round(slimming_loss(model, 0.01).item(), 4)
        0.08
    """
    check_module(model)
    price = check_number("weight", weight, what="a number, 0 or more", least=0)
    # The raw scale: one under a mask of a dead channel is to stay small, too.
    scales = {
        target.parameter: None
        for (module, attribute), target in by_place(model).items()
        if isinstance(module, _BatchNorm) and attribute == "weight"
    }
    if not scales:
        raise ValueError(f"{type(model).__name__} has no BatchNorm with a scale; slimming needs one")
    return torch.stack([scale.abs().sum(dtype=torch.float32) for scale in scales]).sum() * price
