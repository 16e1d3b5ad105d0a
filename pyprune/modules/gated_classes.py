"""The classes of modules with gates: a gated attribute is computed at each reading, and an outermost call is a pass.

There is one class for each class of the user and set of gated attributes, so models of one shape share compiled code,
and pickle finds its way by the class of the user. `forward_pass` says what a pass is.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyprune.modules.attachments import Attachment, gate_name
from pyprune.modules.gated_attributes import check_fits, computed_attributes
from pyprune.modules.sampling import Sampler
from pyprune.modules.undo import undoing

# The attribute that tells a module whether a pass is open.
SAMPLER = "_gate_sampler"


class _GatedModule(nn.Module):
    """The first base of a class with gates; the second is the class that it was made from."""

    _dense_class: type
    _gated_attributes: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A registry of the user's classes must not learn of this one.
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # now: _enter may change the class
        opened = _enter(self)
        try:
            return call(*args, **kwargs)
        finally:
            end(opened)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # What was compiled before it was pruned keeps the old __call__, which comes here.
        call = super()._call_impl
        opened = _enter(self)
        try:
            return call(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            end(opened)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set a parameter, also the raw one below a gate: what ``module.weight = parameter`` comes to."""
        if name not in self._gated_attributes:
            return super().register_parameter(name, param)
        check_fits(name, self._modules[gate_name(name)], param)
        with undoing(partial(set_class, self, type(self))):
            # torch asks whether the attribute is there, for which the gate would draw a sample.
            set_class(self, self._dense_class)
            self.register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self._gated_attributes:
            raise ValueError(
                f"{name} of {type(self).__name__} carries a gate, so it cannot be deleted, or be computed by "
                "something else (a parametrization, weight_norm); call pyprune.strip first"
            )
        super().__delattr__(name)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter of a name, the raw one if it is gated."""
        path, _, name = target.rpartition(".")
        raw = self.get_submodule(path)._parameters.get(name)
        return super().get_parameter(target) if raw is None else raw

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Version 0.1.0 kept gates and weights elsewhere.
        for name in self._gated_attributes:
            was = f"{prefix}parametrizations.{name}."
            for old, new in ((f"{was}original", name), (f"{was}0.logits", f"{gate_name(name)}.logits")):
                if old in state_dict:
                    state_dict[prefix + new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not has_gates(self):
            forget_passes(self)  # its parts were stripped one by one
            return self.__reduce_ex__(protocol)
        # By the class of the user, which pickle can find.
        make, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        dense = tuple(_without_gates(value) if value is type(self) else value for value in arguments)
        return _remake, (make, dense, self._gated_attributes), *state


def _remake(make: Callable[..., nn.Module], arguments: tuple[Any, ...], attributes: tuple[str, ...]) -> nn.Module:
    module = make(*arguments)
    set_class(module, class_with_gates(module, attributes))
    return module


def _deepcopied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module by the method of its class, which may look at the class, as that of torch.fx does."""
    cls, attributes = type(module), gated_attributes(module)
    with undoing(partial(set_class, module, cls)):
        set_class(module, _without_gates(cls))
        copied: nn.Module = copy.deepcopy(module, memo)
    copied.__dict__[SAMPLER] = copy.deepcopy(module.__dict__.get(SAMPLER), memo)
    for name in map(gate_name, attributes):
        copied._modules.setdefault(name, copy.deepcopy(module._modules[name], memo))
    set_class(copied, class_with_gates(copied, attributes))
    return copied


# ---- passes ----


def begin(model: nn.Module, opener: nn.Module | None) -> list[Any]:
    """Open a pass for all gates of a model that are not in one, and return these."""
    seated: dict[Sampler, dict[torch.device, list[Any]]] = {}
    # Only gates are attachments and modules too; what they are is not known down here.
    gates: list[Any] = [
        module for module in model.modules() if isinstance(module, Attachment) and hasattr(module, "sampler")
    ]
    if opener is not None and not gates and not torch.compiler.is_compiling():
        forget_passes(opener)  # its parts were stripped one by one
    gates = [gate for gate in gates if not gate.sampler.is_open]
    for gate in gates:
        by_device = seated.setdefault(gate.sampler, {})
        if gate.training:
            by_device.setdefault(gate.logits.device, []).append(gate)
    for sampler, by_device in seated.items():
        sampler.begin(by_device, opener)
    return gates


def end(gates: list[Any]) -> None:
    """Close the pass that `begin` opened for gates."""
    for gate in gates:
        gate.seat.seed = None
        if gate.sampler.is_open:
            gate.sampler.end()


def _enter(module: nn.Module) -> list[Any]:
    sampler = module.__dict__.get(SAMPLER)
    return [] if sampler is None or sampler.is_open else begin(module, module)


def has_gates(module: nn.Module) -> bool:
    """Whether there are gates in a module, at any depth."""
    return any(isinstance(one, Attachment) for one in module.modules())


def forget_passes(module: nn.Module) -> None:
    """Let calls of a module be no passes any more; what it has gates on stays gated."""
    module.__dict__.pop(SAMPLER, None)
    attributes = gated_attributes(module)
    set_class(module, class_with_gates(module, attributes) if attributes else _without_gates(type(module)))


# ---- gated attributes ----


def put_gate(module: nn.Module, attribute: str, gate: nn.Module) -> None:
    """Let an attribute of a module be what a gate makes of its parameter; change nothing if that cannot be.

    Raises:
        ValueError: with what is in the way.
    """
    name, cls = gate_name(attribute), type(module)
    problem = ""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        problem = "it would take a gate for one of its parts; move the parameter to a module of its own"
    elif isinstance(module, torch.jit.ScriptModule):
        problem = "torch.jit compiled it; put gates on before"
    elif attribute not in module._parameters:
        problem = f"{attribute} is no parameter of it"
    elif hasattr(cls, attribute):
        problem = "its class computes the attribute itself"
    elif name in module._modules or hasattr(module, name):
        problem = f"it has another {name}"
    if problem:
        raise ValueError(f"{cls.__name__} cannot have a gate on {attribute}: {problem}")
    gated = class_with_gates(module, (*gated_attributes(module), attribute))
    set_class(module, gated)
    module._modules[name] = gate
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def take_gate(module: nn.Module, attribute: str) -> None:
    """Undo `put_gate`. What has no gates left is no `_GatedModule` any more, and knows of no passes."""
    del module._modules[gate_name(attribute)]
    left = tuple(name for name in gated_attributes(module) if name != attribute)
    if left or (SAMPLER in module.__dict__ and has_gates(module)):
        set_class(module, class_with_gates(module, left))
    else:
        module.__dict__.pop(SAMPLER, None)
        set_class(module, _without_gates(type(module)))
    if isinstance(module, nn.RNNBase) and not left:
        module._init_flat_weights()


def gated_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module that are gated."""
    return cast(tuple[str, ...], getattr(type(module), "_gated_attributes", ()))


# ---- classes ----

# For as long as there are instances.
_MADE: "WeakValueDictionary[tuple[type, tuple[str, ...]], type]" = WeakValueDictionary()


def class_with_gates(module: nn.Module, attributes: Iterable[str]) -> type:
    """Return the class for a module of this class with gates on these attributes, or with passes only."""
    names = tuple(sorted(attributes))
    return _rebased(type(module), names, parametrize.is_parametrized(module))


def set_class(module: nn.Module, cls: type) -> None:
    """Make a module an instance of another class."""
    if cls is not type(module):
        # Past a __setattr__ of the user.
        object.__setattr__(module, "__class__", cls)


def _rebased(cls: type, attributes: tuple[str, ...], is_parametrized: bool) -> type:
    if "_dense_class" in vars(cls):
        return _with_gates(vars(cls)["_dense_class"], attributes)
    if is_parametrized or issubclass(cls, _GatedModule):
        # What parametrize or FSDP made must stay the first.
        bases = (
            _rebased(base, attributes, False) if is_parametrized or issubclass(base, _GatedModule) else base
            for base in cls.__bases__
        )
        return _copied_class(cls, tuple(bases))
    return _with_gates(cls, attributes)


def _with_gates(cls: type, attributes: tuple[str, ...]) -> type:
    made = _MADE.get((cls, attributes))
    if made is None:
        namespace = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace |= {"_dense_class": cls, "_gated_attributes": attributes}
        if hasattr(cls, "__deepcopy__"):
            namespace["__deepcopy__"] = _deepcopied
        namespace |= computed_attributes(cls, attributes)
        made = _MADE[cls, attributes] = type(cls.__name__, (_GatedModule, cls), namespace)
    return made


def _without_gates(cls: type) -> type:
    if not issubclass(cls, _GatedModule):
        return cls
    if "_dense_class" in vars(cls):
        return cast(type, vars(cls)["_dense_class"])
    return _copied_class(cls, tuple(map(_without_gates, cls.__bases__)))


class _Quiet:
    def __init_subclass__(cls, **kwargs: object) -> None:
        pass


def _copied_class(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class like this one, with other bases, whose ``__init_subclass__`` does not hear of it."""
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    copied = type(cls.__name__, (_Quiet, *bases), namespace)
    copied.__bases__ = bases
    return copied


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
_run_in_python(_GatedModule.__call__, callees=False)
_run_in_python(_GatedModule._call_impl, callees=False)
_run_in_python(_enter, callees=True)
_run_in_python(begin, callees=True)
_run_in_python(end, callees=True)
