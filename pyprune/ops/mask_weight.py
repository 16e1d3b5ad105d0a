"""A weight as its mask leaves it, differentiable."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyprune.ops._library import CUDA_KERNELS_LOADED, WEIGHT_DTYPES

# Elements. torch.where takes a nanosecond for each, because it branches; a call of the kernel starts some µs later.
_WORTH_A_KERNEL = 4096


def mask_weight(weight: Tensor, mask: Tensor, *, dense_gradient: bool = False) -> Tensor:
    """Return ``where(mask, weight, 0)`` in new memory; a dropped infinity or NaN gives 0.

    All that torch does with ``torch.where`` works: derivatives of any order and mode, `torch.func`, compilation,
    subclasses of tensors, any dtype and device. For large dense weights of `WEIGHT_DTYPES` there is a kernel.

    Args:
        weight: any floating-point tensor, any strides.
        mask: bool, of the weight's shape and on its device, True = kept.
        dense_gradient: let the gradient pass as it comes, instead of zeroing it where the mask is False.

    Returns:
        A tensor of the weight's shape, dtype and layout.

    Raises:
        TypeError, ValueError: if the mask is not bool, or of another shape.

    Example:
        >>> weight = torch.tensor([1.0, torch.inf], requires_grad=True)
        >>> out = mask_weight(weight, torch.tensor([True, False]))
        >>> out.tolist()
        [1.0, 0.0]
        >>> out.sum().backward()
        >>> weight.grad.tolist()
        [1.0, 0.0]
    """
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask is {mask.dtype}; give a bool tensor, True = kept")
    if mask.shape != weight.shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, its weight {tuple(weight.shape)}; they must agree")
    if weight.numel() < _WORTH_A_KERNEL or not _has_kernel(weight):
        return _straight(weight, mask) if dense_gradient else torch.where(mask, weight, 0)
    if weight.requires_grad and torch.is_grad_enabled():
        return _with_kernel(weight, mask, dense_gradient)
    return _masked(weight, mask)


def _has_kernel(tensor: Tensor) -> bool:
    """Whether this is a plain tensor, and nothing traces or transforms what is done with it."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and (tensor.is_cpu or (tensor.is_cuda and CUDA_KERNELS_LOADED))
        and tensor.dtype in WEIGHT_DTYPES
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        out: Tensor = torch.ops.pyprune.mask_weight.default(weight, mask)
    return out


class _Masked(torch.autograd.Function):
    """The kernel, and the same as its derivative. In the old style, because the new one takes longer per call."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dense_gradient: bool) -> Tensor:
        ctx.dense_gradient = dense_gradient
        if not dense_gradient:
            ctx.save_for_backward(mask)
        return _masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.dense_gradient else mask_weight(grad, *ctx.saved_tensors), None, None


class _Straight(torch.autograd.Function):
    """The mask in the forward pass only, where there is no kernel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()


def _fake(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(weight)


_with_kernel = cast(Callable[..., Tensor], _Masked.apply)
_straight = cast(Callable[..., Tensor], _Straight.apply)
torch.library.register_fake("pyprune::mask_weight", _fake)
