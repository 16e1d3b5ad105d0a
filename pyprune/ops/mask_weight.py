"""A weight as its mask leaves it, differentiable."""

from typing import Any

import torch
from torch import Tensor


def mask_weight(weight: Tensor, mask: Tensor, *, dense_gradient: bool = False) -> Tensor:
    """Return ``where(mask, weight, 0)`` in new memory; a dropped infinity or NaN gives 0.

    Args:
        weight: float32, float64, float16 or bfloat16, any strides.
        mask: bool, of the weight's shape and on its device, True = kept.
        dense_gradient: let the gradient pass as it comes, instead of zeroing it where the mask is False.

    Returns:
        A tensor of the weight's shape, dtype and layout.

    Example:
        >>> weight = torch.tensor([1.0, torch.inf], requires_grad=True)
        >>> out = mask_weight(weight, torch.tensor([True, False]))
        >>> out.tolist()
        [1.0, 0.0]
        >>> out.sum().backward()
        >>> weight.grad.tolist()
        [1.0, 0.0]
    """
    if dense_gradient:
        out: Tensor = _Straight.apply(weight, mask)  # type: ignore[no-untyped-call]
        return out
    return torch.where(mask, weight, 0)


class _Straight(torch.autograd.Function):
    """The mask in the forward pass only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
