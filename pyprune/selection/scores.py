"""From weights to the scores of their units, as the kernels compare them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.importance import Importance, normalized, random_scores, without_signs
from pyprune.methods.layout import Layout, as_matrices, from_matrices
from pyprune.methods.method import Method
from pyprune.methods.unit_groups import UnitGroup, Weight, reduce_units, units_as_rows


@dataclass(frozen=True)
class Keys:
    """Tensors that order like the scores and are not negative, one for each unit group, and what kernels do to them.

    ``scales`` multiply them, ``normalize`` divides them by their norms, ``factors`` multiply the columns of rows.
    """

    tensors: list[Tensor]
    scales: Tensor | None = None
    normalize: bool = False
    factors: list[Tensor | None] | None = None


def is_magnitude_of_elements(method: Method) -> bool:
    """Whether the scores order like |w|, so that kernels read the weights themselves."""
    return method.granularity.name == "element" and method.importance.power is not None


def keys(method: Method, unit_groups: Sequence[UnitGroup], *, compared: bool) -> Keys:
    """Return what orders like the scores.

    Args:
        method: how to score.
        unit_groups: what to score.
        compared: whether the units of different unit groups compete with each other.

    Raises:
        TypeError, ValueError: if a function or a dict of scores does not give what it must.
    """
    importance = method.importance
    if is_magnitude_of_elements(method):
        weights = [unit_group.weight.values for unit_group in unit_groups]
        how = importance.normalize if compared else "none"
        if how == "none":
            return Keys(weights)
        if how == "l2" and importance.power == 1:
            return Keys(weights, normalize=True)
        if how == "mean" and importance.power == 1:
            return Keys(weights, scales=_one_by_mean(weights))
    scores = unit_scores(method, unit_groups)
    if compared:
        scores = [normalized(score, importance.normalize) for score in scores]
    may_be_negative = importance.signed or (compared and importance.normalize == "gaussian")
    if may_be_negative and any(bool((score < 0).any()) for score in scores):
        scores = without_signs(scores)
    return Keys(scores)


def keys_in_rows(method: Method, unit_groups: Sequence[UnitGroup]) -> Keys:
    """Return what orders like the scores within rows, without storing products of weights and norms of columns."""
    rule = method.importance
    is_product = rule.needs == "input norm" and rule.scores_of == "elements"  # of |w| and norms
    in_columns = [_is_per_column(unit_group) for unit_group in unit_groups]
    if method.granularity.name != "element" or not is_product or not all(in_columns):
        return keys(method, unit_groups, compared=False)
    factors: list[Tensor | None] = [unit_group.weight.statistic for unit_group in unit_groups]
    return Keys([unit_group.weight.values for unit_group in unit_groups], factors=factors)


def unit_scores(method: Method, unit_groups: Sequence[UnitGroup]) -> list[Tensor]:
    """Return the score of every unit; for each unit group a tensor of its unit shape."""
    importance, granularity = method.importance, method.granularity
    if importance.scores_of == "channels":
        return [_scores_of_channels(method, unit_group) for unit_group in unit_groups]
    if importance.scores_of == "rows":
        return [_scores_of_rows(method, unit_group) for unit_group in unit_groups]
    if importance.scores_of == "names":
        return [_scores_of_name(method, unit_group) for unit_group in unit_groups]
    if granularity.name != "element" and importance.power is not None:
        weights = [_left(m.weight.values, m.weight) for unit_group in unit_groups for m in unit_group.members]
        return reduce_units(unit_groups, weights, importance.power, granularity.reduction)
    scores: list[Tensor | None] = [None] * len(unit_groups)
    to_reduce: list[int] = []
    tensors: list[Tensor] = []
    for i, unit_group in enumerate(unit_groups):
        found = [_score_of_elements(method, unit_group, index) for index in range(len(unit_group.members))]
        if granularity.name == "element" or found[0].shape == unit_group.unit_shape != unit_group.weight.values.shape:
            scores[i] = found[0]
        else:
            to_reduce.append(i)
            tensors += [_left(score, m.weight) for score, m in zip(found, unit_group.members, strict=True)]
    how = "sum" if importance.joint else granularity.reduction
    reduced = reduce_units([unit_groups[i] for i in to_reduce], tensors, None, how)
    for i, score in zip(to_reduce, reduced, strict=True):
        scores[i] = score
    return [score.abs() if importance.joint else score for score in scores if score is not None]


def _left(scores: Tensor, weight: Weight) -> Tensor:
    """Let what is pruned already count for nothing in its unit."""
    return scores if weight.base is None else torch.where(weight.base, scores, 0)


def _scores_of_channels(method: Method, unit_group: UnitGroup) -> Tensor:
    weight, shape = unit_group.weight, unit_group.unit_shape
    assert weight.statistic is not None
    scores = method.importance.score(weight.values, weight.statistic)
    units = torch.Size(shape).numel()
    if scores.numel() != units:
        raise ValueError(
            f"{weight.name} has {units} output channels, and importance {method.importance.name} {scores.numel()} "
            "scores; name it in ignored_scope"
        )
    return scores.reshape(shape)  # groups, and the channels of one; its other sizes are 1


def _scores_of_rows(method: Method, unit_group: UnitGroup) -> Tensor:
    rows = units_as_rows(unit_group.members[0])
    return method.importance.score(rows, rows).reshape(unit_group.unit_shape)


def _scores_of_name(method: Method, unit_group: UnitGroup) -> Tensor:
    seed = method.importance.options[0]
    assert isinstance(seed, int)
    return random_scores(seed, unit_group.name, unit_group.unit_shape, unit_group.weight.values.device)


def scores_of_elements(
    importance: Importance, name: str, values: Tensor, statistic: Tensor | None, layout: Layout
) -> Tensor:
    """Return what an importance gives the elements of a weight, which may be anything if a user's function does it.

    Raises:
        ValueError: if it compares outputs and inputs, and which dimensions count them cannot be told.
    """
    if statistic is None:
        statistic = values
    if importance.scores_of != "matrices":
        return importance.score(values, statistic)
    if values.dim() > 1 and not layout.is_clear:
        raise ValueError(
            f"importance {importance.name} compares outputs and inputs, and which dimension of {name} of shape "
            f"{tuple(values.shape)} counts them cannot be told: {layout.problem}. Name it in ignored_scope"
        )
    of = as_matrices(statistic.expand_as(values), layout)
    return from_matrices(importance.score(as_matrices(values, layout), of), layout, values.shape)


def _score_of_elements(method: Method, unit_group: UnitGroup, index: int) -> Tensor:
    weight = unit_group.members[index].weight
    name = f"importance {method.importance.name} of {weight.name}"
    score = scores_of_elements(method.importance, weight.name, weight.values, weight.statistic, weight.layout)
    if not isinstance(score, Tensor) or not score.is_floating_point():
        raise TypeError(f"{name} is {score!r:.80}; it must be a tensor of floating-point numbers")
    if score.shape != weight.values.shape and (score.shape != unit_group.unit_shape or len(unit_group.members) > 1):
        raise ValueError(
            f"{name} has shape {tuple(score.shape)}; give one score for each element, {tuple(weight.values.shape)}, "
            f"or for each unit, {unit_group.unit_shape}"
        )
    if score.device != weight.values.device:
        raise ValueError(f"{name} is on {score.device}, the weight on {weight.values.device}; move the scores there")
    return score.detach()


def _is_per_column(unit_group: UnitGroup) -> bool:
    weight = unit_group.weight
    if weight.statistic is None or weight.layout.groups > 1:  # each group has columns of its own
        return False
    return weight.statistic.numel() == (weight.values.shape[weight.in_dim] if weight.values.dim() else 1)


def _one_by_mean(weights: Sequence[Tensor]) -> Tensor:
    blocks = [tuple(max(1, size) for size in weight.shape) for weight in weights]
    means = [mean.sum(dtype=torch.float64) for mean in ops.unit_scores(weights, blocks, p=1.0, reduction="mean")]
    finite = torch.finfo(torch.float64)
    return torch.stack(means).nan_to_num(nan=1.0).clamp(min=finite.tiny, max=finite.max).reciprocal()
