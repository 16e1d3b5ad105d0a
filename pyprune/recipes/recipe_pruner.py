"""Go through the stages of a recipe, step by step."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune.calibration.training_statistics import needs_gradients
from pyprune.checks import shown
from pyprune.methods.schedules import Ratio, check_step
from pyprune.modules.attachments import check_module
from pyprune.modules.mask_states import is_size
from pyprune.modules.optimizer import innermost_of
from pyprune.modules.strip import strip
from pyprune.modules.undo import Change
from pyprune.recipes.stages import Stage, steps_of
from pyprune.recipes.taught import Taught
from pyprune.selection.find_prunable import find_prunable
from pyprune.training.ac_dc import AcDcPruner
from pyprune.training.keep_sparse import KeepSparse, keep_sparse
from pyprune.training.pruner import Pruner
from pyprune.training.teacher import Distillation


class RecipePruner:
    """What `Recipe.apply` returns: goes through the stages of a recipe, step by step.

    Example:
        >>> from pyprune import Recipe
        >>> recipe = Recipe.from_string("stages: [prune: {final: 0.5, end: 2}]")
        >>> pruner = recipe.apply(nn.Linear(4, 4), None, steps_per_epoch=2)
        >>> for _ in range(4):
        ...     updated = pruner.step()
        >>> pruner.epoch, pruner.ratio
        (2.0, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        steps_per_epoch: int,
        pruners: Sequence[Pruner],
        hold: Callable[[Sequence[Optimizer]], KeepSparse] | None,
        hold_from: int = 0,
        distillation: Distillation | None = None,
        learns: tuple[float, float] = (0, math.inf),
    ) -> None:
        self.model = model
        self.steps_per_epoch = steps_per_epoch
        self.step_count = 0
        self._optimizers = optimizers
        self._pruners = tuple(pruners)
        self._hold, self._hold_from = hold, hold_from
        self._held = self._hold_at(0)
        self._distillation, self._learns, self._has_learned = distillation, learns, False

    @property
    def epoch(self) -> float:
        """How many epochs are done."""
        return self.step_count / self.steps_per_epoch

    @property
    def ratio(self) -> Ratio:
        """The ratio of the last update; 0 while the model is dense, and for zeros that it had before."""
        begun = [pruner for pruner in self._pruners if pruner.schedule.start <= self.step_count]
        return begun[-1].ratio if begun else 0.0

    @property
    def distillation(self) -> Distillation | None:
        """The teacher beside the model, in the epochs in which the recipe says so; otherwise None."""
        return self._distillation if self._learns[0] <= self.step_count < self._learns[1] else None

    def loss(self, task: Tensor, *, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the loss to train with: as `Distillation.loss` while the recipe has a teacher, otherwise the task's.

        Example:
            >>> import copy, torch
            >>> from pyprune import Recipe
            >>> recipe = Recipe.from_string("{stages: [prune: {final: 0.5, end: 2}], teacher: {}}")
            >>> model = nn.Linear(4, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> pruner = recipe.apply(model, optimizer, steps_per_epoch=1, teacher=copy.deepcopy(model))
            >>> task = model(torch.ones(3, 4)).square().sum()
            >>> round((pruner.loss(task) / task).item(), 3)  # a teacher that says the same adds nothing
            0.5
        """
        distillation = self._due()
        return task if distillation is None else distillation.loss(task, mask=mask, labels=labels)

    def _due(self) -> Distillation | None:
        """Return the teacher that is due, to learn from it now."""
        self._has_learned = True
        return self.distillation

    def step(self) -> bool:
        """Count a step of the optimizer; return whether masks were computed anew.

        Raises:
            ValueError: as `Pruner.step` does; and if a teacher is due whose loss was not asked for.
        """
        if self.distillation is not None and not self._has_learned:
            raise ValueError(
                "the recipe has a teacher, and nothing was learned from it in this step; train with "
                "pruner.loss(task), or by the callback of a trainer with teacher="
            )
        due = [pruner for pruner in self._pruners if pruner._may_be_due()]
        carried = dict.fromkeys(mask for pruner in due for mask in pruner._carried().values())
        begins = self._held is None and self._hold is not None and self.step_count + 1 >= self._hold_from
        with Change(*([self.model] if begins else []), holds=carried, objects=self._touched()) as change:
            if begins:
                self._held = self._hold_at(self.step_count + 1)
            self.step_count += 1
            self._has_learned = False
            updated = [pruner._advance() for pruner in self._pruners]
            for pruner in self._over(updated):
                pruner._check_last()
            change.finish(partial(self._finish_step, updated))
        return any(updated)

    def _touched(self) -> list[object]:
        return [self, *(one for pruner in self._pruners for one in pruner._touched())]

    def _over(self, updated: Sequence[bool]) -> list[Pruner]:
        """List the pruners that have no more to do."""
        return [
            pruner
            for i, pruner in enumerate(self._pruners)
            # What an importance measures after the last update has no use, but that one may be late (an overflow);
            # it comes to nothing where a later stage has begun.
            if not (pruner._is_late and not any(updated[i + 1 :])) and self.step_count >= (pruner.schedule.end or 0)
        ]

    def _finish_step(self, updated: Sequence[bool]) -> None:
        for pruner, is_updated in zip(self._pruners, updated, strict=True):
            pruner._finish_step(is_updated)
        for pruner in self._over(updated):
            if not pruner.frozen:
                pruner.freeze()

    def freeze(self) -> None:
        """Let the masks stay as they are from now on, whatever the recipe says, and take all hooks off."""
        with Change(self.model, objects=self._touched()):
            for pruner in self._pruners:
                pruner.freeze()
            if self._distillation is not None:
                self._distillation.remove()
                self._distillation = None

    def finish(self) -> nn.Module:
        """End the training: fold the masks in, hold zeros no longer, and return the plain model.

        It warns if the recipe is not at its end: then ``steps_per_epoch`` was not that of the training.
        """
        last = max(pruner.schedule.end or 0 for pruner in self._pruners) if self._pruners else 0
        if self.step_count < last:
            warnings.warn(
                f"the recipe ends at step {last}, but the training at step {self.step_count}, with a ratio of "
                f"{self.ratio}; check steps_per_epoch={self.steps_per_epoch} and the number of epochs",
                stacklevel=2,
            )
        with Change(self.model, objects=self._touched()) as change:
            self.freeze()
            if self._held is not None:
                self._held.remove()
            change.finish(partial(strip, self.model))
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes: the states of the pruners, with their masks and what is parked."""
        return {
            "step_count": self.step_count,
            "steps_per_epoch": self.steps_per_epoch,
            "pruners": [pruner.state_dict() for pruner in self._pruners],
            "held": _count_held(self._held),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the `RecipePruner` of the same recipe was; load the model's and the optimizer's state before.

        Raises:
            TypeError, ValueError: if it is not such a state, or if the model does not have the zeros that a
                ``constant`` stage held. Nothing is changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != _STATE:
            raise ValueError(f"state_dict is {shown(state_dict)}, which is not the state_dict() of a RecipePruner")
        step_count = check_step(state_dict["step_count"], "step_count")
        if check_step(state_dict["steps_per_epoch"], "steps_per_epoch", least=1) != self.steps_per_epoch:
            raise ValueError(
                f"the state was saved with steps_per_epoch={state_dict['steps_per_epoch']}, and this is "
                f"{self.steps_per_epoch}; epochs would change their meaning"
            )
        states, held = state_dict["pruners"], state_dict["held"]
        if (
            not isinstance(states, (list, tuple))
            or not isinstance(held, Mapping)
            or not all(map(is_size, held.values()))
        ):
            raise ValueError(f"the state has the pruners {shown(states)} and holds {shown(held)}; it is damaged")
        keys = [set(state) if isinstance(state, Mapping) else None for state in states]
        if keys != [set(pruner._state()) for pruner in self._pruners]:
            raise ValueError("the state is that of another recipe; apply the one that it was saved with")
        for pruner, state in zip(self._pruners, states, strict=True):
            pruner._check_state(state)
        with Change(self.model, objects=self._touched()) as change:
            rest = [pruner._loading(state) for pruner, state in zip(self._pruners, states, strict=True)]
            self._hold_again(held, step_count)
            for pruner, state in zip(self._pruners, states, strict=True):
                pruner._load(state)
            self.step_count = step_count
            change.finish(partial(_do_all, rest))

    def _hold_at(self, step: int) -> KeepSparse | None:
        """Hold the zeros that are there now, if the stage that says so has begun by this step."""
        return None if self._hold is None or step < self._hold_from else self._hold(self._optimizers)

    def _hold_again(self, saved: Mapping[str, int], step: int) -> None:
        """Hold the zeros that are there now: weights may have been loaded since the recipe was applied."""
        if self._held is not None:
            self._held.remove()
        there = self._hold_at(step)
        if saved != _count_held(there):
            raise ValueError(
                "the model has other zeros than when the state was saved; load its sparse weights before this state"
            )
        self._held = there


def start(
    stages: Sequence[Stage],
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    steps_per_epoch: int,
    examples_inputs: Any,
    taught: Taught | None,
    teacher: nn.Module | None,
) -> RecipePruner:
    """Put on the masks with which the stages of a recipe begin; see `Recipe.apply`."""
    check_module(model)
    check_step(steps_per_epoch, "steps_per_epoch", least=1)
    optimizers = innermost_of(optimizer, ", or several")
    pruning = [stage for stage in stages if stage.kind != "constant"]
    hold, hold_from = None, 0
    if not pruning:
        if not optimizers:
            raise ValueError("a constant recipe holds zeros through the optimizer; give it")
        hold, hold_from = (
            partial(_hold, stages[0], model, examples_inputs),
            steps_of(stages[0].start, steps_per_epoch),
        )
    with Change(model, objects=optimizers):
        # All put on masks that keep everything, and wait; the first may drop something now.
        pruners = [
            _make_pruner(stage, model, optimizers, steps_per_epoch, examples_inputs) for stage in reversed(pruning)
        ]
        distillation, learns = None, (0.0, math.inf)
        if taught is not None and teacher is not None:
            distillation = taught.begin(model, teacher)
            learns = taught.steps(steps_per_epoch)
        return RecipePruner(model, optimizers, steps_per_epoch, pruners[::-1], hold, hold_from, distillation, learns)


_STATE = {"step_count", "steps_per_epoch", "pruners", "held"}


def _do_all(actions: Iterable[Callable[[], None]]) -> None:
    for action in actions:
        action()


def _count_held(held: KeepSparse | None) -> dict[str, int]:
    masks = {} if held is None else held.masks
    return {name: int(mask.numel() - mask.count_nonzero()) for name, mask in masks.items()}


def _hold(stage: Stage, model: nn.Module, inputs: Any, optimizers: Sequence[Optimizer]) -> KeepSparse:
    try:
        return keep_sparse(model, optimizers or None, ignored_scope=stage.ignored_scope, examples_inputs=inputs)
    except (TypeError, ValueError) as error:
        complaint = str(error).replace("ignored_scope", "ignore: {names: [...]}")  # as a recipe calls it
        raise ValueError(f"{stage.where}: {complaint}") from error


def _make_pruner(
    stage: Stage, model: nn.Module, optimizers: Sequence[Optimizer], steps_per_epoch: int, inputs: Any
) -> Pruner:
    assert stage.schedule is not None
    assert stage.method is not None
    try:
        schedule = stage.schedule(steps_per_epoch)
    except ValueError as error:
        raise ValueError(f"{stage.where}: at steps_per_epoch={steps_per_epoch}, in steps: {error}") from error
    if stage.kind == "ac_dc" and not optimizers:
        raise ValueError(f"{stage.where}: a dense phase begins without momentum; give the optimizer")
    try:
        return (AcDcPruner if stage.kind == "ac_dc" else Pruner)(
            model,
            stage.method,
            schedule,
            _optimizer_of(stage, model, optimizers, inputs),
            ignored_scope=stage.ignored_scope,
            examples_inputs=inputs,
            **stage.keywords,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{stage.where}: {error}") from error


def _optimizer_of(stage: Stage, model: nn.Module, optimizers: Sequence[Optimizer], inputs: Any) -> Optimizer | None:
    """Return the one that trains the weights of a stage; None where there are several, and it needs none."""
    assert stage.method is not None
    if len(optimizers) < 2:
        return next(iter(optimizers), None)
    targets = find_prunable(model, stage.method, stage.ignored_scope, inputs).targets
    weights = {target.parameter for target in targets}
    found = [one for one in optimizers if any(weights.intersection(group["params"]) for group in one.param_groups)]
    if len(found) == 1:
        return found[0]
    if found and stage.kind != "ac_dc" and not needs_gradients(stage.method.importance):
        return None
    raise ValueError(
        f"{len(found)} of {len(optimizers)} optimizers train the weights to prune, and one must train them all; "
        "leave the weights of the others out, by ignore: {names: [...]}"
    )
