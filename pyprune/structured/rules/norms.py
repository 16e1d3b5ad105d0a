"""Norms, and what is computed of all along an axis."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor
from pyprune.structured.rules.call import Call, Contraction, Result, all_held, given_to, tensors_in, with_rest
from pyprune.structured.rules.elementwise import broadcast, none_of_them, spread, unfixed, zero_entries


def batch_norm(call: Call) -> Result:
    """Per channel: what it has for each is tied to the channel."""
    given = call.args["input"]
    axes = call.axes(given)
    if call.args.get("training") or call.args.get("use_input_stats") or call.args.get("running_mean") is None:
        # Of this input: over its axes but the channels'.
        axes = _statistic(call, axes, [axis for axis in range(given.dim()) if axis != 1], keepdim=True, same=True)
    operands: list[tuple[Tensor | None, Axes]] = [(None, axes)]
    shape = tuple(size if dim == 1 else 1 for dim, size in enumerate(given.shape))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(tensor := call.args.get(name), Tensor):
            known = call.axes(tensor)
            factors = tuple(factor.moved((1,)) for factor in known.factors)
            # What is of no parameter (statistics that are buffers of no model) has a fixed size.
            operands.append((None, Axes(shape, factors, known.source)))
    return with_rest(call, _without_scale(call, broadcast(call, operands, axes.shape)))


def _without_scale(call: Call, made: Axes) -> Axes:
    """Where the scale is zero, what comes out is the shift, whatever arrives."""
    scale, shift = call.args.get("weight"), call.args.get("bias")
    if not call.values or not isinstance(scale, Tensor):
        return made
    known = [call.axes(tensor).on(0) for tensor in (scale, shift) if isinstance(tensor, Tensor)]
    fixed = np.logical_and.reduce([one.fixed for one in known if one is not None])
    if known[0] is None or None in known or not fixed.any():
        return made
    fixed = fixed & zero_entries(scale, known[0], call.axes(scale))
    of_channels = replace(known[0], axes=(1,))
    factors = tuple(
        replace(one, fixed=one.fixed | spread(fixed, of_channels, one)) if 1 in one.axes else one
        for one in made.factors
    )
    return replace(made, factors=factors)


def layer_norm(call: Call) -> Result:
    """Normalised over the last axes: units along one of them alone are not exact."""
    given = call.args["input"]
    axes = call.axes(given)
    count = len(call.args["normalized_shape"])
    over = range(given.dim() - count, given.dim())
    made = _statistic(call, axes, over, keepdim=True, same=True, tensor=given)
    operands: list[tuple[Tensor | None, Axes]] = [(None, made)]
    for name in ("weight", "bias"):
        if isinstance(tensor := call.args.get(name), Tensor):
            operands.append((None, call.axes(tensor)))
    made = broadcast(call, operands, axes.shape)
    made = replace(made, factors=tuple(_unfixed_along(made.factors, over)))
    return with_rest(call, made)


def _unfixed_along(factors: Iterable[Factor], over: Iterable[int]) -> list[Factor]:
    gone = set(over)
    return [
        replace(factor, fixed=np.zeros(factor.coords.shape, bool)) if gone & set(factor.axes) else factor
        for factor in factors
    ]


def _arrives(call: Call, axes: Axes, factor: Factor, tensor: Tensor) -> None:
    """All along an axis is summed: what is removed must arrive as zeros."""
    if call.values:
        ones = torch.ones(1).expand(len(factor.coords))
        fixed = (factor.fixed, np.ones(len(factor.fixed), bool))
        coords = (factor.coords, factor.coords)
        call.on_contraction(
            Contraction(coords, tensor, factor.axes[0], ones, 0, fixed, (axes.source, "number"), call.name)
        )


def _statistic(
    call: Call, axes: Axes, over: Iterable[int], *, keepdim: bool, same: bool = False, tensor: Tensor | None = None
) -> Axes:
    """What is computed of all along some axes; ``same``: and laid over them again, as a softmax is."""
    over = set(over)
    kept: list[Factor] = []
    for factor in axes.factors:
        mine = [axis for axis in factor.axes if axis in over]
        left: Factor | None = factor
        if len(mine) == len(factor.axes):
            call.coordinates.is_inexact(factor.coords, f"{call.name} is over all of them")
            if tensor is not None and len(mine) == 1:
                _arrives(call, axes, factor, tensor)
            # With several axes jointly there is no telling which of their units are meant.
            call.coordinates.hold(factor, factor.axes[1:], "")
            left = factor if same else None
        elif mine:
            call.coordinates.hold(factor, mine, "")
            left = factor if same else factor.first(mine)
        if left is not None:
            kept.append(left)
    shape = axes.shape
    if same:
        return Axes(shape, tuple(_unfixed_along(kept, over)), axes.source)
    return _reduced(Axes(shape, tuple(kept), axes.source), over, keepdim)


def _reduced(axes: Axes, over: set[int], keepdim: bool) -> Axes:
    if keepdim:
        return Axes(
            tuple(1 if axis in over else size for axis, size in enumerate(axes.shape)), axes.factors, axes.source
        )
    left = [axis for axis in range(len(axes.shape)) if axis not in over]
    factors = tuple(factor.moved(left.index(axis) for axis in factor.axes) for factor in axes.factors)
    return Axes(tuple(axes.shape[axis] for axis in left), factors, axes.source)


def _dims(call: Call, tensor: Tensor) -> list[int]:
    dims = call.args.get("dim")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(tensor.dim()))
    return [int(dim) % max(1, tensor.dim()) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def reduction(call: Call) -> Result:
    """mean, var, max and the like."""
    tensor, axes = given_to(call)
    keepdim = bool(call.args.get("keepdim"))
    made = _statistic(call, axes, _dims(call, tensor), keepdim=keepdim, tensor=tensor)
    several = list(tensors_in([call.made]))
    return made if isinstance(call.made, Tensor) else [made] * len(several)


def summation(call: Call) -> Result:
    """sum and L2 norm: exact if what is removed arrives as zeros."""
    tensor = call.args["self"]
    axes = call.axes(tensor)
    over = set(_dims(call, tensor))
    kept = []
    for factor in axes.factors:
        mine = [axis for axis in factor.axes if axis in over]
        if len(mine) == len(factor.axes) == 1:
            _arrives(call, axes, factor, tensor)
        elif mine:
            call.coordinates.hold(factor, mine if len(mine) < len(factor.axes) else factor.axes[1:], "")
        if (left := factor.first(mine)) is not None:
            kept.append(left)
    return _reduced(Axes(axes.shape, tuple(kept), axes.source), over, bool(call.args.get("keepdim")))


def along_axis(call: Call) -> Result:
    """softmax, cumulative sums: computed along an axis, laid over it again."""
    tensor, axes = given_to(call)
    made = _statistic(call, axes, [call.dim(tensor)], keepdim=True, same=True, tensor=tensor)
    several = list(tensors_in([call.made]))
    return made if isinstance(call.made, Tensor) else [made] * len(several)


def held_axis(call: Call) -> Result:
    """sort, topk and the like: the size of the axis stays."""
    tensor, axes = given_to(call)
    factors = tuple(unfixed(all_held(call, axes, {call.dim(tensor, default=-1)})))
    made = list(tensors_in([call.made]))
    each = [Axes(tuple(one.shape), factors if one.dim() == tensor.dim() else (), axes.source) for one in made]
    return each[0] if isinstance(call.made, Tensor) else each


def positions(call: Call) -> Result:
    """argmax and the like put out positions along an axis: another size would be other positions."""
    tensor = call.args["self"]
    over = [-1 % max(1, tensor.dim())] if call.name == "multinomial" else _dims(call, tensor)
    all_held(call, call.axes(tensor), over)
    return none_of_them(call)


def group_norm(call: Call) -> Result:
    """Whole groups are exact; a single group is a statistic over all channels."""
    given, groups = call.args["input"], int(call.args["group"])
    axes = call.axes(given)
    channels = axes.on(1)
    if channels is not None:
        if groups == 1:
            call.coordinates.is_inexact(channels.coords, f"{call.name} is over all of them")
        else:
            each = channels.coords.reshape(groups, -1)
            call.coordinates.tie(each, each[:, :1])
    operands: list[tuple[Tensor | None, Axes]] = [(None, axes)]
    shape = tuple(size if dim == 1 else 1 for dim, size in enumerate(given.shape))
    for name in ("weight", "bias"):
        if isinstance(tensor := call.args.get(name), Tensor):
            factors = tuple(factor.moved((1,)) for factor in call.axes(tensor).factors)
            operands.append((None, Axes(shape, factors, "parameters")))
    made = broadcast(call, operands, axes.shape)
    if channels is not None:
        whole = channels.fixed.reshape(groups, -1).all(1).repeat(len(channels.fixed) // groups)
        factors = tuple(replace(one, fixed=one.fixed & whole) if one.axes == (1,) else one for one in made.factors)
        made = replace(made, factors=factors)
    return with_rest(call, made)


def weight_norm(call: Call) -> Result:
    """A weight of a length that is another parameter: a statistic over all axes but one."""
    direction, length = call.args["v"], call.args["g"]
    axes = call.axes(direction)
    dim = int(call.args.get("dim", 0)) % direction.dim()
    made = _statistic(call, axes, [axis for axis in range(direction.dim()) if axis != dim], keepdim=True, same=True)
    made = broadcast(call, [(None, made), (length, call.axes(length))], axes.shape)
    return with_rest(call, made)
