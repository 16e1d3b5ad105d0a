"""The statistic of an importance, gathered while a model trains, without passes of its own."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from pyprune.calibration.sums import ActivationSums, GradientSums
from pyprune.checks import check_count, shown
from pyprune.methods.importance import Importance
from pyprune.modules.mask_states import check_tensors
from pyprune.modules.targets import Target


class TrainingGradients:
    """The gradients of the weights in use, of each batch that an optimizer takes a step for.

    They are seen by hooks on the parameters, as they arrive: the zeros of a mask come after that. Nothing is hooked
    before `start`.

    Args:
        targets: weights.
        optimizer: whose steps end a batch; of several backward passes before one, the gradients are added. A closure
            that it is given is run within the step, so each run of it is a batch.
        on_batch: is called with the gradients before the optimizer changes the weights.

    Raises:
        ValueError: for a weight that has no gradient.
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
        self._targets = targets
        self._optimizer = optimizer
        self._on_batch = on_batch
        self._batch: dict[Target, Tensor] = {}
        self._was_skipped = False
        self._was_dropped = False
        self._hooks = ExitStack()

    def start(self) -> None:
        """Put all hooks on."""
        for target in self._targets:
            hook = target.parameter.register_hook(partial(self._see, target))  # type: ignore[no-untyped-call]
            self._hooks.callback(hook.remove)
        self._hooks.callback(self._optimizer.register_step_pre_hook(self._before_step).remove)

    def _see(self, target: Target, gradient: Tensor) -> None:
        if self.gathers:
            self._was_dropped = False
            # Where grad is None, the optimizer has used or left out all that was seen before.
            seen = None if target.parameter.grad is None else self._batch.get(target)
            # A copy: what arrives becomes `grad`, in which what is dropped is zeroed.
            self._batch[target] = gradient.detach().clone() if seen is None else seen + gradient.detach()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # What a fused optimizer is told by a GradScaler, and leaves the step out for.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            self._batch.clear()
            self._was_skipped = True
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._end_batch()
            return None

        def counted() -> Any:
            result = closure()
            self._end_batch()
            return result

        return args[:1], {**kwargs, "closure": counted}

    def _end_batch(self) -> None:
        if self.gathers and self._batch:
            self._on_batch(self._batch)
        elif self._was_dropped:
            raise ValueError(
                "step() of the Pruner came between backward() and the optimizer's step; call it after both"
            )
        self._batch.clear()

    def drop_batch(self) -> bool:
        """Forget gradients that no optimizer used, as those that overflowed in half precision; say if there were."""
        self._was_dropped = bool(self._batch)
        were_there = self._was_skipped or self._was_dropped
        self._was_skipped = False
        self._batch.clear()
        return were_there

    def parts(self) -> list[object]:
        """List what changes when this does."""
        return [self, self._hooks]

    def stop(self) -> None:
        """Take all hooks off."""
        self._hooks.close()
        self._batch = {}
        self._was_skipped = self._was_dropped = False


class TrainingSums:
    """Sums over the batches that a model trains on; of activations by hooks on layers in training mode.

    Nothing is hooked before `start`.

    Args:
        rule: an importance that needs gradients or activations.
        targets: as for `TrainingGradients`.
        optimizer: whose steps end a batch; for importances of gradients.

    Raises:
        ValueError: for a weight that has no gradient, or whose activations cannot be seen.
    """

    def __init__(self, rule: Importance, targets: list[Target], optimizer: Optimizer | None) -> None:
        self._targets = targets
        self._goes_on = rule.needs == "momentum"
        self._count = 0  # of batches whose gradients were added
        self._seen: set[Target] = set()  # what has had a gradient since
        self._gradients: TrainingGradients | None = None
        self._hooks = ExitStack()
        self._sums: GradientSums | ActivationSums
        if needs_gradients(rule):
            assert optimizer is not None
            self._gradients = TrainingGradients(targets, optimizer, self._add)
            self._sums = GradientSums(rule, targets)
        else:
            self._sums = ActivationSums(rule, targets)

    @property
    def gathers(self) -> bool:
        """Whether something is gathered, or the hooks stay but look at nothing."""
        return self._sums.gathers if self._gradients is None else self._gradients.gathers  # type: ignore[union-attr]

    @gathers.setter
    def gathers(self, gathers: bool) -> None:
        (self._gradients or self._sums).gathers = gathers  # type: ignore[union-attr]

    @property
    def is_empty(self) -> bool:
        """Whether there was no batch yet."""
        return not self._sums.sums if isinstance(self._sums, ActivationSums) else self._count == 0

    def start(self) -> None:
        """Put all hooks on."""
        if isinstance(self._sums, ActivationSums):
            self._hooks.callback(self._sums.start())
        if self._gradients is not None:
            self._gradients.start()

    def _add(self, gradients: Mapping[Target, Tensor]) -> None:
        assert isinstance(self._sums, GradientSums)
        for target in self._targets:
            if target in gradients:
                self._sums.add(target, gradients[target])
            else:
                self._sums.add_nothing(target)
        self._seen.update(gradients)
        self._count += 1

    def drop_batch(self) -> bool:
        """Forget gradients that no optimizer used; say if there were."""
        return self._gradients is not None and self._gradients.drop_batch()

    def results(self) -> dict[Target, Tensor]:
        """Return the statistics, averaged over the ranks of `torch.distributed`, which so choose the same masks.

        Raises:
            ValueError: if there was no batch, or none in which a weight had a gradient.
        """
        if self.is_empty:
            raise ValueError(
                "masks are due, and no batch was trained on since they were computed last; call step() after the "
                "optimizer's, and let the schedule start at 1 or later"
            )
        sums = self._sums
        if isinstance(sums, ActivationSums):
            # Ranks may have seen different numbers of samples.
            sums.sums = {target: total / sums.counts[target].clamp(min=1) for target, total in sums.sums.items()}
            sums.counts = {target: torch.ones_like(count) for target, count in sums.counts.items()}
        elif unseen := [target.name for target in self._targets if target not in self._seen]:
            raise ValueError(
                f"{', '.join(unseen)} had no gradient since masks were computed last, so all of it would count for "
                "nothing; name it in ignored_scope, or compute masks less often"
            )
        average([sums.sums[target] for target in self._targets if target in sums.sums])
        return {target: sums.result(target, self._count) for target in self._targets}

    def restart(self) -> None:
        """Begin anew, but for momentum, which goes on."""
        if self._goes_on:
            return
        self._count = 0
        self._seen.clear()
        if isinstance(self._sums, ActivationSums):
            self._sums.sums.clear()
            self._sums.counts.clear()
        else:
            for tensor in self._sums.sums.values():
                tensor.zero_()

    def parts(self) -> list[object]:
        """List what changes when this does."""
        return [self, self._hooks, self._sums, *([] if self._gradients is None else self._gradients.parts())]

    def stop(self) -> None:
        """Take all hooks off."""
        self._hooks.close()
        if self._gradients is not None:
            self._gradients.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes."""
        counts = self._sums.counts if isinstance(self._sums, ActivationSums) else dict.fromkeys(self._seen, 1)
        return {
            "count": self._count,
            "sums": {target.name: tensor.clone() for target, tensor in self._sums.sums.items()},
            "counts": {target.name: count for target, count in counts.items()},
        }

    def check_state(self, state: object) -> None:
        """Raise ValueError unless `load_state_dict` can take this.

        Raises:
            ValueError: if it is of other weights, or nothing of this kind.
        """
        if not isinstance(state, Mapping) or set(state) != {"count", "sums", "counts"}:
            raise ValueError("the state is that of a pruner with another importance; make one as it was made")
        check_count("count of the state", state["count"])
        check_tensors("sums", state["sums"])
        if not isinstance(state["counts"], Mapping):
            raise ValueError(f"the state has the counts {shown(state['counts'])}, which are no dict")
        shapes = {target.name: target.parameter.shape for target in self._targets}
        names, of_activations = set(state["sums"]), self._gradients is None
        counted = set(state["counts"])
        fits = names == counted if of_activations else names == set(shapes) >= counted
        if not (fits and names <= set(shapes)):
            raise ValueError(
                f"the state is of the weights {shown(sorted(map(str, names)))}, these are {sorted(shapes)}"
            )
        if of_activations:
            check_tensors("counts", state["counts"])
            wrong = [target.name for target in self._targets if target.name in names and not _fits(target, state)]
        else:
            wrong = [name for name in names if state["sums"][name].shape != shapes[name]]
            wrong += [name for name, seen in state["counts"].items() if type(seen) is not int or seen != 1]
            if bool(state["count"]) is not bool(counted):
                raise ValueError(
                    f"the state has {state['count']} batches, and gradients of {len(counted)} weights in them; it is "
                    "damaged: load another"
                )
        if wrong:
            raise ValueError(
                f"the state has other shapes or counts for {', '.join(sorted(wrong))}; load it into the same model"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the sums that gave ``state`` were, which `check_state` has seen."""
        by_name = {target.name: target for target in self._targets}
        device = {name: target.parameter.device for name, target in by_name.items()}
        self._sums.sums = {
            by_name[name]: tensor.to(device[name], copy=True) for name, tensor in state["sums"].items()
        }
        if isinstance(self._sums, ActivationSums):
            self._sums.counts = {
                by_name[name]: count.to(device[name], copy=True) for name, count in state["counts"].items()
            }
        else:
            self._seen = {by_name[name] for name in state["counts"]}
        self._count = int(state["count"])
        self.drop_batch()


def _fits(target: Target, state: Mapping[str, Any]) -> bool:
    """Whether sums of activations can be those of a layer: of its input or its output channels, or so many groups."""
    sums, count = state["sums"][target.name], state["counts"][target.name]
    return (
        count.dim() == 0
        and sums.dim() > 0
        and any(size and sums.numel() % size == 0 for size in target.parameter.shape)
    )


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
        >>> from pyprune.methods import importance
        >>> needs_training(importance.snip()), needs_training(importance.magnitude())
        (True, False)
    """
    return rule.needs not in ("none", "given", "norm scale")


def needs_gradients(rule: Importance) -> bool:
    """Whether an importance is computed from gradients.

    Example:
        >>> from pyprune.methods import importance
        >>> needs_gradients(importance.snip()), needs_gradients(importance.wanda())
        (True, False)
    """
    return rule.needs in ("gradient", "squared gradient", "momentum")
