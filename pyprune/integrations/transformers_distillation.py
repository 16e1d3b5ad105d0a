"""A teacher beside the model of a Hugging Face ``Trainer``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune.integrations.lesson import Lesson
from pyprune.training.teacher import Distillation


class DistillationCallback(TrainerCallback):
    """Let a model learn from a teacher in a Hugging Face ``Trainer``, as `pyprune.Distillation` says.

    The loss that the model returns becomes that with the teacher, in training only; it is what is logged. So the
    model must compute its loss itself: with ``compute_loss_func`` or label smoothing it raises. Nothing is saved: to
    resume, make the callback anew.

    Args:
        teacher: the dense model; it is moved to the device of the training.
        pairs, temperature, task_weight, logits_weight, hidden_weight: as for `pyprune.Distillation`.
        start, end: epochs between which it learns from the teacher; None for to the end. Outside of them the loss is
            that of the task.

    Raises:
        TypeError, ValueError: for wrong numbers, when training begins for what `Distillation` refuses, and in the
            first step for a model without a loss.

    Example:
        >>> callback = DistillationCallback(nn.Linear(4, 4), temperature=2.0)
        >>> # Trainer(model, args, train_dataset=dataset, callbacks=[PruningCallback(...), callback]).train()
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        pairs: Sequence[str] | Mapping[str, str] = (),
        temperature: float = 1.0,
        task_weight: float = 0.5,
        logits_weight: float = 0.5,
        hidden_weight: float = 1.0,
        start: float = 0.0,
        end: float | None = None,
    ) -> None:
        weights = task_weight, logits_weight, hidden_weight
        self._lesson = Lesson(teacher, pairs, temperature, weights, start=start, end=end)
        self._distillation: Distillation | None = None
        self._is_on = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        """Begin to look at the model."""
        self._let_go()
        self._distillation = self._lesson.begin(model, args.device)
        self._hook = model.register_forward_hook(WithTeacher(self._now), with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Say whether it is time to learn."""
        self._is_on = self._lesson.is_due(state.epoch or 0.0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Let go of the model."""
        self._let_go()

    def _let_go(self) -> None:
        if self._distillation is not None:
            self._distillation.remove()
            self._hook.remove()
            self._distillation = None

    def _now(self) -> Distillation | None:
        return self._distillation if self._is_on else None


class WithTeacher:
    """A hook on the model, by which the loss that it returns becomes that with the teacher, in training.

    Copies and pickles of the model get one that does nothing.

    Args:
        now: returns the teacher that is due, or None.
    """

    def __init__(self, now: Callable[[], Distillation | None] | None = None) -> None:
        self.now = now

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        """Change the output, if it is time."""
        if self.now is None or not module.training or not torch.is_grad_enabled():
            return None
        distillation = self.now()
        if distillation is None:
            return None
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                "the model returns no loss, to which that of the teacher could be added: let the batches have "
                "labels, and leave compute_loss_func and label_smoothing_factor out; or use pyprune.Distillation in "
                "compute_loss of a Trainer of your own"
            )
        extra = distillation.extra_loss()
        labels, items = keywords.get("labels"), keywords.get("num_items_in_batch")
        if items is not None and isinstance(labels, Tensor):
            # The task's loss is a sum over tokens by those of all batches that accumulate.
            extra = extra * (labels != -100).sum() / items
        output.loss = distillation.task_weight * loss + extra
        return output
