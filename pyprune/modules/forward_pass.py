"""Where a forward pass of a model begins and ends: with the outermost call of a module that has gates below it.

All uses of a weight in one pass must see the same sample of its gate: tied owners, a module that is called twice,
and the recomputation of checkpointed activations. A gate sees only a weight, so something has to tell it the pass.

- Calls inside the outermost one change nothing. Modules with gates below them get a subclass of their class whose
  ``__call__`` opens a pass and closes it in ``finally``. Hooks would not do: an interrupt from the keyboard goes
  past them and leaves the pass open, and attention leaves its fast path when it sees any. ``_call_impl`` does the
  same, because what was compiled before it was pruned has kept the old ``__call__``. When a module's parts have
  been stripped one by one, its next call or copy gives it its class back. A ``forward`` that is a generator runs
  outside of its pass.
- torch.compile: that ``__call__`` is marked to run in Python, and what it calls is compiled with the seed as an
  input, so a compiled block shares the sample of its eager model, and can be checkpointed. If the caller is
  compiled as a whole, the draw is part of the graph, and checkpointing too. Nothing that changes per step is
  guarded. One gap is left: a block whose ``forward`` is torch's own (``nn.Sequential``), compiled by
  ``torch.compile(block)`` and checkpointed from outside, draws anew in the recomputation; torch notices this unless
  the checkpoint is reentrant.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyprune.modules.attachments import (
    Attachment,
    Owner,
    attach,
    check_module,
    dense_modules,
    detach,
    shared_attachment,
)
from pyprune.modules.gates import StochasticGate, gates_of
from pyprune.modules.sampling import Sampler


@contextmanager
def one_gate_sample(model: nn.Module) -> Iterator[None]:
    """Let all gates of a model keep one sample, for code that calls parts of the model one by one.

    A call of a model that `prune` put gates on does this by itself. It is needed around code that goes past that:
    ``model.encode(x)`` or ``model.forward(x)``, a ``forward`` that is a generator and so runs when its call is over,
    and the use of gates that were put on by hand. `torch.compile` may come before or after `prune`, and around this.

    Args:
        model: the model, or the part, whose gates keep their sample; a pass that is open already goes on.

    Raises:
        TypeError: if it is no module.

    Example:
        >>> import torch
        >>> from pyprune import StochasticGate
        >>> gate, weight = StochasticGate((100,), keep_probability=0.5), torch.ones(100)
        >>> with one_gate_sample(gate):
        ...     bool((gate(weight) == gate(weight)).all())
        True
    """
    check_module(model)
    opened = _begin(model, None)
    try:
        yield
    finally:
        _end(opened)


def attach_and_share(model: nn.Module, attachments: Sequence[tuple[Sequence[Owner], Attachment]]) -> None:
    """Put masks and gates on a model, and let its gates share samples; change nothing if something refuses.

    Raises:
        ValueError: if the model is in DistributedDataParallel already, which would not know the new logits.
    """
    adds_logits = any(
        isinstance(attachment, StochasticGate) and shared_attachment(owners) is None
        for owners, attachment in attachments
    )
    if adds_logits and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel, which would not average the gradients of new gates; put gates "
            "on first, then wrap"
        )
    new = attach(attachments)
    try:
        share_samples(model)
    except BaseException:
        detach(new)
        raise


def share_samples(model: nn.Module) -> None:
    """Make each call of the model, or of a part of it, a pass in which all gates keep one sample.

    It changes all or nothing.
    """
    sampler = Sampler()
    classes = {
        module: _class_with_passes(module)
        for _, module in dense_modules(model)
        if not isinstance(module, _CONTAINERS) and gates_of(module)
    }
    for stream, gate in enumerate(gates_of(model)):
        gate.sampler, gate.stream = sampler, stream
    for module, cls in classes.items():
        module.__dict__[_SAMPLER] = sampler
        _set_class(module, cls)


def unshare_samples(model: nn.Module) -> None:
    """Undo `share_samples`: every module has the class again that it had before."""
    for module in model.modules():
        _unbind(module)


def _begin(model: nn.Module, opener: nn.Module | None) -> list[Sampler]:
    """Open a pass for all gates of a model that are not in one."""
    devices: dict[Sampler, set[torch.device]] = {}
    gates = gates_of(model)
    if opener is not None and not gates and not torch.compiler.is_compiling():
        _unbind(opener)  # its parts were stripped one by one
    for gate in gates:
        if not gate.sampler.is_open:
            devices.setdefault(gate.sampler, set()).update({gate.logits.device} if gate.training else ())
    for sampler, places in devices.items():
        sampler.begin(places, opener)
    return list(devices)


def _end(opened: list[Sampler]) -> None:
    for sampler in opened:
        sampler.end()


# They hold modules or parameters, and are not called.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# The attribute that tells a module whether a pass is open.
_SAMPLER = "_gate_sampler"


class _Passes(nn.Module):
    """The first base of a class whose outermost calls are passes; the second is the class that it was made from."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A registry of the user's classes must not learn of this one.
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # now: _enter may change the class
        opened = _enter(self)
        try:
            return call(*args, **kwargs)
        finally:
            _end(opened)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # What was compiled before it was pruned keeps the old __call__, which comes here.
        call = super()._call_impl
        opened = _enter(self)
        try:
            return call(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            _end(opened)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not gates_of(self):
            _unbind(self)  # its parts were stripped one by one
            return self.__reduce_ex__(protocol)
        # By the class of the user, which pickle can find; then the gated module inside says that it wants no pickle.
        make, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        dense = tuple(_without_passes(value) if value is type(self) else value for value in arguments)
        return _remake, (make, dense), *state


def _remake(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    _set_class(module, _with_passes(type(module)))
    return module


def _deepcopied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module by the method of its class, which may look at the class, as that of torch.fx does."""
    cls = type(module)
    _set_class(module, _without_passes(cls))
    try:
        copied: nn.Module = copy.deepcopy(module, memo)
    finally:
        _set_class(module, cls)
    copied.__dict__[_SAMPLER] = copy.deepcopy(module.__dict__.get(_SAMPLER), memo)
    _set_class(copied, _class_with_passes(copied))
    return copied


def _enter(module: nn.Module) -> list[Sampler]:
    sampler = module.__dict__.get(_SAMPLER)
    return [] if sampler is None or sampler.is_open else _begin(module, module)


# One subclass per class, for as long as there are instances.
_MADE: "WeakValueDictionary[type, type]" = WeakValueDictionary()


def _class_with_passes(module: nn.Module) -> type:
    cls = type(module)
    if issubclass(cls, _Passes):
        return cls
    if parametrize.is_parametrized(module):
        # The class that parametrize made must stay the first.
        return copied_class(cls, tuple(map(_with_passes, cls.__bases__)))
    return _with_passes(cls)


def _with_passes(cls: type) -> type:
    made = _MADE.get(cls)
    if made is None:
        like_it = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        if hasattr(cls, "__deepcopy__"):
            like_it["__deepcopy__"] = _deepcopied
        made = _MADE[cls] = type(cls.__name__, (_Passes, cls), like_it)
    return made


def _without_passes(cls: type) -> type:
    if not issubclass(cls, _Passes):
        return cls
    if cls.__bases__[0] is _Passes:
        return cls.__bases__[1]
    return copied_class(cls, tuple(map(_without_passes, cls.__bases__)))


def _unbind(module: nn.Module) -> None:
    module.__dict__.pop(_SAMPLER, None)
    _set_class(module, _without_passes(type(module)))


def _set_class(module: nn.Module, cls: type) -> None:
    if cls is not type(module):
        # Past a __setattr__ of the user.
        object.__setattr__(module, "__class__", cls)


def _run_in_python(function: Any, *, callees: bool) -> None:
    """Keep torch.compile from beginning with a function; what it calls may be compiled, unless ``callees`` say no."""
    dynamo = torch._C._dynamo.eval_frame
    if not hasattr(dynamo, "set_code_exec_strategy"):
        return  # in another torch, a compiled block that begins a pass cannot be checkpointed
    skip, may_compile = dynamo._FrameAction.SKIP, dynamo._FrameAction.DEFAULT
    strategy = dynamo._FrameExecStrategy(skip, skip if callees else may_compile)
    dynamo.set_code_exec_strategy(function.__code__, strategy)


# A pass begins and ends outside of compiled code, unless its caller is compiled too. So it is noted, and a compiled
# block can be checkpointed.
_run_in_python(_Passes.__call__, callees=False)
_run_in_python(_Passes._call_impl, callees=False)
_run_in_python(_enter, callees=True)
_run_in_python(_begin, callees=True)
_run_in_python(_end, callees=True)
