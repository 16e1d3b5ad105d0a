"""From weights to the scores of their units, as the kernels compare them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops
from pyprune.competitors import Competitor, Weight, reduce_units
from pyprune.importance import normalized, random_scores, without_signs
from pyprune.methods import Method


@dataclass(frozen=True)
class Keys:
    """Tensors that order like the scores and are not negative, one for each competitor, and what kernels do to them.

    ``scales`` multiply them, ``normalize`` divides them by their norms, ``factors`` multiply the columns of rows.
    """

    tensors: list[Tensor]
    scales: Tensor | None = None
    normalize: bool = False
    factors: list[Tensor | None] | None = None


def is_magnitude_of_elements(method: Method) -> bool:
    """Whether the scores order like |w|, so that kernels read the weights themselves."""
    return method.granularity.name == "element" and method.importance.power is not None


def keys(method: Method, competitors: Sequence[Competitor], *, compared: bool) -> Keys:
    """Return what orders like the scores.

    Args:
        method: how to score.
        competitors: what to score.
        compared: whether the units of different competitors compete with each other.

    Raises:
        TypeError, ValueError: if a function or a dict of scores does not give what it must.
    """
    importance = method.importance
    if is_magnitude_of_elements(method):
        weights = [competitor.weight.values for competitor in competitors]
        how = importance.normalize if compared else "none"
        if how == "none":
            return Keys(weights)
        if how == "l2" and importance.power == 1:
            return Keys(weights, normalize=True)
        if how == "mean" and importance.power == 1:
            return Keys(weights, scales=_one_by_mean(weights))
    scores = unit_scores(method, competitors)
    if compared:
        scores = [normalized(score, importance.normalize) for score in scores]
    may_be_negative = importance.signed or (compared and importance.normalize == "gaussian")
    if may_be_negative and any(bool((score < 0).any()) for score in scores):
        scores = without_signs(scores)
    return Keys(scores)


def keys_in_rows(method: Method, competitors: Sequence[Competitor]) -> Keys:
    """Return what orders like the scores within rows, without storing products of weights and norms of columns."""
    in_columns = [_is_per_column(competitor) for competitor in competitors]
    if method.granularity.name != "element" or method.importance.needs != "input norm" or not all(in_columns):
        return keys(method, competitors, compared=False)
    factors: list[Tensor | None] = [competitor.weight.statistic for competitor in competitors]
    return Keys([competitor.weight.values for competitor in competitors], factors=factors)


def unit_scores(method: Method, competitors: Sequence[Competitor]) -> list[Tensor]:
    """Return the score of every unit; for each competitor a tensor of its unit shape."""
    importance, granularity = method.importance, method.granularity
    if importance.scores_of == "channels":
        return [_scores_of_channels(method, competitor) for competitor in competitors]
    if importance.scores_of == "rows":
        return [_scores_of_rows(method, competitor) for competitor in competitors]
    if importance.scores_of == "names":
        return [_scores_of_name(method, competitor) for competitor in competitors]
    if granularity.name != "element" and importance.power is not None:
        weights = [_left(m.weight.values, m.weight) for competitor in competitors for m in competitor.members]
        return reduce_units(competitors, weights, importance.power, granularity.reduction)
    scores: list[Tensor | None] = [None] * len(competitors)
    to_reduce: list[int] = []
    tensors: list[Tensor] = []
    for i, competitor in enumerate(competitors):
        found = [_score_of_elements(method, competitor, index) for index in range(len(competitor.members))]
        if granularity.name == "element" or found[0].shape == competitor.unit_shape != competitor.weight.values.shape:
            scores[i] = found[0]
        else:
            to_reduce.append(i)
            tensors += [_left(score, m.weight) for score, m in zip(found, competitor.members, strict=True)]
    reduced = reduce_units([competitors[i] for i in to_reduce], tensors, None, granularity.reduction)
    for i, score in zip(to_reduce, reduced, strict=True):
        scores[i] = score
    return [score for score in scores if score is not None]


def _left(scores: Tensor, weight: Weight) -> Tensor:
    """Let what is pruned already count for nothing in its unit."""
    return scores if weight.base is None else torch.where(weight.base, scores, 0)


def _scores_of_channels(method: Method, competitor: Competitor) -> Tensor:
    weight, shape = competitor.weight, competitor.unit_shape
    assert weight.statistic is not None
    scores = method.importance.score(weight.values, weight.statistic)
    units = torch.Size(shape).numel()
    if units == 0 or scores.numel() % units:
        raise ValueError(
            f"{weight.name} has {units} output channels, and importance {method.importance.name} {scores.numel()} "
            "scores; name it in ignored_scope"
        )
    # In a grouped transposed convolution a unit is one output channel of every group. Other sizes of the shape are 1.
    return scores.reshape(-1, units).sum(0).reshape(shape)


def _scores_of_rows(method: Method, competitor: Competitor) -> Tensor:
    weight = competitor.weight
    dim = weight.out_dim if method.granularity.name == 'channel("out")' else weight.in_dim
    rows = weight.values.movedim(dim, 0).flatten(1) if weight.values.dim() > 1 else weight.values.reshape(-1, 1)
    return method.importance.score(rows, rows).reshape(competitor.unit_shape)


def _scores_of_name(method: Method, competitor: Competitor) -> Tensor:
    seed = method.importance.options[0]
    assert isinstance(seed, int)
    return random_scores(seed, competitor.name, competitor.unit_shape, competitor.weight.values.device)


def _score_of_elements(method: Method, competitor: Competitor, index: int) -> Tensor:
    weight = competitor.members[index].weight
    name = f"importance {method.importance.name} of {weight.name}"
    statistic = weight.values if weight.statistic is None else weight.statistic
    score = method.importance.score(weight.values, statistic)
    if not isinstance(score, Tensor) or not score.is_floating_point():
        raise TypeError(f"{name} is {score!r:.80}; it must be a tensor of floating-point numbers")
    if score.shape != weight.values.shape and (score.shape != competitor.unit_shape or len(competitor.members) > 1):
        raise ValueError(
            f"{name} has shape {tuple(score.shape)}; give one score for each element, {tuple(weight.values.shape)}, "
            f"or for each unit, {competitor.unit_shape}"
        )
    if score.device != weight.values.device:
        raise ValueError(f"{name} is on {score.device}, the weight on {weight.values.device}; move the scores there")
    return score.detach()


def _is_per_column(competitor: Competitor) -> bool:
    weight = competitor.weight
    return weight.statistic is not None and weight.statistic.numel() == (
        weight.values.shape[weight.in_dim] if weight.values.dim() else 1
    )


def _one_by_mean(weights: Sequence[Tensor]) -> Tensor:
    blocks = [tuple(max(1, size) for size in weight.shape) for weight in weights]
    means = [mean.sum(dtype=torch.float64) for mean in ops.unit_scores(weights, blocks, p=1.0, reduction="mean")]
    finite = torch.finfo(torch.float64)
    return torch.stack(means).clamp(min=finite.tiny, max=finite.max).reciprocal()
