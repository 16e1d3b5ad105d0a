"""Recipes: YAML files that say which pruning is done in which epochs of a training.

A file is read twice: `yaml_source` keeps its nodes, so that each error has a line; `stages` makes of them schedules
that wait for the number of steps per epoch. All pruners of a recipe are made at once, the later ones with masks
that keep everything: what does not fit is found before the training, and checkpoints always have the same names. A
stage is over with its last update, which may be late, unless the next has begun. ``constant`` holds anew what is
zero when a state is loaded, since weights may have been loaded after the recipe was applied.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pyprune.checks import check_path, shown
from pyprune.recipes.recipe_pruner import RecipePruner, start
from pyprune.recipes.stages import Stage, by_epoch, read_stages
from pyprune.recipes.taught import Taught, read_taught
from pyprune.recipes.yaml_source import read


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
        teacher:                        # learn from the dense model, which `apply` is given
          start: 2
          end: 16                       # by default to the end
          pairs: [encoder.layers.5]     # modules whose outputs are compared, or {name: name in the teacher}
          temperature: 2.0
          logits_weight: 0.5            # and task_weight, hidden_weight
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
    hint that `learning_rate_at` returns; nothing is written into the optimizer. A teacher takes the fields of
    `Distillation`; with ``module: backbone`` it stands for that part of the model alone, and pairs are in it.

    Args:
        stages: what ``pyprune.recipes.stages.read_stages`` returns.
        num_epochs: how many epochs the training takes; None if nothing says so.
        learning_rates: the learning rate from each of these epochs on.
        teacher: what ``pyprune.recipes.taught.read_taught`` returns; None without.

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
    teacher: Taught | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe from a YAML file.

        Raises:
            ModuleNotFoundError: without PyYAML (``pip install "pyprune[recipes]"``).
            OSError: if the file cannot be read.
            ValueError: for whatever is wrong in it; names file, line and field, and what is allowed.
        """
        check_path("path", path)
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
        for argument, value in (("text", text), ("name", name)):
            if not isinstance(value, str):
                raise TypeError(f"{argument} is {shown(value)}; give a string")
        fields = read(text, name).fields(("stages", "epochs", "learning_rate", "teacher"), ("stages",))
        stages = read_stages(fields["stages"])
        taught = read_taught(fields["teacher"]) if "teacher" in fields else None
        spans: list[Stage | Taught] = [*stages, *([taught] if taught else [])]
        last = max(one.start if one.end is None else one.end for one in spans)
        epochs = math.ceil(last)
        if "epochs" in fields:
            epochs = math.ceil(fields["epochs"].number("a number of epochs", most=1e9))
            if epochs < last:
                raise fields["epochs"].error(f"there are {epochs}, but a stage or the teacher needs {last:g}")
        rates = by_epoch(fields["learning_rate"]) if "learning_rate" in fields else {}
        rate_at = {epoch: rate.number("a learning rate", above=True) for epoch, rate in rates.items()}
        return cls(stages, epochs or None, rate_at, taught)

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
        teacher: nn.Module | None = None,
    ) -> RecipePruner:
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
            teacher: the dense model, for a recipe with a teacher: ``copy.deepcopy(model)``, made before sparse
                weights are loaded, or a larger one. Train with ``loss`` of what this returns.

        Returns:
            What must be told of each step. Call its ``step()`` after that of the optimizer, and ``finish()`` at the
            end.

        Raises:
            TypeError, ValueError: for wrong arguments, or a stage that does not fit the model. The model is then as
                it was.
        """
        self._check_teacher(teacher)
        return start(self.stages, model, optimizer, steps_per_epoch, examples_inputs, self.teacher, teacher)

    def _check_teacher(self, teacher: object) -> None:
        """Raise unless this is the teacher that the recipe needs: a module, or None without one."""
        if self.teacher is None and teacher is not None:
            raise ValueError("teacher was given, and the recipe has none; add a line teacher: to it, or leave it out")
        if self.teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(
                f"{self.teacher.where}: the recipe has a teacher, and the one given is {shown(teacher)}; give "
                "teacher=copy.deepcopy(model) of the dense model where the recipe is applied"
            )
