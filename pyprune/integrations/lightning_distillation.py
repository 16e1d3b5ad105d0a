"""A teacher beside the model of a Lightning ``Trainer``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from pyprune.checks import shown
from pyprune.integrations.lesson import Lesson
from pyprune.training.teacher import Distillation


class DistillationCallback(Callback):
    """Let a model learn from a teacher in a Lightning ``Trainer``, as `pyprune.Distillation` says.

    The loss that ``training_step`` returns becomes that with the teacher; ``distillation_loss`` is logged. Nothing is
    saved: to resume, make the callback anew. Manual optimization has no loss that is returned, and raises.

    Args:
        teacher: the dense model, of the part that ``module`` names; it is moved to the device of the training.
        module: the part of the LightningModule that ``training_step`` calls, once, as "net" where it has
            ``self.net(inputs)``; "" where it has ``self(inputs)``.
        pairs, temperature, task_weight, logits_weight, hidden_weight: as for `pyprune.Distillation`; names of pairs
            are those within ``module``.
        start, end: epochs between which it learns from the teacher; None for to the end. Outside of them the loss is
            that of the task.

    Raises:
        TypeError, ValueError: for wrong numbers, when training begins for what `Distillation` refuses, and in the
            first step if the part was not called.

    Example:
        >>> callback = DistillationCallback(nn.Linear(4, 4), module="net", temperature=2.0)
        >>> # Trainer(callbacks=[PruningCallback(...), callback]).fit(model, loader)
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        module: str = "",
        pairs: Sequence[str] | Mapping[str, str] = (),
        temperature: float = 1.0,
        task_weight: float = 0.5,
        logits_weight: float = 0.5,
        hidden_weight: float = 1.0,
        start: float = 0.0,
        end: float | None = None,
    ) -> None:
        super().__init__()
        weights = task_weight, logits_weight, hidden_weight
        self._lesson = Lesson(teacher, pairs, temperature, weights, start=start, end=end)
        if not isinstance(module, str):
            raise TypeError(f"module is {shown(module)}; give the name of a part of the model, or an empty string")
        self._module = module
        self._distillation: Distillation | None = None
        self._let_go: Callable[[], None] | None = None
        self._epoch = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look at the model."""
        self._stop()
        try:
            learner = pl_module.get_submodule(self._module)
        except AttributeError as error:
            raise ValueError(
                f"module is {self._module!r}, which is no module of the model; see its named_modules()"
            ) from error
        self._distillation = self._lesson.begin(learner, pl_module.device)
        self._let_go = add_teacher(trainer, pl_module, self._now)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say which epoch it is."""
        # With batches without a known number an epoch has no parts.
        self._epoch = trainer.current_epoch + batch_idx / trainer.num_training_batches

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model."""
        self._stop()

    def _stop(self) -> None:
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    def _now(self) -> Distillation | None:
        return self._distillation if self._lesson.is_due(self._epoch) else None


def add_teacher(
    trainer: Trainer, pl_module: LightningModule, now: Callable[[], Distillation | None]
) -> Callable[[], None]:
    """Let the loss of each training step be that with the teacher which is due; return what ends it.

    Callbacks see a loss, but cannot change it. The strategy is what calls the step, and unlike the model it is
    neither copied nor saved.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            "with manual optimization training_step returns no loss, to which that of the teacher could be added; "
            "make a pyprune.Distillation in the LightningModule, and call its loss there"
        )
    strategy = trainer.strategy
    step = strategy.training_step

    def with_teacher(*args: Any, **keywords: Any) -> Any:
        output = step(*args, **keywords)
        distillation = now()
        task = output.get("loss") if isinstance(output, Mapping) else output
        if distillation is None or not isinstance(task, Tensor):
            return output
        with strategy.precision_plugin.train_step_context():
            extra = distillation.extra_loss()
        pl_module.log("distillation_loss", extra.detach())
        loss = distillation.task_weight * task + extra
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    strategy.training_step = with_teacher

    def let_go() -> None:
        if strategy.__dict__.get("training_step") is with_teacher:
            del strategy.training_step

    return let_go
