"""Recipes: YAML files that say which pruning is done in which epochs of a training."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pyprune._ac_dc import AcDcPruner
from pyprune._keep_sparse import KeepSparse, keep_sparse
from pyprune._pruner import Pruner
from pyprune._strip import strip
from pyprune.attachments import check_module, detach
from pyprune.choosing import entrants
from pyprune.places import read
from pyprune.schedules import Ratio, check_step
from pyprune.stages import Stage, by_epoch, read_stages
from pyprune.targets import attachments_of, find_targets
from pyprune.training_sums import needs_gradients


@dataclass(frozen=True)
class Recipe:
    """Stages of pruning that follow each other through a training; `from_file` and `from_string` read one.

    A recipe says *when* (in epochs, fractions allowed), *how* and *how much*::

        epochs: 20                      # of the whole training; by default where the last stage ends
        stages:
          - prune:                      # gradual pruning
              schedule: cubic           # or another function of pyprune.schedules: {polynomial: {power: 2}}
              start: 2
              end: 12
              frequency: 0.5            # masks are computed anew twice per epoch; by default after every step
              initial: 0.05
              final: 0.9                # or ratios by names or patterns of weights
              importance: magnitude     # or with arguments: {magnitude: {p: 2}}
              granularity: element      # {block: {n: 4, m: 1}}
              scope: model              # by default tensor; {n_of_m: {keep: 2, of: 4}} has final: 0.5
              ignore: {names: [classifier], types: [Embedding]}
          - constant                    # from there to the end: masks stay as they are
        learning_rate: {0: 0.01, 12: 0.001}

    * ``prune`` takes, besides, ``allocation``, ``min_ratio``, ``max_ratio``, ``reintroduce`` and
      ``zero_dead_channels`` as `Pruner` does. ``schedule: {multi_step: {2: 0.5, 6: 0.8}}`` has ratios by epoch, and
      ``one_shot`` only ``final`` and ``start``.
    * ``ac_dc`` takes the same, but no ``schedule``, ``initial`` and ``reintroduce``: it alternates between dense and
      pruned phases of ``frequency`` epochs, and ends pruned. Its scope is by default model.
    * ``constant`` leaves the masks of the stages before as they are, which says no more than the end of the stage
      before it; alone it holds the zeros that the model has, by `keep_sparse`: sparse transfer.

    A stage begins where the one before ends, unless it has a ``start``, and at the ratio which that one leaves,
    unless it has an ``initial``. It needs one if either has ratios by name, or if they ignore different weights.
    Masks are on from the beginning, so that checkpoints always have the same names; before the first stage they keep
    everything. What a stage leaves stays as it is until the next one begins, and after the last. Learning rates are a
    hint that `learning_rate_at` returns; nothing is written into the optimizer.

    Args:
        stages: what `pyprune.stages.read_stages` returns.
        num_epochs: how many epochs the training takes; None if nothing says so.
        learning_rates: the learning rate from each of these epochs on.

    Example:
        >>> import torch
        >>> recipe = Recipe.from_string("stages: [prune: {final: 0.75, end: 2}, constant: {end: 3}]")
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = recipe.apply(model, optimizer, steps_per_epoch=5)
        >>> for epoch in range(recipe.num_epochs):
        ...     for _ in range(5):
        ...         model(torch.ones(1, 4)).sum().backward()
        ...         optimizer.step()
        ...         _ = pruner.step()
        >>> int(pruner.finish().weight.count_nonzero())
        4
    """

    stages: tuple[Stage, ...]
    num_epochs: int | None
    learning_rates: Mapping[float, float] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe from a YAML file.

        Raises:
            ModuleNotFoundError: without PyYAML (``pip install "pyprune[recipes]"``).
            OSError: if the file cannot be read.
            ValueError: for whatever is wrong in it; names file, line and field, and what is allowed.
        """
        content = Path(path).read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{path}:{line}: this is not UTF-8 ({error.reason}); save the file in UTF-8") from error
        return cls.from_string(text, os.fspath(path))

    @classmethod
    def from_string(cls, text: str, name: str = "<string>") -> "Recipe":
        """Read a recipe from YAML; ``name`` stands for the file in messages.

        Raises:
            ModuleNotFoundError, ValueError: as `from_file`.

        Example:
            >>> Recipe.from_string("stages: [prune: {finale: 0.9, end: 2}]")
            Traceback (most recent call last):
            ...
            ValueError: <string>:1: stages[0].prune.finale: 'finale' is unknown here; did you mean final? Allowed: ...
        """
        fields = read(text, name).fields(("stages", "epochs", "learning_rate"), ("stages",))
        stages = read_stages(fields["stages"])
        last = max(stage.start if stage.end is None else stage.end for stage in stages)
        epochs = math.ceil(last)
        if "epochs" in fields:
            epochs = math.ceil(fields["epochs"].number("a number of epochs"))
            if epochs < last:
                raise fields["epochs"].error(f"there are {epochs}, but a stage needs {last:g}")
        rates = by_epoch(fields["learning_rate"]) if "learning_rate" in fields else {}
        rate_at = {epoch: rate.number("a learning rate", above=True) for epoch, rate in rates.items()}
        return cls(stages, epochs or None, rate_at)

    def learning_rate_at(self, epoch: float) -> float | None:
        """Return the learning rate that the recipe recommends at an epoch; None if it has none for it.

        A scheduler can follow it: ``LambdaLR(optimizer, lambda epoch: recipe.learning_rate_at(epoch) / lr)``.

        Example:
            >>> recipe = Recipe.from_string("{stages: [constant], learning_rate: {0: 1e-2, 5: 1e-3}}")
            >>> [recipe.learning_rate_at(epoch) for epoch in (0, 4.9, 5)]
            [0.01, 0.01, 0.001]
        """
        begun = [start for start in self.learning_rates if start <= epoch]
        return self.learning_rates[max(begun)] if begun else None

    def apply(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        steps_per_epoch: int,
        *,
        examples_inputs: Any = None,
    ) -> "RecipePruner":
        """Put on the masks with which the recipe begins.

        To resume, do the same, and load the states of model, optimizer and what this returns, in this order. For
        sparse transfer load the sparse weights first: a ``constant`` stage alone holds the zeros that it finds.

        Args:
            model: the model.
            optimizer: its optimizer, or several; None will do for stages that do not need it (see `Pruner`). A stage
                that does needs one that trains all its weights: with several, those of the others are to be ignored.
            steps_per_epoch: how often ``optimizer.step()`` is called per epoch: batches by those that are
                accumulated.
            examples_inputs: as in `prune`, for all stages.

        Returns:
            What must be told of each step: call its ``step()`` after that of the optimizer, and ``finish()`` at the
            end.

        Raises:
            TypeError, ValueError: for wrong arguments, or a stage that does not fit the model. The model is then as
                it was.
        """
        check_module(model)
        check_step(steps_per_epoch, "steps_per_epoch", least=1)
        optimizers = _listed(optimizer)
        pruning = [stage for stage in self.stages if stage.kind != "constant"]
        hold = None
        if not pruning:
            if not optimizers:
                raise ValueError("a constant recipe holds zeros through the optimizer; give it")
            hold = partial(_hold, self.stages[0], model, examples_inputs)
        pruners = _make_pruners(pruning, model, optimizers, steps_per_epoch, examples_inputs)
        return RecipePruner(model, optimizers, steps_per_epoch, pruners, hold)


class RecipePruner:
    """What `Recipe.apply` returns: goes through the stages of a recipe, step by step.

    Example:
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
    ) -> None:
        self.model = model
        self.steps_per_epoch = steps_per_epoch
        self.step_count = 0
        self._optimizers = optimizers
        self._pruners = tuple(pruners)
        self._hold = hold
        self._held = None if hold is None else hold(optimizers)

    @property
    def epoch(self) -> float:
        """How many epochs are done."""
        return self.step_count / self.steps_per_epoch

    @property
    def ratio(self) -> Ratio:
        """The ratio of the last update; 0 while the model is dense, and for zeros that it had before."""
        begun = [pruner for pruner in self._pruners if pruner.schedule.start <= self.step_count]
        return begun[-1].ratio if begun else 0.0

    def step(self) -> bool:
        """Count a step of the optimizer; return whether masks were computed anew.

        Raises:
            ValueError: as `Pruner.step` does.
        """
        self.step_count += 1
        updated = [pruner.step() for pruner in self._pruners]
        for i, pruner in enumerate(self._pruners):
            # What an importance measures after the last update has no use, but that one may be late (an overflow);
            # it comes to nothing where a later stage has begun.
            is_awaited = pruner._is_late and not any(updated[i + 1 :])
            if not (pruner.frozen or is_awaited) and self.step_count >= (pruner.schedule.end or 0):
                pruner.freeze()
        return any(updated)

    def freeze(self) -> None:
        """Let the masks stay as they are from now on, whatever the recipe says, and take all hooks off."""
        for pruner in self._pruners:
            pruner.freeze()

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
        self.freeze()
        if self._held is not None:
            self._held.remove()
        return strip(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes, without the masks: they are buffers in the model's state_dict."""
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
            raise ValueError(f"{state_dict!r:.80} is not the state_dict() of a RecipePruner")
        step_count = check_step(state_dict["step_count"], "step_count")
        if state_dict["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the state was saved with steps_per_epoch={state_dict['steps_per_epoch']}, and this is "
                f"{self.steps_per_epoch}; epochs would change their meaning"
            )
        states = state_dict["pruners"]
        keys = [set(state) if isinstance(state, Mapping) else None for state in states]
        if keys != [set(pruner._state()) for pruner in self._pruners]:
            raise ValueError("the state is that of another recipe; apply the one that it was saved with")
        for pruner, state in zip(self._pruners, states, strict=True):
            pruner._check_state(state)
        self._hold_again(state_dict["held"])
        for pruner, state in zip(self._pruners, states, strict=True):
            pruner.load_state_dict(state)
        self.step_count = step_count

    def _hold_again(self, saved: Mapping[str, int]) -> None:
        """Hold the zeros that are there now: weights may have been loaded since the recipe was applied."""
        there = None if self._hold is None else self._hold([])
        if saved != _count_held(there):
            raise ValueError(
                "the model has other zeros than when the state was saved; load its sparse weights before this state"
            )
        if self._hold is not None and self._held is not None:
            self._held.remove()
            self._held = self._hold(self._optimizers)


_STATE = {"step_count", "steps_per_epoch", "pruners", "held"}


def _count_held(held: KeepSparse | None) -> dict[str, int]:
    masks = {} if held is None else held.masks
    return {name: int(mask.numel() - mask.count_nonzero()) for name, mask in masks.items()}


def _listed(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [] if optimizer is None else [optimizer]
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer is of type {type(one).__name__}; give a torch.optim.Optimizer, or several")
    return optimizers


def _hold(stage: Stage, model: nn.Module, inputs: Any, optimizers: Sequence[Optimizer]) -> KeepSparse:
    try:
        return keep_sparse(model, optimizers or None, ignored_scope=stage.ignored_scope, examples_inputs=inputs)
    except (TypeError, ValueError) as error:
        complaint = str(error).replace("ignored_scope", "ignore: {names: [...]}")  # as a recipe calls it
        raise ValueError(f"{stage.where}: {complaint}") from error


def _make_pruners(
    stages: Sequence[Stage], model: nn.Module, optimizers: Sequence[Optimizer], steps_per_epoch: int, inputs: Any
) -> list[Pruner]:
    """Return the pruners of all stages; later ones put on masks that keep everything, and wait."""
    carried = {target.parameter for target in attachments_of(model)}
    pruners: list[Pruner] = []
    try:
        # The first is the only one that may drop something now, and if one of them fails, it has not done so.
        for stage in reversed(stages):
            pruners.insert(0, _make_pruner(stage, model, optimizers, steps_per_epoch, inputs))
    except BaseException:
        for pruner in pruners:
            pruner.freeze()
        for target in reversed(attachments_of(model)):
            if target.parameter not in carried:
                detach(target.owners[::-1])
        raise
    return pruners


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
    targets = entrants(stage.method, find_targets(model, stage.ignored_scope, inputs))
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
