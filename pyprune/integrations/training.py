"""What the callbacks for trainers share."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from pyprune import ops
from pyprune.checks import check_bool, check_count, shown
from pyprune.integrations.checkpoints import (
    filled_where_all_is_dropped,
    load_masks,
    masks_follow_loading,
    state_of_masks,
)
from pyprune.modules.evaluation import check_inputs
from pyprune.modules.masks import masks_by_target
from pyprune.modules.optimizer import innermost_of
from pyprune.modules.strip import strip
from pyprune.modules.undo import Change
from pyprune.recipes.recipe import Recipe
from pyprune.recipes.recipe_pruner import RecipePruner
from pyprune.training.keep_sparse import KeepSparse, keep_sparse
from pyprune.training.pruner import Pruner
from pyprune.training.teacher import Distillation

# What prunes in a training, and what makes it: (model, optimizer, steps_per_epoch) -> Pruning.
Pruning = Pruner | RecipePruner | KeepSparse
Start = Callable[..., Pruning]


def check_options(strip: object, steps_per_epoch: object) -> None:
    """Raise unless these are what the callbacks take."""
    check_bool("strip", strip)
    if steps_per_epoch is not None:
        check_count("steps_per_epoch", steps_per_epoch, least=1)


def start_of(
    prune: Recipe | str | os.PathLike[str] | Start, examples_inputs: Any = None, teacher: nn.Module | None = None
) -> Start:
    """Return the function that begins to prune, of what users give to a callback."""
    check_inputs(examples_inputs)
    if isinstance(prune, (str, os.PathLike)):
        prune = Recipe.from_file(prune)
    if isinstance(prune, Recipe):
        prune._check_teacher(teacher)
        return partial(prune.apply, examples_inputs=examples_inputs, teacher=teacher)
    if teacher is not None:
        raise ValueError("teacher is for a recipe that has one; beside other pruning take DistillationCallback")
    if prune is keep_sparse:
        return lambda model, optimizer, _: keep_sparse(model, optimizer, examples_inputs=examples_inputs)
    if not callable(prune):
        raise TypeError(
            f"prune is a {type(prune).__name__}; give a Recipe or its path, pyprune.keep_sparse, or a function that "
            "takes (model, optimizer, steps_per_epoch) and returns a Pruner"
        )
    if examples_inputs is not None:
        raise ValueError("a function makes its Pruner with examples_inputs itself; leave them out here")
    return prune


class Training:
    """The pruning of one run of a trainer.

    Args:
        start: makes what prunes.
        model, optimizer, steps_per_epoch: its arguments; of several optimizers it gets a list.
        resumed: what `state` was when the weights of the model were saved; None at the beginning.
        follow_loading: whether masks become the zeros of what is loaded into the model (`masks_follow_loading`).
    """

    def __init__(
        self,
        start: Start,
        model: nn.Module,
        optimizer: Any,
        steps_per_epoch: int,
        resumed: Mapping[str, Any] | None,
        *,
        follow_loading: bool = True,
    ) -> None:
        found = innermost_of(optimizer)  # without Accelerate's wrapper
        self.model = model
        if resumed is not None and (not isinstance(resumed, Mapping) or set(resumed) != {"pruning", "masks"}):
            raise ValueError(f"the state to resume from is {shown(resumed)}, and not that of this callback")
        with filled_where_all_is_dropped(model, resumed or {}), Change(model, objects=found):
            self.pruning = start(model, found[0] if len(found) == 1 else found, steps_per_epoch)
            if not isinstance(self.pruning, (Pruner, RecipePruner, KeepSparse)):
                raise TypeError(f"prune returned a {type(self.pruning).__name__}; it must return a Pruner")
            if resumed is not None:
                if isinstance(self.pruning, KeepSparse):
                    load_masks(model, resumed["masks"])
                else:
                    self.pruning.load_state_dict(resumed["pruning"])
            self._hooks = masks_follow_loading(model) if follow_loading else []

    def step(self) -> bool:
        """Go on by one step of the optimizer; return whether masks were computed anew."""
        return not isinstance(self.pruning, KeepSparse) and self.pruning.step()

    def steps(self, count: int) -> bool:
        """Go on by several steps after one of the optimizer; return whether masks were computed anew.

        What is measured in the training has one more batch, so there masks that are due in between are computed last.
        """
        if not self.measures():
            return sum(self.step() for _ in range(count)) > 0
        for pruner in self._pruners():
            between = range(pruner.step_count + 1, pruner.step_count + count)
            pruner._is_late |= any(map(pruner.schedule.is_due, between))
            pruner.step_count += count - 1
        if isinstance(self.pruning, RecipePruner):
            self.pruning.step_count += count - 1
        return self.step()

    def measures(self) -> bool:
        """Whether something is measured in the training, whose steps then end a batch of it."""
        return any(pruner._watch is not None for pruner in self._pruners())

    def _pruners(self) -> Sequence[Pruner]:
        if isinstance(self.pruning, KeepSparse):
            return ()
        return self.pruning._pruners if isinstance(self.pruning, RecipePruner) else (self.pruning,)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the model does not have."""
        if isinstance(self.pruning, KeepSparse):
            return {"pruning": {}, "masks": state_of_masks(self.model)}
        return {"pruning": self.pruning.state_dict(), "masks": {}}

    def teacher(self) -> Distillation | None:
        """Return the teacher of the recipe that is due, to learn from it now."""
        return self.pruning._due() if isinstance(self.pruning, RecipePruner) else None

    def sparsity(self) -> float:
        """Return the fraction of the weights under masks that is dropped."""
        masks = [found.mask for found in masks_by_target(self.model).values() if found.on_target]
        total = sum(mask.numel() for mask in masks)
        return float(ops.count_zeros(masks).sum()) / max(1, total)

    def finish(self, *, strip_masks: bool) -> None:
        """Let go of the model; with ``strip_masks``, leave it plain, and hold its zeros no longer."""
        touched = [] if isinstance(self.pruning, KeepSparse) else self.pruning._touched()
        with Change(self.model, objects=touched) as change:
            for hook in self._hooks:
                hook.remove()
            if isinstance(self.pruning, KeepSparse):
                if strip_masks:
                    self.pruning.remove()
                return
            if not strip_masks:
                self.pruning.freeze()
            elif isinstance(self.pruning, RecipePruner):
                change.finish(self.pruning.finish)
            else:
                self.pruning.freeze()
                change.finish(partial(strip, self.model))
