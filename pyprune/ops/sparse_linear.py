"""A linear layer whose weight has no zeros any more."""

from typing import Any

import torch
from torch import Tensor

from pyprune.checks import check_choice
from pyprune.ops._library import check_tensor, register_fake
from pyprune.ops.sparse_weight import FLOATS, SPARSE_LAYOUTS, SparseWeight, check_packed

# In the order of csrc/cpu/kernels/sparse_panel.h.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def sparse_linear(
    input: Tensor, packed: SparseWeight, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Return ``activation(input @ weight.T + bias)`` with a weight without its zeros, on the CPU, for inference.

    Products and sums are in float32 and in an order that depends on the weight, the number of rows of the input and
    the kernels in use, not on the number of threads: the same bits for any. What the weight has left out is not
    multiplied, so that there infinity and NaN in the input change nothing, where a dense layer would return NaN (0 *
    inf); the zeros that ``"block4"`` keeps within a block of four rows do multiply.

    Args:
        input: (..., columns), float32, bfloat16 or float16, of any strides.
        packed: the weight, (rows, columns), from `pack_sparse`; its values may be of another dtype. Of one that comes
            from elsewhere, let `check_sparse` say once that it is well formed.
        bias: (rows,), float32, bfloat16 or float16.
        activation: None, ``"relu"``, ``"gelu"`` (with the error function), ``"gelu_tanh"`` (its approximation) or
            ``"silu"``.

    Returns:
        (..., rows), of the input's dtype.

    Raises:
        TypeError, ValueError: for other dtypes, devices or shapes, and where a gradient is wanted: the input or bias
            requires one, and it is not in ``torch.no_grad()`` or ``torch.inference_mode()``.

    Paper:
        Elsen, Dukhan, Gale, Simonyan: Fast Sparse ConvNets (2020), https://arxiv.org/abs/1911.09723

    Example:
        >>> from pyprune import ops
        >>> packed = ops.pack_sparse(torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, -6.0]]), "index")
        >>> sparse_linear(torch.tensor([1.0, 2.0, 3.0]), packed, activation="relu").tolist()
        [4.0, 0.0]
    """
    number = 0
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
        number = 1 + ACTIVATIONS.index(activation)
    check_tensor(input, "input", FLOATS, values=True)
    if bias is not None:
        check_tensor(bias, "bias", FLOATS, values=True)
    if not isinstance(packed, SparseWeight) or input.dim() == 0 or input.shape[-1] != packed.shape[1]:
        _check(input, packed, bias)
    for name, tensor in (("input", input), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and sparse_linear has none: call it in torch.no_grad(), or detach"
            )
    try:
        result: Tensor = torch.ops.pyprune.sparse_linear(
            input, *packed.tensors, bias, SPARSE_LAYOUTS.index(packed.layout), packed.shape[0], number
        )
    except (RuntimeError, ValueError):  # it checks sizes and dtypes anyway, before it reads
        _check(input, packed, bias)
        raise
    return result


def _check(input: Tensor, packed: SparseWeight, bias: Tensor | None) -> None:
    check_packed(packed)
    rows, columns = packed.shape
    if input.dim() == 0 or input.shape[-1] != columns or not input.device.type == "cpu":
        raise ValueError(
            f"input is of shape {tuple(input.shape)} on {input.device}; a weight of shape ({rows}, {columns}) needs "
            f"(..., {columns}) on the CPU"
        )
    if bias is not None and (bias.shape != (rows,) or not bias.device.type == "cpu"):
        raise ValueError(f"bias is of shape {tuple(bias.shape)} on {bias.device}; give ({rows},) numbers on the CPU")


def sparse_linear_unchecked(input: Tensor, packed: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """Return what `sparse_linear` does, for a layer whose weight and bias were checked once.

    The checks of each call would take as long as a small product. The operator itself sees to dtypes, devices and
    sizes, with fewer words, but for the number of columns, which it does not know.
    """
    if input.dim() == 0 or input.shape[-1] != packed.shape[1]:
        raise ValueError(f"input is of shape {tuple(input.shape)}, and the layer takes (..., {packed.shape[1]})")
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "input or bias requires a gradient, and accelerated layers have none: call the model in torch.no_grad()"
        )
    result: Tensor = torch.ops.pyprune.sparse_linear(
        input, *packed.tensors, bias, SPARSE_LAYOUTS.index(packed.layout), packed.shape[0], 0
    )
    return result


def _fake(
    input: Tensor, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None, bias: Tensor | None,
    layout: int, out_features: int, activation: int,
) -> Tensor:  # fmt: skip
    return input.new_empty((*input.shape[:-1], out_features))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("pyprune::sparse_linear has no derivative: call it in torch.no_grad()")


register_fake("pyprune::sparse_linear", _fake)
torch.library.register_autograd("pyprune::sparse_linear", _backward, setup_context=_setup)
