"""Weights as lists of what is not zero, laid out to be multiplied with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pyprune.checks import check_choice, check_count, check_items, shown
from pyprune.ops._library import check_tensor, register_fake
from pyprune.ops.pack import count_bits, unpack

# In the order of csrc/sparse_layout.h.
SPARSE_LAYOUTS = ("index", "bitmask", "rows", "block4")
SPARSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_FLOATS = SPARSE_DTYPES[:3]
_MASK_WIDTH, _NARROW, _WIDEST, _MOST_COLUMNS = 256, 128, 248, 65_535
_MOST_ENTRIES = 2**31 - 1
_FEW = 0.25  # of the weights: then blocks of columns are wide
_ELEMENTS_TOGETHER = 1 << 20  # of a weight that are packed at a time
_FAULTS = (
    "",
    "offsets do not grow from 0 to the number of entries",
    "a list has another number of entries than its offsets say",
    "a column lies outside of the weight",
    "the columns of a list do not grow",
)


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight without its zeros, as `pack_sparse` makes it and `sparse_linear` takes it.

    Its ``tensors`` are all there is to store; ``layout`` and ``shape`` say what they mean.
    ``csrc/sparse_layout.h`` describes them to the byte.
    """

    values: Tensor
    """The values, of the dtype that was asked for, ``[n]``."""
    index: Tensor
    """Which columns they stand in, as bytes: uint8 ``[m]``."""
    offsets: Tensor
    """Where each list of values begins, int32 ``[lists + 1]``."""
    scale: Tensor | None
    """What int8 values are multiplied by: float32 ``[rows]``."""
    layout: str
    """``"index"``, ``"bitmask"``, ``"rows"`` or ``"block4"``."""
    shape: tuple[int, int]
    """(rows, columns), which are a layer's outputs and inputs."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.nbytes for one in self.tensors if one is not None)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All that there is to store, with None in place of a scale that there is not."""
        return self.values, self.index, self.offsets, self.scale


@torch.no_grad()
def pack_sparse(weight: Tensor, layout: str, *, dtype: torch.dtype | None = None) -> SparseWeight:
    """Return the lists of what is not zero in a weight, for `sparse_linear`.

    Layouts, and what they are good for on a CPU: ``"index"`` (a byte for each column, in blocks of columns) for any
    number of inputs, and the usual choice; ``"bitmask"`` (a bit for each weight) for few inputs and up to 75 %
    zeros; ``"rows"`` (two bytes for each column) for one input and more than 80 % zeros; ``"block4"`` for weights
    whose zeros come as 4 x 1 blocks (`granularity.block`): it keeps a column of four rows as a whole where one of
    them is not zero.

    Args:
        weight: (rows, columns), float32, bfloat16 or float16, of any strides. What is zero after rounding to
            ``dtype`` is left out, -0.0 too; NaN and infinity are kept.
        layout: one of ``SPARSE_LAYOUTS``.
        dtype: of the stored values: float32, bfloat16, float16, int8 (rounded to multiples of a scale for each row,
            its largest magnitude / 127), or None for the weight's own. Arithmetic is in float32 whatever it is.

    Raises:
        TypeError, ValueError: for other dtypes and shapes, more columns than a layout can count (65535 for
            ``"rows"``), 2^31 values or more, or if values that are not finite are to become int8.

    Example:
        >>> packed = pack_sparse(torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 6.0]]), "index")
        >>> unpack_sparse(packed).tolist()
        [[0.0, 2.0, 0.0], [4.0, 0.0, 6.0]]
    """
    check_tensor(weight, "weight", _FLOATS, values=True)
    if weight.dim() != 2 or not weight.is_cpu:
        raise ValueError(f"weight is of shape {tuple(weight.shape)} on {weight.device}; give a matrix on the CPU")
    kind, stored = _layout(layout), _stored(dtype, weight.dtype)
    rows, columns = weight.shape
    return _pack(lambda first, end: weight.detach()[first:end], (rows, columns), kind, stored)


@torch.no_grad()
def pack_sparse_bits(
    bits: Tensor, values: Tensor, shape: Sequence[int], layout: str, *, dtype: torch.dtype | None = None
) -> SparseWeight:
    """Return the same of a weight as `pack` made it and files hold it; only some of its rows are dense at a time.

    Args:
        bits, values: of one tensor, as `pack` returns them.
        shape: (rows, columns) of the weight.
        layout, dtype: as in `pack_sparse`.

    Raises:
        TypeError, ValueError: as in `pack_sparse`, and as in `unpack` for bits that do not fit.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 6.0]])
        >>> from pyprune import ops
        >>> [bits], [values] = ops.pack([weight])
        >>> unpack_sparse(pack_sparse_bits(bits, values, (2, 3), "rows")).tolist()
        [[0.0, 2.0, 0.0], [4.0, 0.0, 6.0]]
    """
    check_tensor(bits, "bits", (torch.uint8,), values=True)
    check_tensor(values, "values", _FLOATS, values=True)
    rows, columns = _shape(shape)
    kind, stored = _layout(layout), _stored(dtype, values.dtype)
    length = -(-rows * columns // 8)
    if bits.shape != (length,) or values.dim() != 1 or not bits.is_cpu or not values.is_cpu:
        raise ValueError(
            f"bits is of shape {tuple(bits.shape)} on {bits.device}, values of shape {tuple(values.shape)} on "
            f"{values.device}; "
            f"a weight of shape ({rows}, {columns}) needs {length} bytes of bits and a row of values on the CPU"
        )
    # How many values come before some of the bytes.
    bits, step = bits.contiguous(), max(1, _rows_together(columns) * columns // 8)
    parts = count_bits([bits[at : at + step] for at in range(0, length, step)]) if length else []
    before = dict(zip(range(0, length + step, step), [0, *accumulate(parts)], strict=False))
    if sum(parts) != values.numel():
        raise ValueError(
            f"values has {values.numel()} values for {sum(parts)} bits that are set; there must be as many"
        )

    def dense(first: int, end: int) -> Tensor:
        begin, stop = first * columns // 8, -(-end * columns // 8)
        some = values[before[begin] : before[stop] if stop < length else values.numel()]
        [part] = unpack([bits[begin:stop]], [some], [(end - first, columns)])
        return part

    return _pack(dense, (rows, columns), kind, stored)


def _rows_together(columns: int) -> int:
    """Return how many rows are packed at a time: a multiple of 32, so that they begin with a byte of bits."""
    return max(1, _ELEMENTS_TOGETHER // max(columns, 1) // 32) * 32


def _pack(
    rows_of: Callable[[int, int], Tensor], shape: tuple[int, int], layout: str, dtype: torch.dtype
) -> SparseWeight:
    rows, columns = shape
    kind = SPARSE_LAYOUTS.index(layout)
    if layout == "rows" and columns > _MOST_COLUMNS:
        raise ValueError(f'layout "rows" has at most {_MOST_COLUMNS} columns, the weight {columns}; give "index"')
    scale = _scale(rows_of, shape) if dtype == torch.int8 else None
    step = _rows_together(columns)

    def parts() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, rows, step):
            end = min(first + step, rows)
            some = rows_of(first, end)
            if scale is not None:
                some = (some.float() / scale[first:end, None]).round_().clamp_(-127, 127)
            yield first, some.to(dtype).contiguous()

    counts = _counts(parts, shape, layout)
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts.flatten(), 0, out=offsets[1:])
    entries, slack = int(offsets[-1]), _slack(layout)
    if entries + slack > _MOST_ENTRIES:
        raise ValueError(f"the weight has {entries} values; a packed one has fewer than 2^31: split its rows")
    offsets = offsets.int()
    values = torch.zeros((entries + slack) * _height(layout), dtype=dtype)
    size = {"bitmask": 32 * counts.numel(), "rows": 2 * (entries + slack)}.get(layout, entries + slack)
    index = torch.zeros(size, dtype=torch.uint8)
    for first, some in parts():
        torch.ops.pyprune.fill_sparse(some, kind, offsets, rows, first, values, index)
    return SparseWeight(values, index, offsets, scale, layout, shape)


def _scale(rows_of: Callable[[int, int], Tensor], shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    step = _rows_together(columns)
    largest = [rows_of(at, min(at + step, rows)).float().abs() for at in range(0, rows if columns else 0, step)]
    scale = torch.cat([one.amax(1) for one in largest]) / 127 if largest else torch.ones(rows)
    if not scale.isfinite().all():
        raise ValueError("weight has values that are not finite, which int8 cannot hold; give another dtype")
    return torch.where(scale > 0, scale, 1.0)


def _counts(parts: Callable[[], Iterable[tuple[int, Tensor]]], shape: tuple[int, int], layout: str) -> Tensor:
    """Return how many entries each list has, int32 (blocks, groups), with as many blocks as suit the zeros."""
    rows, columns = shape

    def count(blocks: int) -> Tensor:
        if not rows or not blocks:
            return torch.zeros(blocks, -(-rows // _height(layout)), dtype=torch.int32)
        kind = SPARSE_LAYOUTS.index(layout)
        counts = [torch.ops.pyprune.count_sparse(some, kind, blocks).view(blocks, -1) for _, some in parts()]
        return torch.cat(counts, 1)

    if layout in ("rows", "bitmask"):
        return count(1 if layout == "rows" else -(-columns // _MASK_WIDTH))
    counts = count(-(-columns // _WIDEST))
    # Lists should not be too short, nor activations of a block too many for the first-level cache.
    few = int(counts.sum()) * _height(layout) <= _FEW * rows * columns
    return counts if few or columns <= _NARROW else count(-(-columns // _NARROW))


def unpack_sparse(packed: SparseWeight) -> Tensor:
    """Return the dense weight: values in their places, times their scales, zeros elsewhere.

    Args:
        packed: what `pack_sparse` returned.

    Returns:
        (rows, columns), of the dtype of the values, or float32 for int8.

    Raises:
        TypeError, ValueError: as in `check_sparse`.
    """
    check_sparse(packed)
    values, index, offsets, scale = packed.tensors
    kind = SPARSE_LAYOUTS.index(packed.layout)
    dense: Tensor = torch.ops.pyprune.unpack_sparse(values, index, offsets, kind, *packed.shape)
    return dense if scale is None else dense.float() * scale[:, None]


def check_sparse(packed: SparseWeight) -> None:
    """Raise unless a packed weight is well formed: to be called once for what comes from elsewhere.

    It reads offsets, columns and scales. `sparse_linear` looks only at sizes and dtypes; with a damaged weight, which
    has not been checked, it returns nonsense, but never reads outside of it.

    Args:
        packed: a packed weight.

    Raises:
        TypeError, ValueError: for tensors of other dtypes or sizes than the layout and shape say, offsets that do not
            grow, and columns outside of the weight.
    """
    check_packed(packed)
    values, index, offsets, scale = packed.tensors
    kind = SPARSE_LAYOUTS.index(packed.layout)
    fault = int(torch.ops.pyprune.check_sparse(values, index, offsets, kind, *packed.shape))
    if fault:
        raise ValueError(f"packed is damaged: {_FAULTS[fault]}. Pack the weight again")
    if scale is not None and not scale.isfinite().all():
        raise ValueError("packed.scale has numbers that are not finite. Pack the weight again")


def check_packed(packed: SparseWeight) -> None:
    """Raise unless the tensors of a packed weight have the dtypes and sizes that its layout and shape say."""
    if not isinstance(packed, SparseWeight):
        raise TypeError(f"packed is {shown(packed)}; give what pack_sparse returns")
    (values, index, offsets, scale), layout = packed.tensors, packed.layout
    check_tensor(values, "packed.values", SPARSE_DTYPES, values=True)
    check_tensor(index, "packed.index", (torch.uint8,), values=True)
    check_tensor(offsets, "packed.offsets", (torch.int32,), values=True)
    _layout(layout, "packed.layout")
    rows, columns = _shape(packed.shape, "packed.shape")
    height, slack = _height(layout), _slack(layout)
    groups = -(-rows // height)
    lists, entries = offsets.numel() - 1, values.numel() // height - slack
    blocks = lists // groups if groups else 0
    size = {"bitmask": 32 * lists, "rows": 2 * (entries + slack)}.get(layout, entries + slack)
    widest = {"bitmask": _MASK_WIDTH, "rows": _MOST_COLUMNS}.get(layout, _WIDEST)
    fits = (
        values.dim() == index.dim() == offsets.dim() == 1
        and lists == blocks * groups
        and (not rows or blocks * widest >= columns)
        and (layout != "rows" or not rows or blocks == 1)
        and (layout != "bitmask" or not rows or (blocks - 1) * widest < columns)
        and entries >= 0
        and values.numel() == (entries + slack) * height
        and index.numel() == size
        and values.is_contiguous() and index.is_contiguous() and offsets.is_contiguous()
    )  # fmt: skip
    if not fits or not (values.device == index.device == offsets.device == torch.device("cpu")):
        raise ValueError(
            f"packed has {tuple(values.shape)} values, {tuple(index.shape)} bytes of index and "
            f"{tuple(offsets.shape)} offsets on {values.device}, which are no weight of shape ({rows}, {columns}) in "
            f'layout "{layout}" on the CPU; give what pack_sparse returns'
        )
    if (scale is None) is (values.dtype == torch.int8):
        raise ValueError(f"packed has values of {values.dtype} and scale {shown(scale)}; int8 has one, others none")
    if scale is not None:
        check_tensor(scale, "packed.scale", (torch.float32,), values=True)
        if scale.shape != (rows,) or not scale.is_cpu:
            raise ValueError(f"packed.scale is {tuple(scale.shape)} on {scale.device}; give ({rows},) numbers")


def _height(layout: str) -> int:
    return 4 if layout == "block4" else 1


def _slack(layout: str) -> int:
    return 288 if layout == "bitmask" else 32


def _layout(layout: object, name: str = "layout") -> str:
    if type(layout) is str and layout in SPARSE_LAYOUTS:  # at every call of a layer
        return layout
    return check_choice(name, layout, SPARSE_LAYOUTS)


def _stored(dtype: object, own: torch.dtype) -> torch.dtype:
    if dtype is None:
        return own
    if not isinstance(dtype, torch.dtype) or dtype not in SPARSE_DTYPES:
        allowed = ", ".join(str(one) for one in SPARSE_DTYPES)
        raise (ValueError if isinstance(dtype, torch.dtype) else TypeError)(
            f"dtype is {shown(dtype)}; allowed are {allowed} and None"
        )
    return dtype


def _shape(shape: object, name: str = "shape") -> tuple[int, int]:
    if type(shape) is tuple and len(shape) == 2 and type(shape[0]) is type(shape[1]) is int and min(shape) >= 0:
        rows, columns = shape
        if max(shape) <= _MOST_ENTRIES:  # at every call of a layer
            return rows, columns
    if isinstance(shape, Tensor):
        raise TypeError(f"{name} is a {type(shape).__name__}; give (rows, columns)")
    sizes = check_items(name, shape, "(rows, columns)")
    if len(sizes) != 2:
        raise ValueError(f"{name} is {shown(shape)}; give (rows, columns)")
    rows, columns = (check_count(name, size, most=_MOST_ENTRIES) for size in sizes)
    return rows, columns


def _fake_count(weight: Tensor, layout: int, blocks: int) -> Tensor:
    height = _height(SPARSE_LAYOUTS[layout])
    return weight.new_empty(blocks * ((weight.shape[0] + height - 1) // height), dtype=torch.int32)


def _fake_fill(
    weight: Tensor, layout: int, offsets: Tensor, rows: int, first_row: int, values: Tensor, index: Tensor
) -> None:
    return None


def _fake_check(values: Tensor, index: Tensor, offsets: Tensor, layout: int, rows: int, columns: int) -> Tensor:
    return offsets.new_empty(1, dtype=torch.int64)


def _fake_unpack(values: Tensor, index: Tensor, offsets: Tensor, layout: int, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


register_fake("pyprune::count_sparse", _fake_count)
register_fake("pyprune::fill_sparse", _fake_fill)
register_fake("pyprune::check_sparse", _fake_check)
register_fake("pyprune::unpack_sparse", _fake_unpack)
