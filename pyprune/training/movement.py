"""Movement pruning: weights stay that move away from zero while a model is fine-tuned."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune import ops
from pyprune.calibration.training_statistics import TrainingGradients, average
from pyprune.checks import check_number, shown
from pyprune.methods.allocation import Amount, removed_count
from pyprune.methods.granularity import Granularity, element
from pyprune.methods.importance import gradient, without_signs
from pyprune.methods.method import Method
from pyprune.methods.schedules import Ratio, Schedule, as_schedule
from pyprune.methods.scope import Scope, tensor
from pyprune.methods.unit_groups import reduce_units, spread_units
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.mask_states import check_tensors
from pyprune.modules.masks import changing_masks, raw_weight
from pyprune.modules.targets import Target
from pyprune.selection.choose_masks import Choice, unit_groups_of
from pyprune.training.pruner import Pruner


class MovementPruner(Pruner):
    """Learn a score S for every unit, from the gradient that reaches it straight through the mask.

    The derivative of the loss by S is the sum of g w over the unit, where g is the gradient of the weight in use and
    w the weight: with plain gradient descent S = -lr * sum over steps of (sum of g w). Scores learn from the first
    step on, those of dropped units too, which so can come back.

    *Hard*: the units with the lowest scores go, as many as the schedule's ratio says. *Soft*, with a ``threshold``:
    units go whose sigma(S) is below threshold * ratio; the ratio only brings the threshold in, and how much goes
    follows from ``regularization``, the weight of ratio * mean(sigma(S)) in the loss.

    Masks follow the scores until the schedule ends, and then stay (`freeze` lets them stay at once). Scores learn
    from gradients as backward gives them: with a ``GradScaler`` those are scaled, which Adam does not mind, but other
    optimizers of scores and ``regularization`` do: use bfloat16 with them.

    Args:
        model, ignored_scope, examples_inputs: as for `Pruner`; a model that is trained already.
        schedule: as for `Pruner`; its start is the end of the warm-up, at step 1 or later. Scores of few batches are
            noise: an epoch or more is usual.
        optimizer: what trains the weights; scores take their steps just before its own.
        lr: learning rate of the scores. Hard masks need only their order, which it does not change with Adam.
        score_optimizer: makes the optimizer of the scores from a list of tensors; Adam with ``lr`` if None.
        granularity: the units; blocks of 32 x 32 are usual in transformers.
        scope: `scope.tensor` or `scope.model`; for hard masks.
        threshold: in (0, 1); hard masks if None.
        regularization: 0 or more; for soft masks.

    Raises:
        TypeError, ValueError: as for `Pruner`, and for other scopes and numbers.

    Papers: Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning"; Lagunas et al. 2021, "Block
    Pruning For Faster Transformers".

    Example:
        >>> from pyprune.methods import schedules
        >>> model = nn.Linear(10, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = MovementPruner(model, schedules.cubic(0.5, start=2, end=10), optimizer)
        >>> for _ in range(12):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(2, (8,))).backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> int((model.weight == 0).sum())
        10
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | Callable[[int], Ratio],
        optimizer: Optimizer,
        *,
        lr: float = 1e-2,
        score_optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
        granularity: Granularity | None = None,
        scope: Scope | None = None,
        threshold: float | None = None,
        regularization: float = 0.0,
        ignored_scope: IgnoredScope | None = None,
        examples_inputs: Any = None,
    ) -> None:
        check_number("lr", lr, what="a learning rate, 0 or more", least=0)
        scope = tensor() if scope is None else scope
        method = Method(gradient(), element() if granularity is None else granularity, scope)
        if method.granularity.coupled is not None:
            raise ValueError(
                "granularity is coupled, and movement learns scores of units of one weight, or of heads by "
                "granularity.head; give another, or a Pruner with importance.taylor(joint=True)"
            )
        self._check(scope, as_schedule(schedule), threshold, regularization)
        if score_optimizer is not None and not callable(score_optimizer):
            raise TypeError(f"score_optimizer is {shown(score_optimizer)}; give a function that makes one of tensors")
        self.threshold, self.regularization = threshold, float(regularization)
        self._optimizer_of_scores = partial(torch.optim.Adam, lr=lr) if score_optimizer is None else score_optimizer
        super().__init__(
            model, method, schedule, optimizer, ignored_scope=ignored_scope, examples_inputs=examples_inputs
        )

    @property
    def scores(self) -> dict[str, Tensor]:
        """The score of every unit, by the name of the weight (for heads of the attention layer); float32."""
        return {unit_group.name: score for unit_group, score in zip(self._units, self._scores, strict=True)}

    def _state(self) -> dict[str, Any]:
        scores = {name: score.clone() for name, score in self.scores.items()}
        return super()._state() | {"scores": scores, "score_optimizer": self._score_optimizer.state_dict()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        expected = {name: score.shape for name, score in self.scores.items()}
        scores = state["scores"] if isinstance(state["scores"], Mapping) else {}
        check_tensors("scores", state["scores"])
        if {name: score.shape for name, score in scores.items()} != expected:
            raise ValueError(f"the state has scores for {shown(sorted(scores))}, this pruner for {sorted(expected)}")

    def _load(self, state: Mapping[str, Any]) -> None:
        try:  # it looks at all before it changes anything
            self._score_optimizer.load_state_dict(state["score_optimizer"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"score_optimizer of the state does not fit the optimizer of scores: {error}") from error
        super()._load(state)

    def _touched(self) -> list[object]:
        return [*super()._touched(), *([self._score_optimizer] if hasattr(self, "_score_optimizer") else ())]

    def _loading(self, state: Mapping[str, Any]) -> Callable[[], None]:
        load_masks = super()._loading(state)

        def load() -> None:
            load_masks()
            for name, score in self.scores.items():
                score.copy_(state["scores"][name])

        return load

    def _check(self, scope: Scope, schedule: Schedule, threshold: float | None, regularization: float) -> None:
        if scope.name not in ("model", "tensor"):
            raise ValueError(f"scope is {scope.name}; movement pruning takes scope.tensor() or scope.model()")
        if isinstance(schedule(schedule.start), dict):
            raise ValueError("movement pruning takes one ratio, not a dict")
        if threshold is not None:
            what = "a number between 0 and 1: it is one of sigma(S)"
            check_number("threshold", threshold, what=what, least=0, most=1, open_ends=True)
        if check_number("regularization", regularization, what="a number, 0 or more", least=0) and threshold is None:
            raise ValueError(
                f"regularization is {regularization} and threshold None; it is for soft masks, which have a threshold"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            raise TypeError("optimizer is None; scores learn from its batches: give the one that trains the weights")
        super()._check_optimizer()

    def _make_watch(self) -> TrainingGradients:
        assert self.optimizer is not None
        self._units = unit_groups_of(self.method, Amount(0.0), self._targets, {})
        self._by_name = {target.name: target for target in self._targets}
        self._scores = [
            torch.zeros(c.unit_shape, device=c.weight.values.device, dtype=torch.float32) for c in self._units
        ]
        self._score_optimizer = self._optimizer_of_scores(self._scores)
        return TrainingGradients(self._targets, self.optimizer, self._learn)

    @torch.no_grad()
    def _learn(self, gradients: Mapping[Target, Tensor]) -> None:
        """Take a step of the scores, with the weights that the gradients are of."""
        products = []
        for unit_group in self._units:
            for member in unit_group.members:
                target = self._by_name[member.weight.name]
                weight, found = raw_weight(target), gradients.get(target)
                wide = weight.double() if weight.dtype == torch.float64 else weight.float()
                products.append(torch.zeros_like(wide) if found is None else found * wide)
        slopes = reduce_units(self._units, products, None, "sum")
        count = sum(score.numel() for score in self._scores)
        ratio = self.ratio
        assert isinstance(ratio, float)
        for score, slope in zip(self._scores, slopes, strict=True):
            score.grad = slope.to(score.dtype).contiguous()
            average([score.grad])
            if self.regularization:
                open_ = torch.sigmoid(score)
                score.grad += self.regularization * ratio / count * open_ * (1 - open_)
        self._score_optimizer.step()

    @torch.no_grad()
    def _update(self, ratio: Ratio) -> None:
        assert isinstance(ratio, float)
        masks = self._masks()
        self._check_before(masks)
        if self.threshold is not None:
            # sigma(S) >= bound, without the rounding of sigma
            bound = self.threshold * ratio
            lowest = math.log(bound / (1 - bound)) if bound else -math.inf
            units = [score >= lowest for score in self._scores]
            nonfinite = torch.stack([(~score.isfinite()).sum() for score in self._scores])
        else:
            keys = without_signs(self._scores)
            sizes = [score.numel() for score in self._scores]
            together = self.method.scope.name == "model"
            removed = removed_count(sum(sizes), ratio) if together else [removed_count(n, ratio) for n in sizes]
            units, nonfinite = ops.threshold(keys, removed)
        self._unchecked = Choice({}, "scores of movement", [(list(self.scores), nonfinite)])
        if nonfinite.is_cpu:
            self._check_last()
        members = [member for unit_group in self._units for member in unit_group.members]
        carried = [masks[self._by_name[member.weight.name]] for member in members]
        unit_is_element = self.method.granularity.name == "element"
        with changing_masks(masks.values()):
            spread = [torch.empty_like(mask.mask) for mask in carried]
            spread_units(self._units, units, spread)
            for member, mask, new in zip(members, carried, spread, strict=True):
                mask.mask, mask.unit = new, None if unit_is_element else member.block
        self.ratio = ratio
