"""Learned gates on a weight: sampled in training with noise that is never stored, deterministic without a seed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyprune.checks import check_bool, check_count, check_number, shown
from pyprune.ops._library import (
    WEIGHT_DTYPES,
    check_int64,
    check_tensor,
    check_type,
    refuse_second_derivative,
    register_fake,
)
from pyprune.ops._memory import check_memory

# The values of GateRule in csrc/gate_math.h.
BERNOULLI, HARD_CONCRETE, STRAIGHT_THROUGH = range(3)
_LARGEST = 1e6


def bernoulli_gate(
    weight: Tensor, logits: Tensor, seed: Tensor | None, *, stream: int = 0, out: Tensor | None = None
) -> Tensor:
    """Keep each weight with probability sigma(logit), and train the logits straight through the comparison.

    With x = logit + log(u / (1 - u)), where u is `gate_noise` (x = logit without a seed)::

        out          = weight where x > 0, else 0
        d out/weight = 1      where x > 0, else 0
        d out/logit  = weight * sigma(x) * (1 - sigma(x)), summed over the weights that share the logit

    As in NNCF, sigma' is taken at the noisy x. The noise is drawn again in the backward pass, never stored.

    Args:
        weight: float32, float64, float16 or bfloat16, any strides.
        logits: float32 or the weight's dtype, on its device, with as many dimensions; each size divides the
            weight's, and w / l neighbours share a logit: (out, 1, 1, 1) gates output channels, (heads, 1) the
            heads of a (heads * size, in) projection, (out / 4, in / 4) blocks of 4 x 4.
        seed: int64 tensor of one element on the weight's device; None for the deterministic form at test time.
        stream: separates the noise of gates that share a seed.
        out: where to write instead of a new tensor; like ``weight``, which it may be. Not for use with autograd.

    Returns:
        The gated weight, of the weight's shape, dtype and layout.

    Raises:
        TypeError, ValueError: for other dtypes, devices or shapes.

    Papers: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"; Kozlov et al.
    2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> bernoulli_gate(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -3.0]), None).tolist()
        [1.0, 0.0]
    """
    return _gate(weight, logits, seed, stream, (BERNOULLI, 1.0, 0.0, 1.0), out)


def hard_concrete_gate(
    weight: Tensor,
    logits: Tensor,
    seed: Tensor | None,
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
    straight_through: bool = False,
    stream: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each weight by a hard-concrete gate z in [0, 1]; the gradient flows through the clamp.

    With u from `gate_noise`::

        s = sigma((logit + log(u / (1 - u))) / beta), or sigma(logit) without a seed
        z = min(1, max(0, s * (zeta - gamma) + gamma)), and out = weight * z
        d z/logit = (zeta - gamma) * s * (1 - s) / beta where 0 < z < 1, else 0 (no beta without a seed)

    Args:
        weight, logits, seed, stream, out: as in `bernoulli_gate`.
        beta: temperature, above 0.
        gamma, zeta: the ends of the stretched interval, gamma < 0 and zeta > 1.
        straight_through: forward the hard decision, 1 where z > 0 (so that the expected L0 is the expected count),
            and take the gradient of the logits from the soft z.

    Raises:
        TypeError, ValueError: for other dtypes, devices, shapes or parameters.

    Paper: Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".

    Example:
        >>> hard_concrete_gate(torch.ones(3), torch.tensor([-4.0, 0.0, 4.0]), None).tolist()
        [0.0, 0.5, 1.0]
    """
    check_hard_concrete(beta, gamma, zeta)
    check_bool("straight_through", straight_through)
    rule = STRAIGHT_THROUGH if straight_through else HARD_CONCRETE
    return _gate(weight, logits, seed, stream, (rule, float(beta), float(gamma), float(zeta)), out)


def check_hard_concrete(beta: float, gamma: float, zeta: float) -> None:
    """Raise unless these are parameters of a hard-concrete distribution."""
    floats = type(beta) is type(gamma) is type(zeta) is float
    if floats and 0 < beta < math.inf and gamma < 0 and zeta > 1 and zeta - gamma < _LARGEST:
        return  # at once, because this is asked in every forward pass
    beta, gamma, zeta = (
        check_number(name, value, what="a number", advice=advice)
        for name, value, advice in (
            ("beta", beta, "the temperature must be a finite number above 0"),
            ("gamma", gamma, "gamma must be a finite number below 0"),
            ("zeta", zeta, "zeta must be a finite number above 1"),
        )
    )
    if beta <= 0:
        raise ValueError(f"beta is {beta}; the temperature must be a finite number above 0")
    if not (gamma < 0 and zeta > 1 and zeta - gamma < _LARGEST):
        raise ValueError(
            f"gamma is {gamma} and zeta is {zeta}; gamma must be below 0 and zeta above 1, and not {_LARGEST} apart"
        )


def check_gate_shape(shape: torch.Size | tuple[int, ...], gate_shape: torch.Size | tuple[int, ...]) -> None:
    """Raise unless logits of ``gate_shape`` can gate a weight of ``shape``."""
    for name, sizes in (("shape", shape), ("gate_shape", gate_shape)):
        if not isinstance(sizes, torch.Size):
            _check_sizes(name, sizes)
    fits = len(shape) == len(gate_shape) and all(
        gates == size or (gates > 0 and size % gates == 0) for size, gates in zip(shape, gate_shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"gate_shape: logits of shape {shown(tuple(gate_shape))} do not fit a weight of shape "
            f"{shown(tuple(shape))}: they need as many dimensions, and each of their sizes must divide the weight's"
        )


def _check_sizes(name: str, sizes: object) -> None:
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name} is {shown(sizes)}; give a tuple of integers")
    for size in sizes:
        if not isinstance(size, torch.SymInt):
            check_count(name, size, what="sizes that are integers and not negative")


def _gate(
    weight: Tensor,
    logits: Tensor,
    seed: Tensor | None,
    stream: int,
    rule: tuple[int, float, float, float],
    out: Tensor | None,
) -> Tensor:
    check_tensor(weight, "weight", WEIGHT_DTYPES, values=False)
    check_tensor(logits, "logits", (torch.float32, weight.dtype))
    if logits.device != weight.device:
        raise ValueError(f"logits are on {logits.device}, the weight on {weight.device}; both must be on one device")
    check_gate_shape(weight.shape, logits.shape)
    if seed is not None:
        check_seed(seed, weight.device)
    stream = check_int64("stream", stream)
    _refuse_tangents(weight, logits)
    if out is None:
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        call: Callable[..., Tensor] = torch.ops.pyprune.gate.default if traced else _Gate.apply
        return call(weight, logits, seed, stream, *rule)
    check_tensor(out, "out", (weight.dtype,))
    if out.shape != weight.shape or out.device != weight.device:
        raise ValueError(
            f"out is {tuple(out.shape)} on {out.device}, the weight {tuple(weight.shape)} on {weight.device}; "
            "they must agree"
        )
    in_place = out is weight or (out.data_ptr() == weight.data_ptr() and out.stride() == weight.stride())
    check_memory({"out": out}, {"weight": None if in_place else weight, "logits": logits, "seed": seed})
    if torch.is_grad_enabled() and (weight.requires_grad or logits.requires_grad or out.requires_grad):
        raise ValueError("out is not for use with autograd; leave it out, or call this under torch.no_grad()")
    with torch.no_grad():
        torch.ops.pyprune.gate_out(weight, logits, seed, stream, *rule, out)
    torch.autograd.graph.increment_version(out)
    return out


def _refuse_tangents(*tensors: Tensor) -> None:
    # Operators with a backward formula drop the tangents of forward-mode differentiation without a word.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    duals = [forward_ad.unpack_dual(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
    if any(dual.tangent is not None for dual in duals):
        raise NotImplementedError("gates have no forward-mode derivative; differentiate in reverse mode")


def check_seed(seed: Tensor, device: torch.device | None = None) -> None:
    """Raise unless this is one int64, on the device if one is given."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed is {shown(seed)}; give an int64 tensor of one element, as torch.randint draws it")
    check_type(seed, "seed")
    if device is not None and seed.device != device:
        raise ValueError(f"seed is on {seed.device}, what it is for on {device}; draw it there")


def _fake(weight: Tensor, logits: Tensor, seed: Tensor | None, *rule: Any) -> Tensor:
    return torch.empty_like(weight)


def _fake_out(weight: Tensor, logits: Tensor, seed: Tensor | None, *rule_and_out: Any) -> None:
    return None


def _fake_backward(
    grad: Tensor, weight: Tensor, logits: Tensor, seed: Tensor | None, *rule_and_needs: Any
) -> tuple[Tensor, Tensor]:
    for_weight, for_logits = rule_and_needs[-2:]
    return (
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
        torch.empty_like(logits) if for_logits else logits.new_empty(0),
    )


def _fake_backward_out(grad: Tensor, weight: Tensor, logits: Tensor, seed: Tensor | None, *rest: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, logits, seed, *ctx.rule = inputs
    ctx.save_for_backward(weight, logits, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_weight, for_logits = ctx.needs_input_grad[:2]
    arguments = (grad, *ctx.saved_tensors, *ctx.rule, for_weight, for_logits)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        # This one refuses to be differentiated again.
        grad_weight, grad_logits = torch.ops.pyprune.gate_backward.default(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            grad_weight, grad_logits = torch.ops.pyprune.gate_backward.default(*arguments)
    rest = (None,) * (1 + len(ctx.rule))
    return (grad_weight if for_weight else None, grad_logits if for_logits else None, *rest)


class _Gate(torch.autograd.Function):
    """The operator with its derivative, where nothing is traced: the registered way costs twice as much per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = torch.ops.pyprune.gate.default(*inputs)
        _setup_context(ctx, inputs, out)
        return out

    backward = staticmethod(_backward)


register_fake("pyprune::gate", _fake)
register_fake("pyprune::gate_out", _fake_out)
register_fake("pyprune::gate_backward", _fake_backward)
register_fake("pyprune::gate_backward_out", _fake_backward_out)
torch.library.register_autograd("pyprune::gate", _backward, setup_context=_setup_context)
refuse_second_derivative("pyprune::gate_backward")
