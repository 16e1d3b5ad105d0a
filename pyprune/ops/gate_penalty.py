"""How many gates are open, as a differentiable sum over each tensor of a list of logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyprune.checks import check_bool, check_number
from pyprune.ops._library import WEIGHT_DTYPES, check_tensors, refuse_second_derivative, register_fake


def gate_penalty(logits: Sequence[Tensor], *, hard: bool = False, shift: float = 0.0) -> Tensor:
    """Sum over each tensor how open its gates are; no synchronisation with the device.

    * ``hard=True``: the number of logits above 0, the gates that are open at test time. Its gradient passes
      straight through the comparison: sigma'(logit + shift), as in NNCF's RBLoss.
    * otherwise the sum of sigma(logit + shift), with its gradient: the expected number of open Bernoulli gates, or,
      with shift = -beta * log(-gamma / zeta), the expected L0 norm of hard-concrete gates.

    Args:
        logits: float32, float64, float16 or bfloat16 tensors on one device, any strides.
        hard: count instead of summing probabilities.
        shift: added to every logit before sigma.

    Returns:
        float64 of shape [len(logits)]; counts are exact, sums the same bits for any number of threads.

    Raises:
        TypeError, ValueError: for other dtypes or mixed devices.

    Paper: Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".

    Example:
        >>> gate_penalty([torch.zeros(4), torch.ones(3)], hard=True).tolist()
        [0.0, 3.0]
        >>> gate_penalty([torch.zeros(4)]).tolist()
        [2.0]
    """
    check_tensors(logits, "logits", WEIGHT_DTYPES, values=False)
    check_bool("hard", hard)
    shift = check_number("shift", shift, what="a finite number")
    if not logits:
        return torch.zeros(0, dtype=torch.float64)
    result: Tensor = torch.ops.pyprune.gate_penalty(list(logits), hard, shift)
    return result


def _fake(logits: list[Tensor], hard: bool, shift: float) -> Tensor:
    return logits[0].new_empty(len(logits), dtype=torch.float64)


def _fake_backward(grad: Tensor, logits: list[Tensor], shift: float) -> list[Tensor]:
    return [torch.empty_like(one) for one in logits]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, ctx.shift = inputs
    ctx.save_for_backward(*logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None]:
    return torch.ops.pyprune.gate_penalty_backward(grad, list(ctx.saved_tensors), ctx.shift), None, None


register_fake("pyprune::gate_penalty", _fake)
register_fake("pyprune::gate_penalty_backward", _fake_backward)
torch.library.register_autograd("pyprune::gate_penalty", _backward, setup_context=_setup_context)
refuse_second_derivative("pyprune::gate_penalty_backward")
