"""A file of sparse tensors, written one by one: the old file or the new one, never half.

Where the data begins is decided before anything is known of it: room for the header and for all shapes is left, data
follows as it comes, and what room is not needed is spaces behind the header.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyprune.files import whole_file
from pyprune.sparse.codec import is_coded, zstd
from pyprune.sparse.encoding import Encoded, Options, Part, encode
from pyprune.sparse.format import KEY, VERSION, names_of
from pyprune.sparse.header import METADATA, NAMES, Entry, header_bytes, header_length
from pyprune.sparse.pieces import LARGE, Pieces, encode_pieces, pieces_of

_IN_MEMORY = 1 << 23  # bytes of bits, which come last; more of them wait in a file without a name
_PIECE = 1 << 20
_WASTE = 2048  # spaces are left if they are a smaller part of the file
_PER_TENSOR = 1000  # bytes of a header, besides names and shapes


@dataclass(frozen=True)
class Source:
    """A tensor that is to be written: what it is, and how to get it when its turn comes.

    Example:
        >>> Source.of("w", torch.ones(2)).shape
        (2,)
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    pieces: Pieces | None = None  # the same, in pieces that are a multiple of eight elements; asked for twice

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Source":
        """Return a tensor that is there."""
        pieces = partial(pieces_of, tensor) if tensor.is_cpu and tensor.is_contiguous() else None
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, pieces)


@dataclass(frozen=True)
class Written:
    """What was written to a sparse file.

    Attributes:
        file_bytes: of the file.
        dense_bytes: of the same tensors, dense.
        kept: for each tensor that is stored sparse, how many of its values are.
        negative_zeros: for each tensor that had -0.0 which became 0.0, how many.
    """

    file_bytes: int
    dense_bytes: int
    kept: dict[str, int]
    negative_zeros: dict[str, int]


def write_sparse(
    path: str | os.PathLike[str],
    sources: Sequence[Source],
    options: Options = Options(),  # noqa: B008, which is frozen
    *,
    tied: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write tensors to a file, each when its turn comes; one is in memory at a time, of large ones pieces.

    Args:
        path: of the file, which is replaced as a whole once it is whole.
        sources: the tensors, by different names.
        options: how they are written.
        tied: other names of some.
        metadata: what else the file is to say.

    Raises:
        ValueError: for a name twice, or a dtype that safetensors have not.
        ImportError: for a codec whose package is missing.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> write_sparse(path, [Source.of("w", torch.eye(64))]).kept
        {'w': 64}
    """
    if options.codec is not None:
        zstd()
    tied, metadata = dict(tied or {}), {"format": "pt"} | dict(metadata or {})
    taken = _check_names(sources, tied)
    # Larger types first, so that each lies where it can be read; what becomes bytes comes last.
    ordered = sorted(sources, key=lambda one: (_is_bytes(one, options), -one.dtype.itemsize))
    room = _room(sources, tied, metadata, options)
    entries: dict[str, Entry] = {}
    shapes: list[Part] = []
    fields: dict[str, Any] = {}
    kept: dict[str, int] = {}
    negative: dict[str, int] = {}
    with whole_file(path) as unfinished, open(unfinished, "wb+") as file, _spool(unfinished) as bits:
        file.seek(room)
        late: list[Part] = []
        begin = 0
        for source in ordered:
            encoded = _encode(source, sources, options, taken)
            fields[source.name] = encoded.fields
            shapes += encoded.shapes
            for part in encoded.values:
                begin = _put(file, part, entries, begin)
            for part in encoded.bits:
                for data in part.pieces():
                    bits.write(data.data)
                late.append(Part(part.name, part.dtype, part.shape, tuple))
            if "nnz" in encoded.fields:
                kept[source.name] = encoded.fields["nnz"]
            if encoded.negative_zeros:
                negative[source.name] = encoded.negative_zeros
            del encoded
        _append(file, bits, late, entries, begin)
        names = [one.name for one in sources]
        ours = {"version": VERSION, "layout": options.layout, "tensors": {name: fields[name] for name in names}}
        metadata[KEY] = json.dumps(ours | {"tied": tied}, separators=(",", ":"))
        file_bytes = _begin_file(file, shapes, entries, metadata, room)
    dense = sum(torch.Size(one.shape).numel() * one.dtype.itemsize for one in sources)
    return Written(file_bytes, dense, kept, negative)


def _check_names(sources: Sequence[Source], tied: Mapping[str, str]) -> set[str]:
    names = [source.name for source in sources]
    taken = {*names, *tied}
    if len(taken) < len(names) + len(tied):
        twice = next(name for name in [*names, *tied] if [*names, *tied].count(name) > 1)
        raise ValueError(f"{twice} is there twice; give each tensor a name of its own")
    if METADATA in taken:
        raise ValueError(f'"{METADATA}" is no name of a tensor: safetensors use it themselves')
    for source in sources:
        if source.dtype not in NAMES:
            known = ", ".join(str(dtype) for dtype in NAMES)
            raise ValueError(f"{source.name} is {source.dtype}, which safetensors have not; they have {known}")
    return taken


def _encode(source: Source, sources: Sequence[Source], options: Options, taken: set[str]) -> Encoded:
    # A tensor whose entries would have the names of others stays as it is.
    others = {*vars(names_of(source.name)).values(), *vars(names_of(source.name, options.layout)).values()}
    free = not (others - {source.name}) & taken
    zero = _zero_point(source, sources, options)
    large = torch.Size(source.shape).numel() * source.dtype.itemsize >= LARGE
    if large and source.pieces is not None and zero is None and options.codec is None and options.layout == "pyprune":
        encoded = encode_pieces(source.name, source.dtype, source.shape, source.pieces, options, sparse=free)
        if encoded is not None:
            return encoded
    tensor = source.read()
    if tensor.dtype != source.dtype or tuple(tensor.shape) != source.shape:
        raise ValueError(
            f"{source.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and was to be {source.dtype} of shape "
            f"{source.shape}"
        )
    return encode(source.name, tensor, options, sparse=free, zero=zero)


def _zero_point(source: Source, sources: Sequence[Source], options: Options) -> Tensor | None:
    """Return what stands for zero in integers, one or one per row, if it is there under its usual name."""
    if source.dtype not in (torch.int8, torch.uint8) or not source.shape or options.layout != "pyprune":
        return None
    point = next((one for one in sources if one.name == f"{source.name}_zero_point"), None)
    if point is None or point.dtype.is_floating_point or torch.Size(point.shape).numel() not in (1, source.shape[0]):
        return None
    values = point.read().detach().cpu().flatten()
    zero = values.to(source.dtype)
    return zero if torch.equal(zero.long(), values.long()) and zero.any() else None


def _is_bytes(source: Source, options: Options) -> bool:
    return options.codec is not None and is_coded(source.dtype, torch.Size(source.shape).numel())


def _room(sources: Sequence[Source], tied: Mapping[str, str], metadata: Mapping[str, str], options: Options) -> int:
    """Return where the data may begin: enough for the header, whatever the tensors turn out to be, and the shapes."""
    room = sum(2 * len(json.dumps(one)) for pair in (*tied.items(), *metadata.items()) for one in pair) + 1000
    for source in sources:
        # Written up to seven times, and in the metadata once more, where what is escaped is escaped again.
        room += 10 * len(json.dumps(source.name)) + 60 * len(source.shape) + _PER_TENSOR
        room += 8 * (len(source.shape) + 2)
        if options.layout != "pyprune" and source.shape:
            room += 8 * torch.Size(source.shape[:-1]).numel()  # row_offsets
    return -(-room // 8) * 8


def _spool(unfinished: Path) -> "tempfile.SpooledTemporaryFile[bytes]":
    return tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(unfinished.parent))


def _put(file: BinaryIO, part: Part, entries: dict[str, Entry], begin: int) -> int:
    """Write an entry, and return where the next one begins."""
    end = begin
    for data in part.pieces():
        file.write(data.data)
        end += data.nbytes
    if end - begin != part.nbytes:
        raise ValueError(f"{part.name} of shape {part.shape} got {end - begin} bytes")
    entries[part.name] = Entry(part.dtype, part.shape, begin, end)
    return end


def _append(
    file: BinaryIO,
    bits: "tempfile.SpooledTemporaryFile[bytes]",
    late: list[Part],
    entries: dict[str, Entry],
    begin: int,
) -> None:
    """Write the bits that have waited, which are bytes."""
    bits.seek(0)
    shutil.copyfileobj(bits, file)
    for part in late:
        size = torch.Size(part.shape).numel()
        entries[part.name] = Entry(part.dtype, part.shape, begin, begin + size)
        begin += size


def _begin_file(
    file: BinaryIO, shapes: list[Part], entries: dict[str, Entry], metadata: Mapping[str, str], room: int
) -> int:
    """Write the header, and the shapes between it and the data; return the bytes of the file."""
    size = file.tell()
    early = sum(part.nbytes for part in shapes)
    moved = {
        name: Entry(entry.dtype, entry.shape, entry.begin + early, entry.end + early)
        for name, entry in entries.items()
    }
    first: dict[str, Entry] = {}
    begin = 0
    for part in shapes:
        end = begin + part.nbytes
        first[part.name] = Entry(part.dtype, part.shape, begin, end)
        begin = end
    length = header_length(first | moved, metadata)
    unused = room - early - length
    if unused > size / _WASTE:
        size, room = _move_up(file, room, unused), room - unused
    file.seek(0)
    file.write(header_bytes(first | moved, metadata, room - early))
    for part in shapes:
        for data in part.pieces():
            file.write(data.data)
    return size


def _move_up(file: BinaryIO, begin: int, by: int) -> int:
    """Move all from a place on towards the start of the file, and return the bytes that it then has."""
    while True:
        file.seek(begin)
        piece = file.read(_PIECE)
        file.seek(begin - by)
        file.write(piece)
        begin += len(piece)
        if not piece:
            return file.truncate(begin - by)
