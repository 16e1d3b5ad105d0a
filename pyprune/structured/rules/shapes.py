"""Views and copies: axes are moved, cut and joined, and pieces are taken and put together."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pyprune.structured.coordinates import NONE, Axes, Factor
from pyprune.structured.rules.call import Call, Result, tensors_in
from pyprune.structured.rules.elementwise import broadcast, source_of


def _given(call: Call) -> tuple[Tensor, Axes]:
    tensor = call.args["self"] if "self" in call.args else call.tensors()[0]
    return tensor, call.axes(tensor)


def _hold(call: Call, factor: Factor, over: Iterable[int], why: str = "") -> Factor | None:
    over = [axis for axis in factor.axes if axis in set(over)]
    if not over:
        return factor
    call.coordinates.hold(factor, over, why or f"{call.name} along it")
    return factor.first(over)


def same(call: Call) -> Axes:
    """What has the values of its first argument, in its shape."""
    _, axes = _given(call)
    if tuple(call.made.shape) != axes.shape:
        return view(call)
    return axes


# ---- cut and join ----


def view(call: Call) -> Axes:
    """Match minimal runs of axes that have as many entries before as after."""
    _, axes = _given(call)
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
    tensor, axes = _given(call)
    dim = call.dim(tensor, "dimension")
    factors = tuple(left for one in axes.factors if (left := _hold(call, one, (dim,))) is not None)
    return Axes(tuple(call.made.shape), factors, axes.source)


# ---- move ----


def _placed(call: Call, places: Callable[[int], int | None]) -> Axes:
    """Axes that have moved; None where one went (it had size 1)."""
    _, axes = _given(call)
    factors = []
    for factor in axes.factors:
        moved = [places(axis) for axis in factor.axes]
        assert None not in moved
        factors.append(factor.moved(axis for axis in moved if axis is not None))
    stretched = {places(axis): size for axis, size in axes.stretched.items()}
    return Axes(
        tuple(call.made.shape),
        tuple(factors),
        axes.source,
        {axis: size for axis, size in stretched.items() if axis is not None},
    )


def transpose(call: Call) -> Axes:
    """Two axes change places."""
    tensor, _ = _given(call)
    if "dim0" in call.args:
        one, other = (int(call.args[name]) % max(1, tensor.dim()) for name in ("dim0", "dim1"))
    elif tensor.dim() < 2:
        return _placed(call, lambda axis: axis)
    else:
        one, other = 0, 1
    return _placed(call, lambda axis: {one: other, other: one}.get(axis, axis))


def permute(call: Call) -> Axes:
    """Axes in another order."""
    tensor, _ = _given(call)
    order = [int(dim) % tensor.dim() for dim in call.args["dims"]]
    return _placed(call, order.index)


def unsqueeze(call: Call) -> Axes:
    """A new axis of size 1."""
    tensor, _ = _given(call)
    dim = int(call.args["dim"]) % (tensor.dim() + 1)
    return _placed(call, lambda axis: axis + (axis >= dim))


def squeeze(call: Call) -> Axes:
    """Axes of size 1 go."""
    tensor, _ = _given(call)
    dims = call.args.get("dim")
    every = range(tensor.dim()) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {int(dim) % max(1, tensor.dim()) for dim in every}
    gone = {dim for dim in gone if tensor.dim() and tensor.shape[dim] == 1}
    left = [axis for axis in range(tensor.dim()) if axis not in gone]
    return _placed(call, lambda axis: left.index(axis) if axis in left else None)


def expand(call: Call) -> Axes:
    """Axes of size 1 become longer, all along the same memory."""
    tensor, axes = _given(call)
    more = call.made.dim() - tensor.dim()
    moved = _placed(call, lambda axis: axis + more)
    new = {
        axis
        for axis, size in enumerate(call.made.shape)
        if size > 1 and (axis < more or axes.shape[axis - more] == 1)
    }
    return replace(moved, stretched={**dict.fromkeys(new), **moved.stretched})


def repeat(call: Call) -> Axes:
    """Copies one after the other."""
    tensor, axes = _given(call)
    counts = [int(count) for count in call.args["repeats"]]
    more = len(counts) - tensor.dim()
    factors = []
    for factor in axes.factors:
        times = [counts[axis + more] for axis in factor.axes]
        factors.append(factor.each(partial(np.tile, reps=times)).moved(axis + more for axis in factor.axes))
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


def repeat_interleave(call: Call) -> Axes:
    """With one number for all: each entry several times; with numbers in a tensor the axis stays."""
    tensor, axes = _given(call)
    dim = call.dim(tensor)
    times = call.args.get("repeats")
    factors = []
    for factor in axes.factors:
        if dim not in factor.axes:
            factors.append(factor)
        elif isinstance(times, int):
            factors.append(factor.each(partial(np.repeat, repeats=times, axis=factor.at(dim))))
        elif (left := _hold(call, factor, (dim,))) is not None:
            factors.append(left)
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


def flip(call: Call) -> Axes:
    """Entries in reverse."""
    tensor, axes = _given(call)
    dims = {int(dim) % tensor.dim() for dim in call.args["dims"]}
    factors = tuple(
        factor.each(partial(np.flip, axis=[factor.at(axis) for axis in factor.axes if axis in dims]))
        for factor in axes.factors
    )
    return replace(axes, factors=factors)


def roll(call: Call) -> Axes:
    """Entries moved around the end, whose number stays."""
    tensor, axes = _given(call)
    dims = [int(dim) % tensor.dim() for dim in call.args["dims"]]
    factors = [
        left for one in axes.factors if (left := one if not set(dims) & set(one.axes) else _rolled(call, one, dims))
    ]
    return replace(axes, factors=tuple(factors))


def _rolled(call: Call, factor: Factor, dims: Sequence[int]) -> Factor | None:
    call.coordinates.hold(factor, [axis for axis in factor.axes if axis in dims], "roll along it")
    return factor


def same_memory(call: Call) -> Axes:
    """as_strided that changes nothing."""
    tensor, axes = _given(call)
    if tuple(call.made.shape) == axes.shape and call.made.stride() == tensor.stride():
        return axes
    for factor in axes.factors:
        call.coordinates.stay(factor.coords, f"{call.name} reads memory as it lies")
    return Axes(tuple(call.made.shape), (), axes.source)


# ---- take pieces ----


def split(call: Call) -> list[Axes]:
    """Pieces along an axis: equal ones lose equally."""
    tensor, axes = _given(call)
    dim = call.dim(tensor)
    pieces = list(tensors_in([call.made]))
    sizes = [piece.shape[dim] for piece in pieces]
    starts = np.cumsum([0, *sizes])
    made = []
    for start, piece in zip(starts, pieces, strict=False):
        factors = _sliced(call, axes, dim, slice(start, start + piece.shape[dim]))
        made.append(replace(axes, shape=tuple(piece.shape), factors=factors))
    factor = axes.on(dim)
    if factor is not None:
        at = factor.at(dim)
        for size in set(sizes):
            same_size = [start for start, one in zip(starts, sizes, strict=False) if one == size]
            first = factor.coords.take(range(same_size[0], same_size[0] + size), at)
            for start in same_size[1:]:
                call.coordinates.tie(first, factor.coords.take(range(start, start + size), at))
    return made


def _sliced(call: Call, axes: Axes, dim: int, part: slice) -> tuple[Factor, ...]:
    """Factors of a part of an axis; a part of size 1 has no units along it any more."""
    made = []
    for factor in axes.factors:
        if dim not in factor.axes:
            made.append(factor)
            continue
        index = tuple(part if axis == dim else slice(None) for axis in factor.axes)
        piece = factor.each(partial(_at, index=index))
        if piece.coords.shape[factor.at(dim)] > 1:
            made.append(piece)
        if piece.coords.shape[factor.at(dim)] != 1:
            continue
        call.coordinates.hold(factor, (dim,), f"{call.name} takes one of them")
        if (left := piece.first((dim,))) is not None:
            made.append(left)
    return tuple(made)


def _at(array: Any, index: Any) -> Any:
    return array[index]


def take_slice(call: Call) -> Axes:
    """A part of an axis. Where it is one of several equal ones, these lose equally."""
    tensor, axes = _given(call)
    dim = call.dim(tensor)
    size = axes.shape[dim] if axes.shape else 0
    start, end, step = (call.args.get(name) for name in ("start", "end", "step"))
    part = slice(*slice(start, end, step).indices(size))
    factor = axes.on(dim)
    length = call.made.shape[dim] if axes.shape else 0
    if factor is not None and 0 < length < size and size % length == 0:
        at = factor.at(dim)
        coords = np.moveaxis(factor.coords, at, 0)
        if part.step == 1 and part.start % length == 0:
            pieces = coords.reshape(size // length, length, *coords.shape[1:])
            call.coordinates.tie(pieces, pieces[:1])
        elif part.step > 1:
            pieces = coords.reshape(length, size // length, *coords.shape[1:])
            call.coordinates.tie(pieces, pieces[:, :1])
    factors = _sliced(call, axes, dim, part)
    stretched = {axis: size if axis != dim else None for axis, size in axes.stretched.items()}
    return Axes(tuple(call.made.shape), factors, axes.source, stretched)


def select(call: Call) -> Axes:
    """One entry of an axis. Units along it stay; of an axis that a view has cut, all parts lose equally."""
    tensor, axes = _given(call)
    dim = call.dim(tensor)
    return _taken(call, axes, dim, int(call.args["index"]), tuple(call.made.shape))


def unbind(call: Call) -> list[Axes]:
    """All entries of an axis, one by one."""
    tensor, axes = _given(call)
    dim = call.dim(tensor)
    pieces = list(tensors_in([call.made]))
    return [_taken(call, axes, dim, index, tuple(piece.shape)) for index, piece in enumerate(pieces)]


def _taken(call: Call, axes: Axes, dim: int, index: int, shape: tuple[int, ...]) -> Axes:
    factors = []
    for factor in axes.factors:
        left: Factor | None = factor
        if dim in factor.axes:
            call.coordinates.hold(factor, (dim,), f"{call.name} takes one of them")
            at = factor.at(dim)
            rest = tuple(axis for axis in factor.axes if axis != dim)
            left = factor.each(partial(np.take, indices=index, axis=at)).moved(rest) if rest else None
        if left is not None:
            factors.append(left.moved(axis - (axis > dim) for axis in left.axes))
    stretched = {axis - (axis > dim): size for axis, size in axes.stretched.items() if axis != dim}
    return Axes(shape, tuple(factors), axes.source, stretched)


def halves(call: Call) -> Axes:
    """glu: one half times a function of the other."""
    tensor, axes = _given(call)
    dim = call.dim(tensor, default=-1)
    half = tensor.shape[dim] // 2
    parts = [
        Axes(
            tuple(call.made.shape),
            _sliced(call, axes, dim, slice(start, start + half)),
            axes.source,
        )
        for start in (0, half)
    ]
    return broadcast(call, [(None, part) for part in parts], tuple(call.made.shape))


# ---- put together ----


def concatenate(call: Call) -> Axes:
    """Along one axis coordinates follow each other; along others they are tied."""
    pieces = [tensor for tensor in call.args["tensors"] if tensor.shape != (0,)]
    dim = call.args.get("dim", 0) % call.made.dim()
    known = [call.axes(tensor) for tensor in pieces]
    source = source_of({axes.source for axes in known})
    shape = tuple(call.made.shape)
    along = [axes.on(dim) for axes in known]
    factors: list[Factor] = []
    is_joint = any(factor is not None and len(factor.axes) > 1 for factor in along)
    if is_joint and len({factor.axes if factor is not None else () for factor in along}) == 1:
        factors.append(_joined_pieces([factor for factor in along if factor is not None], dim))
        call.coordinates.cut(factors[0].coords)
    elif is_joint:
        for factor in along:
            if factor is not None:
                call.coordinates.hold(factor, (dim,), f"{call.name} with what has a fixed size")
    elif any(factor is not None for factor in along):
        factors.append(
            _joined_pieces(
                [
                    _bare_piece(axes, dim) if factor is None else factor
                    for factor, axes in zip(along, known, strict=True)
                ],
                dim,
            )
        )
    others: list[tuple[Tensor | None, Axes]] = []
    for axes in known:
        left = [
            factor.first([dim]) if dim in factor.axes and not factors else factor
            for factor in axes.factors
            if not (factors and dim in factor.axes)
        ]
        sizes = tuple(1 if axis == dim else size for axis, size in enumerate(axes.shape))
        others.append((None, replace(axes, shape=sizes, factors=tuple(one for one in left if one is not None))))
    rest = broadcast(call, others, tuple(1 if axis == dim else size for axis, size in enumerate(shape)))
    return Axes(shape, (*rest.factors, *factors), source)


def _joined_pieces(factors: list[Factor], dim: int) -> Factor:
    at = factors[0].at(dim)
    coords, fixed = (
        np.concatenate(side, at) for side in zip(*((one.coords, one.fixed) for one in factors), strict=True)
    )
    return Factor(factors[0].axes, coords, fixed)


def _bare_piece(axes: Axes, dim: int) -> Factor:
    """A piece without units."""
    size = axes.shape[dim]
    return Factor((dim,), np.full(size, NONE), np.full(size, axes.source != "inputs"))


def stack(call: Call) -> Axes:
    """Tensors of one shape, along a new axis."""
    pieces = list(call.args["tensors"])
    made = broadcast(call, [(tensor, call.axes(tensor)) for tensor in pieces], tuple(pieces[0].shape))
    dim = int(call.args.get("dim", 0)) % call.made.dim()
    factors = tuple(factor.moved(axis + (axis >= dim) for axis in factor.axes) for factor in made.factors)
    return Axes(tuple(call.made.shape), factors, made.source)


def pad(call: Call) -> Axes:
    """Entries that are put beside others belong to no unit."""
    tensor, axes = _given(call)
    widths = [int(width) for width in call.args["pad" if "pad" in call.args else "padding"]]
    factors = []
    for factor in axes.factors:
        left: Factor | None = factor
        for axis in factor.axes:
            place = 2 * (tensor.dim() - 1 - axis)
            if place >= len(widths) or widths[place : place + 2] == [0, 0] or left is None:
                continue
            if len(factor.axes) > 1 or min(widths[place : place + 2]) < 0 or call.name != "constant_pad_nd":
                left = _hold(call, factor, (axis,))
            else:
                width = widths[place : place + 2]
                left = Factor(
                    factor.axes, np.pad(factor.coords, width), np.pad(factor.fixed, width, constant_values=True)
                )
        if left is not None:
            factors.append(left)
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


# ---- positions become channels ----


def pixel_shuffle(call: Call) -> Axes:
    """Channels become positions of an image."""
    tensor, axes = _given(call)
    square = int(call.args["upscale_factor"]) ** 2
    return _channels(call, axes, tensor.dim() - 3, lambda one: _joined(call, one, square))


def pixel_unshuffle(call: Call) -> Axes:
    """Positions of an image become channels."""
    tensor, axes = _given(call)
    square = int(call.args["downscale_factor"]) ** 2
    return _channels(call, axes, tensor.dim() - 3, lambda one: one.each(lambda array: array.repeat(square)))


def im2col(call: Call) -> Axes:
    """Each channel becomes as many as a kernel has positions."""
    tensor, axes = _given(call)
    size = math.prod(call.args["kernel_size"])
    return _channels(call, axes, tensor.dim() - 3, lambda one: one.each(lambda array: array.repeat(size)))


def col2im(call: Call) -> Axes:
    """What `im2col` took apart, put together."""
    tensor, axes = _given(call)
    size = math.prod(call.args["kernel_size"])
    return _channels(call, axes, tensor.dim() - 2, lambda one: _joined(call, one, size))


def _joined(call: Call, factor: Factor, count: int) -> Factor:
    pieces = factor.coords.reshape(-1, count)
    call.coordinates.tie(pieces, pieces[:, :1])
    return Factor(factor.axes, pieces[:, 0], np.asarray(factor.fixed.reshape(-1, count).all(1)))


def _channels(call: Call, axes: Axes, at: int, change: Callable[[Factor], Factor]) -> Axes:
    factors = []
    for factor in axes.factors:
        if factor.axes == (at,):
            factors.append(change(factor))
        else:
            left = _hold(call, factor, [axis for axis in factor.axes if axis >= at])
            if left is not None:
                factors.append(left)
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


def channel_shuffle(call: Call) -> Axes:
    """Channels of several groups, one of each in turn."""
    tensor, axes = _given(call)
    groups = int(call.args["groups"])
    cut = reshaped(call, axes, (tensor.shape[0], groups, tensor.shape[1] // groups, *tensor.shape[2:]))
    swapped = replace(
        cut,
        shape=(cut.shape[0], cut.shape[2], cut.shape[1], *cut.shape[3:]),
        factors=tuple(one.moved({1: 2, 2: 1}.get(axis, axis) for axis in one.axes) for one in cut.factors),
    )
    return reshaped(call, swapped, axes.shape)


def image(call: Call) -> Result:
    """Pooling, interpolation: what is along the first two axes passes, positions stay."""
    tensor = call.tensors()[0]
    axes = call.axes(tensor)
    positions = len(call.args.get("kernel_size") or call.args.get("output_size") or range(tensor.dim() - 2))
    first = max(0, tensor.dim() - max(1, positions))
    factors = tuple(
        left
        for one in axes.factors
        if (left := _hold(call, one, [axis for axis in one.axes if axis >= first])) is not None
    )
    made = list(tensors_in([call.made]))
    several = [Axes(tuple(one.shape), factors if index == 0 else (), axes.source) for index, one in enumerate(made)]
    return several[0] if isinstance(call.made, Tensor) else several


def to_real(call: Call) -> Axes:
    """A complex number becomes two numbers, on a new last axis."""
    _, axes = _given(call)
    return replace(axes, shape=tuple(call.made.shape))


def to_complex(call: Call) -> Axes:
    """Pairs of numbers become complex ones."""
    tensor, axes = _given(call)
    factors = tuple(left for one in axes.factors if (left := _hold(call, one, (tensor.dim() - 1,))) is not None)
    return Axes(tuple(call.made.shape), factors, axes.source)
