"""Run a model on examples, and see below autograd what operations tie: units, and what stays and why.

The rules are in `pyprune.structured.rules`; here is what gives them tensors and takes their answers: two modes of
torch, one that sees operators, and one above it that sees calls of attention, and sizes that come from attributes.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pyprune.modules.evaluation import evaluating, forward, recurrence_unfused, untouched, using
from pyprune.modules.undo import Before, undoing
from pyprune.structured.coordinates import Axes, Coordinates, Coords, Factor
from pyprune.structured.models import tensors_within
from pyprune.structured.rules.call import Call, Contraction, tensors_in
from pyprune.structured.rules.elementwise import unknown
from pyprune.structured.rules.table import RULES
from pyprune.structured.sizes import OpenSize, SizeUse, along, size_uses, sizes_known

OUTPUT = "an output of the model"
NOT_REACHED = "not reached by the examples"
_HEADS = "nn.MultiheadAttention computes the size of a head from its width"


@dataclass(frozen=True, eq=False)
class Traced:
    """A parameter or buffer, by all of its names, and its coordinates along each axis (None: of size 1)."""

    names: tuple[str, ...]
    tensor: Tensor
    coords: tuple[Coords | None, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Product:
    """Multiply-accumulates of one operation, and coordinates along each axis that they grow with."""

    macs: int
    factors: tuple[Coords, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """Entries that are multiplied and summed, and in which module."""

    contraction: Contraction
    module: str
    example: int


@dataclass(eq=False)
class Trace:
    """What was seen of a model."""

    coordinates: Coordinates
    tensors: list[Traced]
    products: list[Product] = field(default_factory=list)
    sizes: list[SizeUse] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


def trace(
    model: nn.Module,
    examples: Sequence[Any],
    on_reading: Callable[[Reading], None] | None = None,
) -> Trace:
    """Run a model on examples, and say what is coupled.

    Args:
        model: in whatever mode; it runs in evaluation.
        examples: each as for a forward pass.
        on_reading: told of what is multiplied and summed, while the tensors are there; then it is followed what does
            not depend on the inputs.
    """
    tracer = _Tracer(model, on_reading)
    stack = ExitStack()
    before = Before(model, with_attributes=False)
    with undoing(before.restore), undoing(stack.close):
        stack.enter_context(evaluating(model))
        stack.enter_context(untouched(model))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(recurrence_unfused())  # convolutions are slower then
        if "torch._dynamo" in sys.modules:  # to import it takes seconds, and nothing is compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_fast_paths())
        stack.enter_context(without_cache(model))
        stack.enter_context(sizes_known(model))
        tracer.watch_modules()
        for index, example in enumerate(examples):
            tracer.example = index
            with using(_Calls(tracer)), using(_Operators(tracer)):
                made = forward(model, example, "examples")
            for tensor in tensors_within(made):
                for factor in tracer.axes(tensor).factors:
                    tracer.trace.coordinates.stay(factor.coords, OUTPUT)
            tracer.trace.outputs.append(made)
        tracer.finish()
    return tracer.trace


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    with undoing(lambda: torch.backends.mha.set_fastpath_enabled(enabled)):
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A cache among the outputs of a language model would keep all heads: run without."""
    configs = {id(one): one for one in (getattr(module, "config", None) for module in model.modules())}
    found = [vars(one) for one in configs.values() if hasattr(one, "__dict__") and vars(one).get("use_cache")]

    def undo() -> None:
        for attributes in found:
            attributes["use_cache"] = True

    with undoing(undo):
        for attributes in found:
            attributes["use_cache"] = False
        yield


class _Tracer:
    """What both modes write into."""

    def __init__(self, model: nn.Module, on_reading: Callable[[Reading], None] | None) -> None:
        self.model = model
        self.on_reading = on_reading
        self.paused = False
        self.example = 0
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
            if DEBUG:
                raise
            self.trace.unknown[f"{name} ({type(error).__name__}: {error})"] = 1
            result = unknown(call)
        self.learn(made, result)

    def _on_contraction(self, contraction: Contraction) -> None:
        if self.on_reading is not None:
            self.on_reading(Reading(contraction, self.modules[-1] if self.modules else "", self.example))

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


DEBUG = False


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


class _Operators(TorchDispatchMode):
    """Sees operators."""

    supports_higher_order_operators = True

    def __init__(self, tracer: _Tracer) -> None:
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


def _written(tracer: _Tracer, tensor: Tensor, before: Axes) -> None:
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


class _Calls(TorchFunctionMode):
    """Sees calls of torch's functions: attention as a whole, and sizes that come from attributes."""

    def __init__(self, tracer: _Tracer) -> None:
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
