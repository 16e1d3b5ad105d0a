"""Time the loss that counts open gates, forward and backward, beside NNCF's RBLoss, as ratios.

All ways run in one process, in turns; the medians are compared. See ``--help`` for the options.
"""

from typing import Any

import torch
from measure import Way, interleave, measured, parse, parser_of, table_of, with_floor
from peers import TARGET, P, nncf_rb_loss
from rich.console import Console
from shapes import MODELS, title_of
from torch import Tensor, nn

import pyprune

NOTES = """\
floor             reads all logits twice and writes their gradients, into
                  existing memory
NNCF's formula    the sum of (sigmoid(m) > 1/2), with its gradient
compiled          the same under torch.compile, all logits flat in one tensor"""


def gated(shapes: list[tuple[int, ...]]) -> nn.Module:
    """Build a model that is nothing but gates, with logits drawn at random."""
    torch.manual_seed(1)
    gates = nn.ModuleList(pyprune.StochasticGate(shape) for shape in shapes)
    for gate in gates:
        gate.logits.data.normal_(2, 2)
    return gates


def rb_loss_ways(model: nn.Module) -> list[Way]:
    logits = pyprune.gate_parameters(model)
    joined = torch.cat([one.detach().flatten() for one in logits])
    whole, grad = joined.clone().requires_grad_(), torch.empty_like(joined)
    rb_loss = pyprune.RBLoss(model, target_ratio=TARGET, p=P)
    compiled = torch.compile(lambda: nncf_rb_loss([whole]), dynamic=False)

    def floor() -> None:
        joined.sum()
        grad.copy_(joined)

    def run(loss: Any, parameters: list[Tensor]) -> None:
        torch.autograd.grad(loss(), parameters)

    expected = nncf_rb_loss([one.detach().double() for one in logits]).item()
    run(compiled, [whole])  # what compiling takes is not what is measured
    if abs(rb_loss().item() - expected) > 1e-5 * expected:
        raise RuntimeError(f"RBLoss is {rb_loss().item()}, NNCF's formula in float64 {expected}")
    return with_floor(
        Way("RB loss", "floor", floor),
        [
            Way("RB loss", "pyprune", lambda: run(rb_loss, logits)),
            Way("RB loss", "NNCF's formula, compiled", lambda: run(compiled, [whole])),
            Way("RB loss", "NNCF's formula, eager", lambda: run(lambda: nncf_rb_loss(logits), logits)),
        ],
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(dtype=["float32"])
    arguments = parse(parser)
    console, results = Console(), []
    with measured(arguments, console, results, NOTES, {}):
        for model in arguments.model:
            gates = gated(MODELS[model]())
            title = title_of(model, "float32", pyprune.gate_parameters(gates))
            ways = rb_loss_ways(gates)
            interleave(ways, arguments.repeats, arguments.seconds, console, title)
            console.print(table_of(title, ways))
            results += [way.as_dict() | {"model": model, "dtype": "float32"} for way in ways]


if __name__ == "__main__":
    main()
