"""Norms over an axis that loses entries which are zero: made to compute what they did, where that can be.

An RMSNorm of n entries, of which all but m are zero, is one of m entries with its weight times sqrt(n / m) and its
epsilon times n / m. A LayerNorm subtracts the mean of n entries from those that are left, and no other does.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.structured.compact import Kept, update_known

# The same bits are not to be had: sums are of other lengths.
_TOLERANCE = 1e-5
_WEIGHTS: list[Callable[[Tensor, float], Tensor]] = [
    lambda weight, scale: weight * scale,
    lambda weight, scale: (1 + weight) * scale - 1,  # of those that multiply with 1 + weight
]


@dataclass(frozen=True, eq=False)
class Rescaled:
    """What a norm becomes: its weight before it is cut, and epsilons by the names of the attributes."""

    module: nn.Module
    weight: Tensor
    epsilons: dict[str, float]


@torch.no_grad()
def rescaled_norms(modules: Iterable[tuple[str, nn.Module]], kept: Kept) -> tuple[list[Rescaled], list[str]]:
    """Return what norms become that lose entries, and the names of those that cannot be the same.

    Args:
        modules: in which all along an axis went into one number.
        kept: which positions are left.
    """
    found, others = [], []
    for name, module in modules:
        weight = module._parameters.get("weight")
        positions = None if weight is None else kept.of(weight).get(0)
        if weight is None or positions is None or weight.dim() != 1:
            others.append(name or type(module).__name__)
            continue
        made = _rescaled(module, weight, positions)
        if made is None:
            others.append(name)
        else:
            found.append(made)
    return found, others


def _rescaled(module: nn.Module, weight: Tensor, positions: Tensor) -> Rescaled | None:
    """Try what an RMSNorm would need, on random numbers."""
    ratio = len(weight) / len(positions)
    smallest = torch.finfo(weight.dtype).eps  # what torch takes for None
    epsilons = {
        name: (smallest if value is None else value) * ratio
        for name, value in vars(module).items()
        if "eps" in name and (value is None or isinstance(value, float))
    }
    generator = torch.Generator().manual_seed(0)
    given = torch.zeros(3, len(weight))
    given[:, positions] = torch.randn(3, len(positions), generator=generator)
    given[2] *= 1e-3  # where epsilon matters
    given = given.to(weight.device, weight.dtype)
    wanted = module(given)[:, positions.to(weight.device)]
    for change in _WEIGHTS:
        new = change(weight.detach(), math.sqrt(ratio))
        trial = copy.deepcopy(module)
        trial.weight.data = new.index_select(0, positions.to(new.device))
        vars(trial).update(epsilons)
        update_known(trial, {id(trial.weight): weight})
        try:
            made = trial(given.index_select(1, positions.to(given.device)))
        except (RuntimeError, ValueError, TypeError):
            return None
        most = wanted.abs().amax(1, keepdim=True)
        gap = torch.finfo(weight.dtype).eps if weight.dtype.itemsize < 4 else _TOLERANCE
        if made.shape == wanted.shape and bool(((made - wanted).abs() <= 4 * gap * most + 1e-30).all()):
            return Rescaled(module, new, epsilons)
    return None
