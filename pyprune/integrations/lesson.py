"""What the callbacks of trainers are told of a teacher: which, how it counts, and when."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pyprune.checks import check_number, shown
from pyprune.training.distillation import check_temperature
from pyprune.training.teacher import Distillation


class Lesson:
    """A teacher that is put beside a model when its training begins.

    Args:
        teacher: the dense model.
        pairs, temperature: as for `Distillation`.
        weights: of the task, the logits and the hidden states, as there.
        start, end: epochs between which the model learns; None for to the end.

    Raises:
        TypeError, ValueError: for no module, and for wrong numbers; of weights when it begins.

    Example:
        >>> lesson = Lesson(nn.Linear(4, 4), (), 2.0, (0.5, 0.5, 1.0), start=1, end=3)
        >>> [epoch for epoch in range(5) if lesson.is_due(epoch)]
        [1, 2]
    """

    def __init__(
        self,
        teacher: nn.Module,
        pairs: Sequence[str] | Mapping[str, str],
        temperature: float,
        weights: tuple[float, float, float],
        *,
        start: float,
        end: float | None,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is {shown(teacher)}; give an nn.Module")
        self._teacher, self._pairs, self._temperature = teacher, pairs, check_temperature(temperature)
        self._weights = weights
        self._start = check_number("start", start, what="an epoch, at least 0", least=0)
        self._end = math.inf
        if end is not None:
            self._end = check_number(
                "end", end, what="an epoch after start, or None", least=self._start, open_ends=True
            )

    def begin(self, learner: nn.Module, device: torch.device) -> Distillation:
        """Put the teacher beside what learns from it, on a device.

        Raises:
            TypeError, ValueError: for what `Distillation` refuses.
        """
        task, logits, hidden = self._weights
        return Distillation(
            learner,
            self._teacher.to(device),
            pairs=self._pairs,
            temperature=self._temperature,
            task_weight=task,
            logits_weight=logits,
            hidden_weight=hidden,
        )

    def is_due(self, epoch: float) -> bool:
        """Whether it is time to learn."""
        return self._start <= epoch < self._end
