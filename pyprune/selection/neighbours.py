"""Which of so many neighbours stay: a number of each row, or N:M along inputs, outputs or both."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import Amount
from pyprune.methods.importance import normalized, without_signs
from pyprune.methods.method import Method
from pyprune.methods.scope import Scope
from pyprune.methods.transposable import transposable_mask
from pyprune.methods.unit_groups import UnitGroup, Weight
from pyprune.selection.scores import keys, keys_in_rows, unit_scores

Masks = tuple[list[Tensor], Tensor]  # as of `ops.group_masks`: masks, and counts of non-finite scores


def keep_in_rows(
    method: Method,
    unit_groups: Sequence[UnitGroup],
    bases: Sequence[Tensor | None],
    masks: Sequence[Tensor] | None,
    sizes: Sequence[int],
    kept: Sequence[int],
    *,
    along: Literal["row", "in", "out"],
) -> Masks:
    """Keep ``kept`` of each ``sizes`` neighbours: of all units of an output, or only along its inputs or outputs."""

    def in_rows(tensor: Tensor, weight: Weight) -> Tensor:
        if tensor.dim() < 2:
            return tensor.reshape(-1)
        if along == "row":
            return tensor.movedim(weight.out_dim, 0)
        return tensor.movedim(weight.in_dim if along == "in" else weight.out_dim, -1)

    def per_column(factor: Tensor, weight: Weight) -> Tensor:
        shape = list(weight.values.shape)
        if along == "in" or len(shape) < 2:
            return factor.flatten()
        shape[weight.out_dim] = 1
        return in_rows(factor.expand(shape), weight).flatten()

    weights = [unit_group.weight for unit_group in unit_groups]
    # A factor of an input is the same for all outputs.
    key = keys(method, unit_groups, compared=False) if along == "out" else keys_in_rows(method, unit_groups)
    masks = masks or [torch.empty_like(tensor, dtype=torch.bool) for tensor in key.tensors]
    views = [in_rows(tensor, weight) for tensor, weight in zip(key.tensors, weights, strict=True)]
    factors = [
        None if factor is None else per_column(factor, weight)
        for factor, weight in zip(key.factors or [None] * len(weights), weights, strict=True)
    ]
    _, nonfinite = ops.group_masks(
        views,
        list(sizes),
        list(kept),
        row_dims=[min(1, view.dim() - 1) if along == "row" else view.dim() - 1 for view in views],
        factors=factors,
        bases=[None if base is None else in_rows(base, weight) for base, weight in zip(bases, weights, strict=True)],
        masks=[in_rows(mask, weight) for mask, weight in zip(masks, weights, strict=True)],
    )
    return list(masks), nonfinite


def keep_n_of_m(
    method: Method,
    unit_groups: Sequence[UnitGroup],
    bases: Sequence[Tensor | None],
    masks: Sequence[Tensor] | None,
    amount: Amount,
    ratios: Sequence[float] | None,
) -> Masks:
    """Keep N of M in all groups, or, if there are ratios, in those where it costs the least."""
    scope, count = method.scope, len(unit_groups)
    if scope.dim == "both":
        found, nonfinite = _in_squares(method, unit_groups, bases, masks)
    else:
        found, nonfinite = keep_in_rows(
            method, unit_groups, bases, masks, [scope.of] * count, [scope.keep] * count, along=scope.dim
        )
    if ratios is not None and any(ratio != scope.ratio for ratio in ratios):
        costs = _leave_whole(method, unit_groups, bases, found, amount, ratios)
        nonfinite = torch.maximum(nonfinite, costs)
    return found, nonfinite


def _in_squares(
    method: Method,
    unit_groups: Sequence[UnitGroup],
    bases: Sequence[Tensor | None],
    masks: Sequence[Tensor] | None,
) -> Masks:
    scores = unit_scores(method, unit_groups)
    masks = masks or [torch.empty_like(score, dtype=torch.bool) for score in scores]
    for unit_group, score, base, mask in zip(unit_groups, scores, bases, masks, strict=True):
        if score.dim() < 2:
            raise ValueError(
                f"{unit_group.name} of shape {tuple(score.shape)} has no outputs and inputs for N:M along both; name "
                'it in ignored_scope, or give dim="in"'
            )
        dims = unit_group.weight.out_dim, unit_group.weight.in_dim
        left = score if base is None else torch.where(base, score, 0)
        square = transposable_mask(left.movedim(dims, (-2, -1)), method.scope.keep, method.scope.of)
        mask.copy_(square.movedim((-2, -1), dims))
        if base is not None:
            mask &= base
    return list(masks), torch.stack([(~score.isfinite()).sum() for score in scores])


def _leave_whole(
    method: Method,
    unit_groups: Sequence[UnitGroup],
    bases: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    amount: Amount,
    ratios: Sequence[float],
) -> Tensor:
    """Give back, in place, what those groups lost whose masking costs the most; count costs that are not finite."""
    scope = method.scope
    blocks = [_block(scope, unit_group) for unit_group in unit_groups]
    scores = unit_scores(method, unit_groups)
    if scope.among == "model":
        scores = [normalized(score, method.importance.normalize) for score in scores]
    lost = [~mask if base is None else base & ~mask for mask, base in zip(masks, bases, strict=True)]
    costs = ops.unit_scores(
        [torch.where(gone, score, 0) for gone, score in zip(lost, scores, strict=True)], blocks, p=None
    )
    if any(bool((cost < 0).any()) for cost in costs if method.importance.signed or scope.among == "model"):
        costs = without_signs(costs)
    # Groups that have nothing to lose count as gone.
    may_lose = [most > 0 for most in ops.unit_scores(lost, blocks, p=None, reduction="max")]
    counts = _counts(unit_groups, scope, may_lose, has_bases=any(base is not None for base in bases))
    if scope.among == "model":
        groups, idle, gone = (sum(column) for column in zip(*counts, strict=True))
        removed: int | list[int] = _removed(groups, idle, gone, ratios[0], scope, amount)
    else:
        removed = [_removed(*count, ratio, scope, amount) for count, ratio in zip(counts, ratios, strict=True)]
    cut, nonfinite = ops.threshold(costs, removed, bases=may_lose)
    whole = [torch.empty_like(mask) for mask in masks]
    ops.expand(cut, blocks, whole)
    for mask, all_stay, base in zip(masks, whole, bases, strict=True):
        mask |= all_stay if base is None else all_stay & base
    return nonfinite


def _removed(groups: int, idle: int, gone: int, ratio: float, scope: Scope, amount: Amount) -> int:
    """Return how many groups are cut in the end, with those that have nothing to lose."""
    assert scope.ratio is not None
    # A share like 0.3 / 0.75 is off by a rounding error, which must not count as a group.
    share = round(ratio / scope.ratio, 12)
    if amount.from_remaining:
        return gone + math.floor(share * (groups - gone) + 0.5)
    return max(gone, idle + math.floor(share * (groups - idle) + 0.5))


def _counts(
    unit_groups: Sequence[UnitGroup], scope: Scope, may_lose: Sequence[Tensor], *, has_bases: bool
) -> list[tuple[int, int, int]]:
    """Return how many groups of N:M there are, how many never lose anything, and how many cannot any more."""
    idle = [_count_idle(scope, unit_group) for unit_group in unit_groups]
    # Read from the device only if the shape does not say it.
    gone = ops.count_zeros(list(may_lose)).tolist() if has_bases else idle
    return [(groups.numel(), one, other) for groups, one, other in zip(may_lose, idle, gone, strict=True)]


def _count_idle(scope: Scope, unit_group: UnitGroup) -> int:
    """Return how many groups at the edge of a weight are so small that they lose nothing."""
    shape = unit_group.unit_shape
    elements = math.prod(shape)
    if scope.dim == "both":
        rows, columns = shape[unit_group.weight.out_dim], shape[unit_group.weight.in_dim]
        rest, other = rows % scope.of, columns % scope.of
        fits = 0 < rest <= scope.keep and 0 < other <= scope.keep and rest + other <= scope.of
        return elements // (rows * columns) if fits else 0
    size = shape[_dim(scope, unit_group)]
    return elements // size if 0 < size % scope.of <= scope.keep else 0


def _block(scope: Scope, unit_group: UnitGroup) -> tuple[int, ...]:
    """Return the size of a group of N:M, in units."""
    block = [1] * len(unit_group.unit_shape)
    if scope.dim == "both":
        block[unit_group.weight.out_dim] = block[unit_group.weight.in_dim] = scope.of
    else:
        block[_dim(scope, unit_group)] = scope.of
    return tuple(block)


def _dim(scope: Scope, unit_group: UnitGroup) -> int:
    if len(unit_group.unit_shape) < 2:
        return 0
    return unit_group.weight.out_dim if scope.dim == "out" else unit_group.weight.in_dim
