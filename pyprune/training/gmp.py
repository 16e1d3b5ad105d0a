"""Gradual magnitude pruning."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pyprune.methods.importance import magnitude
from pyprune.methods.method import Method, PruneMode
from pyprune.methods.schedules import check_ratios, cubic
from pyprune.methods.scope import tensor
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.training.pruner import Pruner


def gmp(
    model: nn.Module,
    ratio: float | Mapping[str, float],
    optimizer: Optimizer | None = None,
    *,
    end: int,
    start: int = 0,
    initial: float | Mapping[str, float] = 0.0,
    frequency: int = 1,
    method: Method | PruneMode | str | None = None,
    reintroduce: bool = True,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
) -> Pruner:
    """Prune gradually while training: fast at first, when there is much to choose from, and slowly in the end.

    For limits, allocation or another schedule make a `Pruner`.

    Args:
        model, optimizer, reintroduce, ignored_scope, examples_inputs: as for `Pruner`.
        ratio: in the end.
        end, start, initial, frequency: of `pyprune.schedules.cubic`, in calls of `Pruner.step`.
        method: as for `Pruner`; magnitude within each weight if None, as in the paper.

    Raises:
        TypeError, ValueError: as for `Pruner`.

    Paper: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".

    Example:
        >>> pruner = gmp(nn.Linear(10, 10), 0.9, end=10)
        >>> for _ in range(10):
        ...     _ = pruner.step()
        >>> int(pruner.model.weight.count_nonzero())
        10
    """
    check_ratios(ratio, "ratio")
    return Pruner(
        model,
        Method(magnitude(), scope=tensor()) if method is None else method,
        cubic(check_ratios(ratio, "ratio"), end=end, start=start, initial=initial, frequency=frequency),
        optimizer,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
        reintroduce=reintroduce,
    )
