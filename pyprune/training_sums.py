"""The statistic of an importance, gathered while a model trains, without passes of its own."""

from collections.abc import Mapping
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


class TrainingSums:
    """Sums over the batches that a model trains on.

    Gradients are seen by hooks on the parameters: those of the weight in use, also where a mask drops it
    (`Mask.dense_gradient`). What goes on into ``grad`` is masked all the same, so clipping and optimizers see nothing
    of it. Activations are seen by hooks on layers in training mode.

    Args:
        rule: an importance that needs gradients or activations.
        targets: weights with a `Mask`.
        optimizer: whose steps end a batch of gradients.

    Raises:
        ValueError: for a weight that has no gradient, or whose activations cannot be seen. Nothing is hooked then.
    """

    def __init__(self, rule: Importance, targets: list[Target], optimizer: Optimizer) -> None:
        self.count = 0
        self.gathers = True  # False: hooks stay, but let everything pass
        self._targets = targets
        self._hooks = ExitStack()
        self._batch: dict[Target, Tensor] = {}
        self._of_gradients = rule.needs in ("gradient", "squared gradient", "momentum")
        self._goes_on = rule.needs == "momentum"
        self._sums: GradientSums | ActivationSums
        if not self._of_gradients:
            self._sums = ActivationSums(rule, targets, only_training=True)
            self._hooks.enter_context(self._sums.watching())
            self._hooks.callback(optimizer.register_step_pre_hook(self._end_batch).remove)
            return
        frozen = [target.name for target in targets if not target.parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"importance {rule.name} needs gradients, and {', '.join(frozen)} has none (requires_grad is False); "
                "name it in ignored_scope"
            )
        self._sums = GradientSums(rule, targets)
        for target in targets:
            mask = target.attachment
            assert isinstance(mask, Mask)
            mask.dense_gradient = True
            self._hooks.callback(setattr, mask, "dense_gradient", False)
            handle = target.parameter.register_hook(partial(self._see, target, mask))  # type: ignore[no-untyped-call]
            self._hooks.callback(handle.remove)
        self._hooks.callback(optimizer.register_step_pre_hook(self._end_batch).remove)

    def _see(self, target: Target, mask: Mask, gradient: Tensor) -> Tensor:
        if self.gathers:
            seen = self._batch.get(target)
            self._batch[target] = gradient if seen is None else seen + gradient
        return ops.mask_weight(gradient, mask.mask)

    def _end_batch(self, *_: Any) -> None:
        """Take in the gradients of all backward passes since the last call, before the optimizer changes weights."""
        if self._of_gradients and self._batch:
            assert isinstance(self._sums, GradientSums)
            for target in self._targets:
                gradient = self._batch.get(target)
                if gradient is None:
                    self._sums.add_nothing(target)
                else:
                    self._sums.add(target, gradient)
        self.drop_batch()
        self.count += 1

    def drop_batch(self) -> None:
        """Forget gradients that no optimizer used, as those that overflowed in half precision."""
        self._batch.clear()

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
        sums = self._sums.sums
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            for target in self._targets:
                if target in sums:
                    distributed.all_reduce(sums[target])
                    sums[target] /= distributed.get_world_size()
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
        self._batch.clear()

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
        self._batch.clear()


def needs_training(rule: Importance) -> bool:
    """Whether an importance is computed from gradients or activations.

    Example:
        >>> from pyprune import importance
        >>> needs_training(importance.snip()), needs_training(importance.magnitude())
        (True, False)
    """
    return rule.needs not in ("none", "given", "norm scale")
