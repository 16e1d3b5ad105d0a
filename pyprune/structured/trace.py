"""Run a model on examples, and see below autograd what operations tie: units, and what stays and why.

The rules are in `pyprune.structured.rules`, what gives them tensors in `tracer` and `modes`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pyprune.modules.evaluation import evaluating, forward, layers_apart, untouched, using
from pyprune.modules.undo import Before, undoing
from pyprune.structured.models import tensors_within
from pyprune.structured.modes import Calls, Operators
from pyprune.structured.seen import Reading, Trace
from pyprune.structured.sizes import sizes_known
from pyprune.structured.tracer import Tracer

OUTPUT = "an output of the model"


def trace(
    model: nn.Module,
    examples: Sequence[Any],
    on_reading: Callable[[Reading], None] | None = None,
) -> Trace:
    """Run a model on examples, and say what is coupled.

    Args:
        model: in whatever mode; it runs in evaluation.
        examples: each as for a forward pass.
        on_reading: told of what is multiplied and summed, while the tensors are there; then it is followed what does
            not depend on the inputs.
    """
    tracer = Tracer(model, on_reading)
    stack = ExitStack()
    before = Before(model, with_attributes=False)
    with undoing(before.restore), undoing(stack.close):
        stack.enter_context(evaluating(model))
        stack.enter_context(untouched(model))
        stack.enter_context(layers_apart(model))
        if "torch._dynamo" in sys.modules:  # to import it takes seconds, and nothing is compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(without_cache(model))
        stack.enter_context(sizes_known(model))
        tracer.watch_modules()
        for example in examples:
            with using(Calls(tracer)), using(Operators(tracer)):
                made = forward(model, example, "examples")
            for tensor in tensors_within(made):
                for factor in tracer.axes(tensor).factors:
                    tracer.trace.coordinates.stay(factor.coords, OUTPUT)
            tracer.trace.outputs.append(made)
        tracer.finish()
    return tracer.trace


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A cache among the outputs of a language model would keep all heads: run without."""
    configs = {id(one): one for one in (getattr(module, "config", None) for module in model.modules())}
    found = [vars(one) for one in configs.values() if hasattr(one, "__dict__") and vars(one).get("use_cache")]

    def undo() -> None:
        for attributes in found:
            attributes["use_cache"] = True

    with undoing(undo):
        for attributes in found:
            attributes["use_cache"] = False
        yield
