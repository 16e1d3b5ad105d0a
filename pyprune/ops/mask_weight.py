"""A weight as its mask leaves it, differentiable."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyprune.checks import check_bool
from pyprune.ops._library import CUDA_KERNELS_LOADED, WEIGHT_DTYPES, check_type, register_fake

# Elements. torch.where takes a nanosecond for each, because it branches; a call of the kernel starts some µs later.
_WORTH_A_KERNEL = 4096


def mask_weight(weight: Tensor, mask: Tensor, *, dense_gradient: bool = False) -> Tensor:
    """Return ``where(mask, weight, 0)`` in new memory; a dropped infinity or NaN gives 0.

    All that torch does with ``torch.where`` works: derivatives of any order and mode (with a dense gradient not in
    forward mode), `torch.func`, compilation, export, subclasses of tensors, any dtype and device. For large dense
    weights of `WEIGHT_DTYPES` there is a kernel.

    Args:
        weight: any floating-point tensor, any strides.
        mask: bool, of the weight's shape and on its device, True = kept.
        dense_gradient: let the gradient pass as it comes, instead of zeroing it where the mask is False.

    Returns:
        A tensor of the weight's shape, dtype and layout.

    Raises:
        TypeError, ValueError: if the mask is not bool, of another shape or elsewhere, or the weight is not
            floating-point.

    Example:
        >>> weight = torch.tensor([1.0, torch.inf], requires_grad=True)
        >>> out = mask_weight(weight, torch.tensor([True, False]))
        >>> out.tolist()
        [1.0, 0.0]
        >>> out.sum().backward()
        >>> weight.grad.tolist()
        [1.0, 0.0]
    """
    _check_dense(weight, "weight")
    _check_dense(mask, "mask")
    check_bool("dense_gradient", dense_gradient)
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}; give a floating-point tensor")
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask is {mask.dtype}; give a bool tensor, True = kept")
    if mask.shape != weight.shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, its weight {tuple(weight.shape)}; they must agree")
    if mask.device != weight.device:
        raise ValueError(f"mask is on {mask.device}, its weight on {weight.device}; both must be on one device")
    return _straight(weight, mask) if dense_gradient else _kept(weight, mask)


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    if weight.numel() < _WORTH_A_KERNEL or not _has_kernel(weight):
        return torch.where(mask, weight, 0)
    if weight.requires_grad and torch.is_grad_enabled():
        return _masked(weight, mask)
    return _call(weight, mask)


def _check_dense(tensor: Tensor, name: str) -> None:
    check_type(tensor, name, wrappers=True)
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} has layout {layout}; only dense (strided) tensors are allowed")


def _has_kernel(tensor: Tensor) -> bool:
    """Whether this is a plain tensor, and what is done with it is neither exported nor transformed."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and (tensor.is_cpu or (tensor.is_cuda and CUDA_KERNELS_LOADED))
        and tensor.dtype in WEIGHT_DTYPES
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _call(weight: Tensor, mask: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and weight.is_contiguous() and mask.is_contiguous():
        # The compiler would lay out what a convolution depends on anew, masks too, which takes longer than the
        # convolution. What as_strided reads it leaves as it is.
        flat = (weight.numel(),), (1,)
        return _operator(weight.as_strided(*flat), mask.as_strided(*flat)).view(weight.shape)
    return _operator(weight, mask)


class _Masked(torch.autograd.Function):
    """The kernel with its derivative, which is the same kernel; the operator's own would take longer per call."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _call(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _kept(grad, *ctx.saved_tensors), None


class _Straight(torch.autograd.Function):
    """The mask in the forward pass only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return _kept(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_operator = cast(Callable[[Tensor, Tensor], Tensor], torch.ops.pyprune.mask_weight.default)
_masked = cast(Callable[[Tensor, Tensor], Tensor], _Masked.apply)
_straight = cast(Callable[[Tensor, Tensor], Tensor], _Straight.apply)


def _fake(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(weight)


register_fake("pyprune::mask_weight", _fake)
