"""Interrupts calls of pyprune at any line of it, and tells whether anything is half done afterwards."""

import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizers
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import pyprune
from pyprune.modules.holding import HELD, HOOKS
from pyprune.modules.masks import masks_by_target
from pyprune.modules.zeros import holds_in

ROOT = str(Path(pyprune.__file__).parent)
Things = dict[str, Any]
_GLOBAL_HOOKS = [
    table
    for module in (torch_modules, torch_optimizers)
    for name, table in vars(module).items()
    if name.startswith("_global") and isinstance(table, dict)
]


class Fault:
    """Raises KeyboardInterrupt before the n-th line of pyprune that runs, once."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.place = ""

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call":
            return self._trace if frame.f_code.co_filename.startswith(ROOT) else None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.place = f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def run(self, call: Callable[[], object]) -> bool:
        """Run a call; return whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def count_lines(call: Callable[[], object]) -> int:
    fault = Fault(-1)
    fault.run(call)
    return -1 - fault.left


def look(things: Things) -> dict[str, Any]:
    """Take down all there is to see of models, optimizers, pruners and files, by value."""
    seen: dict[str, Any] = {
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": (len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())),
        "torch": [names(table.values(), but=[hook for _, _, hook in HOOKS]) for table in _GLOBAL_HOOKS],
    }
    for table, _, hook in HOOKS:
        count = sum(known is hook for known in table.values())
        assert count == 1 or (count == 0 and not HELD), hook
    for name, thing in things.items():
        if isinstance(thing, nn.Module):
            seen[name] = look_at_model(thing)
        elif isinstance(thing, torch.optim.Optimizer):
            hooks = (thing._optimizer_step_pre_hooks, thing._optimizer_step_post_hooks)
            seen[name] = plain(thing.state_dict()), [names(table.values()) for table in hooks]
        elif isinstance(thing, Path):
            seen[name] = {file.name: file.read_bytes() for file in sorted(thing.rglob("*")) if file.is_file()}
        elif hasattr(thing, "_state"):  # not state_dict(), which looks for what was written
            seen[name] = plain(thing._state())
        elif hasattr(thing, "_pruners") and hasattr(thing, "step_count"):
            seen[name] = thing.step_count, [plain(pruner._state()) for pruner in thing._pruners]
        elif hasattr(thing, "epoch"):
            seen[name] = plain(thing.state_dict())
    return seen


def look_at_model(model: nn.Module) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        tables = {key: value for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)}
        seen[name] = {
            "class": (type(module), type(module).__name__, getattr(type(module), "_gated_attributes", ())),
            "attributes": sorted(vars(module)),
            "flag": module.training,
            "children": list(module._modules),
            "parameters": {key: look_at_parameter(one) for key, one in module._parameters.items()},
            "buffers": {key: plain(one) for key, one in module._buffers.items()},
            "not saved": sorted(module._non_persistent_buffers_set),
            "hooks": {key: names(table.values()) for key, table in tables.items()},
            "others": {
                key: plain(value)
                for key, value in vars(module).items()
                if isinstance(value, (int, float, str, tuple, Tensor)) and key != "stream"
            },
        }
    seen["masks"] = {
        target.name: (
            plain(mask.mask),
            plain(mask.parked),
            mask.unit,
            mask.parks,
            mask.is_raw,
            mask.is_written(),
            len(mask.followers),
            HELD.get(id(target.parameter)) is mask,
        )
        for target, mask in masks_by_target(model).items()
    }
    seen["held"] = len(holds_in(model))
    return seen


def look_at_parameter(parameter: nn.Parameter | None) -> Any:
    if parameter is None:
        return None
    hooks = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    return (
        plain(parameter),
        parameter.requires_grad,
        plain(parameter.grad),
        [names((table or {}).values()) for table in hooks],
    )


def names(functions: Iterable[Any], but: Iterable[Any] = ()) -> list[str]:
    without = list(but)
    return [
        getattr(getattr(one, "func", one), "__qualname__", type(one).__name__)
        for one in functions
        if not any(one is other for other in without)
    ]


def plain(value: Any) -> Any:
    """Return a value whose bits == compares."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return tuple(data.shape), str(data.dtype), data.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Name what differs."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            text
            for key in keys
            for text in (
                differences(one[key], other[key], f"{path}/{key}")
                if key in one and key in other
                else [f"{path}/{key} {'lost' if key in one else 'new'}"]
            )
        ]
    return [] if one == other else [f"{path}: {one!r:.100} != {other!r:.100}"]


def check(
    make: Callable[[], Things], call: Callable[[Things], object], lines: Callable[[int], Iterable[int]]
) -> None:
    """Interrupt a call at lines of it, each time on fresh things; assert that they are as before, or as after.

    Args:
        make: makes what the call works on, always the same.
        call: the call.
        lines: which lines to stop at, of so many.
    """
    call(fresh(make))  # what is imported and cached at the first time
    things = fresh(make)
    before = look(things)
    call(things)
    done = look(things)
    things = fresh(make)
    total = count_lines(lambda: call(things))
    broken: dict[str, list[str]] = {}
    for n in lines(total):
        things, fault = fresh(make), Fault(n)
        try:
            if not fault.run(partial(call, things)):
                continue
            after = look(things)
            wrong = differences(before, after)
            if wrong and differences(done, after):
                broken[fault.place] = wrong
                continue
            if not wrong:
                call(things)
                again = look(things)
                if differences(done, again):
                    broken[fault.place + ", again"] = differences(done, again)
        except Exception as error:
            broken[fault.place] = [repr(error)]
    shown = "\n".join(f"{place}: {'; '.join(wrong[:3])}" for place, wrong in broken.items())
    assert not broken, f"half done where it was interrupted ({len(broken)} places of {total} lines):\n{shown}"


def fresh(make: Callable[[], Things]) -> Things:
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return make()
