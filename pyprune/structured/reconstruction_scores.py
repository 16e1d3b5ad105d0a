"""Scores of coupled units by what least squares cannot make up for without them."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import check_count, check_items, check_number
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_initialized, evaluating, untouched
from pyprune.structured.elimination import Reading, eliminate
from pyprune.structured.groups import Group, Member
from pyprune.structured.least_squares import Sums
from pyprune.structured.paired_passes import run
from pyprune.structured.unfolding import groups_of, is_layer, matrix_of, samples


@torch.inference_mode(False)
def reconstruction_scores(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Dataset | Iterable[Any],
    *,
    damping: float = 1e-4,
    num_batches: int | None = None,
    memory: int = 2**30,
) -> list[Tensor]:
    """Score the units of coupled groups by what `reconstruct` cannot repair without them.

    Unit after unit goes, each time the one without which the layers that read the group, solved anew by least
    squares, lose least of what they make. This is the criterion of channel pruning (He et al. 2017), by greedy
    elimination in place of LASSO. Costs are relative to what a layer makes, and added over layers.

    Args:
        model: the dense model; it is only run.
        groups: of `coupled_groups` of this model; those to be scored.
        batches, num_batches: as for `reconstruct`.
        damping: of the ridge.
        memory: bytes that the sums of a layer may take.

    Returns:
        A float64 tensor per group with a score for each unit (higher = keep), which is what is lost when this unit
        and all that score lower are gone, as a share of the sum of squares of outputs.

    Raises:
        TypeError, ValueError: for wrong arguments, a group that no layer reads which can be seen (of what
            `reconstruct` solves, without groups), one with more inputs than there is memory for, or inputs that are
            NaN or infinite.

    Example:
        >>> import pyprune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = pyprune.coupled_groups(model, torch.ones(1, 4))
        >>> (scores,) = reconstruction_scores(model, groups, [torch.randn(64, 4)])
        >>> scores.shape
        torch.Size([8])
    """
    check_module(model)
    check_initialized(model)
    damping = check_number("damping", damping, what="a number, 0 or more", least=0)
    memory = check_count("memory", memory, what="bytes, an integer, 0 or more")
    groups = check_items("groups", groups, "groups of pyprune.coupled_groups(model, examples)")
    for group in groups:
        if not isinstance(group, Group):
            raise TypeError(f"groups has a {type(group).__name__} in it; give those of pyprune.coupled_groups")
    source = batches_of(batches, num_batches, "Scores", names=("batches", "num_batches"))
    places = {
        id(module.weight): (name, module)
        for name, module in model.named_modules()
        if is_layer(module) and isinstance(module.weight, nn.Parameter)
    }
    readers = [_readers(group, places, memory) for group in groups]
    layers = {name: layer for found in readers for _, name, layer in found}
    sums: dict[str, Sums] = {}
    with untouched(model), evaluating(model):
        hooks = [(layer, partial(_add, sums, name, layer)) for name, layer in layers.items()]
        for batch in source:
            run(model, batch, hooks)
    scores = []
    for found in readers:
        readings = []
        for member, name, layer in found:
            if name not in sums:
                raise ValueError(f"no batch goes through {name}; give batches that do, or leave its group out")
            readings.append(_reading(member, layer, sums[name]))
        scores.append(eliminate(readings, damping=damping))
    return scores


def _readers(
    group: Group, places: dict[int, tuple[str, nn.Module]], memory: int
) -> list[tuple[Member, str, nn.Module]]:
    found = [
        (member, *places[id(member.tensor)])
        for member in group.members
        if member.reads and id(member.tensor) in places and groups_of(places[id(member.tensor)][1]) == 1
    ]
    if not found:
        raise ValueError(f"no layer that can be seen reads the group of {group.name}; score it by another importance")
    for _, name, layer in found:
        inputs = matrix_of(layer, layer.weight.detach()).shape[1]  # type: ignore[operator]
        if 8 * 4 * inputs**2 > memory:
            raise ValueError(
                f"{name} has {inputs:,} inputs, and their products take {32 * inputs**2 / 2**30:.1f} GiB; give more "
                f"memory than {memory / 2**30:.1f} GiB, or score the group of {group.name} by another importance"
            )
    return found


def _add(sums: dict[str, Sums], name: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    if name not in sums:
        groups, inputs, outputs = matrix_of(layer, layer.weight.detach()).shape  # type: ignore[operator]
        sums[name] = Sums(groups, inputs, outputs, x.device)
    for a, b in samples(layer, x, output):
        sums[name].add(a, b)
    if not bool(sums[name].yy.isfinite().all() and sums[name].x.isfinite().all()):
        raise ValueError(f"{name} gets or makes NaN or infinite values; leave such batches out")


def _reading(member: Member, layer: nn.Module, sums: Sums) -> Reading:
    weight = matrix_of(layer, layer.weight.detach()).double()  # type: ignore[operator]
    indices = torch.as_tensor(member.indices, device=weight.device)
    window = weight.shape[1] // member.tensor.shape[member.dim]
    inputs = (indices[..., None] * window + torch.arange(window, device=weight.device)).flatten(1)
    system = sums.system(layer.bias is not None)
    size = (weight * (system.gram @ weight)).sum()
    scale = torch.where(size > 0, size, 1).rsqrt()
    return Reading(type(system)(system.gram, system.cross * scale), weight * scale, inputs)
