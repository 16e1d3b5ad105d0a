"""Prune in a Hugging Face ``Trainer``, save and load what was shrunk and what was compressed.

Once this is imported, ``from_pretrained`` of transformers reads what `save_compressed` wrote.

Needs transformers (``pip install "pyprune[transformers]"``).
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pyprune.integrations.transformers needs transformers: pip install 'pyprune[transformers]'", name=error.name
    ) from error

from pyprune.checks import check_path
from pyprune.files import whole_file
from pyprune.integrations.compressed import save_compressed
from pyprune.integrations.compressed_loading import register
from pyprune.integrations.pretrained import from_pretrained, save_pretrained
from pyprune.integrations.training import Start, Training, check_options, start_of
from pyprune.integrations.transformers_distillation import DistillationCallback, WithTeacher
from pyprune.recipes.recipe import Recipe

__all__ = ["DistillationCallback", "PruningCallback", "from_pretrained", "save_compressed", "save_pretrained"]

register()

# Beside the model in a checkpoint.
FILE = "pruning.pt"


class PruningCallback(TrainerCallback):
    """Prune in a Hugging Face ``Trainer``: step after each step of the optimizer, save, resume, strip at the end.

    Steps of gradient accumulation do not count. ``pruning_sparsity`` is logged with the loss.

    Checkpoints hold the plain model, zeros where weights are dropped: ``from_pretrained`` reads them without pyprune,
    and ``load_best_model_at_end`` works. What they lack to resume in the middle (masks, and the raw values under
    them) is in ``pruning.pt`` beside the model; what other ranks measured for the next masks, in ``pruning_rank1.pt``
    and so on. With more ranks than were saved, a training goes on, but not bit for bit.

    Args:
        prune: a `Recipe` or the path of one; `pyprune.keep_sparse`, to hold the zeros that the model has; or a
            function that takes (model, optimizer, steps_per_epoch) and returns a `Pruner`.
        strip: whether to fold the masks in at the end of training. Without it masks stay on.
        steps_per_epoch: steps of the optimizer per epoch; worked out from the number of batches if None.
        examples_inputs: as in `prune`, for a recipe or `keep_sparse`; without it, weights of layers that are not
            torch's own (those of GPT-2, for one) are not found.
        teacher: the dense model, for a recipe with a teacher; it is moved to the device of the training, and the
            model must compute its loss itself, as for `DistillationCallback`.
        resume_from: the checkpoint that training goes on from. Only needed if it is not in ``args.output_dir``,
            because the ``Trainer`` does not tell callbacks.

    Raises:
        TypeError, ValueError: for another ``prune``, and when training begins, for what `Recipe.apply` refuses, an
            unknown number of batches, or a checkpoint without ``pruning.pt``.

    Example:
        >>> from pyprune import Recipe
        >>> callback = PruningCallback(Recipe.from_string("stages: [prune: {final: 0.9, end: 5}]"))
        >>> # Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(
        self,
        prune: Recipe | str | os.PathLike[str] | Start,
        *,
        strip: bool = True,
        steps_per_epoch: int | None = None,
        examples_inputs: Any = None,
        teacher: nn.Module | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        check_options(strip, steps_per_epoch)
        self._start = start_of(prune, examples_inputs, teacher)
        self._teacher = teacher
        self._hook: RemovableHandle | None = None
        self._strip = strip
        self._steps_per_epoch = steps_per_epoch
        check_path("resume_from", resume_from, optional=True)
        self._resume_from = resume_from
        self._training: Training | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Any,
        **unused: object,
    ) -> None:
        """Begin to prune, or go on: weights and optimizer have been loaded."""
        if self._training is not None:  # a run that was interrupted
            self._end(strip_masks=False)
        resumed = None
        if state.global_step > 0:
            resumed = _load(self._saved(args, state), args.process_index)
        steps = self._steps_per_epoch or _steps_per_epoch(train_dataloader, args.gradient_accumulation_steps)
        if self._teacher is not None:
            self._teacher.to(args.device)
        self._training = Training(self._start, model, optimizer, steps, resumed)
        if self._teacher is not None:
            self._hook = model.register_forward_hook(WithTeacher(self._training.teacher), with_kwargs=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        """Go on by a step; this is not called for batches that only accumulate."""
        if self._training is not None:
            self._training.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        """Save what the checkpoint needs beside the plain model."""
        if self._training is None:
            return
        file = _checkpoint(args, state) / FILE
        if args.should_save:  # one rank, or with save_on_each_node, one of each machine
            _save(self._training.state(), file)
        if args.process_index > 0:
            file.parent.mkdir(parents=True, exist_ok=True)  # the other rank may not have been here yet
            _save({"pruning": self._training.state()["pruning"]}, _of_rank(file, args.process_index))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float] | None = None,
        **unused: object,
    ) -> None:
        """Add the sparsity, for the callbacks that come after this one and for ``state.log_history``."""
        if self._training is not None and logs is not None:
            logs["pruning_sparsity"] = state.log_history[-1]["pruning_sparsity"] = self._training.sparsity()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        """Fold the masks in."""
        if self._training is not None:
            self._end(strip_masks=self._strip)

    def _end(self, *, strip_masks: bool) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        assert self._training is not None
        self._training.finish(strip_masks=strip_masks)
        self._training = None

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path:
        folder = Path(self._resume_from) if self._resume_from is not None else _checkpoint(args, state)
        if not (folder / FILE).is_file():
            raise ValueError(
                f"training goes on at step {state.global_step}, but there is no {folder / FILE}; give "
                "PruningCallback(resume_from=...) the checkpoint that the Trainer resumes from"
            )
        return folder / FILE


def _save(state: dict[str, Any], file: Path) -> None:
    with whole_file(file) as unfinished:
        torch.save(state, unfinished)


def _of_rank(file: Path, rank: int) -> Path:
    return file.with_stem(f"{file.stem}_rank{rank}")


def _load(file: Path, rank: int) -> dict[str, Any]:
    """Return what was saved for all ranks, with what this one measured."""
    files = [file, _of_rank(file, rank)] if rank > 0 and _of_rank(file, rank).is_file() else [file]
    state: dict[str, Any] = {}
    for one in files:
        try:
            state |= torch.load(one, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no error of its own for what is no file of torch.save
            raise ValueError(
                f"{one} cannot be read, and is damaged or unfinished; resume from another checkpoint: {error}"
            ) from error
    return state


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _steps_per_epoch(dataloader: Any, accumulated: int) -> int:
    try:
        return max(1, math.ceil(len(dataloader) / accumulated))
    except TypeError as error:
        raise ValueError(
            "the number of batches per epoch is unknown; give PruningCallback(steps_per_epoch=...)"
        ) from error
