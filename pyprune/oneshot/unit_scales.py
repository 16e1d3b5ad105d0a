"""Scales of the coupled units that are kept, by which they make up for those that go: least squares."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyprune.calibration.padding import Padding
from pyprune.console import tracked
from pyprune.methods.coupled import Flags
from pyprune.modules.undo import Before, undoing
from pyprune.oneshot.unit_gradients import kept_positions
from pyprune.selection.coupled import Part, UnitsOfGroup
from pyprune.structured.passes import first_argument
from pyprune.structured.unfolding import groups_of, is_layer, matrix_of, samples, weight_of

# A unit that is to be larger than this makes up for others by chance (Kwon et al. 2022).
_LARGEST = 10.0
# Of the ridge towards scales of 1, a share of the mean diagonal.
_DAMPING = 1e-2


@dataclass(frozen=True)
class Tuned:
    """What tuning has done to a layer that reads units.

    Attributes:
        name: of the layer's weight.
        units: how many units are left that it reads.
        before, after: what its outputs miss for inputs as in the dense model, without and with scales: each output
            relative to its standard deviation there, root of the mean square.
        least, most: the smallest and the largest scale of a unit.
        bias: whether its bias took over the mean of what went.
    """

    name: str
    units: int
    before: float
    after: float
    least: float
    most: float
    bias: bool


@dataclass(frozen=True)
class Tuning:
    """Layers that were tuned, in the order of the forward pass, and why others were not."""

    tuned: tuple[Tuned, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(eq=False)
class Reading:
    """A layer that reads units, and sums over what it reads in the dense model.

    Args:
        name: of its weight.
        layer: itself.
        units: which unit each input is in, (groups, inputs of a group); -1 for none.
        kept: bool, which units are kept.
        weight: as a matrix, float64, (groups, inputs of a group, outputs of a group), as it is in the dense model.
    """

    name: str
    layer: nn.Module
    units: Tensor
    kept: Tensor
    weight: Tensor
    count: int = 0
    order: int = -1
    sums: Tensor | None = None
    gram: Tensor | None = None

    @property
    def bytes(self) -> int:
        """How much memory it takes: the sums, and what is made of them."""
        groups, inputs, _ = self.weight.shape
        return 8 * 4 * groups * inputs**2

    def add(self, x: Tensor) -> None:
        """Add samples of inputs, (groups, samples, inputs of a group)."""
        x = x.double()
        if self.sums is None or self.gram is None:
            self.sums, self.gram = torch.zeros_like(x[:, 0]), torch.zeros_like(x.mT @ x)
        self.count += x.shape[1]
        self.sums += x.sum(1)
        self.gram.baddbmm_(x.mT, x)


def readings_of(groups: Sequence[UnitsOfGroup], kept: Sequence[Flags]) -> tuple[list[Reading], dict[str, str]]:
    """Return the layers that read units of which some go, and why others are left out; the model is dense as yet."""
    found: dict[nn.Parameter, list[tuple[Part, Tensor]]] = {}
    for one, flags in zip(groups, kept, strict=True):
        for part in one.weights:
            if part.reads:
                found.setdefault(part.target.parameter, []).append((part, torch.from_numpy(flags)))
    readings: list[Reading] = []
    skipped: dict[str, str] = {}
    for parameter, parts in found.items():
        if all(bool(flags.all()) for _, flags in parts):
            continue
        target = parts[0][0].target
        layers = {owner.module for owner in target.owners}
        layer = next(iter(layers))
        if len(layers) > 1 or not is_layer(layer) or target.owners[0].attribute != "weight":
            what = "several layers share it" if len(layers) > 1 else f"a {type(layer).__name__} is not tuned"
            skipped[target.name] = what
            continue
        units = _units_of_inputs(layer, parameter, [part for part, _ in parts])
        if units is None:
            skipped[target.name] = "its units are more than inputs of it"
            continue
        matrix = matrix_of(layer, parameter.detach()).double()
        all_kept = torch.cat([flags for _, flags in parts]).to(units.device)
        readings.append(Reading(target.name, layer, units, all_kept, matrix.clone()))
    return readings, skipped


def _units_of_inputs(layer: nn.Module, weight: nn.Parameter, parts: Sequence[Part]) -> Tensor | None:
    """Return which unit each input is in, -1 for none; None if the units are something else than inputs."""
    found: Tensor | None = None
    start = 0
    for part in parts:
        sizes = [1] * weight.dim()
        sizes[part.dim] = -1
        labels = matrix_of(layer, part.units_along(-1).view(sizes).expand(weight.shape))
        if not bool((labels == labels[..., :1]).all()):
            return None
        labels = torch.where(labels[..., 0] < 0, -1, labels[..., 0] + start)
        if found is not None and bool(((found >= 0) & (labels >= 0)).any()):
            return None
        found = labels if found is None else torch.maximum(found, labels)
        start += len(part.indices)
    return None if found is None else found.to(weight.device)


@torch.no_grad()
def look_at_inputs(
    readings: Sequence[Reading],
    run: Callable[[Any], object],
    batches: Sequence[Any],
    padding: Padding,
    memory: int,
) -> dict[str, str]:
    """Sum up what layers read, in as many rounds of passes as memory asks for; say which cannot be looked at.

    Args:
        readings: the layers, of a dense model in evaluation.
        run: runs the model on a batch.
        batches: what it takes.
        padding: of the model; it does not count.
        memory: bytes that the sums of a round may take.
    """
    skipped = {
        one.name: f"its sums take {one.bytes:,} bytes, and memory is {memory:,}"
        for one in readings
        if one.bytes > memory
    }
    order = iter(range(2**62))
    for some in _rounds([one for one in readings if one.name not in skipped], memory):
        was = Before(*(one.layer for one in some), with_attributes=False)
        with undoing(was.restore):
            for one in some:
                one.layer.register_forward_hook(partial(_see, one, padding, order, skipped), with_kwargs=True)
            for batch in tracked(batches, len(batches), "Looking at inputs", shown=len(batches) > 1):
                padding.begin(batch)
                run(batch)
    for one in readings:
        if not one.count:
            skipped.setdefault(one.name, "no batch goes through it as a layer")
    return skipped


def _rounds(readings: Sequence[Reading], memory: int) -> Iterator[list[Reading]]:
    some: list[Reading] = []
    for one in readings:
        if some and sum(other.bytes for other in some) + one.bytes > memory:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _see(
    one: Reading,
    padding: Padding,
    order: Iterator[int],
    skipped: dict[str, str],
    layer: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> None:
    x = first_argument(args, kwargs)
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.is_floating_point():
        skipped[one.name] = "what goes in or comes out is no tensor of real numbers"
        return
    if one.order < 0:
        one.order = next(order)
    kept = kept_positions(padding, x)
    if kept is not None:
        x, output = x[kept], output[kept]
    bias = cast(Tensor | None, layer.bias)
    for a, made in samples(layer, x, output):
        a = a.double()
        if not one.count:
            plain = a @ one.weight
            if bias is not None:
                plain = plain + bias.double().view(groups_of(layer), 1, -1)
            near = 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2
            if not bool((plain - made).norm() <= near * plain.norm() + 1e-12):
                skipped[one.name] = f"its class, {type(layer).__name__}, computes something else than its layer"
        one.add(a)


def unit_scales(one: Reading, *, centred: bool) -> Tensor | None:
    """Return the scale of each unit that a layer reads, 0 of those that go; None if one would be too large.

    The layer's outputs in the dense model are the sum over units of what each gives, A_u. Scales s of those that are
    kept have the least ``||sum of s_u A_u - sum of A_u||^2 + lambda ||s - 1||^2``, each output relative to its
    standard deviation: in transformers a single output may be larger than all others together, and means little.

    Args:
        one: the layer.
        centred: whether the bias takes over the means.
    """
    gram, _ = _gram_of_units(one, centred=centred)
    kept = one.kept.nonzero()[:, 0]
    scales = one.kept.double()
    there = gram[kept][:, kept]
    live = there.diagonal() > 0
    if bool(live.any()):
        kept, there = kept[live], there[live][:, live]
        missing = gram[kept][:, ~one.kept].sum(1)
        there.diagonal().add_(_DAMPING * there.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(there)
        if failed:
            return None
        scales[kept] += torch.cholesky_solve(missing[:, None], factor)[:, 0]
    return scales if bool((scales.abs() <= _LARGEST).all()) else None


def _gram_of_units(one: Reading, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the products of what units give to a layer's outputs, (units, units), and those of all inputs."""
    assert one.gram is not None
    assert one.sums is not None
    means = one.sums / one.count
    covariance = one.gram / one.count - means[:, :, None] * means[:, None, :]
    variance = (one.weight * (covariance @ one.weight)).sum(1, keepdim=True).clamp(min=0)
    # An output that is always the same says nothing.
    worth = torch.where(variance > 1e-12 * variance.amax(), variance, torch.inf).reciprocal()
    products = (covariance if centred else one.gram / one.count) * ((one.weight * worth) @ one.weight.mT)
    count = len(one.kept)
    slots = torch.where(one.units < 0, count, one.units)  # inputs that are in no unit: behind the last
    gram = products.new_zeros(count + 1, count + 1)
    for slot, product in zip(slots, products, strict=True):
        gram.index_add_(1, slot, product.new_zeros(count + 1, len(slot)).index_add_(0, slot, product))
    return gram[:count, :count], (worth > 0).sum()


def missing(one: Reading, scales: Tensor, *, centred: bool) -> float:
    """Return what the outputs of a layer miss with scales: the root of the mean square, in standard deviations."""
    gram, outputs = _gram_of_units(one, centred=centred)
    gone = scales - 1
    return float(((gone @ gram @ gone).clamp(min=0) / outputs.clamp(min=1)).sqrt())


@torch.no_grad()
def tune_units(readings: Sequence[Reading], judge: Callable[[], float]) -> Tuning:
    """Scale what layers read of units that are kept, in place, one after the other in the order of the forward pass.

    Biases take over the mean of what goes. A layer is left without that, or as it was, if the model is better so.

    Args:
        readings: layers that were looked at; the model has masks on what goes now.
        judge: says how bad the model is.
    """
    tuned: list[Tuned] = []
    skipped: dict[str, str] = {}
    best = judge()
    ordered = sorted(readings, key=lambda one: one.order)
    for one in tracked(ordered, len(ordered), "Tuning", shown=len(ordered) > 1):
        bias = cast(nn.Parameter | None, one.layer.bias)
        weight = cast(nn.Parameter, one.layer.weight)
        before = [(tensor, tensor.detach().clone()) for tensor in (weight, bias) if tensor is not None]
        reason = "the model would be worse"
        for centred in (True, False) if bias is not None else (False,):
            scales = unit_scales(one, centred=centred)
            if scales is None:
                reason = f"a scale would be beyond {_LARGEST:g}"
                continue
            _write(one, scales, centred=centred)
            now = judge()
            if now < best:
                best = now
                some = scales[one.kept]
                errors = (missing(one, one.kept.double(), centred=False), missing(one, scales, centred=centred))
                tuned.append(Tuned(one.name, len(some), *errors, float(some.min()), float(some.max()), centred))
                break
            for tensor, values in before:
                tensor.copy_(values)
        else:
            skipped[one.name] = reason
    return Tuning(tuple(tuned), tuple(skipped.items()))


def _write(one: Reading, scales: Tensor, *, centred: bool) -> None:
    by_input = torch.cat([scales, scales.new_ones(1)])[one.units]  # -1 is the last
    weight = cast(nn.Parameter, one.layer.weight)
    matrix = one.weight * by_input[:, :, None]
    alive = weight != 0  # what masks dropped of the outputs stays zero
    weight.copy_(weight_of(one.layer, matrix, weight.shape).to(weight.dtype).where(alive, 0))
    bias = cast(nn.Parameter | None, one.layer.bias)
    if centred and bias is not None:
        assert one.sums is not None
        taken = torch.einsum("gi,gio->go", one.sums / one.count, one.weight - matrix).flatten()
        outputs = matrix_of(one.layer, alive).any(1).flatten()
        bias.add_(torch.where(outputs, taken, 0).view_as(bias).to(bias.dtype))
