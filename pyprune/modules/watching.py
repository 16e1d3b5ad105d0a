"""Where what writes to held parameters is seen: before forward passes, saving, and when parameters are assigned.

``load_state_dict``, ``copy_`` and optimizers that are not torch's move the version counter of a parameter. A forward
pre-hook compares it. It adds nothing to the forward pass but that look, and while a model is compiled or exported not
even that: nothing is traced that is not in the dense model.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_module_registration_hooks,
    _global_parameter_registration_hooks,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune.modules.attachments import MASKS
from pyprune.modules.holding import HELD, HOOKS, Hold, MasksOfModule
from pyprune.modules.sharding import is_sharded
from pyprune.modules.zeros import clear, settle, settle_written

# ---- before a forward pass ----


def before_forward(module: nn.Module, args: object) -> None:
    """Hold the zeros of a module's own parameters if something wrote to them (a forward pre-hook)."""
    if torch.compiler.is_compiling():
        return
    holds: dict[str, Hold] = module.__dict__.get(MASKS, {})
    written = []
    for attribute, hold in holds.items():
        is_there = module._parameters.get(attribute) is hold.parameter
        hold.watch_gradient()
        if not is_there or (not hold.is_raw and hold.is_written()):
            hold.add_place(module, attribute)  # copies do not know theirs
            if is_there and hold.parameter is not None:
                written.append(hold)
    if written:
        settle(written)


def before_forward_below(module: nn.Module, args: object) -> None:
    """Do what `before_forward` does for a module whose parts are not called or may not have hooks."""
    if not torch.compiler.is_compiling():
        for part in module.modules():
            before_forward(part, args)


def before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Let what is saved have the zeros, whatever wrote to the parameters, through ``.data`` too."""
    before_forward(module, ())
    if not torch.compiler.is_compiling():
        clear(hold for hold in module.__dict__.get(MASKS, {}).values() if not hold.is_raw)


def watch(model: nn.Module) -> None:
    """Give the modules with masks, in a model or a part of one, their look before a forward pass.

    Hooks in a ``nn.TransformerEncoderLayer`` would switch its fast path off, so the look is in what is around it. The
    parts of attention and of lists of parameters are not called by themselves.
    """
    for module, hook in _watchers(model, None, set()):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, prepend=True)
    for module in filter(_has_masks, model.modules()):
        if before_state_dict not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(before_state_dict)


# They hold modules or parameters, and are not called.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


def _watchers(
    module: nn.Module, around: nn.Module | None, seen: set[nn.Module]
) -> Iterator[tuple[nn.Module, Callable[[nn.Module, object], None]]]:
    """Yield which modules look, and whether at themselves or at all of their parts."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, nn.TransformerEncoderLayer):
        if around is not None and _has_masks_below(module):
            yield around, before_forward_below
        return
    if isinstance(module, nn.MultiheadAttention):
        if _has_masks_below(module):
            yield module, before_forward_below
        return
    is_called = not isinstance(module, _CONTAINERS)
    if _has_masks(module):
        if is_called:
            yield module, before_forward
        elif around is not None:
            yield around, before_forward_below
    for child in module.children():
        yield from _watchers(child, module if is_called else around, seen)


def unwatch(model: nn.Module) -> None:
    """Take off what `watch` put on, of modules that have no masks any more."""
    for module in model.modules():
        for attribute in list(module.__dict__.get(MASKS, {})):
            if module._parameters.get(attribute) is None:  # None was assigned
                module.__dict__[MASKS][attribute].take_off(module, attribute)
        if not _has_masks(module):
            _remove_hook(module, before_forward)
            _remove_hook(module, before_state_dict)
        if before_forward_below in module._forward_pre_hooks.values() and not _has_masks_below(module):
            _remove_hook(module, before_forward_below)


def _remove_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks):
        for key in [key for key, known in hooks.items() if known is hook]:
            del hooks[key]


def _has_masks(module: nn.Module) -> bool:
    return MASKS in module.__dict__


def _has_masks_below(module: nn.Module) -> bool:
    return any(map(_has_masks, module.modules()))


# ---- when a parameter is assigned ----


def _on_registration(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
    """Let a mask follow when a `Parameter` is assigned to its place: its values are the new raw ones."""
    if not HELD or torch.compiler.is_compiling():
        return
    holds: dict[str, Hold] = module.__dict__.get(MASKS, {})
    hold = holds.get(attribute)
    if hold is None:
        # A held one that comes to another place takes its mask along; a list may just list a model's parameters.
        held = None if isinstance(module, _CONTAINERS) else HELD.get(id(parameter))
        if held is not None and held.parameter is parameter:
            module.__dict__.setdefault(MASKS, MasksOfModule())[attribute] = held
            held.add_place(module, attribute)
            watch(module)
        return
    if parameter is hold.parameter:
        _clear_unseen([hold])
        return
    problem = ""
    if is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter):
        problem = f"a {type(parameter).__name__}"
    elif parameter.shape != hold._mask.shape:
        problem = f"a parameter of shape {tuple(parameter.shape)}"
    if problem:
        raise ValueError(
            f"{attribute!r} of a {type(module).__name__} has a mask for shape {tuple(hold._mask.shape)}, and cannot "
            f"become {problem}; call pyprune.strip first"
        )
    hold.move_to(module, attribute, parameter)


def _on_module_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Zero what was written through ``.data`` where a layer comes to its place, as PEFT does after it merged."""
    if HELD and module is not None and MASKS in module.__dict__ and not torch.compiler.is_compiling():
        _clear_unseen(module.__dict__[MASKS].values())


def _clear_unseen(holds: Iterable[Hold]) -> None:
    holds = [hold for hold in holds if not hold.is_raw]
    settle_written(holds)
    clear(holds)


HOOKS.extend(
    [
        (_global_parameter_registration_hooks, register_module_parameter_registration_hook, _on_registration),
        (_global_module_registration_hooks, register_module_module_registration_hook, _on_module_registration),
    ]
)
