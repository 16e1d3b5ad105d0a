"""Random weights of which none is zero, so that no removal looks exact by accident."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from pyprune.modules.evaluation import forward
from zoo.case import draw


def shake(model: nn.Module, examples: Any, *, seed: int = 0) -> None:
    """Move every parameter and every statistic away from zero, one, and each other.

    Last layers of residual branches that begin at zero, layer scales of 1e-6, biases of zeros and fresh statistics of
    BatchNorm would make almost any removal exact.
    """

    def shaken() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point():
                    _move(name, parameter)
            _gather_statistics(model, examples)

    draw(shaken, seed)


def _move(name: str, parameter: Tensor) -> None:
    noise = torch.randn_like(parameter)
    leaf = name.rpartition(".")[2]
    if max(parameter.shape, default=1) < parameter.numel():  # a matrix or more
        spread, mean = float(parameter.std()), float(parameter.mean())
        if abs(mean) < spread or spread == 0:
            # The signal neither vanishes on its way, nor do all weights of an attention become equal.
            fan_in = parameter[0].numel() if leaf == "weight" else parameter.shape[-1]
            parameter.sub_(mean).mul_(0.8 / max(spread, 1e-12)).add_(noise, alpha=0.6 if spread else 1.0)
            parameter.mul_(1.2 / math.sqrt(fan_in))
        else:
            parameter.add_(noise, alpha=0.1 * spread)
    elif "bias" in leaf or leaf.startswith("b_"):
        parameter.add_(noise, alpha=0.1)
    elif parameter.abs().mean() < 0.1:  # scales of norms that count from one, layer scales
        parameter.copy_(1 + noise.clamp(-2, 2) * 0.2)
    else:
        parameter.add_(noise.clamp(-2, 2), alpha=0.2)


def _gather_statistics(model: nn.Module, examples: Any) -> None:
    """Give every BatchNorm statistics as data has them, moved: so activations neither grow nor vanish."""
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    forward(model, examples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        var.mul_(torch.rand_like(var) * 0.5 + 0.75).add_(0.05 * var.mean())
        mean.add_(torch.randn_like(mean) * var.sqrt() * 0.2)
    model.eval()


def outputs_of(model: nn.Module, examples: Any) -> list[Tensor]:
    """Return all tensors of numbers in what the model returns, in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return numbers_in(forward(model, examples))


def numbers_in(output: Any) -> list[Tensor]:
    """Return the floating tensors of a nested output, also of one that is no container to torch."""
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise TypeError(f"there is no floating tensor in an output of class {type(output).__name__}")
    return tensors
