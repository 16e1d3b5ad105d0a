"""RigL: training that is sparse from the first step to the last, with connections that move."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune import ops
from pyprune.calibration.training_statistics import TrainingGradients, average
from pyprune.methods.allocation import Allocation, check_ratio
from pyprune.methods.importance import random
from pyprune.methods.method import Method
from pyprune.methods.schedules import Ratio, check_step, constant
from pyprune.methods.scope import tensor
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import changing_masks
from pyprune.modules.targets import Target
from pyprune.training.pruner import Pruner


class RigLPruner(Pruner):
    """Train a model that is sparse from the start: at times the smallest weights go, and others grow.

    The first masks are random. At step t, of the weights that a tensor has, the share
    fraction / 2 * (1 + cos(pi t / end)) with the smallest |w| goes, and as many of those that it has not grow: those
    with the largest gradient in size, from zero and without momentum. So every tensor keeps its number of weights.

    Args:
        model, optimizer, ignored_scope, examples_inputs: as for `Pruner`.
        ratio: of all steps, in [0, 1).
        end: the step of the last update, in calls of `Pruner.step`; three quarters of the training are usual.
        frequency: how many steps lie between updates; less than ``end``.
        fraction: share of the weights that moves in the first update, in [0, 1).
        allocation: as in `prune`; by "erk" thin layers keep more, by "er" without regard to the size of kernels.
        seed: of the first masks.

    Raises:
        TypeError, ValueError: as for `Pruner`.

    Paper: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners".

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = RigLPruner(model, 0.8, optimizer, end=30, frequency=10, allocation="uniform")
        >>> before = model[0].weight != 0
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> after = model[0].weight != 0
        >>> int(after.sum()), bool((before != after).any())
        (80, True)
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float,
        optimizer: Optimizer,
        *,
        end: int,
        frequency: int = 100,
        fraction: float = 0.3,
        allocation: Allocation = "erk",
        seed: int = 0,
        ignored_scope: IgnoredScope | None = None,
        examples_inputs: Any = None,
    ) -> None:
        check_ratio(ratio)
        self.fraction = check_ratio(fraction, "fraction")
        if check_step(frequency, "frequency", least=1) >= check_step(end, "end"):
            raise ValueError(
                f"frequency is {frequency} and end {end}, so nothing would ever move; give a smaller one"
            )
        self._gradients: dict[Target, Tensor] = {}
        super().__init__(
            model,
            Method(random(seed), scope=tensor()),
            constant(check_ratio(ratio), end=end, frequency=frequency),
            optimizer,
            ignored_scope=ignored_scope,
            examples_inputs=examples_inputs,
            allocation=allocation,
        )

    def _finish_masks(self) -> None:
        super()._finish_masks()
        for mask in self._carried().values():
            mask.parks, mask.parked = False, None  # what grows begins at zero

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            raise TypeError("optimizer is None; RigL grows weights by their gradients: give what ends a batch")
        super()._check_optimizer()

    def _make_watch(self) -> TrainingGradients:
        assert self.optimizer is not None
        return TrainingGradients(self._targets, self.optimizer, self._take)

    def _is_measured(self) -> bool:
        return bool(self._gradients)

    def _is_looked_at(self) -> bool:
        # Only the gradient of the batch just before an update counts.
        return not self.frozen and (self._is_late or self.schedule.is_due(self.step_count + 1))

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._gradients = {}

    def _take(self, gradients: Mapping[Target, Tensor]) -> None:
        self._gradients = {target: gradient.detach().clone() for target, gradient in gradients.items()}

    @torch.no_grad()
    def _update(self, ratio: Ratio) -> None:
        assert self.schedule.end is not None
        masks, found = self._masks(), self._gradients
        missing = [target.name for target in self._targets if target not in found]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} had no gradient in the last step of the optimizer, so nothing can grow"
            )
        self._gradients = {}
        weights = [target.parameter for target in self._targets]
        before = [masks[target].mask for target in self._targets]
        sizes = [weight.numel() for weight in weights]
        gone = ops.count_zeros(before).tolist()
        share = self.fraction / 2 * (1 + math.cos(math.pi * self.step_count / self.schedule.end))
        moved = [int(share * (size - zeros)) for size, zeros in zip(sizes, gone, strict=True)]
        fewer, bad = ops.threshold(
            weights, [zeros + count for zeros, count in zip(gone, moved, strict=True)], bases=before
        )
        gradients = [found[target] for target in self._targets]
        average(gradients)
        grown, worse = ops.threshold(
            gradients,
            [size - count for size, count in zip(sizes, moved, strict=True)],
            bases=[~mask for mask in fewer],
        )
        if bool(bad.any()) or bool(worse.any()):
            raise ValueError("weights or gradients are NaN or infinite: the training diverged. Load a checkpoint")
        with changing_masks(masks.values()):
            for target, kept, new in zip(self._targets, fewer, grown, strict=True):
                masks[target].mask = kept.logical_or_(new)
                masks[target].parks = True  # until all is done
        self.ratio = ratio
