"""A large tensor as the entries that stand for it in a file, in the memory of its bits and of a piece."""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops.crc32 import crc32
from pyprune.sparse.blocks import SAMPLE, may_have_blocks
from pyprune.sparse.encoding import Encoded, Options, Part, may_be_sparse
from pyprune.sparse.format import names_of
from pyprune.sparse.header import NAMES

PIECE = 1 << 20  # elements, a multiple of eight
LARGE = 1 << 23  # bytes; smaller tensors are encoded as a whole
Pieces = Callable[[], Iterator[Tensor]]


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """Return the elements of a contiguous tensor in pieces, in the order of the flat index."""
    return iter(torch.split(tensor.detach().view(-1), PIECE))


def encode_pieces(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Pieces, options: Options, *, sparse: bool = True
) -> Encoded | None:
    """Return what `encode` returns of the whole tensor; None if it has to be seen as a whole.

    Args:
        name, dtype, shape: of the tensor.
        pieces: returns its elements, the same at each call: once to decide, and once to write. All but the last are
            as many as a multiple of eight.
        options: of the file; without a codec, of our layout.
        sparse: whether it may be anything but itself.

    Example:
        >>> encoded = encode_pieces("w", torch.float32, (4096,), lambda: pieces_of(torch.eye(64)), Options())
        >>> encoded.fields["nnz"], [part.name for part in encoded.values + encoded.bits]
        (64, ['w', 'w_bitmask'])
    """
    sparse = sparse and may_be_sparse(dtype)
    keep = options.keep_negative_zero or not dtype.is_floating_point
    rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (0, 0)
    start: list[Tensor] = []  # the first rows, until there are enough to look for blocks
    bits: list[Tensor] = []
    kept = negative = dense_crc = values_crc = 0
    for piece in pieces():
        dense_crc = crc32(piece, dense_crc)
        if not sparse:
            continue
        [row], [values] = ops.pack([piece], negative_zeros=True)
        if not keep:
            with_signs = len(values)
            [row], [values] = ops.pack([piece])
            negative += with_signs - len(values)
        if rows and sum(map(len, start)) < SAMPLE * columns:
            start.append(piece)
        bits.append(row)
        kept += len(values)
        values_crc = crc32(values, values_crc)
    fields: dict[str, Any] = {"dtype": NAMES[dtype], "shape": list(shape)}
    if not sparse or not options.is_worth(dtype, prod(shape), kept):
        part = Part(name, dtype, shape, lambda: map(_bytes, pieces()))
        return Encoded(fields | {"crc32": [dense_crc]}, [part])
    if rows and not (options.keep_negative_zero and dtype.is_floating_point):  # blocks keep all signs in them
        sample = torch.cat(start)[: SAMPLE * columns] if len(start) > 1 else start[0][: SAMPLE * columns]
        if may_have_blocks(sample, shape):
            return None
    names, joined = names_of(name), torch.cat(bits)
    parts = [Part(name, dtype, (kept,), partial(_packed, pieces, keep))]
    row_part = Part(names.bitmask, torch.uint8, tuple(joined.shape), joined.numpy())
    sizes = torch.tensor(shape, dtype=torch.int64)
    shape_part = Part(names.shape, torch.int64, tuple(sizes.shape), _bytes(sizes))
    fields |= {"nnz": kept, "crc32": [values_crc, crc32(joined)]}
    return Encoded(fields, parts, [shape_part], [row_part], negative)


def _packed(pieces: Pieces, negative_zeros: bool) -> Iterator[Any]:
    for piece in pieces():
        _, [values] = ops.pack([piece], negative_zeros=negative_zeros)
        if len(values):
            yield _bytes(values)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()
