"""Weights of a model as matrices, whose columns are the inputs of one group, and the way back."""

import torch
from torch import Tensor

from pyprune.methods.layout import as_matrices, from_matrices
from pyprune.modules.masks import raw_weight
from pyprune.modules.targets import Target

__all__ = ["as_matrices", "as_weight", "from_matrices", "matrices"]


def matrices(target: Target) -> Tensor:
    """Return the raw values of a weight as matrices, a copy of float32, or of float64 if it is that.

    Raises:
        ValueError: if it cannot be told what its dimensions count.

    Example:
        >>> from pyprune.modules.targets import find_targets
        >>> (target,) = find_targets(torch.nn.Linear(3, 2))
        >>> tuple(matrices(target).shape)
        (1, 2, 3)
    """
    wide = torch.float64 if target.parameter.dtype == torch.float64 else torch.float32
    return as_matrices(raw_weight(target).detach(), target.layout).to(wide, copy=True)


def as_weight(target: Target, matrices: Tensor) -> Tensor:
    """Return matrices of a weight, values or a mask, in its shape; values in its dtype."""
    weight = from_matrices(matrices, target.layout, target.parameter.shape)
    return weight if weight.dtype == torch.bool else weight.to(target.parameter.dtype)
