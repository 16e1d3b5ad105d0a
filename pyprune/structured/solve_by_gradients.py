"""Solve layers by conjugate gradients, where the sums of products of all their inputs would be too large.

Products with X and X' are made by the layer itself and by its gradient, so nothing is unfolded: a convolution with
65,536 inputs needs memory for its weight, and for what it gets and makes.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.structured.least_squares import conjugate_gradients
from pyprune.structured.paired_layers import Reader
from pyprune.structured.paired_passes import Job
from pyprune.structured.solved import Solved, relative, solved
from pyprune.structured.unfolding import call, channel_dim, groups_of, matrix_of, weight_of

_DAMPING = 1e-4
_ITERATIONS = 100
_TOLERANCE = 1e-5

_Pairs = list[tuple[Tensor, Tensor]]


def solve_by_gradients(
    dense: nn.Module, model: nn.Module, batches: Sequence[Any], job: Job, *, damping: float | None, memory: int
) -> list[Solved]:
    """Solve a job, and write what came out into its layers, by as many batches as there is memory for; at least one.

    Without a damping, if there are four batches or more, the iterations end where they predict the last quarter of
    the batches no better. What is held is in float32 (float64 for weights of float64).

    Raises:
        ValueError: if new weights are not finite.
    """
    dtype = torch.float64 if job.legs[0][0].weight.dtype == torch.float64 else torch.float32
    held: list[list[list[tuple[Tensor, list[Tensor]]]]] = []
    left = memory
    for index, batch in enumerate(batches):
        calls: list[list[tuple[Tensor, list[Tensor]]]] = [[] for _ in job.legs]

        def take(leg: int, x: Tensor, ys: list[Tensor], calls: Any = calls) -> None:
            calls[leg].append((x.to(dtype, copy=True), [y.to(dtype) for y in ys]))

        job.see(dense, model, index, batch, take)
        held.append(calls)
        sizes = (x.numel() + sum(y.numel() for y in ys) for leg in calls for x, ys in leg)
        left -= 2 * dtype.itemsize * sum(sizes)  # what gradients need is as much again
        if left <= 0:
            break
    kept_back = len(held) // 4 if damping is None else 0

    def layer(leg: int, place: int, those: Sequence[Any]) -> _Layer:
        return _Layer(job.legs[leg][place], [(x, ys[place]) for calls in those for x, ys in calls[leg]])

    done: list[Solved] = []
    first, last = held[: len(held) - kept_back], held[len(held) - kept_back :]
    alone = [[(0, place)] for place in range(len(job.legs[0]))]
    for places in alone if len(job.legs) == 1 else [[(leg, 0) for leg in range(len(job.legs))]]:
        layers, others = [[layer(*place, those) for place in places] for those in (first, last)]
        share = "" if len(held) == len(batches) else f", {len(held)} of {len(batches)} batches"
        done += _solve(layers, others if kept_back else [], _DAMPING if damping is None else damping, share)
    return done


class _Layer:
    """A layer with what it gets and what it is to make, as a linear function of its weight."""

    def __init__(self, reader: Reader, pairs: _Pairs) -> None:
        self.reader = reader
        self.pairs = pairs
        self.dim = channel_dim(reader.layer)
        self.wanted = [y for _, y in pairs]
        self.count = sum(y.numel() // y.shape[self.dim] for y in self.wanted)
        self.dtype = torch.float64 if reader.weight.dtype == torch.float64 else torch.float32
        self.zero = torch.zeros_like(reader.weight, dtype=self.dtype)

    @cached_property
    def roots(self) -> _Pairs:
        """Outputs and the weights that they are functions of, whatever the weights are: gradients are X' R."""
        return self._roots(self.pairs)

    def _roots(self, pairs: _Pairs) -> _Pairs:
        with torch.enable_grad():
            weights = [self.zero.clone().requires_grad_() for _ in pairs]
            return [
                (call(self.reader.layer, x, weight, None, y), weight)
                for (x, y), weight in zip(pairs, weights, strict=True)
            ]

    def _gathered(self, outputs: Sequence[Tensor], roots: _Pairs) -> Tensor:
        total = torch.zeros_like(self.zero)
        for output, (root, weight) in zip(outputs, roots, strict=True):
            total += torch.autograd.grad(root, weight, output, retain_graph=True)[0]
        return matrix_of(self.reader.layer, total)

    def gathered(self, outputs: list[Tensor]) -> Tensor:
        """Return X' R as a matrix, centred if there is a bias."""
        if self.reader.bias is not None:
            means = self._mean(outputs)
            outputs = [self._plus(output, -means) for output in outputs]
        return self._gathered(outputs, self.roots)

    @cached_property
    def _means(self) -> Tensor:
        """The means of the inputs, as many as there are: (groups, inputs)."""
        ones = [torch.ones_like(y) for y in self.wanted]
        return self._gathered(ones, self.roots)[..., 0].double() / max(1, self.count)

    def diagonal(self) -> Tensor:
        """Return the diagonal of X'X, centred if there is a bias: (groups, inputs, 1)."""
        ones = [torch.ones_like(y) for y in self.wanted]
        squares = self._gathered(ones, self._roots([(x.square(), y) for x, y in self.pairs]))[..., :1]
        if self.reader.bias is None:
            return squares
        return (squares - self.count * self._means.square()[..., None].to(squares.dtype)).clamp(min=0)

    def made(self, matrix: Tensor) -> list[Tensor]:
        """Return X W, batch by batch."""
        layer = self.reader.layer
        weight = weight_of(layer, matrix.to(self.dtype), self.zero.shape)
        return [call(layer, x, weight, None, y) for x, y in self.pairs]

    def _mean(self, outputs: list[Tensor]) -> Tensor:
        """Return the mean of outputs, by channel, in float64."""
        total = [output.movedim(self.dim, -1).flatten(0, -2).sum(0, dtype=torch.float64) for output in outputs]
        return torch.stack(total).sum(0) / max(1, self.count)

    def _plus(self, output: Tensor, channels: Tensor) -> Tensor:
        return output + channels.to(output.dtype).view(-1, *(1,) * (-self.dim - 1))

    def bias(self, matrix: Tensor) -> Tensor | None:
        """Return the bias that goes with weights: (groups, outputs)."""
        if self.reader.bias is None:
            return None
        made = torch.einsum("gi,gio->go", self._means, matrix.double())
        return self._mean(self.wanted).view(groups_of(self.reader.layer), -1) - made

    def missing(self, matrix: Tensor, bias: Tensor | None) -> float:
        """Return the sum of squares of what is missing to the wanted outputs."""
        made = self.made(matrix)
        if bias is not None:
            made = [self._plus(output, bias.flatten()) for output in made]
        return _squares([y - output for y, output in zip(self.wanted, made, strict=True)])

    def error(self) -> float:
        """Return the distance of what the layer makes to what it is to make, relative to the latter."""
        return relative(self.missing(self.reader.matrix(), self.reader.bias_row()), _squares(self.wanted))


def _squares(tensors: list[Tensor]) -> float:
    return sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in tensors)


def _solve(layers: list[_Layer], last: list[_Layer], damping: float, share: str) -> list[Solved]:
    """Solve the weight that layers share, or that of one; stop where the last samples are predicted no better."""
    reader = layers[0].reader
    present = reader.matrix()
    kept = torch.ones_like(present) if reader.mask is None else reader.mask
    present, kept = present * kept, kept.to(layers[0].dtype)
    before = [layer.error() for layer in layers]
    diagonal = torch.stack([layer.diagonal() for layer in layers]).sum(0)
    ridge = damping * (diagonal * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)

    def gathered(layer: _Layer) -> Tensor:
        made = layer.made(present)
        return layer.gathered([y - output for y, output in zip(layer.wanted, made, strict=True)])

    def product(step: Tensor) -> Tensor:
        return kept * (torch.stack([one.gathered(one.made(step)) for one in layers]).sum(0) + ridge * step)

    def missing(step: Tensor) -> float:
        matrix = present + step
        return sum(few.missing(matrix, one.bias(matrix)) for few, one in zip(last, layers, strict=True))

    right = kept * torch.stack([gathered(layer) for layer in layers]).sum(0)
    step, iterations = conjugate_gradients(
        product,
        right,
        diagonal + ridge,
        tolerance=_TOLERANCE,
        iterations=_ITERATIONS,
        watched=missing if last else None,
    )
    matrix = present + step
    for layer in layers:
        layer.reader.write(matrix, layer.bias(matrix))
    method = f"conjugate gradients, {iterations} iterations{share}"
    return [
        solved(layer.reader, layer.count, error, layer.error(), method)
        for layer, error in zip(layers, before, strict=True)
    ]
