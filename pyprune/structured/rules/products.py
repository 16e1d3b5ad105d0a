"""Products: what is multiplied and summed is tied; rows and columns come out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyprune.structured.coordinates import Axes, Factor, Flags
from pyprune.structured.rules.call import Call, Contraction
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


def depends(call: Call, weight: Tensor, out_axis: int, in_axis: int, source: Axes, in_axis_of_source: int) -> Flags:
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


def _fixed_along(axis: int, factors: list[Factor], fixed: Flags) -> list[Factor]:
    """Say which entries along an axis are fixed."""
    return [replace(factor, fixed=fixed) if factor.axes == (axis,) else factor for factor in factors]


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
            columns = _fixed_along(1, columns, ~depends(call, second, 1, 0, left, 1))
        elif left.source != "inputs":
            rows = _fixed_along(0, rows, ~depends(call, first, 0, 1, right, 0))
    product = Axes(tuple(call.made.shape), (*rows, *columns), source_of({left.source, right.source}))
    return _plus(call, product, bias)


def _plus(call: Call, product: Axes, bias: Tensor | None) -> Axes:
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
    return _plus(call, product, call.args["self"])


def dot(call: Call) -> Axes:
    """(k,) times (k,)."""
    one, other = call.tensors()
    contract(call, (one, 0), (other, 0))
    return Axes((), (), source_of({call.axes(tensor).source for tensor in (one, other)}))


def bmm(call: Call) -> Axes:
    """(b, n, k) times (b, k, m). Where both have units along b, these are heads: all in one goes together."""
    return _batched(call, call.args["self"], call.args["mat2"])


def baddbmm(call: Call) -> Axes:
    """A batched product, plus a bias."""
    product = _batched(call, call.args["batch1"], call.args["batch2"])
    return _plus(call, product, call.args["self"])


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
    dead = np.moveaxis(zero, factor.at(0), 0).reshape(value.shape[0], -1).all(1)

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
        columns = [replace(factor, fixed=~depends(call, second, 2, 1, left, first.dim() - 1)) for factor in columns]
    product = Axes(tuple(call.made.shape), (*rows, *columns), source_of({left.source, right.source}))
    return _plus(call, product, call.args.get("bias"))
