"""Weights as matrices, whose columns are the inputs of one group, and the way back.

The columns of a convolution are positions of its kernel by channels: so neighbours of N:M, which are channels at one
position, are neighbouring columns.
"""

import torch
from torch import Tensor

from pyprune.methods.layout import Layout, groups_first
from pyprune.modules.masks import raw_weight
from pyprune.modules.targets import Target


def as_matrices(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a weight, or a mask of it, as (groups, outputs of one, inputs of one); a view where that is possible.

    Args:
        tensor: the weight; of one dimension, it is one row.
        layout: what its dimensions count.

    Raises:
        ValueError: if the layout does not say what counts outputs and inputs.

    Example:
        >>> tuple(as_matrices(torch.empty(6, 2, 3, 3), Layout(0, 1, groups=2)).shape)
        (2, 3, 18)
    """
    if tensor.dim() < 2:
        return tensor.reshape(1, 1, -1)
    by_group = groups_first(tensor, layout)
    return by_group.permute(_order(layout, by_group.dim())).flatten(2)


def from_matrices(matrices: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Undo `as_matrices`.

    Example:
        >>> layout = Layout(1, 0, groups=2)
        >>> kernel = torch.randn(4, 3, 5)
        >>> torch.equal(from_matrices(as_matrices(kernel, layout), layout, kernel.shape), kernel)
        True
    """
    if len(shape) < 2:
        return matrices.reshape(shape)
    split = (layout.groups, shape[0] // layout.groups, *shape[1:])
    order = _order(layout, len(split))
    back = [order.index(dim) for dim in range(len(split))]
    return matrices.reshape([split[dim] for dim in order]).permute(back).reshape(shape)


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


def _order(layout: Layout, dims: int) -> list[int]:
    """Return the dimensions of a weight, with groups first: groups, outputs, all others, inputs."""
    if layout.outputs is None or layout.inputs is None:
        raise ValueError(f"which dimensions of the weight count outputs and inputs is not known: {layout.problem}")
    outputs, inputs = layout.outputs + 1, layout.inputs + 1
    return [0, outputs, *(dim for dim in range(1, dims) if dim not in (outputs, inputs)), inputs]
