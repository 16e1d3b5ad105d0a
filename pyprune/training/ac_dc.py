"""AC/DC: training that alternates between a dense and a pruned model."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune import ops
from pyprune.methods.importance import magnitude
from pyprune.methods.method import Method, PruneMode
from pyprune.methods.schedules import alternating, check_ratios
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask
from pyprune.modules.targets import Target
from pyprune.modules.zeros import fold_all
from pyprune.training.pruner import Pruner


class AcDcPruner(Pruner):
    """A `Pruner` by which weights come back as zero, and their optimizer begins anew, when masks open.

    It takes what a `Pruner` takes but ``reintroduce=False``, and an optimizer for certain. When the schedule's ratio
    is 0 and masks drop something, that becomes zero, and the optimizer forgets its state of all pruned weights:
    momentum, Adam's moments and step counts.

    Example:
        >>> import torch
        >>> from pyprune.methods import schedules
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> schedule = schedules.alternating(0.5, end=8, frequency=2)
        >>> pruner = AcDcPruner(model, Method(magnitude()), schedule, optimizer)
        >>> [pruner.step() and pruner.ratio for _ in range(6)]
        [False, 0.5, False, 0.0, False, 0.5]
    """

    _opened: Mapping[Target, Tensor] = MappingProxyType({})  # what masks dropped that were opened just now

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            raise TypeError("optimizer is None; AC/DC resets what the optimizer knows of the weights: give it")
        if self._options.dropped_stay:
            raise ValueError("reintroduce is False, but in dense phases all weights come back; leave it out")
        super()._check_optimizer()

    def _open(self, masks: Mapping[Target, Mask]) -> None:
        dropped = {target: mask.mask for target, mask in masks.items()}
        self._opened = dropped if bool(ops.count_zeros(list(dropped.values())).any()) else {}
        super()._open(masks)

    def _finish_masks(self) -> None:
        super()._finish_masks()
        assert self.optimizer is not None
        fold_all((target.parameter, mask) for target, mask in self._opened.items())
        for target, mask in self._carried().items():
            if target in self._opened:
                mask.saw()
                self.optimizer.state.pop(target.parameter, None)
        self._opened = {}


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
    schedule = alternating(check_ratios(ratio, "ratio"), end=end, frequency=frequency, start=start)
    return AcDcPruner(
        model,
        Method(magnitude()) if method is None else method,
        schedule,
        optimizer,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
    )
