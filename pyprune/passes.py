"""Where a forward pass of a model begins and ends: with the outermost call of a module that has gates below it.

ARCHITECTURE.md says why it is done so.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyprune.attachments import copied_class, dense_modules
from pyprune.gates import gates_of
from pyprune.sampling import Sampler


@contextmanager
def one_gate_sample(model: nn.Module) -> Iterator[None]:
    """Let all gates of a model keep one sample, for code that calls parts of the model one by one.

    A call of a model that `prune` put gates on does this by itself. It is needed around code that goes past that,
    ``model.encode(x)`` or ``model.forward(x)``, and around the use of gates that were put on by hand.

    Example:
        >>> import torch
        >>> from pyprune import StochasticGate
        >>> gate, weight = StochasticGate((100,), keep_probability=0.5), torch.ones(100)
        >>> with one_gate_sample(gate):
        ...     bool((gate(weight) == gate(weight)).all())
        True
    """
    opened = _begin(model, None)
    try:
        yield
    finally:
        _end(opened)


def share_samples(model: nn.Module) -> None:
    """Make each call of the model, or of a part of it, a pass in which all gates keep one sample."""
    sampler = Sampler()
    for stream, gate in enumerate(gates_of(model)):
        gate.sampler, gate.stream = sampler, stream
    for module in {module for _, module in dense_modules(model)}:
        if not isinstance(module, _CONTAINERS) and gates_of(module):
            _bind(module, sampler)


def unshare_samples(model: nn.Module) -> None:
    """Undo `share_samples`: every module has the class again that it had before."""
    for module in model.modules():
        _unbind(module)


def _begin(model: nn.Module, opener: nn.Module | None) -> list[Sampler]:
    """Open a pass for all gates of a model that are not in one."""
    devices: dict[Sampler, set[torch.device]] = {}
    for gate in gates_of(model):
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


def _bind(module: nn.Module, sampler: Sampler) -> None:
    """Let the outermost calls of a module be passes."""
    module._gate_sampler = sampler  # type: ignore[assignment]
    cls = type(module)
    if hasattr(cls, _DENSE):
        return
    if parametrize.is_parametrized(module):
        # The class that parametrize made must stay the first.
        module.__class__ = copied_class(cls, tuple(map(_with_passes, cls.__bases__)))
    else:
        module.__class__ = _with_passes(cls)  # type: ignore[arg-type]


def _unbind(module: nn.Module) -> None:
    module.__dict__.pop("_gate_sampler", None)
    module.__class__ = _without_passes(type(module))


# Names, in a class whose calls are passes, the class that it was made from.
_DENSE = "_class_without_passes"


@functools.cache
def _with_passes(cls: Any) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        sampler = self.__dict__.get("_gate_sampler")
        opened = [] if sampler is None or sampler.is_open else _begin(self, self)
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            _end(opened)

    # A pass begins and ends outside of compiled code, unless its caller is compiled too. So it is noted, and a
    # compiled block can be checkpointed.
    _run_in_python(__call__, callees=False)
    like_it = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {"__call__": __call__, _DENSE: cls, **like_it})


def _without_passes(cls: type) -> type:
    if not hasattr(cls, _DENSE):
        return cls
    if _DENSE in vars(cls):
        return cast(type, vars(cls)[_DENSE])
    return copied_class(cls, tuple(map(_without_passes, cls.__bases__)))


def _run_in_python(function: Any, *, callees: bool) -> None:
    """Keep torch.compile from beginning with a function; what it calls may be compiled, unless ``callees`` say no."""
    dynamo = torch._C._dynamo.eval_frame
    if not hasattr(dynamo, "set_code_exec_strategy"):
        return  # in another torch, a compiled block that begins a pass cannot be checkpointed
    skip, may_compile = dynamo._FrameAction.SKIP, dynamo._FrameAction.DEFAULT
    strategy = dynamo._FrameExecStrategy(skip, skip if callees else may_compile)
    dynamo.set_code_exec_strategy(function.__code__, strategy)


_run_in_python(_begin, callees=True)
_run_in_python(_end, callees=True)
