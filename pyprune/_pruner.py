"""Prune while a model trains."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune._prune import check_kind, method_of, statistics_of
from pyprune.allocation import Allocation, Amount
from pyprune.choosing import Choice, choose_masks, competitors_of, entrants
from pyprune.contests import ratios_of
from pyprune.following import new_followers, update_followers
from pyprune.ignored_scope import IgnoredScope
from pyprune.masks import Mask, NewMask, attach_masks
from pyprune.methods import Method, PruneMode, check_amount
from pyprune.schedules import Ratio, Schedule, as_schedule, check_step
from pyprune.targets import Target, find_targets
from pyprune.training_sums import TrainingGradients, TrainingSums, needs_training


class Pruner:
    """Prune a model while it trains: masks follow a schedule, and importances are measured on the training itself.

    Made before the training, it puts masks on the weights at once: those of step 0 of the schedule, or masks that
    keep everything. Then call `step` after each step of the optimizer, or after each epoch: the schedule counts these
    calls. Masks are written in place: nothing is compiled again, and where the method allows it (elements or units
    by magnitude, N:M) nothing waits for a GPU. After the training `pyprune.strip` leaves the plain model.

    Gradients and activations are gathered from the training. Gradients are those of the weight in use, which a
    dropped weight has, too; one step of the optimizer is one batch. What ``grad`` holds is masked all the same. Ranks
    of `torch.distributed` average what they gathered. With a ``GradScaler`` gradients are the scaled ones.

    Args:
        model: the model. Before ``fully_shard``, after which no more updates may come; DistributedDataParallel may be
            put on before or after.
        method: a `Method`, a magnitude mode of `PruneMode`, or its name.
        schedule: one of `pyprune.schedules`, or a function from the step to the ratio, by which masks are due at
            every step. N:M has a ratio of its own: masks are on wherever that of the schedule is not 0.
        optimizer: what trains the model; needed for importances of gradients or activations.
        ignored_scope, examples_inputs, allocation, zero_dead_channels: as in `prune`.
        min_ratio, max_ratio: as in `prune`; the least holds from where the schedule has its last ratio.
        reintroduce: whether weights that are dropped may come back, with the value that they had; if not, masks
            only lose elements.

    Attributes:
        ratio: the ratio of the last update.
        step_count: how many steps were made.

    Raises:
        TypeError, ValueError: as `prune` does, and for a schedule that asks for masks before anything was measured.
            The model is then as it was.

    Paper: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".

    Example:
        >>> from pyprune import Method, importance, schedules, strip
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> method = Method(importance.magnitude())
        >>> pruner = Pruner(model, method, schedules.cubic(0.75, end=20, frequency=5), optimizer)
        >>> for _ in range(25):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     updated = pruner.step()
        >>> pruner.ratio, sum(int((layer.weight == 0).sum()) for layer in (strip(model)[0], model[2]))
        (0.75, 120)
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | PruneMode | str,
        schedule: Schedule | Callable[[int], Ratio],
        optimizer: Optimizer | None = None,
        *,
        ignored_scope: IgnoredScope | None = None,
        examples_inputs: Any = None,
        allocation: Allocation = "uniform",
        min_ratio: float | Mapping[str, float] = 0.0,
        max_ratio: float | Mapping[str, float] = 1.0,
        reintroduce: bool = True,
        zero_dead_channels: bool = False,
    ) -> None:
        name, found = method_of(method)
        if found is None:
            raise ValueError(
                f"mode is {name}, but learned gates are drawn to a ratio by a loss; give a Method or a magnitude mode"
            )
        if optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
        self.model = model
        self.method = found
        self.schedule = as_schedule(schedule)
        self.optimizer = optimizer
        self.step_count = 0
        self.ratio: Ratio = 0.0
        self.frozen = False
        self._options = Amount(0.0, allocation, min_ratio, max_ratio, dropped_stay=not reintroduce)
        self._unchecked: Choice | None = None
        self._watch: TrainingSums | TrainingGradients | None = None
        self._targets = entrants(found, find_targets(model, ignored_scope, examples_inputs))
        check_kind(self._targets, Mask)
        self._statistics = self._known_statistics(examples_inputs)
        self._check_all()
        self._attach(zero_dead_channels, examples_inputs)
        self._watch = self._start_watching()

    def step(self) -> bool:
        """Count a step, and compute the masks anew if they are due; return whether they were.

        Raises:
            ValueError: for NaN or infinity in weights or scores: the training diverged. Masks mean nothing then:
                load a checkpoint. (On a GPU it comes with the next update, or when the state is saved.)
        """
        self.step_count += 1
        if self._watch is not None:
            self._watch.drop_batch()
        if self.frozen or not self.schedule.is_due(self.step_count):
            return False
        self._update(self.schedule(self.step_count))
        return True

    def freeze(self) -> None:
        """Let the masks stay as they are from now on, whatever the schedule says, and take all hooks off."""
        self._check_last()
        self.frozen = True
        if self._watch is not None:
            self._watch.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes, but for the masks: those are buffers in the model's state_dict."""
        self._check_last()
        return {
            "step_count": self.step_count,
            "ratio": self.ratio,
            "frozen": self.frozen,
            "sums": self._watch.state_dict() if isinstance(self._watch, TrainingSums) else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the pruner that gave ``state_dict`` was: with the model's state_dict, to the same masks.

        Raises:
            TypeError, ValueError: if it is not the state of such a pruner. This one is then as it was.
        """
        expected = set(self.state_dict())
        if not isinstance(state_dict, Mapping) or set(state_dict) != expected:
            raise ValueError(f"{state_dict!r:.80} is not the state_dict() of a {type(self).__name__}")
        count = check_step(state_dict["step_count"], "step_count")
        has_sums = isinstance(self._watch, TrainingSums)
        if has_sums != (state_dict["sums"] is not None):
            raise ValueError("the state is that of a pruner with another importance; make one as it was made")
        if isinstance(self._watch, TrainingSums):
            self._watch.load_state_dict(state_dict["sums"])
        self.step_count, self.ratio = count, state_dict["ratio"]
        if state_dict["frozen"]:
            self.freeze()
        self.frozen = bool(state_dict["frozen"])

    # ---- before the training ----

    def _known_statistics(self, inputs: Any) -> dict[Target, Tensor | None] | None:
        """Return what the importance needs, unless it is measured in training."""
        rule = self.method.importance
        if not needs_training(rule):
            found = statistics_of(self.model, rule, self._targets, None, inputs)
            self._targets = [target for target in self._targets if target in found]
            return found
        if self.optimizer is None:
            raise ValueError(
                f"importance {rule.name} is measured in training; give the optimizer, whose steps end a batch"
            )
        if self.schedule.is_due(0) and is_pruned(self.schedule(0)):
            raise ValueError(
                f"importance {rule.name} is measured in training, and the schedule wants masks at step 0; let it "
                "start at 1 or later, or with ratio 0"
            )
        return None

    def _check_all(self) -> None:
        """Raise now for what would be wrong with masks at the end of the schedule."""
        schedule = self.schedule
        for step in schedule.steps or (schedule.start if schedule.end is None else schedule.end,):
            ratio = schedule(step)
            amount = self._amount(ratio)
            if self._statistics is None:
                ratios_of(self.method, amount, competitors_of(self.method, amount, self._targets, {}))
            elif is_pruned(ratio):
                choose_masks(self.method, amount, self._targets, self._statistics).check()

    def _attach(self, zero_dead_channels: bool, inputs: Any) -> None:
        masks = {
            target: NewMask(target.owners, torch.ones_like(target.parameter, dtype=torch.bool))
            for target in self._targets
            if target.attachment is None
        }
        ratio: Ratio = 0.0
        if self.schedule.is_due(0) and is_pruned(self.schedule(0)):
            ratio = self.schedule(0)
            assert self._statistics is not None
            masks = choose_masks(self.method, self._amount(ratio), self._targets, self._statistics).masks
        carried = {target: target.attachment for target in self._targets if target not in masks}
        kept = {t: NewMask(t.owners, m.mask.clone(), m.unit) for t, m in carried.items() if isinstance(m, Mask)}
        followers = new_followers(self.model, masks | kept, inputs) if zero_dead_channels else []
        attach_masks(list((masks | (kept if followers else {})).values()), followers)
        update_followers(self.model)
        self.ratio = ratio

    def _start_watching(self) -> TrainingSums | TrainingGradients | None:
        """Put on what looks at the training."""
        if not needs_training(self.method.importance):
            return None
        assert self.optimizer is not None
        return TrainingSums(self.method.importance, self._targets, self.optimizer)

    # ---- in training ----

    def _amount(self, ratio: Ratio) -> Amount:
        """Return how much goes at a ratio of the schedule, checked."""
        scope = self.method.scope
        last = None if self.schedule.end is None else self.schedule(self.schedule.end)
        if scope.name == "n_of_m":
            assert scope.keep is not None
            assert scope.of is not None
            own = 1 - scope.keep / scope.of
            if last is not None and (not isinstance(last, float) or abs(last - own) > 0.01):
                raise ValueError(
                    f"the schedule ends at {last}, but keeping {scope.keep} of {scope.of} removes {own:g}; give that"
                )
            return check_amount(self.method, replace(self._options, ratio=None))
        options = replace(self._options, ratio=ratio)
        return check_amount(self.method, options if ratio == last else replace(options, min_ratio=0.0))

    @torch.inference_mode(False)
    def _update(self, ratio: Ratio) -> None:
        """Compute the masks anew."""
        self._check_last()
        masks = self._masks()
        if not is_pruned(ratio):
            for mask in () if self._options.dropped_stay else masks.values():
                mask.fill_(True)
        else:
            statistics = self._statistics
            if isinstance(self._watch, TrainingSums):
                statistics = dict(self._watch.results())
                self._watch.restart()
            assert statistics is not None
            self._write(self._amount(ratio), statistics, masks)
        update_followers(self.model)
        self.ratio = ratio

    def _write(
        self, amount: Amount, statistics: Mapping[Target, Tensor | None], masks: Mapping[Target, Tensor]
    ) -> None:
        # In place where nothing reads the old masks meanwhile: new memory would take longer than the kernel.
        in_place = not amount.has_bases
        choice = choose_masks(self.method, amount, self._targets, statistics, into=masks if in_place else None)
        self._unchecked = choice
        if all(mask.is_cpu for mask in masks.values()):
            self._check_last()
        if not in_place:
            attach_masks(list(choice.masks.values()))
        for target, new in choice.masks.items():
            mask = target.attachment
            assert isinstance(mask, Mask)
            if mask.unit != new.unit:  # a module takes its time to set an attribute
                mask.unit = new.unit

    def _masks(self) -> dict[Target, Tensor]:
        """Return the tensors of the masks; they may have been replaced, by moving the model."""
        masks: dict[Target, Tensor] = {}
        for target in self._targets:
            mask = target.attachment
            if not isinstance(mask, Mask):
                raise ValueError(f"{target.name} carries no mask any more; make a new Pruner after strip()")
            masks[target] = mask.mask
        return masks

    def _check_last(self) -> None:
        """Raise if the masks of the last update were computed from NaN or infinity."""
        choice, self._unchecked = self._unchecked, None
        if choice is not None:
            choice.check()


def is_pruned(ratio: Ratio) -> bool:
    """Whether a ratio, or one of a dict, is not 0.

    Example:
        >>> is_pruned({"fc": 0.0}), is_pruned(0.5)
        (False, True)
    """
    return any(ratio.values()) if isinstance(ratio, dict) else ratio != 0
