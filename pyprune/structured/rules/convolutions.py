"""Convolutions, transposed or not, in groups or not."""

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor, Flags
from pyprune.structured.rules.call import Call
from pyprune.structured.rules.elementwise import broadcast, source_of
from pyprune.structured.rules.products import contract, depends


def convolution(call: Call) -> Axes:
    """Of 1 to 3 dimensions, transposed or not, in groups or not."""
    given, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    transposed, groups = bool(call.args["transposed"]), int(call.args["groups"])
    axes, kernel = call.axes(given), call.axes(weight)
    ties = call.coordinates
    for axis in range(2, weight.dim()):
        if (factor := kernel.on(axis)) is not None:
            ties.hold(factor, (axis,), "positions of a kernel")
        if (factor := axes.on(axis)) is not None:
            ties.hold(factor, (axis,), "positions of an image")
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    channels = axes.on(1)
    columns: list[Factor] = []
    spatial = math.prod(call.made.shape[2:]) if not transposed else math.prod(given.shape[2:])
    macs = given.shape[0] * spatial * weight.numel()
    if groups == 1:
        padded = transposed or any(call.args["padding"])
        contract(call, (given, 1), (weight, in_axis), padded=padded)
        if (factor := kernel.on(out_axis)) is not None:
            columns.append(factor.first([axis for axis in factor.axes if axis != out_axis]).moved((1,)))  # type: ignore[union-attr]
        call.on_product(macs, [*columns, *(one for one in (kernel.on(in_axis) or channels,) if one is not None)])
        if call.values:
            columns = [replace(one, fixed=~depends(call, weight, out_axis, in_axis, axes, 1)) for one in columns]
    else:
        columns = _groups(call, channels, kernel, groups, transposed)
        call.on_product(macs, columns)
        if call.values and columns:
            columns = [replace(columns[0], fixed=_fixed_groups(weight, channels, groups, transposed, axes))]
    batch = [factor for factor in axes.factors if factor.axes == (0,)]
    for factor in axes.factors:
        if len(factor.axes) > 1:
            ties.hold(factor, [axis for axis in factor.axes if axis != 1], "")
    source = source_of({axes.source, kernel.source})
    made = Axes(tuple(call.made.shape), (*batch, *columns), source)
    if bias is None:
        return made
    known = call.axes(bias)
    along = tuple(factor.moved((1,)) for factor in known.factors)
    shape = tuple(size if dim == 1 else 1 for dim, size in enumerate(made.shape))
    return broadcast(call, [(None, made), (None, Axes(shape, along, known.source))], made.shape)


def _groups(call: Call, channels: Factor | None, kernel: Axes, groups: int, transposed: bool) -> list[Factor]:
    """Tie all inputs and outputs of each group of a convolution; returns the factor of its outputs."""
    ties = call.coordinates
    first, second = kernel.on(0), kernel.on(1)
    if second is not None:
        ties.hold(second, (1,), "channels within groups of a convolution")
    if first is None or channels is None or len(channels.axes) > 1:
        for factor in (first, channels):
            if factor is not None:
                ties.stay(factor.coords, "groups of a convolution that reads what cannot be removed")
        if first is None or transposed:
            return []
        return [first.moved((1,))]
    own = first.coords.reshape(groups, -1)
    read = channels.coords.reshape(groups, -1)
    ties.tie(own, own[:, :1])
    ties.tie(read, read[:, :1])
    ties.tie(own[:, 0], read[:, 0])
    if own.shape[1] > 1 or read.shape[1] > 1:
        ties.groups.append(own)
    if not transposed:
        return [first.moved((1,))]
    each = call.made.shape[1] // groups
    coords = np.repeat(own[:, 0], each)
    return [Factor((1,), coords, np.zeros(len(coords), bool))]


def _fixed_groups(weight: Tensor, channels: Factor | None, groups: int, transposed: bool, given: Axes) -> Flags:
    """Say which outputs do not depend on inputs: of groups that read nothing that does, or with no weights."""
    read = np.ones(groups, bool) if given.source == "inputs" else np.zeros(groups, bool)
    if channels is not None and len(channels.axes) == 1:
        read = np.asarray(~channels.fixed.reshape(groups, -1).all(1))
    used = (weight.detach() != 0).view(groups, weight.shape[0] // groups, weight.shape[1], -1).any(-1).cpu().numpy()
    outputs = used.any(1) if transposed else used.any(2)
    return ~(outputs & read[:, None]).ravel()
