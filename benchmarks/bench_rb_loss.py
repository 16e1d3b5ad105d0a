"""The loss that counts open gates, forward and backward."""

from collections.abc import Callable
from functools import cache
from typing import Any

import nncf_peer
import torch
from measure import Way, with_floor
from peers import TARGET, P, nncf_rb_loss
from shapes import LISTS, Case, as_modules
from torch import Tensor, nn

import pyprune

MODELS = tuple(LISTS)
DTYPES = ("float32",)  # of the logits, whatever that of the weights
LOSS = "RB loss"


def gated(case: Case) -> nn.Module:
    """Build a model that is nothing but gates, with logits drawn at random."""
    torch.manual_seed(1)
    gates = nn.ModuleList(pyprune.StochasticGate(shape) for shape in case.shapes)
    for gate in gates:
        gate.logits.data.normal_(2, 2)
    return gates


def run(loss: Callable[[], Tensor], logits: list[Tensor]) -> Any:
    return torch.autograd.grad(loss(), logits)


def ways(case: Case) -> list[Way]:
    model = gated(case)
    logits = pyprune.gate_parameters(model)
    joined = torch.cat([one.detach().flatten() for one in logits])
    whole, grad = joined.clone().requires_grad_(), torch.empty_like(joined)
    ours = pyprune.RBLoss(model, target_ratio=TARGET, p=P)
    compiled = torch.compile(lambda: nncf_rb_loss([whole]), dynamic=False)  # all logits flat in one tensor

    def floor() -> None:
        joined.sum()
        grad.copy_(joined)

    @cache
    def nncf() -> tuple[Any, ...]:
        weights = [torch.zeros(()).expand(shape) for shape in case.shapes]  # their values do not matter
        return nncf_peer.rb_loss(as_modules(weights), TARGET, P)

    if nncf_peer.AVAILABLE:
        eager = Way(LOSS, "NNCF, eager", run, nncf, returned=grad.nbytes)
    else:
        eager = Way(LOSS, "NNCF, eager", lambda: run(lambda: nncf_rb_loss(logits), logits), formula=True)
    rest = [
        Way(LOSS, "pyprune", lambda: run(ours, logits)),
        Way(LOSS, "NNCF, compiled", lambda: run(compiled, [whole]), compiles=True, formula=True),
        eager,
    ]
    for way in rest:
        way.returned = grad.nbytes
    return with_floor(Way(LOSS, "floor: read twice, write once", floor, moved=3 * grad.nbytes), rest)
