"""Which coupled units stay: their scores, how many of each group, and masks of all parameters that they lie in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import Amount
from pyprune.methods.coupled import Flags, combined, lowest
from pyprune.methods.importance import normalized, random_scores
from pyprune.methods.method import Method
from pyprune.modules.masks import Mask
from pyprune.modules.targets import Target
from pyprune.selection.count_coupled import coupled_counts
from pyprune.selection.coupled import CoupledUnits, Part, UnitsOfGroup, parts_scored
from pyprune.selection.scores import scores_of_elements


@dataclass(frozen=True, eq=False)
class CoupledChoice:
    """The masks of all parameters that lose units, and how many scores of each group are not finite."""

    masks: dict[Target, Tensor]
    names: list[str]
    nonfinite: Tensor


@torch.no_grad()
def choose_coupled(
    method: Method, amount: Amount, units: CoupledUnits, statistics: Mapping[Target, Tensor | None]
) -> CoupledChoice:
    """Choose which coupled units stay: in each group, or of groups that compete, those with the highest scores.

    Args:
        method: how.
        amount: how much goes, from `pyprune.methods.method.check_amount`.
        units: whose.
        statistics: what the importance was measured from, of the weights that it needs it for.

    Raises:
        TypeError, ValueError: for scores, an amount or a rule that do not fit these groups, and a cost that cannot be
            reached.
    """
    scores = [score.double().cpu() for score in coupled_scores(method, amount, units.chosen, statistics)]
    nonfinite = torch.tensor([int((~score.isfinite()).sum()) for score in scores], dtype=torch.int64)
    if method.scope.weights_compete:
        scores = [normalized(score, method.importance.normalize) for score in scores]
    gone = [_gone(one, amount) for one in units.chosen]
    ordered = [
        np.where(dropped, -np.inf, np.nan_to_num(score.numpy())) for score, dropped in zip(scores, gone, strict=True)
    ]
    removed = coupled_counts(method, amount, units, ordered, [int(dropped.sum()) for dropped in gone])
    kept = [lowest(score, count) for score, count in zip(ordered, removed, strict=True)]
    return CoupledChoice(unit_masks(units, amount, kept), [one.name for one in units.chosen], nonfinite)


# ---- scores ----


def coupled_scores(
    method: Method, amount: Amount, groups: Sequence[UnitsOfGroup], statistics: Mapping[Target, Tensor | None]
) -> list[Tensor]:
    """Return the score of every unit, for each group a vector."""
    rule, how = method.importance, method.granularity.coupled
    assert how is not None
    if rule.needs == "given":
        given = rule.options[0]
        assert isinstance(given, Mapping)
        return [_given(one, given) for one in groups]
    if rule.scores_of == "names":
        seed = rule.options[0]
        assert isinstance(seed, int)
        return [random_scores(seed, one.name, (len(one),), torch.device("cpu")) for one in groups]
    found = []
    for one in groups:
        parts = parts_scored(one, rule, statistics)
        scores = [_in_weight(method, amount, part, statistics.get(part.target)) for part in parts]
        found.append(torch.stack(scores).sum(0).abs() if rule.joint else combined(scores, how))
    return found


def _given(one: UnitsOfGroup, given: Mapping[str, Tensor]) -> Tensor:
    score = next((given[name] for name in one.names if name in given), None)
    if score is None or score.shape != (len(one),):
        what = "has none" if score is None else f"has shape {tuple(score.shape)}"
        raise ValueError(
            f"importance given: the score of the group {one.name} {what}; give one number for each of its "
            f"{len(one)} units, under the name of the weight that makes it"
        )
    return score.detach().cpu()


def _in_weight(method: Method, amount: Amount, part: Part, statistic: Tensor | None) -> Tensor:
    """Return the score of each unit in one weight; float64 on the CPU."""
    rule, weight = method.importance, part.target.parameter.detach()
    if rule.needs == "norm scale":
        entries = rule.score(weight, weight).flatten()
    elif rule.scores_of == "channels":
        assert statistic is not None
        entries = rule.score(weight, statistic).flatten()
    elif rule.scores_of == "rows":
        rows = part.per_unit(weight.movedim(part.dim, 0).flatten(1)).flatten(1)
        return rule.score(rows, rows).double().cpu()
    else:
        elements, power = weight, rule.power
        if power is None:
            elements, power = _elements(method, part, statistic), 2.0 if rule.needs == "input norm" else None
        if amount.has_bases and isinstance(mask := part.target.attachment, Mask):
            elements = torch.where(mask.mask, elements, 0)  # what is pruned already counts for nothing
        entries = ops.unit_scores([elements], [part.block], p=power, reduction="sum")[0].flatten()
    score = part.per_unit(entries.double()).sum(1)
    return (score.sqrt() if rule.needs == "input norm" else score).cpu()


def _elements(method: Method, part: Part, statistic: Tensor | None) -> Tensor:
    rule, weight = method.importance, part.target.parameter.detach()
    name = f"importance {rule.name} of {part.target.name}"
    statistic = None if statistic is None else statistic.to(weight.device)
    score = scores_of_elements(rule, part.target.name, weight, statistic, part.target.layout)
    if not isinstance(score, Tensor) or not score.is_floating_point():
        raise TypeError(f"{name} is {score!r:.80}; it must be a tensor of floating-point numbers")
    if score.shape != weight.shape:
        raise ValueError(
            f"{name} has shape {tuple(score.shape)}; give one score for each element, {tuple(weight.shape)}"
        )
    return score.detach()


# ---- masks ----


def _gone(one: UnitsOfGroup, amount: Amount) -> Flags:
    """Return which units of a group are dropped from all its weights already, where such stay so."""
    if not amount.has_bases:
        return np.zeros(len(one), bool)
    return one.dropped(zeros_count=amount.from_remaining)


def unit_masks(units: CoupledUnits, amount: Amount, kept: Sequence[Flags]) -> dict[Target, Tensor]:
    """Return masks that drop all but some units of each chosen group from all parameters that they lie in."""
    masks = {target: _base(target, amount) for target in units.targets}
    dropped = [(one, ~flags) for one, flags in zip(units.chosen, kept, strict=True)]
    # What other groups have lost stays so.
    dropped += [(one, one.dropped()) for one in units.others if any(part.target in masks for part in one.parts)]
    for one, gone in dropped:
        for part in one.parts:
            if part.target in masks and gone.any():
                mask = masks[part.target]
                mask.index_fill_(part.dim, part.indices[torch.from_numpy(gone)].flatten().to(mask.device), False)
    return masks


def _base(target: Target, amount: Amount) -> Tensor:
    """Return a mask that keeps all that can be kept."""
    mask, parameter = target.attachment, target.parameter.detach()
    if amount.has_bases and isinstance(mask, Mask):
        return mask.mask.clone()
    if amount.from_remaining and parameter.dim() > 1:  # of a bias that was never trained, zeros say nothing
        return parameter != 0
    return torch.ones_like(parameter, dtype=torch.bool)
