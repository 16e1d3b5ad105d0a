"""Gives rules the tensors of a forward pass, and takes their answers."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pyprune.structured.coordinates import Axes, Coordinates, Factor
from pyprune.structured.rules.call import Call, Contraction, tensors_in
from pyprune.structured.rules.elementwise import unknown
from pyprune.structured.seen import Product, Reading, Trace, Traced
from pyprune.structured.size_uses import SizeUse, along

NOT_REACHED = "not reached by the examples"


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
        self.own: dict[int, Traced] = {}
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
            self.own[key] = one
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

    @property
    def module(self) -> str:
        """The name of the module that runs."""
        return self.modules[-1] if self.modules else ""

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
            if id(tensor) in self.own:
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
                and id(other) not in self.own
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
        self.trace.coordinates.place = self.module
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
            self.on_reading(Reading(contraction, self.module))

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
