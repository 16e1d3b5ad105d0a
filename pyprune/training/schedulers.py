"""Prune to another ratio at every epoch of a training."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyprune.checks import shown
from pyprune.methods.allocation import check_ratio
from pyprune.methods.method import METHODS, PruneMode, check_mode
from pyprune.methods.schedules import Schedule, check_step, exponential, multi_step
from pyprune.modules.attachments import check_module
from pyprune.modules.undo import Change
from pyprune.selection.prune import masked_targets, update_masks
from pyprune.training.losses import RBLoss


class _Scheduler(ABC):
    """Count epochs, and at the start of each prune to the ratio of a schedule.

    ``epoch`` is the one that the next `step` is for.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._ratio = 0.0
        self.epoch = 0

    def step(self, epoch: int | None = None) -> None:
        """Set the ratio of the present epoch, and go on to the next; call it at the start of each epoch.

        Args:
            epoch: the epoch to jump to; the one after the last if None.

        Raises:
            TypeError, ValueError: for an epoch that is negative or no integer.
        """
        now = self.epoch if epoch is None else check_step(epoch, "epoch")
        ratio = self.get_pruning_ratio(now)
        with Change(*self._changed(), objects=[self]):
            self._set_ratio(ratio)
            self._ratio, self.epoch = ratio, now + 1

    def get_pruning_ratio(self, epoch: int) -> float:
        """Return the ratio that the schedule has for an epoch."""
        ratio = self._schedule(epoch)
        assert isinstance(ratio, float)
        return ratio

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes: the next epoch and the ratio of the last `step`."""
        return {"epoch": self.epoch, "ratio": self._ratio}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the scheduler that gave ``state_dict`` was; the schedule stays that of this scheduler.

        Raises:
            TypeError, ValueError: if it is not the state of a scheduler.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"epoch", "ratio"}:
            raise ValueError(
                f"state_dict is {shown(state_dict)}, which is not the state_dict() of a {type(self).__name__}"
            )
        epoch, ratio = check_step(state_dict["epoch"], "epoch"), check_ratio(state_dict["ratio"])
        self.epoch, self._ratio = epoch, ratio

    @abstractmethod
    def _set_ratio(self, ratio: float) -> None: ...

    @abstractmethod
    def _changed(self) -> list[nn.Module]:
        """List what `_set_ratio` changes."""


class _MagnitudeScheduler(_Scheduler):
    def __init__(self, model: nn.Module, mode: PruneMode | str, schedule: Schedule) -> None:
        check_module(model)
        self._mode = check_mode(mode)
        if self._mode not in METHODS:
            raise ValueError(
                f"mode is {self._mode.value}, but only magnitude masks are set to a ratio; learned gates are drawn "
                "to one by a loss: schedule an RBLoss, or give LagrangianLoss warmup_steps"
            )
        masked_targets(model)
        super().__init__(schedule)
        self._model = weakref.ref(model)

    @property
    def current_ratio(self) -> float:
        """The ratio that the last `step` set; 0.0 before the first."""
        return self._ratio

    def _changed(self) -> list[nn.Module]:
        model = self._model()
        return [] if model is None else [model]

    def _set_ratio(self, ratio: float) -> None:
        model = self._model()
        if model is None:
            raise RuntimeError(
                "the model is gone: a scheduler does not keep its model alive. Keep a reference to the model, and "
                "build a new scheduler for a copy"
            )
        update_masks(model, self._mode, ratio)


class MultiStepMagnitudePruningScheduler(_MagnitudeScheduler):
    """Prune a model by magnitude to the ratio of the last step of ``steps`` that has begun.

    Each `step` computes the masks anew from the raw weights, so weights can come back. `get_config` has the
    masks and what they dropped; the state_dict of the scheduler holds the epoch.

    Args:
        model: the model, pruned with `prune` before. Held by a weak reference.
        mode: one of the magnitude modes, or its name.
        steps: ratio in [0, 1) from each of these epochs on; one of them is 0.

    Raises:
        TypeError, ValueError: for wrong arguments, or a model without masks. `step` also raises RuntimeError if
            the model is no more.

    Paper: Kozlov et al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> from pyprune import prune
        >>> mode = PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        >>> model = prune(nn.Linear(10, 10), mode, ratio=0.1)
        >>> scheduler = MultiStepMagnitudePruningScheduler(model, mode=mode, steps={0: 0.1, 2: 0.5})
        >>> for epoch in range(3):
        ...     scheduler.step()
        >>> int((model.weight == 0).sum())
        50
    """

    def __init__(self, model: nn.Module, *, mode: PruneMode | str, steps: Mapping[int, float]) -> None:
        super().__init__(model, mode, _multi_step(steps))


class ExponentialMagnitudePruningScheduler(_MagnitudeScheduler):
    """Prune a model by magnitude, the same fraction of what is left every epoch.

    At epoch e, with i = initial_ratio, t = target_ratio and T = target_epoch, the ratio is
    1 - (1 - i) * ((1 - t) / (1 - i)) ** (e / T), and t from T on. Otherwise as `MultiStepMagnitudePruningScheduler`.

    Args:
        model: the model, pruned with `prune` before. Held by a weak reference.
        mode: one of the magnitude modes, or its name.
        initial_ratio: the ratio at epoch 0, in [0, 1).
        target_ratio: the ratio from ``target_epoch`` on, above ``initial_ratio`` and below 1.
        target_epoch: at least 1.

    Raises:
        TypeError, ValueError: for wrong arguments, or a model without masks. `step` also raises RuntimeError if
            the model is no more.

    Paper: Kozlov et al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> from pyprune import prune
        >>> mode = PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        >>> model = prune(nn.Linear(10, 10), mode, ratio=0.2)
        >>> scheduler = ExponentialMagnitudePruningScheduler(
        ...     model, mode=mode, initial_ratio=0.2, target_ratio=0.8, target_epoch=2
        ... )
        >>> for epoch in range(3):
        ...     scheduler.step()
        ...     print(f"{scheduler.current_ratio:.2f}")
        0.20
        0.60
        0.80
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: PruneMode | str,
        initial_ratio: float,
        target_ratio: float,
        target_epoch: int,
    ) -> None:
        super().__init__(model, mode, _exponential(initial_ratio, target_ratio, target_epoch))


class _RBScheduler(_Scheduler):
    def __init__(self, rb_loss: RBLoss, schedule: Schedule) -> None:
        # torch.compile wraps the loss; what is set on the wrapper goes to the loss.
        if not isinstance(getattr(rb_loss, "_orig_mod", rb_loss), RBLoss):
            raise TypeError(f"rb_loss is a {type(rb_loss).__name__}; give the RBLoss whose target this is to set")
        super().__init__(schedule)
        self._rb_loss = rb_loss

    @property
    def current_ratio(self) -> float:
        """The ratio that the gates have reached; ``rb_loss.target_ratio`` is the one they are drawn to."""
        return self._rb_loss.current_ratio

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        with Change(self._rb_loss, objects=[self]):
            super().load_state_dict(state_dict)
            if self.epoch > 0:
                self._set_ratio(self._ratio)

    def _changed(self) -> list[nn.Module]:
        return [self._rb_loss]

    def _set_ratio(self, ratio: float) -> None:
        self._rb_loss.check()
        self._rb_loss.target_ratio = ratio


class MultiStepRBPruningScheduler(_RBScheduler):
    """Set the target of an `RBLoss` to the ratio of the last step of ``steps`` that has begun.

    Args:
        rb_loss: the loss.
        steps: ratio in [0, 1) from each of these epochs on; one of them is 0.

    Raises:
        TypeError, ValueError: for wrong arguments. `step` also raises ValueError if a layer with gates was replaced
            in the model, and RuntimeError after `strip`.

    Paper: Kozlov et al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(10, 10), PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
        >>> rb_loss = RBLoss(model, target_ratio=0.3)
        >>> scheduler = MultiStepRBPruningScheduler(rb_loss, steps={0: 0.3, 5: 0.5, 10: 0.7})
        >>> scheduler.step(epoch=7)
        >>> rb_loss.target_ratio
        0.5
    """

    def __init__(self, rb_loss: RBLoss, steps: Mapping[int, float]) -> None:
        super().__init__(rb_loss, _multi_step(steps))


class ExponentialRBPruningScheduler(_RBScheduler):
    """Set the target of an `RBLoss` so that the same fraction of what is left goes every epoch.

    At epoch e, with i = initial_ratio, t = target_ratio and T = target_epoch, the target is
    1 - (1 - i) * ((1 - t) / (1 - i)) ** (e / T), and t from T on.

    Args:
        rb_loss: the loss.
        initial_ratio: the target at epoch 0, in [0, 1).
        target_ratio: the target from ``target_epoch`` on, above ``initial_ratio`` and below 1.
        target_epoch: at least 1.

    Raises:
        TypeError, ValueError: for wrong arguments. `step` also raises ValueError if a layer with gates was replaced
            in the model, and RuntimeError after `strip`.

    Paper: Kozlov et al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(10, 10), PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
        >>> rb_loss = RBLoss(model, target_ratio=0.2)
        >>> scheduler = ExponentialRBPruningScheduler(rb_loss, 0.2, 0.8, target_epoch=10)
        >>> scheduler.step(epoch=5)
        >>> round(rb_loss.target_ratio, 4)
        0.6
    """

    def __init__(self, rb_loss: RBLoss, initial_ratio: float, target_ratio: float, target_epoch: int) -> None:
        super().__init__(rb_loss, _exponential(initial_ratio, target_ratio, target_epoch))


def _multi_step(steps: Mapping[int, float]) -> Schedule:
    schedule = multi_step(steps)
    if schedule.start != 0:
        raise ValueError(f"steps begin at {schedule.start}; give the ratio for epoch 0 too")
    return schedule


def _exponential(initial_ratio: float, target_ratio: float, target_epoch: int) -> Schedule:
    initial, target = check_ratio(initial_ratio, "initial_ratio"), check_ratio(target_ratio, "target_ratio")
    if initial >= target:
        raise ValueError(
            f"initial_ratio is {initial} and target_ratio {target}; the target must be above the initial ratio "
            "(the multi-step schedule can stay or fall)"
        )
    return exponential(target, end=check_step(target_epoch, "target_epoch", least=1), initial=initial)
