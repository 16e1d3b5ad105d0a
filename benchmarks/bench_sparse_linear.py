"""A linear layer whose weight is packed without its zeros, beside the dense layers of torch."""

import warnings

import torch
from measure import Way, with_floor
from shapes import MATRICES, Case
from torch import Tensor, nn

from pyprune import ops

MODELS = tuple(MATRICES)
DTYPES = ("float32",)
ROWS = (1, 4, 16, 64, 256)
FEW = 4  # rows of input, for which weights come from memory and are stored in 16 bits
DENSE, BFLOAT16, INT8 = "torch, float32", "torch, bfloat16", "torch, int8 dynamic"
PACKED, BLOCKS = "pack a linear layer", "linear, 4x1 blocks"
MANY_ZEROS = 0.78  # from where on columns are shorter than a mask


def group_of(rows: int) -> str:
    return f"linear, {rows} row{'s' if rows > 1 else ''}"


def ways(case: Case) -> list[Way]:
    (weight,) = case.draw()
    outputs, inputs = weight.shape
    blocks = weight * (torch.rand(-(-outputs // 4), inputs) >= case.ratio).repeat_interleave(4, 0)[:outputs]
    weight = weight * (torch.rand_like(weight) >= case.ratio)
    return [way for rows in ROWS for way in ways_of(rows, case, weight, blocks)] + packing(weight)


def ways_of(rows: int, case: Case, weight: Tensor, blocks: Tensor) -> list[Way]:
    group, x = group_of(rows), torch.randn(rows, weight.shape[1])
    dtype = torch.bfloat16 if rows <= FEW else torch.float32
    few = "rows" if rows == 1 else "index"
    best = (few if case.ratio >= MANY_ZEROS else "bitmask") if rows <= FEW else "index"
    layouts = {layout: ops.pack_sparse(weight, layout, dtype=dtype) for layout in ("index", "bitmask", "rows")}
    four = ops.pack_sparse(blocks, "block4", dtype=dtype)
    # As between the layers of a model that no cache holds; the larger products need no such care.
    cache = torch.ones(1 << 24 if rows <= FEW else 0)
    bfloat16, half = weight.bfloat16(), x.bfloat16()

    def cold() -> tuple[()]:
        cache.add_(1)
        return ()

    def way(of: str, name: str, packed: ops.SparseWeight) -> Way:
        return Way(of, name, lambda: ops.sparse_linear(x, packed), cold, returned=rows * weight.shape[0] * 4)

    def dense(of: str, layer: Tensor) -> Way:
        return Way(of, DENSE, lambda: nn.functional.linear(x, layer), cold)

    def floor(of: str, packed: ops.SparseWeight) -> Way:
        read = torch.ones(packed.nbytes // 4)
        return Way(of, "floor: read the packed weight", read.sum, cold, moved=read.nbytes)

    others = [way(group, f"pyprune, {layout}", packed) for layout, packed in layouts.items() if layout != best]
    rivals = [
        dense(group, weight),
        Way(group, BFLOAT16, lambda: nn.functional.linear(half, bfloat16), cold),
        int8_way(group, weight, x, cold),
    ]
    in_blocks = f"{BLOCKS}, {rows}"
    return [
        *with_floor(floor(group, layouts[best]), [way(group, "pyprune", layouts[best]), *others, *rivals]),
        *with_floor(floor(in_blocks, four), [way(in_blocks, "pyprune", four), dense(in_blocks, blocks)]),
    ]


def int8_way(group: str, weight: Tensor, x: Tensor, prepare: object) -> Way:
    """Return what users of a CPU choose instead."""
    if not {"fbgemm", "x86", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines):
        return Way(group, INT8, tuple, left_out="this torch has no engine for it")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.weight.copy_(weight)
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    return Way(group, INT8, lambda: quantised(x), prepare)  # type: ignore[arg-type]


def packing(weight: Tensor) -> list[Way]:
    """Return what it takes to pack, once when a model is loaded."""
    packed = ops.pack_sparse(weight, "index")
    [bits], [values] = ops.pack([weight])
    return with_floor(
        Way(PACKED, "floor: copy the weight", weight.clone, moved=2 * weight.nbytes),
        [
            Way(PACKED, "pyprune", lambda: ops.pack_sparse(weight, "index"), returned=packed.nbytes),
            Way(
                PACKED,
                "pyprune, from bits",
                lambda: ops.pack_sparse_bits(bits, values, weight.shape, "index"),
                returned=packed.nbytes,
            ),
            Way(PACKED, "torch, to_sparse_csr", weight.to_sparse_csr),
        ],
    )
