"""Runs of a model that are timed or watched, and leave it as it was."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyprune.modules.evaluation import evaluating, forward, untouched
from pyprune.modules.undo import Before, undoing
from pyprune.structured.models import tensors_within

_PLAIN = (Tensor, str, bytes, int, float, complex, type(None))


@contextmanager
def still(*models: nn.Module) -> Iterator[None]:
    """Have models in evaluation, without gradients; whatever passes change in them, and random numbers, come back."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undoing(Before(model, with_attributes=False).restore))
            stack.enter_context(evaluating(model))
            stack.enter_context(untouched(model))
        yield


def run(model: nn.Module, *inputs: Any) -> None:
    """Call a model with one input after the other."""
    for one in inputs:
        forward(model, one, "examples")


def copies_of(inputs: Sequence[Any]) -> Callable[[], tuple[Any, ...]]:
    """Return what gives the inputs of a run: copies, if there is more than tensors in them (a cache, which grows).

    Example:
        >>> one = torch.ones(2)
        >>> copies_of([one])()[0] is one, copies_of([(one, object())])()[0][0] is one
        (True, False)
    """
    leaves = [leaf for one in inputs for leaf in tree_leaves(dict(one) if isinstance(one, Mapping) else one)]
    if all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return lambda: tuple(inputs)
    return lambda: tuple(copy.deepcopy(one) for one in inputs)


def devices_of(models: Iterable[nn.Module], inputs: Sequence[Any]) -> set[torch.device]:
    """Return where the tensors of models and inputs are."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.device for tensor in (*tensors, *tensors_within(list(inputs)))}
