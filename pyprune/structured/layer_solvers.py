"""Solve layers that get one input, or share a weight, by least squares: from sums, or by conjugate gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.structured.least_squares import Sums, conjugate_gradients
from pyprune.structured.paired_layers import Reader
from pyprune.structured.paired_passes import Job
from pyprune.structured.unfolding import call, channel_dim, groups_of, matrix_of, samples, weight_of

# What is tried where no damping was given.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ITERATIONS = 100
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Solved:
    """What became of a layer.

    Attributes:
        name: of the layer.
        inputs: how many one of its outputs reads.
        outputs: how many there are.
        samples: how many it was solved by.
        before, after: distance to the wanted outputs, relative to their size (Frobenius norms).
        method: how it was solved.
    """

    name: str
    inputs: int
    outputs: int
    samples: int
    before: float
    after: float
    method: str


def solve_by_sums(
    dense: nn.Module, model: nn.Module, batches: Sequence[Any], job: Job, *, damping: float | None
) -> list[Solved]:
    """Solve a job, and write what came out into its layers.

    Without a damping, each layer gets the one of `DAMPINGS` by which what the first batches say fits the last ones
    best; the first of them if there are too few batches to tell.

    Raises:
        ValueError: if new weights are not finite.
    """
    kept_back = 0 if damping is not None else len(batches) // 4
    sums, last = ([_empty(leg) for leg in job.legs] for _ in range(2))

    def take(into: list[list[Sums]], leg: int, x: Tensor, ys: list[Tensor]) -> None:
        for a, b in samples(job.legs[leg][0].layer, x, *ys):
            for one in into:
                one[leg].add(a, b)

    for index, batch in enumerate(batches):
        into = [sums, last] if index >= len(batches) - kept_back else [sums]
        job.see(dense, model, index, batch, partial(take, into))
    parts, parts_of_last = _by_reader(job, sums), _by_reader(job, last)
    before = {reader: _error(*part.squares(reader.matrix(), reader.bias_row())) for reader, part in parts.items()}
    chosen: dict[Reader, float] = {}
    for readers in [list(parts)] if len(job.legs) > 1 else [[reader] for reader in parts]:
        ours = [parts[one] for one in readers]
        best = damping
        if best is None:
            best = _best_damping(readers, ours, [parts_of_last[one] for one in readers])
        matrix = _solution(readers, ours, best)
        for reader, part in zip(readers, ours, strict=True):
            chosen[reader] = best
            reader.write(matrix, None if reader.bias is None else part.bias(matrix))
    return [
        _solved(
            reader,
            part.count,
            before[reader],
            _error(*part.squares(reader.matrix(), reader.bias_row())),
            f"least squares, damping {chosen[reader]:g}",
        )
        for reader, part in parts.items()
    ]


def _empty(leg: list[Reader]) -> Sums:
    groups, inputs, _ = leg[0].matrix().shape
    return Sums(groups, inputs, sum(one.matrix().shape[2] for one in leg), leg[0].weight.device)


def _by_reader(job: Job, sums: Sequence[Sums]) -> dict[Reader, Sums]:
    parts: dict[Reader, Sums] = {}
    for leg, total in zip(job.legs, sums, strict=True):
        start = 0
        for reader in leg:
            stop = start + reader.matrix().shape[2]
            parts[reader] = total.outputs(start, stop)
            start = stop
    return parts


def _solution(readers: Sequence[Reader], parts: Sequence[Sums], damping: float) -> Tensor:
    """Return the weight that these layers share, or that of one."""
    systems = [part.system(reader.bias is not None) for reader, part in zip(readers, parts, strict=True)]
    return reduce(add, systems).solve(readers[0].matrix(), damping=damping, mask=readers[0].mask)


def _best_damping(readers: Sequence[Reader], parts: Sequence[Sums], last: Sequence[Sums]) -> float:
    if not all(part.count > few.count > 0 for part, few in zip(parts, last, strict=True)):
        return DAMPINGS[0]
    first = [part.without(few) for part, few in zip(parts, last, strict=True)]

    def missing(damping: float) -> float:
        matrix = _solution(readers, first, damping)
        biases = [
            None if reader.bias is None else one.bias(matrix) for reader, one in zip(readers, first, strict=True)
        ]
        return sum(few.squares(matrix, bias)[0] for few, bias in zip(last, biases, strict=True))

    return min(DAMPINGS, key=missing)


def _error(missing: float, wanted: float) -> float:
    return (missing / wanted) ** 0.5 if wanted else 0.0


def _solved(reader: Reader, count: int, before: float, after: float, method: str) -> Solved:
    groups, inputs, outputs = reader.matrix().shape
    return Solved(reader.name, inputs, groups * outputs, count, before, after, method)


def solve_by_gradients(
    dense: nn.Module, model: nn.Module, batches: Sequence[Any], job: Job, *, damping: float | None, memory: int
) -> list[Solved]:
    """Solve a job without sums of products, of as many batches as there is memory for; at least of one.

    Inputs and outputs are held in float32 (float64 for weights of float64), and products with X'X are made by the
    layer itself and its gradient, with nothing unfolded.

    Raises:
        ValueError: if new weights are not finite.
    """
    dtype = torch.float64 if job.legs[0][0].weight.dtype == torch.float64 else torch.float32
    held: list[list[tuple[Tensor, list[Tensor]]]] = [[] for _ in job.legs]
    left, used = memory, 0

    def take(leg: int, x: Tensor, ys: list[Tensor]) -> None:
        nonlocal left
        held[leg].append((x.to(dtype, copy=True), [y.to(dtype) for y in ys]))
        left -= 2 * dtype.itemsize * (x.numel() + sum(y.numel() for y in ys))  # what gradients need is as much again

    for index, batch in enumerate(batches):
        job.see(dense, model, index, batch, take)
        used += 1
        if left <= 0:
            break
    share = "" if used == len(batches) else f", {used} of {len(batches)} batches"
    if len(job.legs) > 1:
        shared = [_Layer(leg[0], [(x, ys[0]) for x, ys in pairs]) for leg, pairs in zip(job.legs, held, strict=True)]
        return _solve_layers(shared, DAMPINGS[0] if damping is None else damping, share)
    ((leg, pairs),) = zip(job.legs, held, strict=True)
    alone = ([_Layer(one, [(x, ys[i]) for x, ys in pairs])] for i, one in enumerate(leg))
    return [
        solved
        for layers in alone
        for solved in _solve_layers(layers, DAMPINGS[0] if damping is None else damping, share)
    ]


class _Layer:
    """A layer with what it gets and what it is to make, as a linear function of its weight."""

    def __init__(self, reader: Reader, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.reader = reader
        self.pairs = pairs
        self.dim = channel_dim(reader.layer)
        self.wanted = [y for _, y in pairs]
        self.count = sum(y.numel() // y.shape[self.dim] for y in self.wanted)
        self.zero = torch.zeros_like(reader.weight, dtype=self.wanted[0].dtype)
        self.roots = self._roots(lambda x: x)

    def _roots(self, of_input: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        with torch.enable_grad():
            weights = [self.zero.clone().requires_grad_() for _ in self.pairs]
            return [
                (call(self.reader.layer, of_input(x), weight, None, y), weight)
                for (x, y), weight in zip(self.pairs, weights, strict=True)
            ]

    def made(self, matrix: Tensor) -> list[Tensor]:
        """Return X W, batch by batch."""
        layer = self.reader.layer
        weight = weight_of(layer, matrix.to(self.zero.dtype), self.zero.shape)
        return [call(layer, x, weight, None, y) for x, y in self.pairs]

    def mean(self, outputs: list[Tensor]) -> Tensor:
        """Return the mean of outputs, by channel, in float64."""
        total = [output.movedim(self.dim, -1).flatten(0, -2).sum(0, dtype=torch.float64) for output in outputs]
        return torch.stack(total).sum(0) / self.count

    def gathered(self, outputs: list[Tensor]) -> Tensor:
        """Return X' R as a matrix, centred if there is a bias."""
        if self.reader.bias is not None:
            outputs = [_minus(output, self.mean(outputs), self.dim) for output in outputs]
        return self._gathered(outputs, self.roots)

    def _gathered(self, outputs: list[Tensor], roots: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros_like(self.zero)
        for output, (root, weight) in zip(outputs, roots, strict=True):
            total += torch.autograd.grad(root, weight, output, retain_graph=True)[0]
        return matrix_of(self.reader.layer, total)

    def diagonal(self) -> Tensor:
        """Return the diagonal of X'X, centred if there is a bias: (groups, inputs, 1)."""
        ones = [torch.ones_like(y) for y in self.wanted]
        squares = self._gathered(ones, self._roots(torch.square))[..., :1]
        if self.reader.bias is None:
            return squares
        return (squares - self._gathered(ones, self.roots)[..., :1].square() / self.count).clamp(min=0)

    def bias(self, matrix: Tensor) -> Tensor | None:
        """Return the bias that goes with weights."""
        if self.reader.bias is None:
            return None
        return (self.mean(self.wanted) - self.mean(self.made(matrix))).view(groups_of(self.reader.layer), -1)

    def error(self) -> float:
        """Return the distance of what the layer makes to what it is to make, relative to the latter."""
        made = self.made(self.reader.matrix())
        if self.reader.bias is not None:
            made = [_minus(output, -self.reader.bias.detach(), self.dim) for output in made]
        missing = sum(
            float((y - output).square().sum(dtype=torch.float64)) for y, output in zip(self.wanted, made, strict=True)
        )
        return _error(missing, sum(float(y.square().sum(dtype=torch.float64)) for y in self.wanted))


def _minus(output: Tensor, channels: Tensor, dim: int) -> Tensor:
    return output - channels.to(output.dtype).view(-1, *(1,) * (-dim - 1))


def _solve_layers(layers: list[_Layer], damping: float, share: str) -> list[Solved]:
    """Solve the weight that layers share, or that of one."""
    reader = layers[0].reader
    kept = torch.ones_like(reader.matrix()) if reader.mask is None else reader.mask
    kept = kept.to(layers[0].zero.dtype)
    before = [layer.error() for layer in layers]
    present = reader.matrix() * kept
    diagonal = sum(layer.diagonal() for layer in layers)
    ridge = damping * (diagonal * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    rights = []
    for layer in layers:
        missing = [y - made for y, made in zip(layer.wanted, layer.made(present), strict=True)]
        rights.append(layer.gathered(missing))

    def product(step: Tensor) -> Tensor:
        return kept * (sum(layer.gathered(layer.made(step)) for layer in layers) + ridge * step)

    step, iterations = conjugate_gradients(
        product, kept * sum(rights), diagonal + ridge, tolerance=_TOLERANCE, iterations=_ITERATIONS
    )
    matrix = present + step
    for layer in layers:
        layer.reader.write(matrix, layer.bias(matrix))
    method = f"conjugate gradients, {iterations} iterations{share}"
    return [
        _solved(layer.reader, layer.count, error, layer.error(), method)
        for layer, error in zip(layers, before, strict=True)
    ]
