"""Relative importance: what a weight is among those of its output, and among those of its input."""

import torch
from torch import Tensor


def relative_importance(matrices: Tensor) -> Tensor:
    """Return |w| / (sum of |w| in its row) + |w| / (sum of |w| in its column); zeros are 0.

    Args:
        matrices: (..., outputs, inputs).

    Example:
        >>> relative_importance(torch.tensor([[1.0, -3.0], [1.0, 0.0]])).tolist()
        [[0.75, 1.75], [1.5, 0.0]]
    """
    sizes = matrices.abs()
    # In float64, so that the order of the additions does not show.
    rows = sizes.sum(-1, keepdim=True, dtype=torch.float64).to(sizes.dtype)
    columns = sizes.sum(-2, keepdim=True, dtype=torch.float64).to(sizes.dtype)
    return torch.where(sizes == 0, 0, sizes / rows + sizes / columns)
