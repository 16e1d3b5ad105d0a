"""Gates, forward and backward: as one tensor into existing memory, and tensor by tensor through autograd."""

from collections.abc import Callable
from typing import Any

import nncf_peer
import torch
from measure import Way, with_floor
from peers import BETA, GAMMA, ZETA, eager_hard_concrete, nncf_gate
from shapes import LISTS, Case
from torch import Tensor

from pyprune import ops

MODELS = tuple(LISTS)
DTYPES = ("float32",)
Gate = Callable[[Tensor, Tensor], Tensor]


def pyprune_bernoulli(weight: Tensor, logits: Tensor) -> Tensor:
    return ops.bernoulli_gate(weight, logits, draw_seed())


def pyprune_hard_concrete(weight: Tensor, logits: Tensor) -> Tensor:
    return ops.hard_concrete_gate(weight, logits, draw_seed())


def draw_seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, ())


# Name -> ours, theirs, whose that is, whether that is a formula, the number of the rule in the kernel.
GATES: dict[str, tuple[Gate, Gate, str, bool, int]] = {
    "Bernoulli": (
        pyprune_bernoulli,
        nncf_peer.gate if nncf_peer.AVAILABLE else nncf_gate,
        "NNCF",
        not nncf_peer.AVAILABLE,
        0,
    ),
    "hard-concrete": (pyprune_hard_concrete, eager_hard_concrete, "torch", False, 1),
}


def forward_backward(gate: Gate, weights: list[Tensor], logits: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """Gate all weights, then take all gradients, as a training step does."""
    outputs = [gate(weight, logit) for weight, logit in zip(weights, logits, strict=True)]
    return [outputs, torch.autograd.grad(outputs, [*weights, *logits], grads)]


class Reused:
    """Our kernels on lists of tensors, with outputs that exist, and torch's own ways of moving as many bytes."""

    def __init__(self, weights: list[Tensor], logits: list[Tensor], grads: list[Tensor], rule: int) -> None:
        self.inputs = [(w.detach(), m.detach(), g) for w, m, g in zip(weights, logits, grads, strict=True)]
        self.options = (torch.tensor(5), 0, rule, BETA, GAMMA, ZETA)
        self.outputs = [(torch.empty_like(w), torch.empty_like(w), torch.empty_like(m)) for w, m, _ in self.inputs]
        self.moved = 4 * sum(g.nbytes for g in grads) + 4 * sum(m.nbytes for m in logits)

    def forward(self) -> None:
        for (weight, logits, _), (out, _, _) in zip(self.inputs, self.outputs, strict=True):
            torch.ops.pyprune.gate_out(weight, logits, *self.options, out)

    def backward(self) -> None:
        for (weight, logits, grad), (_, *grads) in zip(self.inputs, self.outputs, strict=True):
            torch.ops.pyprune.gate_backward_out(grad, weight, logits, *self.options, *grads)

    def both(self) -> None:
        self.forward()
        self.backward()

    def floor(self) -> None:
        """Read weights and logits, write outputs; read these and gradients, write two gradients."""
        for (weight, logits, _), (out, _, _) in zip(self.inputs, self.outputs, strict=True):
            torch.mul(weight, logits, out=out)
        for (weight, logits, grad), (_, *grads) in zip(self.inputs, self.outputs, strict=True):
            torch.mul(weight, logits, out=grads[0])
            grads[1].copy_(grad)

    def floor_fresh(self) -> list[Any]:
        """Move the same bytes, into fresh memory: what allocation costs."""
        outputs = [weight * logits for weight, logits, _ in self.inputs]
        return [outputs, [(weight * logits, grad.clone()) for weight, logits, grad in self.inputs]]


def one_tensor(name: str, lists: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> list[Way]:
    ours, theirs, label, formula, rule = GATES[name]
    one = [torch.cat([tensor.detach().flatten() for tensor in tensors]) for tensors in lists]
    joined = ([one[0].requires_grad_()], [one[1].requires_grad_()], [one[2]])
    kernels = Reused(*joined, rule)
    compiled = torch.compile(theirs, dynamic=False)
    group, returned = f"{name} gates, one tensor", 3 * one[0].nbytes
    peers = [
        Way(group, f"{label}, compiled", lambda: forward_backward(compiled, *joined), compiles=True),
        Way(group, f"{label}, eager", lambda: forward_backward(theirs, *joined)),
    ]
    fresh = Way(group, "pyprune, fresh outputs", lambda: forward_backward(ours, *joined))
    for way in (fresh, *peers):
        way.returned = returned
    for way in peers:
        way.formula = formula
    return with_floor(
        Way(group, "floor", kernels.floor, moved=kernels.moved),
        [
            Way(group, "pyprune", kernels.both),
            Way(group, "pyprune, forward alone", kernels.forward),
            Way(group, "pyprune, backward alone", kernels.backward),
            fresh,
            *peers,
        ],
    )


def tensor_by_tensor(name: str, lists: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> list[Way]:
    ours, theirs, label, formula, rule = GATES[name]
    kernels = Reused(*lists, rule)
    # One compilation for all shapes: flat, and of any length.
    flat = [[one.detach().flatten().requires_grad_() for one in tensors] for tensors in lists[:2]]
    flat_grads = [grad.flatten() for grad in lists[2]]
    compiled = torch.compile(theirs, dynamic=True)
    group = f"{name} gates, tensor by tensor"
    peers = [
        Way(group, f"{label}, compiled", lambda: forward_backward(compiled, *flat, flat_grads), compiles=True),
        Way(group, f"{label}, eager", lambda: forward_backward(theirs, *lists)),
    ]
    for way in peers:
        way.formula = formula
    fresh = [
        Way(group, "pyprune", lambda: forward_backward(ours, *lists)),
        Way(group, "floor in fresh memory", kernels.floor_fresh),
        *peers,
    ]
    for way in fresh:
        way.returned = 3 * sum(grad.nbytes for grad in lists[2])
    floor = Way(group, "floor in existing memory", kernels.floor, moved=kernels.moved)
    return with_floor(floor, fresh)


def ways(case: Case) -> list[Way]:
    weights = [weight.requires_grad_() for weight in case.draw()]
    generator = torch.Generator().manual_seed(1)
    logits = [(2 + 2 * torch.randn(one.shape, generator=generator)).requires_grad_() for one in weights]
    grads = [torch.randn(one.shape, generator=generator) for one in weights]
    lists = (weights, logits, grads)
    return [way for name in GATES for part in (one_tensor, tensor_by_tensor) for way in part(name, lists)]
