"""Axes that are moved, added, dropped, or laid out again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pyprune.structured.coordinates import Axes, Factor
from pyprune.structured.rules.call import Call, given_to, held


def _placed(call: Call, places: Callable[[int], int | None]) -> Axes:
    """Axes that have moved; None where one went (it had size 1)."""
    _, axes = given_to(call)
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
    tensor, _ = given_to(call)
    if "dim0" in call.args:
        one, other = (int(call.args[name]) % max(1, tensor.dim()) for name in ("dim0", "dim1"))
    elif tensor.dim() < 2:
        return _placed(call, lambda axis: axis)
    else:
        one, other = 0, 1
    return _placed(call, lambda axis: {one: other, other: one}.get(axis, axis))


def permute(call: Call) -> Axes:
    """Axes in another order."""
    tensor, _ = given_to(call)
    order = [int(dim) % tensor.dim() for dim in call.args["dims"]]
    return _placed(call, order.index)


def unsqueeze(call: Call) -> Axes:
    """A new axis of size 1."""
    tensor, _ = given_to(call)
    dim = int(call.args["dim"]) % (tensor.dim() + 1)
    return _placed(call, lambda axis: axis + (axis >= dim))


def squeeze(call: Call) -> Axes:
    """Axes of size 1 go."""
    tensor, _ = given_to(call)
    dims = call.args.get("dim")
    every = range(tensor.dim()) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {int(dim) % max(1, tensor.dim()) for dim in every}
    gone = {dim for dim in gone if tensor.dim() and tensor.shape[dim] == 1}
    left = [axis for axis in range(tensor.dim()) if axis not in gone]
    return _placed(call, lambda axis: left.index(axis) if axis in left else None)


def expand(call: Call) -> Axes:
    """Axes of size 1 become longer, all along the same memory."""
    tensor, axes = given_to(call)
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
    tensor, axes = given_to(call)
    counts = [int(count) for count in call.args["repeats"]]
    more = len(counts) - tensor.dim()
    factors = []
    for factor in axes.factors:
        times = [counts[axis + more] for axis in factor.axes]
        factors.append(factor.each(partial(np.tile, reps=times)).moved(axis + more for axis in factor.axes))
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


def repeat_interleave(call: Call) -> Axes:
    """With one number for all: each entry several times; with numbers in a tensor the axis stays."""
    tensor, axes = given_to(call)
    dim = call.dim(tensor)
    times = call.args.get("repeats")
    factors = []
    for factor in axes.factors:
        if dim not in factor.axes:
            factors.append(factor)
        elif isinstance(times, int):
            factors.append(factor.each(partial(np.repeat, repeats=times, axis=factor.at(dim))))
        elif (left := held(call, factor, (dim,))) is not None:
            factors.append(left)
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


def flip(call: Call) -> Axes:
    """Entries in reverse."""
    tensor, axes = given_to(call)
    dims = {int(dim) % tensor.dim() for dim in call.args["dims"]}
    factors = tuple(
        factor.each(partial(np.flip, axis=[factor.at(axis) for axis in factor.axes if axis in dims]))
        for factor in axes.factors
    )
    return replace(axes, factors=factors)


def roll(call: Call) -> Axes:
    """Entries moved around the end, whose number stays."""
    tensor, axes = given_to(call)
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
    tensor, axes = given_to(call)
    if tuple(call.made.shape) == axes.shape and call.made.stride() == tensor.stride():
        return axes
    for factor in axes.factors:
        call.coordinates.stay(factor.coords, f"{call.name} reads memory as it lies")
    return Axes(tuple(call.made.shape), (), axes.source)
