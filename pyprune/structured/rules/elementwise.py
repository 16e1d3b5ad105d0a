"""Operations that broadcast: what overlaps is tied elementwise."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor, Flags
from pyprune.structured.rules.call import Call, Result, tensors_in


def pointwise(call: Call) -> Axes:
    """Everything that broadcasts: what overlaps is tied elementwise."""
    tensors = call.tensors()
    if len(tensors) == 1 and tensors[0].shape == call.made.shape:
        return call.axes(tensors[0])
    return broadcast(call, [(tensor, call.axes(tensor)) for tensor in tensors], tuple(call.made.shape))


def broadcast(call: Call, operands: list[tuple[Tensor | None, Axes]], shape: tuple[int, ...]) -> Axes:
    """Align operands at their last axes, and tie them."""
    aligned = [(tensor, _aligned(axes, len(shape))) for tensor, axes in operands if axes.shape]
    factors = _clusters([factor for _, axes in aligned for factor in axes.factors])
    made = []
    for cluster in factors:
        factor = _merged(call, cluster)
        for _, axes in aligned:
            bare = [
                axis
                for axis in factor.axes
                if axes.on(axis) is None
                and axes.shape[axis] > 1
                and axes.source != "number"
                and axis not in axes.stretched
            ]
            call.coordinates.hold(factor, bare, f"{call.name} meets what has a fixed size there")
            for axis in factor.axes:
                if axes.on(axis) is None and axes.stretched.get(axis) is not None and axes.shape[axis] > 1:
                    call.on_size(axes.stretched[axis], factor, axis)
        made.append(_with_fixed(call, factor, aligned))
    sources = {axes.source for _, axes in operands}
    taken = {axis for factor in made for axis in factor.axes}
    stretched = {axis: size for axis in range(len(shape)) if axis not in taken for size in _stretched(aligned, axis)}
    return Axes(shape, tuple(made), source_of(sources), stretched)


def _stretched(operands: list[tuple[Tensor | None, Axes]], axis: int) -> list[Any]:
    """What gave the size of an axis along which all operands are stretched; nothing if one is not."""
    long = [axes for _, axes in operands if axes.shape[axis] > 1]
    if not long or not all(axis in axes.stretched or axes.source == "number" for axes in long):
        return []
    sizes = [axes.stretched[axis] for axes in long if axes.stretched.get(axis) is not None]
    return sizes[:1] or [None]


def source_of(sources: set[Any]) -> Any:
    """What is made of several: of inputs, if one of them is."""
    for source in ("inputs", "parameters"):
        if source in sources:
            return source
    return "number"


def _aligned(axes: Axes, dim: int) -> Axes:
    """The same with axes of size 1 in front."""
    more = dim - len(axes.shape)
    if not more:
        return axes
    factors = tuple(factor.moved(axis + more for axis in factor.axes) for factor in axes.factors)
    return Axes(
        (1,) * more + axes.shape, factors, axes.source, {axis + more: size for axis, size in axes.stretched.items()}
    )


def _clusters(factors: list[Factor]) -> list[list[Factor]]:
    """Put factors together that share an axis."""
    clusters: list[list[Factor]] = []
    for factor in factors:
        with_it = [cluster for cluster in clusters if any(set(one.axes) & set(factor.axes) for one in cluster)]
        clusters = [cluster for cluster in clusters if cluster not in with_it]
        clusters.append([one for cluster in with_it for one in cluster] + [factor])
    return clusters


def _merged(call: Call, cluster: list[Factor]) -> Factor:
    """Tie factors that share axes to the largest of them."""
    largest = max(cluster, key=lambda factor: len(factor.axes))
    for factor in cluster:
        if factor is largest:
            continue
        inside = set(factor.axes) <= set(largest.axes)
        if inside and (largest.axes[0] in factor.axes or len(factor.axes) == len(largest.axes)):
            call.coordinates.tie(spread(factor.coords, factor, largest), largest.coords)
        else:  # a weight that all heads share, and the like
            call.coordinates.stay(factor.coords, f"all heads share it in {call.name}")
            call.coordinates.hold(largest, factor.axes, f"{call.name} along two axes")
    return largest


def spread(array: Any, factor: Factor, over: Factor) -> Any:
    """Lay an array of one factor along the axes of a larger one, for broadcasting."""
    shared = [axis for axis in over.axes if axis in factor.axes]
    array = array.transpose([factor.at(axis) for axis in shared])
    sizes = dict(zip(shared, array.shape, strict=True))
    return array.reshape([sizes.get(axis, 1) for axis in over.axes])


_PRODUCTS = {"mul", "div"}


def _with_fixed(call: Call, factor: Factor, operands: list[tuple[Tensor | None, Axes]]) -> Factor:
    """Say which entries do not depend on inputs: where no operand does, or one is a factor that is zero."""
    if not call.values:
        return replace(factor, fixed=np.zeros(factor.coords.shape, bool))
    fixed = np.ones(factor.coords.shape, bool)
    zero = np.zeros(factor.coords.shape, bool)
    for tensor, axes in operands:
        own = [one for one in axes.factors if set(one.axes) <= set(factor.axes)]
        if not own:
            fixed &= axes.source != "inputs"
            continue
        for one in own:
            fixed &= spread(one.fixed, one, factor)
            if call.name in _PRODUCTS and tensor is not None and one.fixed.any():
                zero |= spread(zero_entries(tensor, one, axes) & one.fixed, one, factor)
    return replace(factor, fixed=fixed | zero)


def zero_entries(tensor: Tensor, factor: Factor, axes: Axes) -> Flags:
    """Say where a tensor is zero all along the axes that a factor does not have."""
    shift = len(axes.shape) - tensor.dim()
    own = [axis - shift for axis in factor.axes]
    used = tensor.detach() != 0
    if rest := tuple(axis for axis in range(tensor.dim()) if axis not in own):
        used = used.any(rest)
    order = sorted(own)
    return np.asarray(~used.cpu().numpy().transpose([order.index(axis) for axis in own]))


def unfixed(factors: Iterable[Factor]) -> list[Factor]:
    """The same, with entries that may depend on inputs."""
    return [replace(factor, fixed=np.zeros(factor.coords.shape, bool)) for factor in factors]


def none_of_them(call: Call) -> Result:
    """What has no units: sizes, comparisons of sizes, indices."""
    return _untracked(call.made)


def _untracked(made: Any) -> Result:
    if isinstance(made, Tensor):
        return Axes(tuple(made.shape))
    return [Axes(tuple(tensor.shape)) for tensor in tensors_in([made])]


def numbers(call: Call) -> Axes:
    """Tensors that are filled with one number, in whatever shape; what is made like another has its units."""
    if call.name.endswith("_like") and tuple(call.args["self"].shape) == tuple(call.made.shape):
        axes = call.axes(call.args["self"])
        factors = tuple(replace(one, fixed=np.ones(one.coords.shape, bool)) for one in axes.factors)
        return Axes(axes.shape, factors, "number", axes.stretched)
    return Axes(tuple(call.made.shape), (), "number")


def ranges(call: Call) -> Axes:
    """Tensors that are made of numbers alone."""
    return Axes(tuple(call.made.shape), (), "parameters")


def unknown(call: Call) -> Result:
    """Whatever has no rule."""
    for tensor in call.tensors():
        for factor in call.axes(tensor).factors:
            call.coordinates.stay(factor.coords, f"{call.name} is not known")
    return _untracked(call.made)
