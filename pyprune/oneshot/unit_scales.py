"""Scales of the coupled units that are kept, so that the layers that read them make what they did: least squares."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.console import tracked
from pyprune.selection.coupled import Part, UnitsOfGroup
from pyprune.structured.least_squares import Sums, System
from pyprune.structured.paired_layers import Reader, find_readers
from pyprune.structured.paired_passes import Job, look_at_both
from pyprune.structured.solve_by_sums import solve_by_sums
from pyprune.structured.solved import Solved
from pyprune.structured.unfolding import matrix_of

# A unit that is to be larger than this makes up for others by chance (Kwon et al. 2022).
_LARGEST = 10.0


@dataclass(frozen=True)
class Tuned:
    """What tuning has done to a layer that reads units.

    Attributes:
        name: of the layer.
        units: how many units are left that it reads.
        before, after: distance to the outputs of the dense model, relative to their size.
        least, most: the smallest and the largest scale of a unit.
    """

    name: str
    units: int
    before: float
    after: float
    least: float
    most: float


@dataclass(frozen=True)
class Tuning:
    """Layers that were tuned, in the order of the forward pass, and why others were not."""

    tuned: tuple[Tuned, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@torch.no_grad()
def tune_units(
    dense: nn.Module,
    model: nn.Module,
    groups: Sequence[UnitsOfGroup],
    passes: tuple[nn.Module, nn.Module],
    inputs: Sequence[Any],
    memory: int,
) -> Tuning:
    """Scale what layers read of units that are kept, in place, by least squares; biases are solved along.

    Layer after layer, in the order of the forward pass, the scales s of the units become those with the least
    ``||sum over units of s_u X_u W_u + b - Y||^2 + lambda ||s - 1||^2``, where X is what the layer gets in the pruned
    model, tuned up to there, and Y what it makes in the dense one; lambda is a share of the mean diagonal of the
    equations, the one by which the first three quarters of the batches predict the last best.

    Args:
        dense: the model before pruning.
        model: the same with masks on what goes; both in evaluation.
        groups: whose units.
        passes: what runs ``dense`` and ``model`` on an input.
        inputs: what these take.
        memory: bytes that the sums of a layer may take.
    """
    by_weight: dict[nn.Parameter, list[Part]] = {}
    for one in groups:
        for part in one.weights:
            if part.reads:
                by_weight.setdefault(part.target.parameter, []).append(part)
    weights, problems = find_readers(dense, model, {}, None)
    reading = [readers for readers in weights if readers[0].weight in by_weight]
    units: dict[Reader, Tensor] = {}
    skipped: dict[str, str] = {}
    for readers in reading:
        labels = _units_of_inputs(readers[0], by_weight[readers[0].weight])
        if labels is None:
            skipped |= {one.name: "its units are more than inputs of it" for one in readers}
        else:
            units |= dict.fromkeys(readers, labels)
    names = {owner.name for several in by_weight.values() for part in several for owner in part.target.owners}
    known = {f"{one.name}.weight" if one.name else "weight" for readers in reading for one in readers}
    skipped |= {name: problems.get(name, "it is no layer that can be solved") for name in sorted(names - known)}
    look = look_at_both(*passes, inputs, [readers for readers in reading if readers[0] in units], only_cut=True)
    skipped |= look.problems
    solved: list[Solved] = []
    ranges: dict[str, tuple[int, float, float]] = {}
    for job in tracked(look.jobs, len(look.jobs), "Tuning", shown=len(look.jobs) > 1):
        readers = [reader for leg in job.legs for reader in leg]
        if job.bytes > memory:
            skipped |= {one.name: f"its sums take {job.bytes:,} bytes, and memory is {memory:,}" for one in readers}
            continue
        done = _tune(passes, inputs, job, units, ranges)
        solved += done
        left = {one.name for one in readers} - {one.name for one in done}
        skipped |= dict.fromkeys(sorted(left), f"a scale would be beyond {_LARGEST:g}")
    tuned = (Tuned(one.name, *(ranges[one.name][:1]), one.before, one.after, *ranges[one.name][1:]) for one in solved)
    return Tuning(tuple(tuned), tuple(skipped.items()))


def _tune(
    passes: tuple[nn.Module, nn.Module],
    inputs: Sequence[Any],
    job: Job,
    units: dict[Reader, Tensor],
    ranges: dict[str, tuple[int, float, float]],
) -> list[Solved]:
    def scaled(readers: Sequence[Reader], parts: Sequence[Sums], damping: float) -> Tensor | None:
        scales, is_there = unit_scales(readers, parts, units[readers[0]], damping)
        if not bool((scales.abs() <= _LARGEST).all()):
            return None
        some = scales[is_there] if bool(is_there.any()) else torch.ones(1)
        for reader in readers:
            ranges[reader.name] = (int(is_there.sum()), float(some.min()), float(some.max()))
        # Inputs that are in no unit read the last scale, which is 1.
        by_input = torch.cat([scales, scales.new_ones(1)])[units[readers[0]]]
        return readers[0].matrix() * by_input[:, :, None]

    return solve_by_sums(*passes, inputs, job, damping=None, solution=scaled)


def _units_of_inputs(reader: Reader, parts: Sequence[Part]) -> Tensor | None:
    """Return which unit each input is in, (groups, inputs of a group), -1 for none; None if that cannot be said."""
    found = None
    start = 0
    for part in parts:
        along = part.units_along(-1)
        sizes = [1] * reader.weight.dim()
        sizes[part.dim] = -1
        labels = matrix_of(reader.layer, along.view(sizes).expand(reader.weight.shape))
        if not bool((labels == labels[..., :1]).all()):
            return None
        labels = torch.where(labels[..., 0] < 0, -1, labels[..., 0] + start)
        if found is not None and bool(((found >= 0) & (labels >= 0)).any()):
            return None
        found = labels if found is None else torch.maximum(found, labels)
        start += len(part.indices)
    return None if found is None else found.to(reader.weight.device)


def unit_scales(
    readers: Sequence[Reader], parts: Sequence[Sums], units: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Return the scale of each unit that layers with one weight read, and which units there are; others have 1.

    Args:
        readers: the layers.
        parts: the sums of each.
        units: which unit each input is in, (groups, inputs of a group); -1 for none.
        damping: of the ridge towards 1, a share of the mean diagonal.
    """
    matrix = readers[0].matrix()
    count = int(units.max()) + 1
    # What is in no unit is gathered behind the last, and left out.
    slots = torch.where(units < 0, count, units)
    gram, right = matrix.new_zeros(count + 1, count + 1), matrix.new_zeros(count + 1)
    for reader, part in zip(readers, parts, strict=True):
        system = part.system(reader.bias is not None)
        products = system.gram * (matrix @ matrix.mT)
        missing = (matrix * (system.cross - system.gram @ matrix)).sum(2)
        for slot, product, own in zip(slots, products, missing, strict=True):
            rows = product.new_zeros(count + 1, len(slot)).index_add_(0, slot, product)
            gram.index_add_(1, slot, rows)
            right.index_add_(0, slot, own)
    is_there = gram.diagonal()[:count] > 0
    places = is_there.nonzero()[:, 0]
    scales = matrix.new_ones(count)
    if len(places):
        there = gram[places][:, places]
        # The equations of the step from 1, so that what is wanted is what is missing now.
        wanted = right[places] + there.sum(1)
        ones = matrix.new_ones(1, len(places), 1)
        scales[places] = System(there[None], wanted[None, :, None]).solve(ones, damping=damping)[0, :, 0]
    return scales, is_there


def loss_as_pass(model: nn.Module, loss_fn: Any) -> nn.Module:
    """Return a module that runs a model by calling a loss on it and a batch; the model is no part of it."""
    return _Called(partial(loss_fn, model))


class _Called(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, batch: Any) -> Any:
        return self.call(batch)
