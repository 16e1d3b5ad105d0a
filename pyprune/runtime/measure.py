"""How much faster the products of a layer are with its weight in another layout."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyprune.runtime.candidates import Candidate, candidates_for
from pyprune.runtime.find_layers import Input, Layer
from pyprune.runtime.timing import in_turns, waiting_for

DENSE = "dense"
# What caches of CPUs hold, at most; a model that is smaller finds its weights there.
_CACHE = 1 << 27
# Other shapes of inputs of one layer are left out: those with the fewest rows.
_MOST_SHAPES = 3


@dataclass(frozen=True)
class Found:
    """The best layout for a weight: its name, what stands for the weight, and the gain; a reason if there is none."""

    layout: str = DENSE
    packed: Any = None
    gain: float | None = None
    reason: str = ""


@dataclass
class Bench:
    """Measures layers of one model, and those that are alike once.

    Args:
        dtype: of packed values; None leaves it.
        min_gain: how many times faster a layout must be.
        seconds: for each layer.
        model_bytes: of all weights of the model: so much is read between two products with one of them.
    """

    dtype: torch.dtype | None
    min_gain: float
    seconds: float
    model_bytes: int
    _known: dict[Any, dict[str, float]] = field(default_factory=dict)

    def best(self, layer: Layer) -> Found:
        """Return what is best for a layer."""
        if layer.problem:
            return Found(reason=layer.problem)
        fitting, why = candidates_for(layer.matrix)
        if not fitting:
            return Found(reason=why)
        calls = sorted(layer.calls.items(), key=lambda call: call[0][0].numel() * call[1])[-_MOST_SHAPES:]
        alike = (
            type(layer.module), layer.matrix.shape, layer.weight.dtype, layer.weight.device, round(32 * layer.zeros),
            tuple(fitting), tuple(calls), layer.bias is None,
        )  # fmt: skip
        packed: dict[Candidate, Any] = {}
        if alike not in self._known:
            packed = {one: one.pack(layer.matrix, self.dtype) for one in fitting}
            self._known[alike] = self._gains(layer, packed, calls)
        gains = self._known[alike]
        best = max(fitting, key=lambda one: gains[one.layout])
        gain = gains[best.layout]
        if gain < self.min_gain:
            return Found(gain=gain, reason=f"at best {gain:.2f} x as fast ({best.layout})")
        weight = packed[best] if best in packed else best.pack(layer.matrix, self.dtype)
        return Found(best.layout, weight, gain)

    def _gains(
        self, layer: Layer, packed: dict[Candidate, Any], calls: Sequence[tuple[Input, int]]
    ) -> dict[str, float]:
        """Return how many times faster the calls of a layer are in each layout."""
        total = dict.fromkeys([DENSE, *(one.layout for one in packed)], 0.0)
        bias = layer.bias
        for (shape, dtype), count in calls:
            input = torch.randn(shape, device=layer.weight.device).to(dtype)
            ways: dict[str, Callable[[Tensor], Tensor]] = {DENSE: layer.product}
            for one, weight in packed.items():
                ways[one.layout] = lambda x, one=one, weight=weight: one.product(x, weight, bias)  # type: ignore[misc]
            wait = waiting_for([input.device])
            times = in_turns(ways, seconds=self.seconds / len(calls), prepare=self._cold(input), wait=wait)
            for name in total:
                total[name] += count * statistics.median(times[name])
        return {name: total[DENSE] / seconds for name, seconds in total.items() if name != DENSE}

    def _cold(self, input: Tensor) -> Callable[[str], tuple[Tensor]]:
        """Return what leaves caches as the rest of the model does: other weights in them, and the input."""
        others = torch.ones(min(self.model_bytes, _CACHE) // 4, device=input.device)

        def prepare(way: str) -> tuple[Tensor]:
            others.sum()
            input.sum()
            return (input,)

        return prepare


def bytes_of(packed: Any) -> int:
    """Return the bytes of what stands for a weight.

    Example:
        >>> bytes_of(torch.ones(3))
        12
    """
    if isinstance(packed, torch.sparse.SparseSemiStructuredTensor):  # half of the values, two bits for each
        return sum(part.nbytes for part in (packed.packed, packed.meta) if part is not None)
    return int(packed.nbytes)
