"""Operations whose indices are data: the axis that is indexed keeps its size, others pass."""

from dataclasses import replace

import torch
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor, Source
from pyprune.structured.rules.call import Call, Result, all_held, with_rest
from pyprune.structured.rules.elementwise import broadcast, zero_entries

_MASKS = (torch.bool, torch.uint8)


def _held(call: Call, tensor: Tensor, axes: Axes, over: set[int]) -> list[Factor]:
    """Keep the sizes of axes; returns what is left of the factors: fixed is what is zero, whatever is picked."""
    return [
        replace(left, fixed=zero_entries(tensor, left, axes) & left.fixed)
        if call.values and left.fixed.any()
        else left
        for left in all_held(call, axes, over, f"{call.name} picks among them")
    ]


def embedding(call: Call) -> Axes:
    """Rows of a table, picked by the inputs: the table keeps its rows, its width passes."""
    weight = call.args["weight"]
    axes = call.axes(weight)
    last = call.made.dim() - 1
    factors = tuple(factor.moved((last,)) for factor in _held(call, weight, axes, {0}))
    return Axes(tuple(call.made.shape), factors, "inputs")


def embedding_bag(call: Call) -> Result:
    """Sums of rows of a table."""
    weight = call.args["weight"]
    factors = tuple(factor.moved((1,)) for factor in _held(call, weight, call.axes(weight), {0}))
    return with_rest(call, Axes(tuple(call.made[0].shape), factors))


def index(call: Call) -> Axes:
    """Indices of one or several axes, tensors or masks."""
    tensor = call.args["self"]
    axes = call.axes(tensor)
    places, over = _places(tensor, call.args["indices"])
    factors = []
    for factor in _held(call, tensor, axes, over):
        factors.append(factor.moved(places[axis] for axis in factor.axes))
    return Axes(tuple(call.made.shape), tuple(factors), _picked(call, axes))


def _picked(call: Call, axes: Axes) -> Source:
    """What is picked by indices that are made of numbers alone does not depend on inputs."""
    indices = [one for one in call.tensors() if one is not call.args["self"]]
    fixed = axes.source != "inputs" and all(call.axes(one).source != "inputs" for one in indices)
    return "parameters" if fixed else "inputs"


def _places(tensor: Tensor, indices: list[Tensor | None]) -> tuple[dict[int, int], set[int]]:
    """Say where axes go that are not indexed, and which are."""
    axis, over, shapes, spots = 0, set(), [], []
    for one in indices:
        if one is None:
            axis += 1
            continue
        consumed = one.dim() if one.dtype in _MASKS else 1
        spots.append((axis, consumed))
        over |= set(range(axis, axis + consumed))
        shapes.append(1 if one.dtype in _MASKS else one.dim())
        axis += consumed
    new = max(shapes, default=0)
    adjacent = bool(spots) and over == set(range(min(over), max(over) + 1))
    left = [one for one in range(tensor.dim()) if one not in over]
    first = min(over) if adjacent else 0
    places = {}
    for rank, other in enumerate(left):
        places[other] = rank if adjacent and other < first else rank + new
    return places, over


def index_select(call: Call) -> Axes:
    """Entries of one axis."""
    tensor = call.args["self"]
    axes = call.axes(tensor)
    factors = _held(call, tensor, axes, {call.dim(tensor)})
    return Axes(tuple(call.made.shape), tuple(factors), _picked(call, axes))


def gather(call: Call) -> Axes:
    """Entries along an axis; the index has a fixed size along others, unless it was expanded there."""
    tensor, indices = call.args["self"], call.args["index"]
    axes = call.axes(tensor)
    over = {call.dim(tensor)} | _bare(call, indices)
    return Axes(tuple(call.made.shape), tuple(_held(call, tensor, axes, over)), axes.source)


def _bare(call: Call, indices: Tensor) -> set[int]:
    known = call.axes(indices)
    return {
        axis
        for axis, size in enumerate(indices.shape)
        if size > 1 and axis not in known.stretched and known.on(axis) is None and indices.stride(axis) != 0
    }


def scatter(call: Call) -> Axes:
    """Entries put along an axis, or added there; index as in `gather`."""
    tensor = call.args["self"]
    dim = call.dim(tensor)
    indices = call.args["index"]
    over = {dim} | (_bare(call, indices) if indices.dim() == tensor.dim() else set())
    operands: list[tuple[Tensor | None, Axes]] = []
    for name in ("self", "src", "source", "value"):
        one = call.args.get(name)
        if isinstance(one, Tensor) and one.dim() == tensor.dim():
            axes = call.axes(one)
            shape = tuple(1 if axis == dim else size for axis, size in enumerate(axes.shape))
            operands.append((None, replace(axes, shape=shape, factors=tuple(_held(call, one, axes, over)))))
    shape = tuple(1 if axis == dim else size for axis, size in enumerate(call.made.shape))
    made = broadcast(call, operands, shape)
    return replace(made, shape=tuple(call.made.shape))


def index_put(call: Call) -> Axes:
    """Values put at indices: along axes that are not indexed they are tied."""
    tensor, values = call.args["self"], call.args["values"]
    axes, given = call.axes(tensor), call.axes(values)
    places, over = _places(tensor, call.args["indices"])
    factors = _held(call, tensor, axes, over)
    new = max(places.values(), default=-1) + 1
    shift = max(new, values.dim()) - values.dim()
    back = {place: axis for axis, place in places.items()}
    moved = []
    for factor in given.factors:
        known = [axis for axis in factor.axes if axis + shift in back]
        call.coordinates.hold(factor, [axis for axis in factor.axes if axis not in known], f"{call.name} along it")
        if (left := factor.first([axis for axis in factor.axes if axis not in known])) is not None:
            moved.append(left.moved(back[axis + shift] for axis in left.axes))
    shape = tuple(1 if axis in over else size for axis, size in enumerate(tensor.shape))
    put = tuple(
        1 if axis in over or places[axis] - shift < 0 else values.shape[places[axis] - shift]
        for axis in range(tensor.dim())
    )
    stretched = {back[axis + shift]: size for axis, size in given.stretched.items() if axis + shift in back}
    made = broadcast(
        call,
        [
            (None, replace(axes, shape=shape, factors=tuple(factors))),
            (None, Axes(put, tuple(moved), given.source, stretched)),
        ],
        shape,
    )
    return replace(made, shape=tuple(tensor.shape))
