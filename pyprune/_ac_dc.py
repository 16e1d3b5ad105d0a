"""AC/DC: training that alternates between a dense and a pruned model."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pyprune import ops
from pyprune._pruner import Pruner, is_pruned
from pyprune.ignored_scope import IgnoredScope
from pyprune.importance import magnitude
from pyprune.methods import Method, PruneMode
from pyprune.schedules import Ratio, alternating


class AcDcPruner(Pruner):
    """A `Pruner` by which weights come back as zero, and their optimizer begins anew, when masks open.

    It takes what a `Pruner` takes, and an optimizer for certain. Whenever the schedule's ratio falls to 0, what the
    masks dropped becomes zero, and the optimizer forgets its state of all pruned weights: momentum, Adam's moments
    and step counts.

    Example:
        >>> import torch
        >>> from pyprune import schedules
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> schedule = schedules.alternating(0.5, end=8, frequency=2)
        >>> pruner = AcDcPruner(model, Method(magnitude()), schedule, optimizer)
        >>> [pruner.step() and pruner.ratio for _ in range(6)]
        [False, 0.5, False, 0.0, False, 0.5]
    """

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            raise TypeError("optimizer is None; AC/DC resets what the optimizer knows of the weights: give it")
        super()._check_optimizer()

    def _update(self, ratio: Ratio) -> None:
        if not is_pruned(ratio) and is_pruned(self.ratio):
            assert self.optimizer is not None
            masks = self._masks()
            ops.fold([target.parameter for target in masks], [mask.mask for mask in masks.values()])
            for target in masks:
                self.optimizer.state.pop(target.parameter, None)
        super()._update(ratio)


def ac_dc(
    model: nn.Module,
    ratio: float | Mapping[str, float],
    optimizer: Optimizer,
    *,
    end: int,
    frequency: int,
    start: int = 0,
    method: Method | PruneMode | str | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
) -> AcDcPruner:
    """Alternate between dense and pruned training, every ``frequency`` steps, and end pruned.

    Masks are chosen when a pruned phase begins, and hold through it. When a dense phase begins, all weights train,
    from zero where they were dropped, and the momentum of the optimizer is forgotten.

    Args:
        model, optimizer, ignored_scope, examples_inputs: as for `Pruner`.
        ratio: of the pruned phases.
        end, frequency, start: of `pyprune.schedules.alternating`, in calls of `Pruner.step`.
        method: as for `Pruner`; magnitude among all weights if None.

    Raises:
        TypeError, ValueError: as for `Pruner`.

    Paper: Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks".

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = ac_dc(model, 0.5, optimizer, end=20, frequency=5)
        >>> [step for step in range(1, 21) if pruner.step()]
        [5, 10, 15]
    """
    schedule = alternating(ratio, end=end, frequency=frequency, start=start)
    return AcDcPruner(
        model,
        Method(magnitude()) if method is None else method,
        schedule,
        optimizer,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
    )
