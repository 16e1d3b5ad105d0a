"""What the step of an optimizer does to held zeros: it keeps them, whichever optimizer it is, told or not.

Hooks that torch has for all optimizers look, in each step, for parameters that are held. Where gradient, weight and
state are zero, most optimizers leave them so: only a few of the zeros are looked at then, because something may have
written to weights through ``.data``. The state (momentum, moments) is zeroed when masks change or a state was loaded,
and weights and state at every step of an optimizer that mixes elements or is not known.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pyprune import ops
from pyprune.modules.holding import HELD, HOOKS, Hold, check_dense
from pyprune.modules.sharding import is_sharded
from pyprune.modules.zeros import fold_all, settle_written

# With an eps of 0 they divide zero by zero.
_LEAVE_ZEROS = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adadelta,
    torch.optim.ASGD,
}


class _Known:
    """What an optimizer's state was when its dropped elements were zeroed last."""

    def __init__(self) -> None:
        self.state: object = None
        self.changed_at: weakref.WeakKeyDictionary[Hold, int] = weakref.WeakKeyDictionary()
        self.turn = 0


_KNOWN: "weakref.WeakKeyDictionary[Optimizer, _Known]" = weakref.WeakKeyDictionary()


def held_by(optimizer: Optimizer) -> list[Hold]:
    """List what is held of the parameters of an optimizer."""
    if not HELD:
        return []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(is_sharded(parameter) and id(parameter) not in HELD for parameter in parameters):
        for one in list(HELD.values()):
            one.find_shard()
    return [hold for parameter in parameters if (hold := HELD.get(id(parameter))) is not None]


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not HELD:
        return None
    holds = [hold for hold in held_by(optimizer) if not hold.is_raw]
    if not holds:
        return None
    settle_written(holds)
    mask_gradients(hold for hold in holds if not hold.gradient_is_masked)
    mask_state(optimizer, holds)
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], _within_step(args[1], holds), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _within_step(kwargs["closure"], holds)}
    return None


def _within_step(closure: Callable[[], Any], holds: Sequence[Hold]) -> Callable[[], Any]:
    """Return a closure whose forward passes take what the optimizer wrote in this step for no raw values."""

    def stepping() -> Any:
        try:
            for hold in holds:
                hold.is_stepping = True
            return closure()
        finally:
            for hold in holds:
                hold.is_stepping = False

    return stepping


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if not HELD:
        return
    holds = [hold for hold in held_by(optimizer) if not hold.is_raw]
    if not holds:
        return
    known = _KNOWN.setdefault(optimizer, _Known())
    if _leaves_zeros(optimizer, holds):
        _fold_weights(_written_unseen(holds, known))
    else:
        _fold_weights(holds)
        known.changed_at.clear()
        mask_state(optimizer, holds)
    for hold in holds:
        hold.saw()


def _fold_weights(holds: Iterable[Hold]) -> None:
    once = dict.fromkeys(holds)
    fold_all((hold.parameter, hold.local_mask) for hold in once if hold.parameter is not None)


def _written_unseen(holds: list[Hold], known: _Known) -> Iterator[Hold]:
    """Yield what was perhaps written to through ``.data``, by a few zeros of each; and one in turn, to be sure."""
    known.turn += 1
    yield holds[known.turn % len(holds)]
    by_device: dict[torch.device, list[tuple[Hold, Tensor]]] = {}
    for hold in holds:
        assert hold.parameter is not None
        if is_sharded(hold.parameter):
            yield hold
        else:
            by_device.setdefault(hold.parameter.device, []).append((hold, hold.parameter))
    for pairs in by_device.values():
        strays = ops.probe([weight for _, weight in pairs], [hold.mask for hold, _ in pairs], known.turn)
        yield from (hold for (hold, _), is_stray in zip(pairs, strays, strict=True) if is_stray)


def _leaves_zeros(optimizer: Optimizer, holds: Iterable[Hold]) -> bool:
    if type(optimizer) not in _LEAVE_ZEROS:
        return False
    least = min(group.get("eps", 1) for group in optimizer.param_groups)
    # 1e-8 is nothing in half precision.
    in_half = least < 3e-8 and any(
        one.parameter is not None and one.parameter.dtype is torch.float16 for one in holds
    )
    return least != 0 and not in_half


def mask_gradients(holds: Iterable[Hold]) -> None:
    """Zero gradients that did not come by a backward pass, or before the parameter was held."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for hold in holds:
        assert hold.parameter is not None
        hold.watch_gradient()
        gradient = hold.parameter.grad
        if gradient is not None:
            check_dense(gradient)
            pairs.append((gradient, hold.local_mask))
    fold_all(pairs)


def mask_state(optimizer: Optimizer, holds: Iterable[Hold]) -> None:
    """Zero momentum, moments and the like of what is dropped, where masks or the state are new to each other."""
    known = _KNOWN.setdefault(optimizer, _Known())
    is_loaded = known.state is not optimizer.state
    stale = [hold for hold in holds if is_loaded or hold.changed_at != known.changed_at.get(hold)]
    pairs: list[tuple[Tensor, Tensor]] = []
    for hold in stale:
        assert hold.parameter is not None
        state = optimizer.state.get(hold.parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == hold.parameter.shape and value.dtype in ops.WEIGHT_DTYPES:
                if is_loaded:  # what was loaded may still be the tensors of a checkpoint that someone else uses
                    state[key] = value.clone()
                pairs.append((state[key], hold.local_mask))
    fold_all(pairs)
    # Now that it is done: whoever is interrupted does it again.
    if is_loaded:
        known.changed_at.clear()
    for hold in stale:
        known.changed_at[hold] = hold.changed_at
    known.state = optimizer.state


for _hook in (_before_step, _after_step):
    # What `torch.compiler.disable` does, without loading the compiler: a compiled step is interrupted for them.
    _hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    _hook._torchdynamo_disable_msg = "zeros of pruned weights are held; compile the step with fullgraph=False"  # type: ignore[attr-defined]
HOOKS.extend(
    [
        (_global_optimizer_pre_hooks, register_optimizer_step_pre_hook, _before_step),
        (_global_optimizer_post_hooks, register_optimizer_step_post_hook, _after_step),
    ]
)
