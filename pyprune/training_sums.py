"""The statistic of an importance, gathered while a model trains, without passes of its own."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, distributed
from torch.optim import Optimizer

from pyprune import ops
from pyprune.gathering import ActivationSums, GradientSums
from pyprune.importance import Importance
from pyprune.masks import Mask
from pyprune.targets import Target


class TrainingGradients:
    """The gradients of the weights in use, of each batch that an optimizer takes a step for.

    They are seen by hooks on the parameters, also where a mask drops the weight (`Mask.dense_gradient`). What goes on
    into ``grad`` is masked all the same, so clipping and optimizers see nothing of it.

    Args:
        targets: weights with a `Mask`.
        optimizer: whose steps end a batch; of several backward passes before one, the gradients are added.
        on_batch: is called with the gradients before the optimizer changes the weights.

    Raises:
        ValueError: for a weight that has no gradient. Nothing is hooked then.
    """

    def __init__(
        self, targets: list[Target], optimizer: Optimizer, on_batch: Callable[[Mapping[Target, Tensor]], None]
    ) -> None:
        frozen = [target.name for target in targets if not target.parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"gradients are needed, and {', '.join(frozen)} has none (requires_grad is False); name it in "
                "ignored_scope"
            )
        self.gathers = True  # False: the hooks stay, but look at nothing
        self._on_batch = on_batch
        self._batch: dict[Target, Tensor] = {}
        self._hooks = ExitStack()
        for target in targets:
            mask = target.attachment
            assert isinstance(mask, Mask)
            mask.dense_gradient = True
            self._hooks.callback(setattr, mask, "dense_gradient", False)
            hook = partial(self._see, target, mask)
            self._hooks.callback(target.parameter.register_hook(hook).remove)  # type: ignore[no-untyped-call]
        self._hooks.callback(optimizer.register_step_pre_hook(self._end_batch).remove)

    def _see(self, target: Target, mask: Mask, gradient: Tensor) -> Tensor:
        if self.gathers:
            seen = self._batch.get(target)
            self._batch[target] = gradient if seen is None else seen + gradient
        return ops.mask_weight(gradient, mask.mask)

    def _end_batch(self, *_: Any) -> None:
        if self.gathers:
            self._on_batch(self._batch)
        self.drop_batch()

    def drop_batch(self) -> None:
        """Forget gradients that no optimizer used, as those that overflowed in half precision."""
        self._batch.clear()

    def stop(self) -> None:
        """Take all hooks off."""
        self._hooks.close()
        self.drop_batch()


class TrainingSums:
    """Sums over the batches that a model trains on; of activations by hooks on layers in training mode.

    Args:
        rule: an importance that needs gradients or activations.
        targets: weights with a `Mask`.
        optimizer: whose steps end a batch.

    Raises:
        ValueError: for a weight that has no gradient, or whose activations cannot be seen. Nothing is hooked then.
    """

    def __init__(self, rule: Importance, targets: list[Target], optimizer: Optimizer) -> None:
        self.count = 0
        self._targets = targets
        self._of_gradients = rule.needs in ("gradient", "squared gradient", "momentum")
        self._goes_on = rule.needs == "momentum"
        self._gradients: TrainingGradients | None = None
        self._hooks = ExitStack()
        self._sums: GradientSums | ActivationSums
        if self._of_gradients:
            self._gradients = TrainingGradients(targets, optimizer, self._add)
            self._sums = GradientSums(rule, targets)
        else:
            self._sums = ActivationSums(rule, targets, only_training=True)
            self._hooks.enter_context(self._sums.watching())
            self._hooks.callback(optimizer.register_step_pre_hook(self._count).remove)

    def _add(self, gradients: Mapping[Target, Tensor]) -> None:
        assert isinstance(self._sums, GradientSums)
        for target in self._targets:
            if target in gradients:
                self._sums.add(target, gradients[target])
            else:
                self._sums.add_nothing(target)
        self._count()

    def _count(self, *_: Any) -> None:
        self.count += 1

    def drop_batch(self) -> None:
        """Forget gradients that no optimizer used."""
        if self._gradients is not None:
            self._gradients.drop_batch()

    def results(self) -> dict[Target, Tensor]:
        """Return the statistics, averaged over the ranks of `torch.distributed`, which so choose the same masks.

        Raises:
            ValueError: if there was no batch.
        """
        if self.count == 0:
            raise ValueError(
                "masks are due, and no batch was trained on since they were computed last; call step() after the "
                "optimizer's, and let the schedule start at 1 or later"
            )
        average([self._sums.sums[target] for target in self._targets if target in self._sums.sums])
        return {target: self._sums.result(target, self.count) for target in self._targets}

    def restart(self) -> None:
        """Begin anew, but for momentum, which goes on."""
        if self._goes_on:
            return
        self.count = 0
        if isinstance(self._sums, ActivationSums):
            self._sums.sums.clear()
            self._sums.counts.clear()
        else:
            for tensor in self._sums.sums.values():
                tensor.zero_()

    def stop(self) -> None:
        """Take all hooks off."""
        self._hooks.close()
        if self._gradients is not None:
            self._gradients.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes."""
        state: dict[str, Any] = {
            "count": self.count,
            "sums": {target.name: tensor.clone() for target, tensor in self._sums.sums.items()},
        }
        if isinstance(self._sums, ActivationSums):
            state["counts"] = {target.name: count for target, count in self._sums.counts.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the sums that gave ``state`` were.

        Raises:
            ValueError: if it is of other weights.
        """
        by_name = {target.name: target for target in self._targets}
        unknown = set(state["sums"]) - set(by_name)
        if unknown or (self._of_gradients and len(state["sums"]) != len(by_name)):
            raise ValueError(f"the state is of the weights {sorted(state['sums'])}, these are {sorted(by_name)}")
        device = {name: target.parameter.device for name, target in by_name.items()}
        loaded = {by_name[name]: tensor.to(device[name], copy=True) for name, tensor in state["sums"].items()}
        self._sums.sums = loaded
        if isinstance(self._sums, ActivationSums):
            self._sums.counts = {by_name[name]: count for name, count in state["counts"].items()}
        self.count = int(state["count"])
        self.drop_batch()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over the ranks of `torch.distributed`, if there are several.

    Example:
        >>> import torch
        >>> average([torch.ones(2)])
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= distributed.get_world_size()


def needs_training(rule: Importance) -> bool:
    """Whether an importance is computed from gradients or activations.

    Example:
        >>> from pyprune import importance
        >>> needs_training(importance.snip()), needs_training(importance.magnitude())
        (True, False)
    """
    return rule.needs not in ("none", "given", "norm scale")
