"""A dense safetensors file, written piece by piece: the old file or the new one, never half."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pyprune.files import whole_file
from pyprune.sparse.header import Entry, header_bytes, header_length


@dataclass(frozen=True)
class Dense:
    """A tensor that is to be written: what it is, and its elements in pieces, in the order of the flat index."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]


def write_dense(path: str | os.PathLike[str], tensors: Sequence[Dense], metadata: Mapping[str, str]) -> int:
    """Write tensors to a file in their order, with one piece in memory at a time; return its bytes.

    Args:
        path: of the file, which is replaced as a whole once it is whole.
        tensors: by different names. Put larger types first: each should begin at a multiple of its size.
        metadata: strings that the file is to carry.

    Raises:
        ValueError: if the pieces of a tensor are not as many elements as its shape says.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> write_dense(path, [Dense("w", torch.float32, (2,), lambda: [torch.ones(1), torch.zeros(1)])], {})
        72
    """
    entries: dict[str, Entry] = {}
    begin = 0
    for one in tensors:
        size = prod(one.shape) * one.dtype.itemsize
        entries[one.name] = Entry(one.dtype, one.shape, begin, begin + size)
        begin += size
    with whole_file(path) as unfinished, open(unfinished, "wb") as file:
        file.write(header_bytes(entries, metadata, header_length(entries, metadata)))
        for one in tensors:
            start = file.tell()
            for piece in one.pieces():
                if piece.numel():
                    file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            if file.tell() - start != prod(one.shape) * one.dtype.itemsize:
                raise ValueError(f"{one.name} of shape {one.shape} got {file.tell() - start} bytes")
        return file.tell()
