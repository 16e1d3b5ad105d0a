"""Run a model to compare what it computes, and say where it failed."""

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.modules.evaluation import evaluating, untouched
from pyprune.modules.undo import undoing
from pyprune.structured.compact import named_tensors
from pyprune.structured.trace import without_cache

# Frames of these are no user's.
_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation, and leave it as it is."""
    with evaluating(model), untouched(model), without_cache(model):
        yield


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Let all real tensors of a model be in float64 for the time."""
    tensors = {id(one): one for one in named_tensors(model).values() if one.is_floating_point()}
    before = [(tensor, tensor.data) for tensor in tensors.values()]

    def undo() -> None:
        for tensor, data in before:
            tensor.data = data

    with undoing(undo):
        for tensor, data in before:
            tensor.data = data.double()
        yield


def to_double(leaf: Any) -> Any:
    """A real tensor in float64; anything else as it is."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def check_expected(outputs: Sequence[Sequence[Tensor]]) -> None:
    """Raise ValueError unless outputs can be compared: there is one, and none is NaN."""
    for tensors in outputs:
        if not tensors:
            raise ValueError("the model puts out no tensor for these examples; there is nothing to compare it by")
        for tensor in tensors:
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ValueError("the model puts out NaN for these examples; nothing can be verified with them")


def difference_of(expected: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of each output."""
    if [one.shape for one in expected] != [one.shape for one in made]:
        return math.inf
    worst = 0.0
    numbers = [(a, b) for a, b in zip(expected, made, strict=True) if a.is_floating_point() or a.is_complex()]
    if not numbers:
        return 0.0 if all(torch.equal(a, b) for a, b in zip(expected, made, strict=True)) else math.inf
    for a, b in numbers:
        if not a.numel():
            continue
        # Equal infinities (masked logits) do not differ.
        same = a == b
        most = torch.where(a.isfinite(), a.abs(), 0).max().item()
        gap = torch.where(same, 0, (a - b).abs()).max().item()
        if gap:
            worst = max(worst, gap / most if most else math.inf) if not math.isnan(gap) else math.inf
    return worst


def line_of(error: BaseException) -> str:
    """The line of the user's code that failed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THEIRS):
            return f" ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
    return ""


def class_that_failed(error: BaseException) -> str:
    """The class of the innermost module of a user in whose code an error arose."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith("torch."):
            found = type(module).__name__
    return found
