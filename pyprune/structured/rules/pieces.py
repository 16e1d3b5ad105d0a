"""Pieces of axes: taken, and put together."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pyprune.structured.coordinates import NONE, Axes, Factor
from pyprune.structured.rules.call import Call, given_to, held, tensors_in
from pyprune.structured.rules.elementwise import broadcast, source_of


def split(call: Call) -> list[Axes]:
    """Pieces along an axis: equal ones lose equally."""
    tensor, axes = given_to(call)
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
    tensor, axes = given_to(call)
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
    tensor, axes = given_to(call)
    dim = call.dim(tensor)
    return _taken(call, axes, dim, int(call.args["index"]), tuple(call.made.shape))


def unbind(call: Call) -> list[Axes]:
    """All entries of an axis, one by one."""
    tensor, axes = given_to(call)
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
    tensor, axes = given_to(call)
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
    tensor, axes = given_to(call)
    widths = [int(width) for width in call.args["pad" if "pad" in call.args else "padding"]]
    factors = []
    for factor in axes.factors:
        left: Factor | None = factor
        for axis in factor.axes:
            place = 2 * (tensor.dim() - 1 - axis)
            if place >= len(widths) or widths[place : place + 2] == [0, 0] or left is None:
                continue
            if len(factor.axes) > 1 or min(widths[place : place + 2]) < 0 or call.name != "constant_pad_nd":
                left = held(call, factor, (axis,))
            else:
                width = widths[place : place + 2]
                left = Factor(
                    factor.axes, np.pad(factor.coords, width), np.pad(factor.fixed, width, constant_values=True)
                )
        if left is not None:
            factors.append(left)
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)
