"""Products: what is multiplied and summed is tied; rows and columns come out."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor, Flags
from pyprune.structured.rules.call import Call, Contraction, Result, tensors_in
from pyprune.structured.rules.elementwise import broadcast, source_of, unfixed, zero_entries


def contract(
    call: Call,
    one: tuple[Tensor, int],
    other: tuple[Tensor, int],
    *,
    padded: bool = False,
) -> None:
    """Tie the axes of two tensors that are multiplied and summed."""
    (first, first_axis), (second, second_axis) = one, other
    left, right = call.axes(first), call.axes(second)
    left_factor, right_factor = left.on(first_axis), right.on(second_axis)
    for factor, own, beside in ((left_factor, left, right), (right_factor, right, left)):
        if factor is not None and own.source != "inputs" and beside.source == "inputs":
            call.coordinates.read(factor.coords)
    if left_factor is None or right_factor is None:
        for factor, axis, bare in ((left_factor, first_axis, right), (right_factor, second_axis, left)):
            if factor is None:
                continue
            other_axis = second_axis if factor is left_factor else first_axis
            if bare.stretched.get(other_axis) is not None:  # zeros, as many as an attribute says
                call.on_size(bare.stretched[other_axis], factor, axis)
            else:
                call.coordinates.hold(factor, (axis,), "it reads what cannot be removed")
        return
    if len(left_factor.axes) == len(right_factor.axes) == 1:
        call.coordinates.tie(left_factor.coords, right_factor.coords)
    else:
        for factor, axis, lone in ((left_factor, first_axis, right_factor), (right_factor, second_axis, left_factor)):
            if len(factor.axes) > 1:
                call.coordinates.hold(factor, (axis,), "")
                if len(lone.axes) == 1:
                    call.coordinates.stay(lone.coords, f"all heads share it in {call.name}")
        return
    if call.values:
        call.on_contraction(
            Contraction(
                (left_factor.coords, right_factor.coords),
                first,
                first_axis,
                second,
                second_axis,
                (left_factor.fixed, right_factor.fixed),
                (left.source, right.source),
                call.name,
                padded,
            )
        )


def _outputs(call: Call, axes: Axes, gone: Iterable[int], places: dict[int, int]) -> list[Factor]:
    """The factors of an operand that come out of a product, at other axes."""
    made = []
    for factor in axes.factors:
        left = factor.first([axis for axis in factor.axes if axis in gone])
        if left is not None:
            made.append(left.moved(places[axis] for axis in left.axes))
    return made


def _depends(call: Call, weight: Tensor, out_axis: int, in_axis: int, source: Axes, in_axis_of_source: int) -> Flags:
    """Say which outputs of a product depend on inputs: those that read one which does."""
    size = weight.shape[out_axis]
    factor = source.on(in_axis_of_source)
    if source.source != "inputs":
        return np.zeros(size, bool)
    used = weight.detach() != 0
    if factor is not None and len(factor.axes) == 1 and factor.fixed.any():
        keep = torch.from_numpy((~factor.fixed).nonzero()[0]).to(used.device)
        if used.shape[in_axis] == len(factor.fixed):
            used = used.index_select(in_axis, keep)
    if rest := tuple(axis for axis in range(used.dim()) if axis != out_axis):
        used = used.any(rest)
    return np.asarray(used.cpu().numpy())


def _product(call: Call, factors: list[Factor], weight: Tensor, out: int, in_: int, source: Axes, at: int) -> None:
    """Say of the outputs of a weight which are fixed. Its factor is the one with the last axis of what is made."""
    if not call.values:
        return
    last = call.made.dim() - 1
    for index, factor in enumerate(factors):
        if factor.axes == (last,):
            fixed = ~_depends(call, weight, out, in_, source, at)
            factors[index] = replace(factor, fixed=fixed)


def matrices(call: Call, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Axes:
    """(n, k) times (k, m), plus a bias."""
    left, right = call.axes(first), call.axes(second)
    contract(call, (first, 1), (second, 0))
    rows = _outputs(call, left, (1,), {0: 0, 1: -1})
    columns = _outputs(call, right, (0,), {1: 1, 0: -1})
    call.on_product(
        first.shape[0] * first.shape[1] * second.shape[1],
        [*rows, *columns, *(factor for factor in (right.on(0) or left.on(1),) if factor is not None)],
    )
    rows, columns = unfixed(rows), unfixed(columns)
    if call.values:
        if right.source != "inputs":
            _product(call, columns, second, 1, 0, left, 1)
        elif left.source != "inputs":
            rows = [
                replace(factor, fixed=~_depends(call, first, 0, 1, right, 0)) if factor.axes == (0,) else factor
                for factor in rows
            ]
    product = Axes(tuple(call.made.shape), (*rows, *columns), source_of({left.source, right.source}))
    return product if bias is None else broadcast(call, [(None, product), (bias, call.axes(bias))], product.shape)


def mm(call: Call) -> Axes:
    """(n, k) times (k, m)."""
    return matrices(call, call.args["self"], call.args["mat2"])


def addmm(call: Call) -> Axes:
    """(n, k) times (k, m), plus a bias."""
    return matrices(call, call.args["mat1"], call.args["mat2"], call.args["self"])


def mv(call: Call) -> Axes:
    """(n, k) times (k,)."""
    matrix, vector = call.args["self"], call.args["vec"]
    contract(call, (matrix, 1), (vector, 0))
    rows = unfixed(_outputs(call, call.axes(matrix), (1,), {0: 0, 1: -1}))
    return Axes(tuple(call.made.shape), tuple(rows), source_of({call.axes(matrix).source, call.axes(vector).source}))


def addmv(call: Call) -> Axes:
    """(n, k) times (k,), plus a vector."""
    product = mv(Call(**{**vars(call), "args": {"self": call.args["mat"], "vec": call.args["vec"]}}))
    bias = call.args["self"]
    return broadcast(call, [(None, product), (bias, call.axes(bias))], product.shape)


def dot(call: Call) -> Axes:
    """(k,) times (k,)."""
    contract(call, (call.args["self"], 0), (call.args["tensor"], 0))
    return Axes((), (), source_of({call.axes(tensor).source for tensor in call.tensors()}))


def bmm(call: Call) -> Axes:
    """(b, n, k) times (b, k, m). Where both have units along b, these are heads: all in one goes together."""
    return _batched(call, call.args["self"], call.args["mat2"])


def baddbmm(call: Call) -> Axes:
    """A batched product, plus a bias."""
    product = _batched(call, call.args["batch1"], call.args["batch2"])
    bias = call.args["self"]
    return broadcast(call, [(None, product), (bias, call.axes(bias))], product.shape)


def _batched(call: Call, first: Tensor, second: Tensor) -> Axes:
    left, right = call.axes(first), call.axes(second)
    batches = [left.on(0), right.on(0)]
    ties = call.coordinates
    if batches[0] is not None and batches[1] is not None:
        for batch in batches:
            assert batch is not None
            ties.hold(batch, [axis for axis in batch.axes if axis != 0], "")
        each = [one.first([axis for axis in one.axes if axis != 0]) for one in batches if one is not None]
        assert each[0] is not None
        assert each[1] is not None
        ties.tie(each[0].coords, each[1].coords)
        ties.heads.append(each[0].coords)
    else:
        for batch, bare in ((batches[0], right), (batches[1], left)):
            if batch is not None and bare.source != "number":
                # Experts, or heads that share what they are multiplied with.
                ties.stay(batch.coords, f"{call.name} along what has a fixed size")
    left_k, right_k = left.on(2), right.on(1)
    inside = [factor is not None and 0 in factor.axes for factor in (left_k, right_k)]
    if not any(inside):
        contract(call, (first, 2), (second, 1))
    else:  # a lone axis meets each of the heads
        for factor in (left_k, right_k):
            if factor is not None and 0 not in factor.axes:
                ties.stay(factor.coords, f"all heads share it in {call.name}")
    rows = _outputs(call, left, (2,), {0: 0, 1: 1, 2: -1})
    columns = _outputs(call, right, (1,), {0: 0, 2: 2, 1: -1})
    if any(0 in factor.axes for factor in columns):
        # All in a head goes together, so the batch axis says enough of it.
        rows = [one.first([axis for axis in one.axes if axis]) or one if 0 in one.axes else one for one in rows]
    macs = first.shape[0] * first.shape[1] * first.shape[2] * second.shape[2]
    grow = [*rows, *columns]
    if left_k is not None and not inside[0]:
        grow.append(left_k)
    call.on_product(macs, [factor for index, factor in enumerate(grow) if _is_first_on_batch(grow, index)])
    fixed = _zero_heads(call, second, right) if call.values else None
    merged = broadcast(
        call,
        [
            (None, Axes(_with_ones(call.made.shape, 2), tuple(unfixed(rows)), left.source)),
            (None, Axes(_with_ones(call.made.shape, 1), tuple(unfixed(columns)), right.source)),
        ],
        tuple(call.made.shape),
    )
    if fixed is not None:
        merged = replace(
            merged,
            factors=tuple(
                replace(factor, fixed=fixed(factor)) if 0 in factor.axes else factor for factor in merged.factors
            ),
        )
    return merged


def _is_first_on_batch(factors: list[Factor], index: int) -> bool:
    return 0 not in factors[index].axes or all(0 not in factor.axes for factor in factors[:index])


def _with_ones(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(1 if dim == axis else size for dim, size in enumerate(shape))


def _zero_heads(call: Call, value: Tensor, axes: Axes) -> Callable[[Factor], Flags] | None:
    """Heads whose values are zero, whatever the inputs are, put out zeros."""
    factor = axes.on(0)
    if factor is None or not factor.fixed.any():
        return None
    zero = zero_entries(value, factor, axes) & factor.fixed
    heads = zero.reshape(len(zero), -1) if factor.at(0) == 0 else np.moveaxis(zero, factor.at(0), 0).reshape(
        value.shape[0], -1
    )  # fmt: skip
    dead = heads.all(1)

    def fixed(made: Factor) -> Flags:
        shape = [-1 if axis == 0 else 1 for axis in made.axes]
        return np.broadcast_to(dead.reshape(shape), made.coords.shape)

    return fixed


def grouped_mm(call: Call) -> Axes:
    """Rows of each expert times its matrix; which rows belong to which cannot be said in sizes."""
    first, second = call.args["self"], call.args["mat2"]
    left, right = call.axes(first), call.axes(second)
    for axes, dim in ((left, first.dim()), (right, second.dim())):
        if dim == 3 and (experts := axes.on(0)) is not None:
            call.coordinates.hold(experts, (0,), "experts stay: which rows are whose is data")
    contract(call, (first, first.dim() - 1), (second, second.dim() - 2))
    last = call.made.dim() - 1
    columns = [factor.moved((last,)) for factor in right.factors if factor.axes == (second.dim() - 1,)]
    rows = [factor for factor in left.factors if factor.axes == (first.dim() - 2,)]
    read = left.on(first.dim() - 1) or right.on(second.dim() - 2)
    call.on_product(
        first.shape[-2] * first.shape[-1] * second.shape[-1], [*columns, *([read] if read is not None else [])]
    )
    if call.values and second.dim() == 3:
        columns = [replace(factor, fixed=~_depends(call, second, 2, 1, left, first.dim() - 1)) for factor in columns]
    bias = call.args.get("bias")
    product = Axes(tuple(call.made.shape), (*rows, *columns), source_of({left.source, right.source}))
    return product if bias is None else broadcast(call, [(None, product), (bias, call.axes(bias))], product.shape)


def attention(call: Call) -> Result:
    """softmax(q k') v. Units are heads; the size of one stays, because the scale depends on it."""
    query, key, value = (call.args[name] for name in ("query", "key", "value"))
    ties = call.coordinates
    dim = query.dim()
    per_head = []
    for tensor in (query, key, value):
        axes = call.axes(tensor)
        heads = []
        for factor in axes.factors:
            inner = [axis for axis in factor.axes if axis >= dim - 2]
            ties.hold(factor, inner, "the size of a head stays: the scale depends on it")
            if (left := factor.first(inner)) is not None:
                heads.append(left)
        per_head.append(Axes((*axes.shape[:-2], 1, 1), tuple(heads), axes.source))
    most = query.shape[-3] if dim > 2 else 1
    per_head = [_repeated_heads(axes, most, dim - 3) for axes in per_head]
    output, *rest = tensors_in([call.made])
    made_shape = tuple(output.shape)
    operands: list[tuple[Tensor | None, Axes]] = [(None, axes) for axes in per_head]
    if (mask := call.args.get("attn_mask", call.args.get("attn_bias"))) is not None:
        along = call.axes(mask).factors
        for factor in along:
            ties.hold(factor, [axis for axis in factor.axes if axis >= mask.dim() - 2], "a mask of attention")
        kept = tuple(
            left
            for factor in along
            if (left := factor.first([axis for axis in factor.axes if axis >= mask.dim() - 2])) is not None
        )
        known = call.axes(mask)
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
    made = Axes(made_shape, tuple(factors), "inputs")
    return [made, *(Axes(tuple(tensor.shape)) for tensor in rest)] if rest else made


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
            columns = [replace(one, fixed=~_depends(call, weight, out_axis, in_axis, axes, 1)) for one in columns]
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
