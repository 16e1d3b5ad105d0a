"""Views that cut and join axes."""

from typing import Any

import numpy as np

from pyprune.structured.coordinates import Axes, Factor
from pyprune.structured.rules.call import Call, all_held, given_to


def same(call: Call) -> Axes:
    """What has the values of its first argument, in its shape."""
    _, axes = given_to(call)
    if tuple(call.made.shape) != axes.shape:
        return view(call)
    return axes


def view(call: Call) -> Axes:
    """Match minimal runs of axes that have as many entries before as after."""
    _, axes = given_to(call)
    return reshaped(call, axes, tuple(call.made.shape))


def reshaped(call: Call, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """Lay factors along the axes of another shape of the same entries."""
    runs = _runs(axes.shape, shape)
    made = []
    for factor in axes.factors:
        touched = [run for run in runs if set(run[0]) & set(factor.axes)]
        crowded = any(
            other is not factor and set(other.axes) & set(before) for other in axes.factors for before, _ in touched
        )
        alone = any(len(before) != 1 or len(after) != 1 for before, after in touched)
        if crowded and alone:
            call.coordinates.stay(factor.coords, f"{call.name} joins several axes that have units")
            continue
        made.append(_laid(call, factor, axes.shape, shape, touched))
    stretched = {
        after[0]: axes.stretched[before[0]]
        for before, after in runs
        if len(before) == len(after) == 1 and before[0] in axes.stretched
    }
    return Axes(shape, tuple(one for one in made if one is not None), axes.source, stretched)


def _laid(
    call: Call,
    factor: Factor,
    before: tuple[int, ...],
    after: tuple[int, ...],
    runs: list[tuple[list[int], list[int]]],
) -> Factor | None:
    """The factor along the axes of another shape; ``runs`` are those it touches."""
    order = [axis for run in runs for axis in run[0]]
    into = [axis for run in runs for axis in run[1]]
    # Which of the new axes come first, so that outer parts still do.
    mine = [factor.at(axis) if axis in factor.axes else None for axis in order]
    full = [before[axis] for axis in order]
    sizes = [after[axis] for axis in into]

    def lay(array: Any) -> Any:
        array = array.transpose([dim for dim in mine if dim is not None])
        array = array.reshape([1 if dim is None else size for dim, size in zip(mine, full, strict=True)])
        return np.broadcast_to(array, full).reshape(sizes)

    coords, fixed = lay(factor.coords), lay(factor.fixed)
    varies = [dim for dim in range(coords.ndim) if (coords != coords.take([0], dim)).any()]
    if not varies:  # one unit all over it
        varies = [dim for dim, size in enumerate(sizes) if size > 1][:1]
        if not varies:
            return None
    index = tuple(slice(None) if dim in varies else 0 for dim in range(coords.ndim))
    # Where it was zero only here and there it depends, for the sake of those that are dropped.
    fixed = fixed.all(tuple(dim for dim in range(coords.ndim) if dim not in varies))
    coords = coords[index]
    axes = [into[dim] for dim in varies]
    first = _order_of(factor, runs, axes)
    coords, fixed = coords.transpose(first), fixed.transpose(first)
    axes = [axes[dim] for dim in first]
    if len(axes) > 1 and len(axes) > len(factor.axes):
        call.coordinates.cut(np.ascontiguousarray(coords))
    return Factor(tuple(axes), np.ascontiguousarray(coords), np.ascontiguousarray(fixed))


def _order_of(factor: Factor, runs: list[tuple[list[int], list[int]]], axes: list[int]) -> list[int]:
    """Sort new axes as the old ones were that they came of, so that what was outer is outer."""
    rank = {}
    for before, after in runs:
        ranks = [factor.at(axis) for axis in before if axis in factor.axes]
        for axis in after:
            rank[axis] = min(ranks, default=len(factor.axes))
    return sorted(range(len(axes)), key=lambda dim: (rank[axes[dim]], dim))


def _runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair minimal runs of axes with equal numbers of entries.

    Example:
        >>> _runs((2, 6), (2, 3, 2)), _runs((2, 3, 4), (6, 4))
        ([([0], [0]), ([1], [1, 2])], [([0, 1], [0]), ([2], [1])])
    """
    if 0 in before or 0 in after:
        return []
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        size, other = 1, 1
        if i < len(before):
            left, size, i = [i], before[i], i + 1
        if j < len(after):
            right, other, j = [j], after[j], j + 1
        while size != other:
            if size < other:
                left, size, i = [*left, i], size * before[i], i + 1
            else:
                right, other, j = [*right, j], other * after[j], j + 1
        if not left or not right:  # ones at the end
            continue
        # A one beside what fits is in a run of its own, unless it was needed.
        runs.append((left, right))
    return runs


def unfold_axis(call: Call) -> Axes:
    """Windows along an axis."""
    tensor, axes = given_to(call)
    dim = call.dim(tensor, "dimension")
    return Axes(tuple(call.made.shape), all_held(call, axes, (dim,)), axes.source)
