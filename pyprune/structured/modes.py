"""Two modes of torch that a `Tracer` learns from.

One sees operators, and one above it calls of attention, and sizes that come from attributes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.structured.coordinates import Axes
from pyprune.structured.rules.call import Call, tensors_in, with_rest
from pyprune.structured.rules.elementwise import unknown
from pyprune.structured.rules.table import RULES
from pyprune.structured.size_uses import OpenSize, size_uses
from pyprune.structured.tracer import Tracer

_HEADS = "nn.MultiheadAttention computes the size of a head from its width"


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
    return with_rest(call, axes)


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
                tracer.learn(use.tensor, replace(axes, stretched=stretched))
            else:
                tracer.trace.sizes.append(use)
        return made

    def _keep_heads(self, tensor: Tensor) -> None:
        """Outputs of projections in, inputs of the one out."""
        tracer = self.tracer
        owner = tracer.own.get(id(tensor))
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
