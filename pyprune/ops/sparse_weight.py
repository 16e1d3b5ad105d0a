"""What a packed weight is, and whether it is well formed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.checks import check_choice, check_count, check_items, shown
from pyprune.ops._library import check_tensor, register_fake

# In the order of csrc/sparse_layout.h.
SPARSE_LAYOUTS = ("index", "bitmask", "rows", "block4")
SPARSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
FLOATS = SPARSE_DTYPES[:3]
MASK_WIDTH, NARROW, WIDEST, MOST_COLUMNS = 256, 128, 248, 65_535
MOST_ENTRIES = 2**31 - 1
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
    check_layout(layout, "packed.layout")
    rows, columns = check_shape(packed.shape, "packed.shape")
    height, slack = rows_of_group(layout), slack_of(layout)
    groups = -(-rows // height)
    lists, entries = offsets.numel() - 1, values.numel() // height - slack
    blocks = lists // groups if groups else 0
    size = {"bitmask": 32 * lists, "rows": 2 * (entries + slack)}.get(layout, entries + slack)
    widest = {"bitmask": MASK_WIDTH, "rows": MOST_COLUMNS}.get(layout, WIDEST)
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


def rows_of_group(layout: str) -> int:
    """Return how many rows share a list."""
    return 4 if layout == "block4" else 1


def slack_of(layout: str) -> int:
    """Return how many entries are behind the last, for kernels to read."""
    return 288 if layout == "bitmask" else 32


def check_layout(layout: object, name: str = "layout") -> str:
    """Return the name of a layout."""
    if type(layout) is str and layout in SPARSE_LAYOUTS:  # at every call of a layer
        return layout
    return check_choice(name, layout, SPARSE_LAYOUTS)


def check_shape(shape: object, name: str = "shape") -> tuple[int, int]:
    """Return (rows, columns)."""
    if type(shape) is tuple and len(shape) == 2 and type(shape[0]) is type(shape[1]) is int and min(shape) >= 0:
        rows, columns = shape
        if max(shape) <= MOST_ENTRIES:  # at every call of a layer
            return rows, columns
    if isinstance(shape, Tensor):
        raise TypeError(f"{name} is a {type(shape).__name__}; give (rows, columns)")
    sizes = check_items(name, shape, "(rows, columns)")
    if len(sizes) != 2:
        raise ValueError(f"{name} is {shown(shape)}; give (rows, columns)")
    rows, columns = (check_count(name, size, most=MOST_ENTRIES) for size in sizes)
    return rows, columns


def _fake_check(values: Tensor, index: Tensor, offsets: Tensor, layout: int, rows: int, columns: int) -> Tensor:
    return offsets.new_empty(1, dtype=torch.int64)


register_fake("pyprune::check_sparse", _fake_check)
