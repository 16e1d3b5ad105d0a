"""Prune in the trainers of Ultralytics; needs ultralytics (``pip install "pyprune[ultralytics]"``).

- What is validated and saved is an average of the weights (EMA), and in half precision. It gets the zeros of the
  model whenever these change, and none by rounding, so that a checkpoint has the zeros of the masks.
- Its trainer accumulates gradients over few batches at first, and over more later, so a step of its optimizer is no
  constant part of an epoch. The pruning goes by the batches that are done, and on only where no gradient is open.
- What a checkpoint lacks to resume (masks, and what is parked) is an attribute of the average that is saved, in plain
  tensors. When the trainer has stripped the last and the best checkpoint at the end, it is taken out, too.

How models are made smaller and trained then is in ``ultralytics_shrunk.py``.
"""

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

try:
    from ultralytics.utils.patches import torch_load
    from ultralytics.utils.torch_utils import unwrap_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pyprune.integrations.ultralytics needs Ultralytics: pip install 'pyprune[ultralytics]'", name=error.name
    ) from error

from pyprune.checks import shown
from pyprune.files import whole_file
from pyprune.integrations.training import Start, Training, start_of
from pyprune.integrations.ultralytics_shrunk import drawn_image, traceable
from pyprune.integrations.ultralytics_shrunk import shrink as shrink
from pyprune.integrations.ultralytics_shrunk import trainer_of as trainer_of
from pyprune.modules.averages import masks_by_name, reapply
from pyprune.modules.strip import strip
from pyprune.recipes.recipe import Recipe

# The attribute of the average in a checkpoint that has what it takes to resume.
STATE = "pruning"
# The least number of half precision above 0.
_LEAST = 2.0**-24


def add_pruning(yolo: Any, prune: Recipe | str | os.PathLike[str] | Start, *, examples_inputs: Any = None) -> None:
    """Let a ``YOLO`` (or ``RTDETR``, or a trainer) prune its model in each training from now on.

    Training goes as ever: ``yolo.train(data=..., epochs=...)``, and ``resume=True`` after an interruption, of a YOLO
    that has the same pruning added. Masks follow the epochs of the recipe whatever the numbers of batches that are
    accumulated. What is validated, and all checkpoints, are as sparse as the model, and plain: they need no pyprune.
    ``pruning_sparsity`` is in ``results.csv`` and wherever else learning rates are logged.

    Args:
        yolo: what has Ultralytics' ``add_callback``: a ``YOLO``, or one of its trainers.
        prune: a `Recipe` or the path of one; `pyprune.keep_sparse`, to hold the zeros that the model has; or a
            function that takes (model, optimizer, steps_per_epoch) and returns a `Pruner`.
        examples_inputs: as in `prune`, for a recipe or `keep_sparse`. A recipe of coupled channels draws an image.

    Raises:
        TypeError, ValueError: for another ``prune``, for what has no callbacks or has a pruning already, and when
            training begins, for what `Recipe.apply` refuses, or a checkpoint to resume that was saved without.

    Example:
        >>> from pyprune import Recipe
        >>> yolo = YOLO("yolo11n.yaml")  # doctest: +SKIP
        >>> add_pruning(yolo, Recipe.from_string("stages: [prune: {final: 0.6, end: 5}]"))  # doctest: +SKIP
        >>> yolo.train(data="coco8.yaml", epochs=8)  # doctest: +SKIP
    """
    callbacks = getattr(yolo, "callbacks", None)
    if not isinstance(callbacks, Mapping) or not callable(getattr(yolo, "add_callback", None)):
        raise TypeError(f"yolo is {shown(yolo)}; give a YOLO, or a trainer of Ultralytics")
    if isinstance(prune, (str, os.PathLike)):
        prune = Recipe.from_file(prune)
    start = start_of(prune, examples_inputs)
    methods = [stage.method for stage in prune.stages] if isinstance(prune, Recipe) else []
    is_coupled = any(method is not None and method.granularity.coupled is not None for method in methods)
    if any(isinstance(getattr(one, "__self__", None), _Pruning) for added in callbacks.values() for one in added):
        raise ValueError("there is a pruning already; call yolo.reset_callbacks() before you add another")
    pruning = _Pruning(start, draws=is_coupled and examples_inputs is None)
    for callback in (
        pruning.on_train_start,
        pruning.on_train_epoch_start,
        pruning.on_train_batch_end,
        pruning.on_train_epoch_end,
        pruning.on_train_end,
        pruning.teardown,
    ):
        yolo.add_callback(callback.__name__, callback)


class _Pruning:
    """The callbacks for one trainer after the other; before it begins, it can be pickled for other ranks."""

    def __init__(self, start: Start, *, draws: bool) -> None:
        self._start = start
        self._draws = draws  # an image, to see what is coupled
        self._training: Training | None = None
        self._steps_per_epoch = self._steps = self._batches = self._updates = 0
        self._average: object = None
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any) -> None:
        """Begin to prune, or go on: weights and optimizer have been loaded."""
        self.teardown(trainer)
        self._begin(trainer, _saved(trainer) if trainer.start_epoch > 0 else None)

    def _begin(self, trainer: Any, state: dict[str, Any] | None) -> None:
        # Another batch size may have been given to what resumes; epochs keep their meaning.
        self._steps_per_epoch = state["steps_per_epoch"] if state else _steps_per_epoch(trainer)
        resumed = {name: state[name] for name in ("pruning", "masks")} if state else None
        model = _pruned(trainer.model)
        start = partial(self._start, examples_inputs=drawn_image(model)) if self._draws else self._start
        with traceable(model):  # for methods that look at a forward pass
            self._training = Training(
                start, model, trainer.optimizer, self._steps_per_epoch, resumed, follow_loading=False
            )
        self._steps = state["steps"] if state else 0
        self._average, self._updates, self._state = trainer.ema, trainer.ema.updates, state

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Count from the start of the epoch, which may be done again: with fewer images, or the last checkpoint."""
        self._batches = 0
        if self._training is not None and trainer.ema is not self._average:
            # A loss was not finite. The trainer has loaded the last checkpoint, and copied the model with its masks.
            for model in (_pruned(trainer.model), _pruned(trainer.ema.ema)):
                strip(model)
            state = self._state
            self.teardown(trainer)
            self._begin(trainer, state)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Go on if the optimizer did."""
        self._batches += 1
        if self._training is not None and trainer.ema.updates != self._updates and not _goes_back(trainer):
            self._updates = trainer.ema.updates
            # Rounded up: the last step of the optimizer is the last of the pruning, too.
            self._go_on(trainer, math.ceil(self._batches * self._steps_per_epoch / len(trainer.train_loader)))

    def _go_on(self, trainer: Any, steps_of_epoch: int) -> None:
        assert self._training is not None
        due = trainer.epoch * self._steps_per_epoch + steps_of_epoch - self._steps
        if due > 0:
            is_updated = self._training.steps(due)
            self._steps += due
            if is_updated:
                _follow(_pruned(trainer.model), _pruned(trainer.ema.ema))

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Give the average, which is validated and saved next, the model's zeros, and what it takes to resume."""
        if self._training is None or _goes_back(trainer):
            return
        if not self._training.measures():  # else the batches that are accumulated now would be lost
            self._go_on(trainer, self._steps_per_epoch)
        model, average = _pruned(trainer.model), _pruned(trainer.ema.ema)
        _follow(model, average)
        _keep_from_underflow(average)
        self._state = {**self._training.state(), "steps": self._steps, "steps_per_epoch": self._steps_per_epoch}
        setattr(trainer.ema.ema, STATE, self._state)
        trainer.lr["pruning_sparsity"] = self._training.sparsity()

    def on_train_end(self, trainer: Any) -> None:
        """Let go of the model, and take out of the checkpoints what it took to resume."""
        if self._training is not None:
            self._training.finish(strip_masks=True)
            self._training = None
            for file in {trainer.last, trainer.best}:
                _strip_checkpoint(file)

    def teardown(self, trainer: Any) -> None:
        """Look at the training no longer, if it was interrupted."""
        if self._training is not None:
            self._training.finish(strip_masks=False)
            self._training = None


def _pruned(model: nn.Module) -> nn.Module:
    """Return the model that is pruned: what is distilled into, without wrappers."""
    plain: nn.Module = unwrap_model(model)
    return getattr(plain, "student_model", plain)


def _goes_back(trainer: Any) -> bool:
    """Whether a trainer will load the last checkpoint at the end of the epoch, because the loss is not finite."""
    return trainer.epoch > trainer.start_epoch and not bool(trainer.loss.isfinite())


def _steps_per_epoch(trainer: Any) -> int:
    """Count the optimizer's steps in an epoch; the first ones, which accumulate fewer batches, have more."""
    return max(1, len(trainer.train_loader) // int(trainer.accumulate))


def _saved(trainer: Any) -> dict[str, Any]:
    """Return what the checkpoint that a trainer resumes from was saved with."""
    found = getattr(torch_load(trainer.args.model, map_location="cpu").get("ema"), STATE, None)
    if not isinstance(found, dict) or set(found) != {"pruning", "masks", "steps", "steps_per_epoch"}:
        raise ValueError(
            f"training goes on at epoch {trainer.start_epoch + 1}, but {trainer.args.model} was saved without a "
            "pruning; resume without add_pruning, or begin anew with it: yolo.train(resume=False)"
        )
    return found


def _strip_checkpoint(file: Any) -> None:
    if not file.exists():
        return
    checkpoint = torch_load(file, map_location="cpu")
    if vars(checkpoint["model"] or checkpoint["ema"]).pop(STATE, None) is not None:
        with whole_file(file) as unfinished:
            torch.save(checkpoint, unfinished)


@torch.no_grad()
def _follow(model: nn.Module, average: nn.Module) -> None:
    """Give an average the zeros of its model; what has come back begins as it is in the model."""
    masks = masks_by_name(model)
    if masks:
        reapply(model, average)
    weights, averages = dict(model.named_parameters()), dict(average.named_parameters())
    for name, mask in masks.items():
        averages[name].copy_(torch.where(mask & (averages[name] == 0), weights[name], averages[name]))


@torch.no_grad()
def _keep_from_underflow(average: nn.Module) -> None:
    """Let nothing that is kept become a zero in half precision."""
    for parameter in average.parameters():
        small = (parameter != 0) & (parameter.abs() < _LEAST)
        parameter.copy_(torch.where(small, torch.full_like(parameter, _LEAST).copysign(parameter), parameter))
