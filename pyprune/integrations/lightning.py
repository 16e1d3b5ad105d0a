"""Prune in a Lightning ``Trainer``; needs lightning (``pip install "pyprune[lightning]"``)."""

import math
import os
from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pyprune.integrations.lightning needs Lightning: pip install 'pyprune[lightning]'", name=error.name
    ) from error

from pyprune.integrations.lightning_distillation import DistillationCallback, add_teacher
from pyprune.integrations.training import Start, Training, check_options, start_of
from pyprune.recipes.recipe import Recipe

__all__ = ["DistillationCallback", "PruningCallback"]


class PruningCallback(Callback):
    """Prune in a Lightning ``Trainer``: step after each step of the optimizer, save, resume, and strip at the end.

    Pruning begins when training does (the sanity check before it sees the dense model). Steps are counted by
    ``trainer.global_step``, so batches that only accumulate gradients do not count. At the end of each epoch it logs
    ``pruning_sparsity``.

    Checkpoints hold the plain model, zeros where weights are dropped: ``load_from_checkpoint`` needs no pyprune.
    What they lack to resume in the middle (masks, and the raw values under them) is in the state of this callback.
    Lightning saves that of one rank: with several, a training resumes bit for bit only where nothing is measured in
    it (magnitudes, for one).

    Args:
        prune: a `Recipe` or the path of one; `pyprune.keep_sparse`, to hold the zeros that the model has; or a
            function that takes (model, optimizer, steps_per_epoch) and returns a `Pruner`. The model is the
            LightningModule; with several optimizers it gets a list of them, as `Recipe.apply` does.
        strip: whether to fold the masks in at the end of training. Without it masks stay on.
        steps_per_epoch: steps of the optimizer per epoch; worked out from the number of batches if None.
        examples_inputs: as in `prune`, for a recipe or `keep_sparse`; without it, weights of layers that are not
            torch's own are not found.
        teacher: the dense model, for a recipe with a teacher, which says by ``module`` of which part of the
            LightningModule; it is moved to the device of the training.

    Raises:
        TypeError, ValueError: for another ``prune``, and when training begins, for what `Recipe.apply` refuses, or an
            unknown number of batches.

    Example:
        >>> from pyprune import Recipe
        >>> callback = PruningCallback(Recipe.from_string("stages: [prune: {final: 0.9, end: 5}]"))
        >>> trainer = Trainer(max_epochs=8, callbacks=[callback], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        prune: Recipe | str | os.PathLike[str] | Start,
        *,
        strip: bool = True,
        steps_per_epoch: int | None = None,
        examples_inputs: Any = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_options(strip, steps_per_epoch)
        self._start = start_of(prune, examples_inputs, teacher)
        self._teacher = teacher
        self._let_go: Callable[[], None] | None = None
        self._strip = strip
        self._steps_per_epoch = steps_per_epoch
        self._training: Training | None = None
        self._steps = 0
        # What was loaded, and after training, what was there at its end.
        self._state: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; Lightning loads a checkpoint after this."""
        self._state = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to prune, or go on: weights and optimizers have been loaded."""
        if self._training is not None:  # a run that was interrupted
            self._end(strip_masks=False)
        steps = self._steps_per_epoch or _steps_per_epoch(trainer)
        if self._teacher is not None:
            self._teacher.to(pl_module.device)
        self._training = Training(self._start, pl_module, trainer.optimizers, steps, self._state or None)
        if self._teacher is not None:
            self._let_go = add_teacher(trainer, pl_module, self._training.teacher)
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: object) -> None:
        """Go on by a step if the optimizer did."""
        if self._training is not None and trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self._training.step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity."""
        if self._training is not None:
            pl_module.log("pruning_sparsity", self._training.sparsity())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model, after callbacks that put an average into it when training ends."""
        if self._training is not None:
            self._state = self.state_dict()
            self._end(strip_masks=self._strip)

    def _end(self, *, strip_masks: bool) -> None:
        if self._let_go is not None:
            self._let_go()
            self._let_go = None
        assert self._training is not None
        self._training.finish(strip_masks=strip_masks)
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the plain model."""
        return self._state if self._training is None else self._training.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training goes on."""
        self._state = state_dict


def _steps_per_epoch(trainer: Trainer) -> int:
    batches = trainer.num_training_batches
    if math.isinf(batches):
        raise ValueError("the number of batches per epoch is unknown; give PruningCallback(steps_per_epoch=...)")
    steps: float = batches / trainer.accumulate_grad_batches
    return max(1, math.ceil(steps))
