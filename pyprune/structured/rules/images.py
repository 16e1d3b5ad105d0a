"""Images: positions become channels, pooling, padding by what is there."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pyprune.structured.coordinates import Axes, Factor
from pyprune.structured.rules.call import Call, Result, all_held, given_to, held, tensors_in, with_rest
from pyprune.structured.rules.views import reshaped


def pixel_shuffle(call: Call) -> Axes:
    """Channels become positions of an image."""
    tensor, axes = given_to(call)
    square = int(call.args["upscale_factor"]) ** 2
    return _channels(call, axes, tensor.dim() - 3, lambda one: _joined(call, one, square))


def pixel_unshuffle(call: Call) -> Axes:
    """Positions of an image become channels."""
    tensor, axes = given_to(call)
    square = int(call.args["downscale_factor"]) ** 2
    return _channels(call, axes, tensor.dim() - 3, lambda one: one.each(lambda array: array.repeat(square)))


def im2col(call: Call) -> Axes:
    """Each channel becomes as many as a kernel has positions."""
    tensor, axes = given_to(call)
    size = math.prod(call.args["kernel_size"])
    return _channels(call, axes, tensor.dim() - 3, lambda one: one.each(lambda array: array.repeat(size)))


def col2im(call: Call) -> Axes:
    """What `im2col` took apart, put together."""
    tensor, axes = given_to(call)
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
            left = held(call, factor, [axis for axis in factor.axes if axis >= at])
            if left is not None:
                factors.append(left)
    return Axes(tuple(call.made.shape), tuple(factors), axes.source)


def channel_shuffle(call: Call) -> Axes:
    """Channels of several groups, one of each in turn."""
    tensor, axes = given_to(call)
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
    factors = all_held(call, axes, range(first, tensor.dim()))
    return with_rest(call, Axes(tuple(next(iter(tensors_in([call.made]))).shape), factors, axes.source))


def to_real(call: Call) -> Axes:
    """A complex number becomes two numbers, on a new last axis."""
    _, axes = given_to(call)
    return replace(axes, shape=tuple(call.made.shape))


def to_complex(call: Call) -> Axes:
    """Pairs of numbers become complex ones."""
    tensor, axes = given_to(call)
    return Axes(tuple(call.made.shape), all_held(call, axes, (tensor.dim() - 1,)), axes.source)
