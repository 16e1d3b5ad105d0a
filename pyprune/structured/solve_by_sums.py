"""Solve layers that get one input, or share a weight, by least squares from sums of products."""

from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any

from torch import Tensor, nn

from pyprune.structured.least_squares import Sums
from pyprune.structured.paired_layers import Reader
from pyprune.structured.paired_passes import Job
from pyprune.structured.solved import Solved, relative, solved
from pyprune.structured.unfolding import samples

# What is tried where no damping was given.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


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
    before = {reader: relative(*part.squares(reader.matrix(), reader.bias_row())) for reader, part in parts.items()}
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
        solved(
            reader,
            part.count,
            before[reader],
            relative(*part.squares(reader.matrix(), reader.bias_row())),
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
