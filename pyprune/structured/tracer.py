"""Gives rules the tensors of a forward pass, and takes their answers.

Two modes of torch: one sees operators, and one above it sees calls of attention, and sizes that come from attributes.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pyprune.structured.coordinates import Axes, Coordinates, Factor
from pyprune.structured.rules.call import Call, Contraction, tensors_in
from pyprune.structured.rules.elementwise import unknown
from pyprune.structured.rules.table import RULES
from pyprune.structured.seen import Product, Reading, Trace, Traced
from pyprune.structured.size_uses import OpenSize, SizeUse, along, size_uses

NOT_REACHED = "not reached by the examples"
_HEADS = "nn.MultiheadAttention computes the size of a head from its width"


class Tracer:
    """What both modes write into."""

    def __init__(self, model: nn.Module, on_reading: Callable[[Reading], None] | None) -> None:
        self.model = model
        self.on_reading = on_reading
        self.paused = False
        self.modules: list[str] = []
        coordinates = Coordinates()
        self._known: Any = WeakIdKeyDictionary()
        self._by_memory: dict[tuple[Any, ...], Axes] = {}
        self._reached: set[int] = set()
        self._own: dict[int, Traced] = {}
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
        found = []
        for key, tensor in tensors.items():
            has_units = tensor.is_floating_point() or tensor.is_complex()
            coords = tuple(coordinates.new(size) if has_units and size > 1 else None for size in tensor.shape)
            one = Traced(tuple(names[key]), tensor, coords)
            found.append(one)
            self._own[key] = one
            axes = self._axes_of(one)
            self._known[tensor] = axes
            self._by_memory[_memory(tensor)] = axes
        self.trace = Trace(coordinates, found)
        self._by_key = {_memory(one.tensor): one for one in found}

    def _axes_of(self, traced: Traced) -> Axes:
        factors = []
        for axis, coords in enumerate(traced.coords):
            if coords is not None:
                fixed = np.ones(len(coords), bool)
                factors.append(Factor((axis,), coords, fixed))
        return Axes(tuple(traced.tensor.shape), tuple(factors), "parameters")

    def watch_modules(self) -> None:
        """Keep a stack of the modules that run."""
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def enter(*_: Any, name: str = name) -> None:
                self.modules.append(name)

            def leave(*_: Any) -> None:
                if self.modules:
                    self.modules.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)

    # ---- axes of tensors ----

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of a tensor's axes."""
        found = self._known.get(tensor)
        if found is None:
            found = self._by_memory.get(_memory(tensor))
        if found is None:
            source: Any = "number" if tensor.dim() == 0 else "inputs"
            return Axes(tuple(tensor.shape), (), source)
        return found  # type: ignore[no-any-return]

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Remember that parameters were used."""
        for tensor in tensors:
            if id(tensor) in self._own:
                self._reached.add(id(tensor))
            elif (one := self._by_key.get(_memory(tensor))) is not None:
                self._reached.add(id(one.tensor))

    def learn(self, made: Any, result: Axes | list[Axes]) -> None:
        """Take in the answer of a rule."""
        if isinstance(made, Tensor):
            if isinstance(result, list):
                result = result[0]
            self._known[made] = result
        elif isinstance(result, list):
            for tensor, axes in zip(tensors_in([made]), result, strict=False):
                self._known[tensor] = axes

    def forget_fixed(self, tensor: Tensor) -> None:
        """A part of this tensor's memory was written to: whatever lies there may depend on inputs."""
        place = tensor.untyped_storage().data_ptr()
        for other in list(self._known.keys()):
            if (
                other.layout is torch.strided
                and other.untyped_storage().data_ptr() == place
                and id(other) not in self._own
            ):
                axes = self._known[other]
                factors = tuple(replace(one, fixed=np.zeros(one.coords.shape, bool)) for one in axes.factors)
                self._known[other] = replace(axes, factors=factors, source="inputs")

    def apply(self, name: str, args: dict[str, Any], made: Any, *, rule: Any = None) -> None:
        """Let a rule say what an operation did; if there is none, or it fails, what it touched stays."""
        call = Call(
            name,
            args,
            made,
            self.axes,
            self.trace.coordinates,
            self._on_contraction,
            self._on_product,
            self._on_size,
            values=self.on_reading is not None,
        )
        tensors = call.tensors()
        self.reach(tensors)
        self.trace.coordinates.place = self.modules[-1] if self.modules else ""
        if rule is None:
            if any(self.axes(tensor).factors for tensor in tensors):
                self.trace.unknown[name] = self.trace.unknown.get(name, 0) + 1
            rule = unknown
        try:
            result = rule(call)
            _check(made, result)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            self.trace.unknown[f"{name} ({type(error).__name__}: {error})"] = 1
            result = unknown(call)
        self.learn(made, result)

    def _on_contraction(self, contraction: Contraction) -> None:
        if self.on_reading is not None:
            self.on_reading(Reading(contraction, self.modules[-1] if self.modules else ""))

    def _on_product(self, macs: int, factors: list[Factor]) -> None:
        self.trace.products.append(Product(macs, tuple(factor.coords for factor in factors)))

    def _on_size(self, expression: Any, factor: Factor, axis: int) -> None:
        entries = along(Axes((), (factor,)), axis)
        assert entries is not None
        self.trace.sizes.append(SizeUse(expression, len(entries), entries))

    def finish(self) -> None:
        """What was never used stays."""
        for one in self.trace.tensors:
            if id(one.tensor) not in self._reached:
                for coords in one.coords:
                    if coords is not None:
                        self.trace.coordinates.stay(coords, NOT_REACHED)


def _check(made: Any, result: Axes | list[Axes]) -> None:
    results = result if isinstance(result, list) else [result]
    for tensor, axes in zip(tensors_in([made]), results, strict=False):
        for factor in axes.factors:
            sizes = tuple(tensor.shape[axis] for axis in factor.axes)
            assert sizes == factor.coords.shape == factor.fixed.shape, (
                sizes,
                factor.coords.shape,
                factor.fixed.shape,
            )


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies; parameters' `.data` lies where they do."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return (id(tensor),)
    try:
        return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    except RuntimeError:  # wrapper subclasses have no memory of their own
        return (id(tensor),)


class Operators(TorchDispatchMode):
    """Sees operators."""

    supports_higher_order_operators = True

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if tracer.paused:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):  # flex_attention and the like
            made = func(*args, **kwargs)
            tracer.apply(str(func), dict(enumerate(tensors_in([*args, *kwargs.values()]))), made)  # type: ignore[arg-type]
            return made
        packet = func.overloadpacket.__name__
        name = packet.removesuffix("_") if packet.rstrip("_") != "" else packet
        rule = RULES.get(packet, RULES.get(name))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = RULES["where"]
        if rule is None and func.namespace == "pyprune":
            rule = _of_gates
        if rule is None:
            with self:  # under inference_mode linear and matmul arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        bound = _bound(func, args, kwargs)
        written = [
            bound[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and isinstance(bound.get(argument.name), Tensor)
        ]
        before = [tracer.axes(tensor) for tensor in written]
        made = func(*args, **kwargs)
        tracer.apply(name, bound, made, rule=rule)
        for tensor, axes in zip(written, before, strict=True):
            _written(tracer, tensor, axes)
        return made


def _of_gates(call: Call) -> Any:
    """A gate multiplies the weight that comes first."""
    made = call.made if isinstance(call.made, Tensor) else next(iter(tensors_in([call.made])))
    tensors = call.tensors()
    axes = call.axes(tensors[0])
    if axes.shape != tuple(made.shape):
        return unknown(call)
    for tensor in tensors[1:]:
        for factor in call.axes(tensor).factors:
            call.coordinates.stay(factor.coords, "of a gate")
    return (
        axes
        if isinstance(call.made, Tensor)
        else [axes] + [Axes(tuple(t.shape)) for t in list(tensors_in([call.made]))[1:]]
    )


def _written(tracer: Tracer, tensor: Tensor, before: Axes) -> None:
    """A tensor was written to in place: if it is a part of another, that does not get the new units."""
    if tensor.layout is not torch.strided:
        return
    is_part = tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()
    if not is_part:
        return
    after = tracer.axes(tensor)
    had = {axis for factor in before.factors for axis in factor.axes}
    for factor in after.factors:
        if not set(factor.axes) <= had:
            tracer.trace.coordinates.stay(factor.coords, "it is written into a part of another tensor")
    tracer.forget_fixed(tensor)


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = {}
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            bound[argument.name] = args[place]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


class Calls(TorchFunctionMode):
    """Sees calls of torch's functions: attention as a whole, and sizes that come from attributes."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        name = getattr(func, "__name__", "").strip("_")
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        made = func(*args, **kwargs)
        if name == "multi_head_attention_forward":
            for tensor in tensors_in([args[4:14], *kwargs.values()]):
                self._keep_heads(tensor)
            for tensor in tensors_in(
                [*args[:1], kwargs.get("query")]
            ):  # its width is compared with that of all heads
                for factor in tracer.axes(tensor).factors:
                    tracer.trace.coordinates.hold(factor, [tensor.dim() - 1], _HEADS)
        for use in size_uses(name, args, kwargs, made, tracer.axes):
            if isinstance(use, OpenSize):  # it will meet what has units, or not
                axes = tracer.axes(use.tensor)
                stretched = {**axes.stretched, use.axis: use.expression}
                tracer._known[use.tensor] = replace(axes, stretched=stretched)
            else:
                tracer.trace.sizes.append(use)
        return made

    def _keep_heads(self, tensor: Tensor) -> None:
        """Outputs of projections in, inputs of the one out."""
        tracer = self.tracer
        owner = tracer._own.get(id(tensor))
        if owner is None:
            return
        is_out = any(name.endswith("out_proj.weight") for name in owner.names)
        if any(name.endswith("out_proj.bias") for name in owner.names):
            return
        axis = 1 if is_out else tensor.dim() - 1 if "bias_" in owner.name.rpartition(".")[2] else 0
        coords = owner.coords[axis]
        if coords is not None:
            tracer.trace.coordinates.stay(coords, _HEADS)

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracer = self.tracer
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        before = tracer.paused
        tracer.paused = True
        try:
            made = func(*args, **kwargs)
        finally:
            tracer.paused = before
        if not tracer.paused:
            tracer.apply("attention", bound, made, rule=RULES["scaled_dot_product_attention"])
        return made
