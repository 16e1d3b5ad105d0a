"""Which of so many neighbours stay: a number of each row, or N:M along inputs, outputs or both."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import Amount
from pyprune.methods.importance import normalized, without_signs
from pyprune.methods.layout import Layout, groups_first
from pyprune.methods.method import Method
from pyprune.methods.scope import Scope
from pyprune.methods.transposable import transposable_mask
from pyprune.methods.unit_groups import UnitGroup
from pyprune.selection.scores import keys, keys_in_rows, unit_scores

Side = Literal["in", "out", "both"]
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

    def in_rows(tensor: Tensor, unit_group: UnitGroup) -> Tensor:
        if along == "row" and tensor.dim() > 1:
            return outputs_first(tensor, unit_group)
        return _neighbours_last(tensor, unit_group, "in" if along == "row" else along)

    def per_column(factor: Tensor, unit_group: UnitGroup) -> Tensor:
        shape = list(unit_group.weight.values.shape)
        if along == "in" or len(shape) < 2:
            return factor.flatten()
        shape[unit_group.weight.out_dim] = 1
        return outputs_first(factor.expand(shape), unit_group).flatten()

    # A factor of an input is the same for all outputs.
    key = keys(method, unit_groups, compared=False) if along == "out" else keys_in_rows(method, unit_groups)
    masks = masks or [torch.empty_like(tensor, dtype=torch.bool) for tensor in key.tensors]
    views = [in_rows(tensor, one) for tensor, one in zip(key.tensors, unit_groups, strict=True)]
    factors = [
        None if factor is None else per_column(factor, one)
        for factor, one in zip(key.factors or [None] * len(unit_groups), unit_groups, strict=True)
    ]
    _, nonfinite = ops.group_masks(
        views,
        list(sizes),
        list(kept),
        row_dims=[2 if along == "row" and view.dim() > 1 else view.dim() - 1 for view in views],
        factors=factors,
        bases=[None if base is None else in_rows(base, one) for base, one in zip(bases, unit_groups, strict=True)],
        masks=[in_rows(mask, one) for mask, one in zip(masks, unit_groups, strict=True)],
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
        left = score if base is None else torch.where(base, score, 0)
        square = transposable_mask(_neighbours_last(left, unit_group, "both"), method.scope.keep, method.scope.of)
        _neighbours_last(mask, unit_group, "both").copy_(square)
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

    def views(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_view(one, group, scope.dim) for one, group in zip(tensors, unit_groups, strict=True)]

    scores = unit_scores(method, unit_groups)
    if scope.among == "model":
        scores = [normalized(score, method.importance.normalize) for score in scores]
    lost = [~mask if base is None else base & ~mask for mask, base in zip(masks, bases, strict=True)]
    costly = views([torch.where(gone, score, 0) for gone, score in zip(lost, scores, strict=True)])
    blocks = [
        tuple(scope.of if dim in _dims(group, scope.dim) else 1 for dim in range(view.dim()))
        for view, group in zip(costly, unit_groups, strict=True)
    ]
    costs = ops.unit_scores(costly, blocks, p=None)
    if any(bool((cost < 0).any()) for cost in costs if method.importance.signed or scope.among == "model"):
        costs = without_signs(costs)
    # Groups that have nothing to lose count as gone.
    may_lose = [most > 0 for most in ops.unit_scores(views(lost), blocks, p=None, reduction="max")]
    counts = _counts(unit_groups, costly, scope, may_lose, has_bases=any(base is not None for base in bases))
    if scope.among == "model":
        groups, idle, gone = (sum(column) for column in zip(*counts, strict=True))
        removed: int | list[int] = _removed(groups, idle, gone, ratios[0], scope, amount)
    else:
        removed = [_removed(*count, ratio, scope, amount) for count, ratio in zip(counts, ratios, strict=True)]
    cut, nonfinite = ops.threshold(costs, removed, bases=may_lose)
    whole = [torch.empty_like(mask) for mask in masks]
    ops.expand(cut, blocks, views(whole))
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
    unit_groups: Sequence[UnitGroup],
    views: Sequence[Tensor],
    scope: Scope,
    may_lose: Sequence[Tensor],
    *,
    has_bases: bool,
) -> list[tuple[int, int, int]]:
    """Return how many groups of N:M there are, how many never lose anything, and how many cannot any more."""
    idle = [
        _count_idle(scope, view.numel(), [view.shape[dim] for dim in _dims(group, scope.dim)])
        for view, group in zip(views, unit_groups, strict=True)
    ]
    # Read from the device only if the shape does not say it.
    gone = ops.count_zeros(list(may_lose)).tolist() if has_bases else idle
    return [(groups.numel(), one, other) for groups, one, other in zip(may_lose, idle, gone, strict=True)]


def _count_idle(scope: Scope, elements: int, sizes: Sequence[int]) -> int:
    """Return how many groups at the edge of a weight are so small that they lose nothing."""
    rests = [size % scope.of for size in sizes]
    # A square that has few rows and columns may still have to lose some: 3 of 4 cannot keep all of 3 x 3.
    fits = all(0 < rest <= scope.keep for rest in rests) and sum(rests) <= scope.of
    return elements // math.prod(sizes) if fits else 0


# ---- views ----


def count_of_rows(unit_group: UnitGroup) -> int:
    """Return how many rows of units there are, one for each output of each group."""
    shape, weight = unit_group.unit_shape, unit_group.weight
    if len(shape) < 2:
        return 1
    return shape[weight.out_dim] * (1 if weight.out_dim == 0 else weight.layout.groups)


def outputs_first(tensor: Tensor, unit_group: UnitGroup) -> Tensor:
    """Return a view with two dimensions in front, that count groups, where they matter, and outputs."""
    dim = unit_group.weight.out_dim
    return _groups_first(tensor, unit_group, matter=dim != 0).movedim(dim + 1, 1)


def _neighbours_last(tensor: Tensor, unit_group: UnitGroup, along: Side) -> Tensor:
    """Return a view with the inputs or outputs of a group as its last dimension, or outputs and inputs as two."""
    dims = _dims(unit_group, along)
    return _view(tensor, unit_group, along).movedim(dims, list(range(-len(dims), 0)))


def _view(tensor: Tensor, unit_group: UnitGroup, along: Side) -> Tensor:
    """Return a view in which neighbours lie along `_dims`, and are of one group."""
    if tensor.dim() < 2:
        return tensor.reshape(-1)
    return _groups_first(tensor, unit_group, matter=1 in _dims(unit_group, along))


def _dims(unit_group: UnitGroup, along: Side) -> list[int]:
    if len(unit_group.unit_shape) < 2:
        return [0]
    weight = unit_group.weight
    outputs, inputs = weight.out_dim + 1, weight.in_dim + 1  # after groups
    return {"in": [inputs], "out": [outputs], "both": [outputs, inputs]}[along]


def _groups_first(tensor: Tensor, unit_group: UnitGroup, *, matter: bool) -> Tensor:
    weight = unit_group.weight
    if matter and tensor.shape[0] % weight.layout.groups:
        raise ValueError(
            f"{weight.name} of shape {tuple(weight.values.shape)} has {weight.layout.groups} groups, and blocks that "
            "lie across them are in no row; name it in ignored_scope, or choose smaller blocks"
        )
    return groups_first(tensor, weight.layout if matter else Layout())
