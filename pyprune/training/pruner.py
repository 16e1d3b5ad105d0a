"""Prune while a model trains.

A `Pruner` is a schedule, a method and a step counter; what is chosen at an update is chosen as by `prune`.

- An update writes into the masks before the last, and then they change places: fresh memory would cost more than the
  kernel, and until all is done the old masks are there to go back to. Counts of non-finite scores are read at once on
  the CPU, and on a GPU with the next update, when nobody waits.
- The optimizer's step ends a batch, before it changes weights; a closure that it runs itself (as in Lightning) is a
  batch. Accumulated backward passes add up for as long as ``grad`` does. A step that a ``GradScaler`` skips is
  forgotten.
- All is checked before anything is put on: what looks at the training is made first, and hooked last.
- Ranks average what they gathered when masks are due, and so choose the same masks.
- Nothing of it is in the model but masks. A checkpoint is three states: model, optimizer, pruner.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune.calibration.sums import without_tables
from pyprune.calibration.training_statistics import TrainingGradients, TrainingSums, needs_gradients, needs_training
from pyprune.checks import check_bool, shown
from pyprune.methods.allocation import Allocation, Amount
from pyprune.methods.importance import random
from pyprune.methods.method import Method, PruneMode, check_amount
from pyprune.methods.schedules import Ratio, Schedule, as_schedule, check_ratios, check_step, is_pruned
from pyprune.methods.unit_groups import UnitGroup
from pyprune.modules.averages import averages_of, reapply, warn_of_copies
from pyprune.modules.dead_channels import new_followers
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.mask_states import check_state, loading, state_of
from pyprune.modules.masks import Mask, NewMask, attach_masks, changing_masks, masks_in
from pyprune.modules.optimizer import innermost
from pyprune.modules.steps import mask_state
from pyprune.modules.targets import Target
from pyprune.modules.undo import Change
from pyprune.modules.zeros import holds_in, settle_written
from pyprune.selection.choose_masks import (
    Choice,
    choose_masks,
    unit_groups_of,
    units_of,
)
from pyprune.selection.choose_units import ratios_of
from pyprune.selection.coupled import check_follows, check_no_coupled
from pyprune.selection.find_prunable import check_kind, find_prunable, tell_missed
from pyprune.selection.prune import ends_of, method_of, statistics_of


class Pruner:
    """Prune a model while it trains: masks follow a schedule, and importances are measured on the training itself.

    Made before the training, it puts masks on the weights at once: those of step 0 of the schedule, or masks that
    keep everything (masks that are there stay until the schedule starts). Then call `step` after each step of the
    optimizer, or after each epoch: the schedule counts these calls. Nothing is compiled again when masks change
    (but for activations, in the first batches and after the last update), and where the method allows it
    (elements or units by magnitude, N:M) nothing waits for a GPU. After the training `pyprune.strip` leaves the plain
    model. Just after an update BatchNorm has averages of other weights: evaluate later, or after
    `pyprune.batch_norm_adaptation`.

    Gradients and activations are gathered from the training. Gradients are those of the weight in use, which a
    dropped weight has, too; one step of the optimizer is one batch. What ``grad`` holds is masked all the same. Ranks
    of `torch.distributed` average what they gathered (so save the state of each rank). With a ``GradScaler``
    gradients are the scaled ones, and steps that it leaves out count for nothing: if nothing else was measured, the
    masks wait for the next step. After the last update nothing is gathered any more.

    Args:
        model: the model. Before ``fully_shard``, after which no more updates may come; DistributedDataParallel may be
            put on before or after.
        method: a `Method`, a magnitude mode of `PruneMode`, or its name.
        schedule: one of `pyprune.schedules`, or a function from the step to the ratio, by which masks are due at
            every step. Of N:M it ends at 1 - keep / of, or below; on the way some groups are whole.
        optimizer: what trains the weights; needed for importances of gradients.
        ignored_scope, examples_inputs, allocation, zero_dead_channels: as in `prune`.
        min_ratio, max_ratio: as in `prune`; the least holds where the schedule has its last ratio (always, if it has
            no end).
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
        >>> from pyprune import Method, strip
        >>> from pyprune.methods import importance, schedules
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

    @torch.inference_mode(False)  # masks made under inference_mode could not be trained with
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
        name, found = method_of(method, "method")
        if found is None:
            raise ValueError(
                f"mode is {name}, but learned gates are drawn to a ratio by a loss; give a Method or a magnitude mode"
            )
        for option, value in (("reintroduce", reintroduce), ("zero_dead_channels", zero_dead_channels)):
            check_bool(option, value)
        self.model = model
        self.method = found
        self.schedule = as_schedule(schedule)
        self.optimizer = None if optimizer is None else innermost(optimizer)
        self.step_count = 0
        self.ratio: Ratio = 0.0
        self.frozen = False
        self._options = Amount(0.0, allocation, min_ratio, max_ratio, dropped_stay=not reintroduce)
        self._unchecked: Choice | None = None
        self._same_unit_groups: list[UnitGroup] | None = None
        self._copies: frozenset[int] = frozenset()
        self._averages: list[weakref.ref[nn.Module]] = []
        self._spares: dict[Target, Tensor] = {}  # the masks before the last, to write the next ones to
        self._is_late = False  # masks were due, but there was nothing yet to choose them by
        check_follows(found, zero_dead_channels)
        self._prunable = find_prunable(model, found, ignored_scope, examples_inputs)
        check_no_coupled(model, found, stay=not reintroduce)
        self._coupled = self._prunable.coupled
        self._options = replace(self._options, left_out=self._prunable.left_out)
        self._targets = self._prunable.targets
        if self._coupled is None:
            self._targets = without_tables(found.importance, self._targets)
        check_kind(self._targets, Mask)
        self._check_optimizer()
        self._watch: TrainingSums | TrainingGradients | None = None
        with Change(model, objects=self._touched()) as change:
            for mask in self._carried().values():
                mask.parks = True  # `keep_sparse` had no use for what is dropped
            with changing_masks(masks_in(model)):
                self._statistics = self._known_statistics(examples_inputs)
                has_inputs = examples_inputs is not None
                tell_missed(model, found, ignored_scope, self._prunable, self._statistics, has_inputs=has_inputs)
                self._watch = self._make_watch()
                self._ends = ends_of(model, found, examples_inputs)
                self._check_all()
                self._attach(zero_dead_channels, examples_inputs, ignored_scope)
            if self._watch is not None:
                self._watch.start()
                self._watch.gathers = self._is_looked_at()
            change.finish(self._finish_masks)

    def step(self) -> bool:
        """Count a step, and compute the masks anew if they are due; return whether they were.

        Raises:
            ValueError: for NaN or infinity in weights or scores: the training diverged. Masks mean nothing then:
                load a checkpoint. (On a GPU it comes with the next update, or when the state is saved.) A step that
                fails is not counted, and nothing has changed: repaired, the same step can be made again.
        """
        carried = self._carried().values() if self._may_be_due() else ()
        with Change(holds=carried, objects=self._touched()) as change:
            is_updated = self._advance()
            change.finish(partial(self._finish_step, is_updated))
        return is_updated

    def _may_be_due(self) -> bool:
        return not self.frozen and (self._is_late or self.schedule.is_due(self.step_count + 1))

    def _touched(self) -> list[object]:
        """List what a step changes besides masks and weights."""
        watch = self._watch
        inside = watch.parts() if watch is not None else ()
        return [one for one in (self, self.optimizer, *inside) if one is not None]

    def _advance(self) -> bool:
        """Do all of a step that can be taken back."""
        self.step_count += 1
        was_skipped = self._watch is not None and self._watch.drop_batch()
        is_due = not self.frozen and (self._is_late or self.schedule.is_due(self.step_count))
        self._is_late = is_due and was_skipped and not self._is_measured()
        if is_due and not self._is_late:
            self._update(self.schedule(self.step_count))
        return is_due and not self._is_late

    def _finish_step(self, is_updated: bool) -> None:
        """Do the rest of a step, which may be done twice."""
        is_last = self.schedule.end is not None and self.step_count >= self.schedule.end
        if is_updated:
            self._finish_masks()
            if is_last:
                self._spares = {}
            if self.optimizer is not None:
                mask_state(self.optimizer, self._carried().values())
        if self._watch is not None:
            self._watch.gathers = self._is_looked_at()
        if is_updated:  # the last thing, because it may warn, and where warnings are errors nothing comes after
            self._reapply(is_last)
            if is_last:
                warn_of_copies(self._carried().values())

    def _reapply(self, is_last: bool) -> None:
        """Give averages the zeros: at the end they stay so, and those that were copied with masks have old ones."""
        copies = frozenset(id(copied) for mask in self._carried().values() for copied in mask.copies)
        if is_last or copies != self._copies:  # to look at all objects takes its time
            found = averages_of(self.model) if is_last or copies else []
            self._copies, self._averages = copies, [weakref.ref(average) for average in found]
        for reference in self._averages:
            average = reference()
            if average is not None:
                reapply(self.model, average)

    def _finish_masks(self) -> None:
        """Do what cannot be taken back once masks are new; it may be done twice."""
        if isinstance(self._watch, TrainingSums):
            self._watch.restart()

    def freeze(self) -> None:
        """Let the masks stay as they are from now on, whatever the schedule says, and take all hooks off."""
        self._check_last()
        with Change(self.model, objects=self._touched()):
            self.frozen, self._spares = True, {}
            if self._watch is not None:
                self._watch.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes: steps, what was measured, masks, and what is parked under them."""
        self._check_last()
        settle_written(holds_in(self.model))
        return self._state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the pruner that gave ``state_dict`` was: with the model's state_dict, to the same masks.

        Raises:
            TypeError, ValueError: if it is not the state of such a pruner. This one is then as it was.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(self._state()):
            raise ValueError(
                f"state_dict is {shown(state_dict)}, which is not the state_dict() of a {type(self).__name__}"
            )
        self._check_state(state_dict)
        with Change(self.model, objects=self._touched()) as change:
            load_rest = self._loading(state_dict)
            self._load(state_dict)
            change.finish(load_rest)

    def __reduce__(self) -> str:
        raise TypeError(
            f"a {type(self).__name__} looks at the training of one model and cannot be copied or pickled; make one "
            "for the copied model and its optimizer, and load this one's state_dict()"
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "ratio": self.ratio,
            "frozen": self.frozen,
            "is_late": self._is_late,
            "sums": self._watch.state_dict() if isinstance(self._watch, TrainingSums) else None,
            "masks": {target.name: state_of(mask) for target, mask in self._carried().items()},
        }

    def _check_state(self, state: Mapping[str, Any]) -> None:
        check_step(state["step_count"], "step_count")
        if check_ratios(state["ratio"], "the ratio of the state") == {} != self.schedule(int(state["step_count"])):
            raise ValueError("the ratio of the state is {}, which names no weight; it is damaged: load another")
        for flag in ("frozen", "is_late"):
            check_bool(f"{flag} of the state", state[flag])
        if isinstance(self._watch, TrainingSums):
            self._watch.check_state(state["sums"])
        elif state["sums"] is not None:
            raise ValueError("the state is that of a pruner with another importance; make one as it was made")
        masks = {target.name: mask for target, mask in self._carried().items()}
        if not isinstance(state["masks"], Mapping) or set(state["masks"]) != set(masks):
            raise ValueError(f"the state is of the weights {_named(state['masks'])}, these are {sorted(masks)}")
        for name, mask in masks.items():
            check_state(name, state["masks"][name], mask.mask.shape, mask.followers)

    def _load(self, state: Mapping[str, Any]) -> None:
        self._unchecked = None  # of the training that is left
        was_frozen, self.frozen = self.frozen, state["frozen"]
        self.step_count, self.ratio, self._is_late = int(state["step_count"]), state["ratio"], state["is_late"]
        if self._watch is None:
            return
        if isinstance(self._watch, TrainingSums):
            self._watch.load_state_dict(state["sums"])
        if self.frozen:
            self._watch.stop()
        elif was_frozen:
            self._watch.start()
        self._watch.gathers = self._is_looked_at()

    def _loading(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Return what is to be done after `_load`, which cannot be taken back; it may be done twice."""
        return loading([(mask, state["masks"][target.name]) for target, mask in self._carried().items()])

    # ---- before the training ----

    def _check_optimizer(self) -> None:
        """Raise if an optimizer is missing, or is that of another model."""
        if self.optimizer is None:
            if needs_gradients(self.method.importance):
                raise ValueError(
                    f"importance {self.method.importance.name} is measured in training; give the optimizer, whose "
                    "steps end a batch"
                )
            return
        trained = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not any(id(target.parameter) in trained for target in self._targets):
            frozen = not any(target.parameter.requires_grad for target in self._targets)
            advice = (
                "they are frozen, so prune them once, before" if frozen else "make it from this model's parameters"
            )
            raise ValueError(f"the optimizer trains none of the weights to prune; {advice}")

    def _known_statistics(self, inputs: Any) -> dict[Target, Tensor | None] | None:
        """Return what the importance needs, unless it is measured in training."""
        rule = self.method.importance
        if not needs_training(rule):
            found = statistics_of(self.model, rule, self._prunable, None, inputs)
            self._targets = [target for target in self._targets if target in found]
            return found
        if self.schedule.is_due(0) and is_pruned(self.schedule(0)):
            raise ValueError(
                f"importance {rule.name} is measured in training, and the schedule wants masks at step 0; let it "
                "start at 1 or later, or with ratio 0"
            )
        return None

    def _check_all(self) -> None:
        """Raise now for what would be wrong with masks at the end of the schedule."""
        schedule, method, statistics = self.schedule, self.method, self._statistics
        if statistics is None and self._coupled is not None:
            method, statistics = replace(method, importance=random()), {}  # how many go is what can be wrong
        elif statistics is None and needs_gradients(method.importance):
            statistics = {target: torch.zeros_like(target.parameter) for target in self._targets}
        for step in schedule.steps or (schedule.start if schedule.end is None else schedule.end,):
            ratio = schedule(step)
            amount = self._amount(ratio)
            if statistics is None:
                ratios_of(self.method, amount, unit_groups_of(self.method, amount, self._targets, {}))
            elif is_pruned(ratio):
                choice = choose_masks(method, amount, self._targets, statistics, coupled=self._coupled)
                choice.check()
                choice.tell(self.model, self._ends)

    def _attach(self, zero_dead_channels: bool, inputs: Any, ignored_scope: IgnoredScope | None) -> None:
        units = units_of(self.method, self._targets)
        masks = {
            target: NewMask(
                target.owners,
                torch.ones_like(target.parameter, dtype=torch.bool),
                units[target.name],
                on_target=self._coupled is None or target.parameter.dim() > 1,
            )
            for target in self._targets
            if target.attachment is None
        }
        ratio = self.schedule(0)
        if self.schedule.is_due(0) and is_pruned(ratio):
            assert self._statistics is not None
            amount = self._amount(ratio)
            choice = choose_masks(self.method, amount, self._targets, self._statistics, coupled=self._coupled)
            choice.check()
            masks = choice.masks
        carried = {target: target.attachment for target in self._targets if target not in masks}
        kept = {t: NewMask(t.owners, m.mask.clone(), m.unit) for t, m in carried.items() if isinstance(m, Mask)}
        followers = new_followers(self.model, masks | kept, inputs, ignored_scope) if zero_dead_channels else []
        attach_masks(self.model, list((masks | (kept if followers else {})).values()), followers)
        if self.schedule.is_due(0) and not is_pruned(ratio) and not self._options.dropped_stay:
            self._open({target: mask for target, mask in self._masks().items() if target in carried})
        self.ratio = ratio

    def _make_watch(self) -> TrainingSums | TrainingGradients | None:
        """Return what is to look at the training."""
        rule = self.method.importance
        return TrainingSums(rule, self._measured(), self.optimizer) if needs_training(rule) else None

    def _measured(self) -> list[Target]:
        """Return the weights by which units are scored."""
        return self._targets if self._coupled is None else self._coupled.measured(self.method.importance)

    # ---- in training ----

    def _is_measured(self) -> bool:
        """Whether there is anything to choose masks by."""
        return not (isinstance(self._watch, TrainingSums) and self._watch.is_empty)

    def _is_looked_at(self) -> bool:
        """Whether the next batch is of any use."""
        if self.frozen:
            return False
        return self._is_late or self.schedule.end is None or self.step_count < self.schedule.end

    def _amount(self, ratio: Ratio) -> Amount:
        """Return how much goes at a ratio of the schedule, checked."""
        last = None if self.schedule.end is None else self.schedule(self.schedule.end)
        options = replace(self._options, ratio=ratio)
        is_last = self.schedule.end is None or ratio == last
        return check_amount(self.method, options if is_last else replace(options, min_ratio=0.0))

    def _open(self, masks: Mapping[Target, Mask]) -> None:
        """Let the masks keep everything."""
        for mask in masks.values():
            mask.mask = torch.ones_like(mask.mask)

    @torch.inference_mode(False)
    def _update(self, ratio: Ratio) -> None:
        """Compute the masks anew."""
        masks = self._masks()
        self._check_before(masks)
        with changing_masks(masks.values()):
            if is_pruned(ratio):
                found = self._watch.results() if isinstance(self._watch, TrainingSums) else self._statistics
                assert found is not None
                self._write(self._amount(ratio), found, masks)
            elif not self._options.dropped_stay:
                self._open(masks)
        self.ratio = ratio

    def _write(
        self, amount: Amount, statistics: Mapping[Target, Tensor | None], masks: Mapping[Target, Mask]
    ) -> None:
        # Where the masks before the last were: new memory would take longer than the kernel.
        is_new = amount.has_bases or self._coupled is not None
        choice = choose_masks(
            self.method,
            amount,
            self._targets,
            statistics,
            into=None if is_new else {target: self._spare(target, mask) for target, mask in masks.items()},
            unit_groups=self._unit_groups(amount),
            coupled=self._coupled,
        )
        self._unchecked = choice
        if _on_cpu(masks):
            self._check_last()
        for target, new in choice.masks.items():
            if not is_new:
                self._spares[target] = masks[target].mask
            masks[target].mask, masks[target].unit = new.mask, new.unit

    def _spare(self, target: Target, mask: Mask) -> Tensor:
        """Return memory for the next mask of a target."""
        spare, now = self._spares.get(target), mask.mask
        if spare is None or (spare.device, spare.shape, spare.stride()) != (now.device, now.shape, now.stride()):
            return torch.empty_like(now)
        return spare

    def _unit_groups(self, amount: Amount) -> list[UnitGroup] | None:
        """Return what competes, if it is the same tensors at every update: to cut them up takes its time."""
        if amount.has_bases or self._statistics is None or self._coupled is not None:
            return None
        if self._same_unit_groups is None:
            self._same_unit_groups = unit_groups_of(self.method, amount, self._targets, self._statistics)
        return self._same_unit_groups

    def _carried(self) -> dict[Target, Mask]:
        """Return the masks of those weights that carry one."""
        pairs = ((target, target.attachment) for target in self._targets)
        return {target: mask for target, mask in pairs if isinstance(mask, Mask)}

    def _masks(self) -> dict[Target, Mask]:
        """Return the masks, or raise if they were stripped, or their layers replaced."""
        masks: dict[Target, Mask] = {}
        modules = set(self.model.modules())
        for target in self._targets:
            owner = target.owners[0]
            mask = owner.attachment
            if owner.module not in modules:
                raise ValueError(
                    f"{target.name} belongs to a layer that is no longer in the model: it was replaced. Make a new "
                    "Pruner for the model as it is"
                )
            if not isinstance(mask, Mask):
                raise ValueError(f"{target.name} carries no mask any more; make a new Pruner after strip()")
            if owner.parameter is not target.parameter:
                raise ValueError(
                    f"{target.name} is another parameter than before (load_state_dict(assign=True) and fully_shard "
                    "make new ones); make a new Pruner, or let no more updates come"
                )
            masks[target] = mask
        return masks

    def _check_before(self, masks: Mapping[Target, Mask]) -> None:
        """Raise if the masks of the last update were wrong and nobody has been told yet."""
        last, self._unchecked = self._unchecked, None
        if last is not None and not _on_cpu(masks):
            last.check()
            last.tell(self.model, self._ends)

    def _check_last(self) -> None:
        """Raise if the masks of the last update were computed from NaN or infinity."""
        if self._unchecked is not None:
            self._unchecked.check()
            self._unchecked.tell(self.model, self._ends)
            self._unchecked = None


def _named(masks: object) -> str:
    return shown(sorted(map(str, masks)) if isinstance(masks, Mapping) else masks)


def _on_cpu(masks: Mapping[Target, Mask]) -> bool:
    return all(mask.mask.is_cpu for mask in masks.values())
