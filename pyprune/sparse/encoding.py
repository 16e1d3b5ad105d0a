"""One tensor, as the entries that stand for it in a file."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops.crc32 import crc32
from pyprune.sparse.blocks import expand_blocks, find_block
from pyprune.sparse.codec import Bytes, compress, is_coded, split
from pyprune.sparse.format import names_of
from pyprune.sparse.header import NAMES

# What the header says of a sparse tensor takes about so many bytes.
_DESCRIPTION = 400


@dataclass(frozen=True)
class Options:
    """How the tensors of a file are written; see `save_sparse`."""

    codec: str | None = None
    layout: str = "pyprune"
    keep_negative_zero: bool = False
    min_zeros: float = 0.1

    def is_worth(self, dtype: torch.dtype, count: int, kept: int) -> bool:
        """Whether a tensor of so many elements, of which so many are kept, is to be bits and values."""
        taken = -(-count // 8) + kept * dtype.itemsize + _DESCRIPTION
        return self.min_zeros <= 0 or (count - kept >= self.min_zeros * count and taken < count * dtype.itemsize)

    def __post_init__(self) -> None:
        if self.codec is not None and self.layout != "pyprune":
            raise ValueError(
                f'layout "{self.layout}" has no codec; leave out codec="{self.codec}", or give layout="pyprune"'
            )


@dataclass(frozen=True)
class Part:
    """An entry of the file: its name, type and shape, and its bytes, or what returns them in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Bytes | Callable[[], Iterable[Bytes]]

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterable[Bytes]:
        """Return the bytes, one piece after the other."""
        return self.data() if callable(self.data) else (self.data,)


@dataclass(frozen=True)
class Encoded:
    """What is written of a tensor: shapes first in the file, then values, bits last; and what the metadata say."""

    fields: dict[str, Any]
    values: list[Part]
    shapes: list[Part] = field(default_factory=list)
    bits: list[Part] = field(default_factory=list)
    negative_zeros: int = 0  # that became 0.0


def encode(
    name: str, tensor: Tensor, options: Options, *, sparse: bool = True, zero: Tensor | None = None
) -> Encoded:
    """Return what stands for a tensor, which is dense if that is smaller.

    Args:
        name: of the tensor.
        tensor: on any device.
        options: of the file.
        sparse: whether it may be anything but itself.
        zero: what its elements have subtracted before: one number, or one per row, of its dtype.

    Example:
        >>> encoded = encode("w", torch.eye(64), Options())
        >>> encoded.fields["nnz"], [part.name for part in encoded.values + encoded.shapes + encoded.bits]
        (64, ['w', 'w_shape', 'w_bitmask'])
    """
    tensor = tensor.detach().cpu().contiguous()
    theirs = options.layout != "pyprune"
    if theirs:
        sparse = sparse and name.endswith(".weight") and tensor.dim() >= 2
    if sparse and may_be_sparse(tensor.dtype):
        centred = tensor if zero is None else tensor - zero.view(-1, *(1,) * (tensor.dim() - 1))
        found = _pack(centred, options)
        if found is not None:
            return (_theirs if theirs else _ours)(name, centred, found, options, zero)
    fields = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
    if sparse and options.codec and is_coded(tensor.dtype, tensor.numel()):
        parts, fields["codec"] = _coded(name, tensor), options.codec
        fields["crc32"] = [_crc32(parts)]
        return Encoded(fields, parts, [_numbers(names_of(name).shape, tensor.shape)])
    parts = [_part(name, tensor)]
    return Encoded(fields | {"crc32": [_crc32(parts)]}, parts)


def may_be_sparse(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype can be stored by bits and values."""
    return dtype in ops.PACK_DTYPES and dtype not in (torch.bool, torch.complex64)


@dataclass(frozen=True)
class _Packed:
    bits: Tensor
    values: Tensor
    negative_zeros: int


def _pack(tensor: Tensor, options: Options) -> _Packed | None:
    """Return bits and values, or None if these are no smaller."""
    count, least = tensor.numel(), options.min_zeros
    if tensor.dtype in ops.WEIGHT_DTYPES and count and int(ops.count_zeros([tensor])) < least * count:
        return None
    [bits], [values] = ops.pack([tensor], negative_zeros=True)
    negative = 0
    if not options.keep_negative_zero and tensor.is_floating_point():
        [_], [others] = ops.pack([values])
        negative = len(values) - len(others)
        if negative:
            [bits], [values] = ops.pack([tensor])
    return _Packed(bits, values, negative) if options.is_worth(tensor.dtype, count, len(values)) else None


def _ours(name: str, tensor: Tensor, packed: _Packed, options: Options, zero: Tensor | None) -> Encoded:
    names, bits, values = names_of(name), packed.bits, packed.values
    fields: dict[str, Any] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
    shapes = [_numbers(names.shape, tensor.shape)]
    found = None
    if not options.keep_negative_zero or not tensor.is_floating_point():  # blocks keep all signs in them
        found = find_block(tensor, len(bits) + values.nbytes + _DESCRIPTION // 4)
    if found is not None:
        block, mask = found
        whole = expand_blocks(mask, block, tuple(tensor.shape))
        [_], [values] = ops.pack([tensor], [whole])
        if packed.negative_zeros:
            values = torch.where(values == 0, torch.zeros_like(values), values)
        [bits], _ = ops.pack([mask])
        shapes.append(_numbers(names.block, block))
        fields["block"] = list(block)
    fields["nnz"] = len(values)
    if options.codec:
        fields["codec"] = options.codec
        parts = _coded(name, values)
        bits = torch.from_numpy(compress(bits.numpy()).copy())
    else:
        parts = [_part(name, values)]
    if zero is not None:
        fields["zero"] = True
        parts.append(_part(names.zero, zero.flatten()))
    row = [_part(names.bitmask, bits)]
    return Encoded(fields | {"crc32": [_crc32(parts), _crc32(row)]}, parts, shapes, row, packed.negative_zeros)


def _theirs(name: str, tensor: Tensor, packed: _Packed, options: Options, zero: Tensor | None) -> Encoded:
    """Return what compressed-tensors' "sparse-bitmask" has: rows of bits that begin at a byte."""
    names = names_of(name, options.layout)
    each = np.unpackbits(packed.bits.numpy(), count=tensor.numel(), bitorder="little").reshape(tensor.shape)
    rows = torch.from_numpy(each.sum(-1, dtype=np.int64))
    parts = [_part(names.values, packed.values)]
    bits = [_part(names.bitmask, torch.from_numpy(np.packbits(each, axis=-1, bitorder="little")))]
    fields = {
        "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "nnz": len(packed.values),
        "crc32": [_crc32(parts), _crc32(bits)],
    }  # fmt: skip
    shapes = [_numbers(names.shape, tensor.shape), _part(names.row_offsets, torch.cumsum(rows, 0) - rows)]
    return Encoded(fields, parts, shapes, bits, packed.negative_zeros)


def _coded(name: str, values: Tensor) -> list[Part]:
    low, high = split(values)
    frame = compress(high)
    return [
        Part(name, torch.uint8, low.shape, low.reshape(-1)),
        Part(names_of(name).high, torch.uint8, frame.shape, frame),
    ]


def _part(name: str, tensor: Tensor) -> Part:
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return Part(name, tensor.dtype, tuple(tensor.shape), data)


def _numbers(name: str, numbers: Any) -> Part:
    return _part(name, torch.tensor(list(numbers), dtype=torch.int64))


def _crc32(parts: list[Part]) -> int:
    found = 0
    for data in (data for part in parts for data in part.pieces()):
        # Frames are in the memory of bytes, which torch takes with a warning only.
        found = crc32(torch.from_numpy(data if data.flags.writeable else data.copy()), found)
    return found
