"""Time gates, forward and backward, beside NNCF's formula and an eager hard concrete, as ratios.

All ways run in one process, in turns; the medians are compared. See ``--help`` for the options. The default run
takes about two minutes and 4 GB of memory.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Way, interleave, measured, parse, parser_of, table_of, with_floor
from peers import BETA, GAMMA, ZETA, eager_hard_concrete, nncf_gate
from rich.console import Console
from shapes import DTYPES, MODELS, random_weights, title_of
from torch import Tensor

from pyprune import ops

NOTES = """\
one tensor        as many gates as the model has weights; logits in float32
reused outputs    our kernels write into tensors that exist: no fresh memory
54 tensors        through autograd, as in training, with fresh outputs
floor             moves the bytes of forward (read weight and logits, write the
                  output) and backward (read these and a gradient, write two)
NNCF's formula    w * (sigmoid(m + logit(u)) > 1/2), with its gradient
compiled          the same under torch.compile
extra memory      held at most beyond the inputs and what is returned"""


def pyprune_bernoulli(weight: Tensor, logits: Tensor) -> Tensor:
    return ops.bernoulli_gate(weight, logits, draw_seed())


def pyprune_hard_concrete(weight: Tensor, logits: Tensor) -> Tensor:
    return ops.hard_concrete_gate(weight, logits, draw_seed())


def draw_seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, ())


Gate = Callable[[Tensor, Tensor], Tensor]
GATES: dict[str, tuple[Gate, Gate, str, int]] = {
    "Bernoulli": (pyprune_bernoulli, nncf_gate, "NNCF's formula", 0),
    "hard concrete": (pyprune_hard_concrete, eager_hard_concrete, "torch", 1),
}


def forward_backward(gate: Gate, weights: list[Tensor], logits: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """Gate all weights, then take all gradients, as a training step does."""
    outputs = [gate(weight, logit) for weight, logit in zip(weights, logits, strict=True)]
    torch.autograd.grad(outputs, [*weights, *logits], grads)
    return outputs


class Reused:
    """Our kernels on one tensor, with outputs that exist."""

    def __init__(self, weight: Tensor, logits: Tensor, grad: Tensor, rule: int) -> None:
        self.inputs = (weight.detach(), logits.detach(), torch.tensor(5), 0, rule, BETA, GAMMA, ZETA)
        self.grad = grad
        self.outputs = (torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(logits))

    def forward(self) -> None:
        torch.ops.pyprune.gate_out(*self.inputs, self.outputs[0])

    def backward(self) -> None:
        torch.ops.pyprune.gate_backward_out(self.grad, *self.inputs, *self.outputs[1:])

    def both(self) -> None:
        self.forward()
        self.backward()

    def floor_forward(self) -> None:
        torch.mul(self.inputs[0], self.inputs[1], out=self.outputs[0])

    def floor_backward(self) -> None:
        torch.mul(self.inputs[0], self.inputs[1], out=self.outputs[1])
        self.outputs[2].copy_(self.grad)

    def floor_both(self) -> None:
        self.floor_forward()
        self.floor_backward()


def kernel_ways(name: str, weight: Tensor, logits: Tensor, grad: Tensor) -> list[Way]:
    ours, theirs, label, rule = GATES[name]
    reused = Reused(weight, logits, grad, rule)
    lists = ([weight], [logits], [grad])
    compiled = torch.compile(theirs, dynamic=False)
    forward_backward(compiled, *lists)  # what compiling takes is not what is measured
    part = f"{name}, one tensor"
    return with_floor(
        Way(part, "floor", reused.floor_both),
        [
            Way(part, "pyprune, reused outputs", reused.both),
            Way(part, "  forward alone", reused.forward),
            Way(part, "  backward alone", reused.backward),
            Way(part, "pyprune, fresh outputs", lambda: forward_backward(ours, *lists)),
            Way(part, f"{label}, compiled", lambda: forward_backward(compiled, *lists)),
            Way(part, f"{label}, eager", lambda: forward_backward(theirs, *lists)),
        ],
    )


def training_ways(name: str, weights: list[Tensor], logits: list[Tensor], grads: list[Tensor]) -> list[Way]:
    ours, theirs, label, _ = GATES[name]
    # One compilation for all shapes: flat, and of any length.
    flat = [[one.detach().flatten().requires_grad_() for one in tensors] for tensors in (weights, logits)]
    flat_grads = [grad.flatten() for grad in grads]
    compiled = torch.compile(theirs, dynamic=True)
    forward_backward(compiled, *flat, flat_grads)
    part = f"{name}, {len(weights)} tensors, through autograd"
    return [
        Way(part, "pyprune", lambda: forward_backward(ours, weights, logits, grads)),
        Way(part, f"{label}, compiled", lambda: forward_backward(compiled, *flat, flat_grads)),
        Way(part, f"{label}, eager", lambda: forward_backward(theirs, weights, logits, grads)),
    ]


def extra_memory_mib(run: Callable[[], Any], returned_bytes: int) -> float:
    """Return the peak of resident memory while it runs, without what it returns, in MiB (Linux)."""
    status = Path("/proc/self/status")

    def resident(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    run()  # warm, and compiled
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before - returned_bytes) / 2**20


def memory_lines(name: str, weight: Tensor, logits: Tensor, grad: Tensor) -> list[dict[str, Any]]:
    ours, theirs, label, _ = GATES[name]
    returned = 2 * weight.nbytes + logits.nbytes
    return [
        {
            "group": f"{name}, extra memory",
            "way": way,
            "mib": extra_memory_mib(lambda gate=gate: forward_backward(gate, [weight], [logits], [grad]), returned),
        }
        for way, gate in {
            "pyprune": ours,
            f"{label}, compiled": torch.compile(theirs, dynamic=False),
            f"{label}, eager": theirs,
        }.items()
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(model=["resnet50"], dtype=["float32"], repeats=9)
    arguments = parse(parser)
    console, results = Console(), []
    with measured(arguments, console, results, NOTES, {}):
        for model in arguments.model:
            for dtype in arguments.dtype:
                weights = [weight.requires_grad_() for weight in random_weights(MODELS[model](), DTYPES[dtype])]
                generator = torch.Generator().manual_seed(1)
                logits = [(2 + 2 * torch.randn(one.shape, generator=generator)).requires_grad_() for one in weights]
                grads = [torch.randn(one.shape, generator=generator).to(one.dtype) for one in weights]
                weight, logit, grad = (
                    torch.cat([one.detach().flatten() for one in tensors]) for tensors in (weights, logits, grads)
                )
                title = title_of(model, dtype, weights)
                for name in GATES:
                    one = (weight.requires_grad_(), logit.requires_grad_(), grad)
                    ways = kernel_ways(name, *one) + training_ways(name, weights, logits, grads)
                    interleave(ways, arguments.repeats, arguments.seconds, console, title)
                    console.print(table_of(title, ways))
                    memory = memory_lines(name, *one)
                    for line in memory:
                        console.print(f"  {line['way']:<28} {line['mib']:8.0f} MiB extra", highlight=False)
                    console.print()
                    results += [
                        line | {"model": model, "dtype": dtype} for line in [*(w.as_dict() for w in ways), *memory]
                    ]


if __name__ == "__main__":
    main()
