"""Attention as one operation: units are heads."""

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor
from pyprune.structured.rules.call import Call, Result, all_held, tensors_in, with_rest
from pyprune.structured.rules.elementwise import broadcast, unfixed, zero_entries


def attention(call: Call) -> Result:
    """softmax(q k') v. Units are heads; the size of one stays, because the scale depends on it."""
    query, key, value = (call.args[name] for name in ("query", "key", "value"))
    ties = call.coordinates
    dim = query.dim()
    per_head = []
    for tensor in (query, key, value):
        axes = call.axes(tensor)
        heads = all_held(call, axes, (dim - 2, dim - 1), "the size of a head stays: the scale depends on it")
        per_head.append(Axes((*axes.shape[:-2], 1, 1), heads, axes.source))
    most = query.shape[-3] if dim > 2 else 1
    per_head = [_repeated_heads(axes, most, dim - 3) for axes in per_head]
    made_shape = tuple(next(iter(tensors_in([call.made]))).shape)
    operands: list[tuple[Tensor | None, Axes]] = [(None, axes) for axes in per_head]
    if (mask := call.args.get("attn_mask", call.args.get("attn_bias"))) is not None:
        known = call.axes(mask)
        kept = all_held(call, known, (mask.dim() - 2, mask.dim() - 1), "a mask of attention")
        stretched = {axis: size for axis, size in known.stretched.items() if axis < mask.dim() - 2}
        operands.append((None, Axes((*mask.shape[:-2], 1, 1), kept, known.source, stretched)))
    tied = broadcast(call, operands, (*made_shape[:-2], 1, 1))
    ties.heads += [factor.coords for factor in tied.factors]
    macs = math.prod(query.shape) * key.shape[-2] + math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]
    call.on_product(macs, list(per_head[0].factors))
    values = call.axes(value)
    factors = []
    for factor in values.factors:
        moved = _repeated_factor(factor, most, dim - 3)
        if call.values and factor.fixed.any():
            zero = zero_entries(value, factor, values) & factor.fixed
            zero = np.broadcast_to(zero.all(tuple(range(1, zero.ndim)), keepdims=True), zero.shape)
            moved = replace(moved, fixed=_repeated_factor(replace(factor, fixed=zero), most, dim - 3).fixed)
        else:
            moved = replace(moved, fixed=np.zeros(moved.coords.shape, bool))
        factors.append(moved)
    queries = per_head[0].on(dim - 3)
    if queries is not None and not any(dim - 3 in factor.axes for factor in factors):
        # One head of keys and values serves all queries.
        factors = unfixed([queries])
    return with_rest(call, Axes(made_shape, tuple(factors), "inputs"))


def _repeated_heads(axes: Axes, count: int, axis: int) -> Axes:
    factors = tuple(_repeated_factor(factor, count, axis) for factor in axes.factors)
    shape = tuple(count if dim == axis and size > 1 else size for dim, size in enumerate(axes.shape))
    return replace(axes, factors=factors, shape=shape)


def _repeated_factor(factor: Factor, count: int, axis: int) -> Factor:
    """Grouped queries: each head of keys and values serves several of queries."""
    if axis not in factor.axes:
        return factor
    dim = factor.at(axis)
    return factor.each(lambda array: array.repeat(count // array.shape[dim], dim))
