"""The header of a safetensors file: what is in it and where, believed only after it was checked.

A file is the length of the header (8 bytes, little endian), the header (JSON, padded with spaces), and the data. The
header maps names to a type, a shape and two offsets in the data, and ``__metadata__`` to strings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from pyprune.checks import LARGEST_INT, shown

METADATA = "__metadata__"
MOST_BYTES = 100_000_000  # of a header, as for safetensors itself
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor in the file; offsets are in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """All entries of a file, its metadata, and where its data begins."""

    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    data: int = 0


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str], length: int) -> bytes:
    """Return the start of a file of so many bytes, the eight of the length among them.

    Raises:
        ValueError: if it takes more.

    Example:
        >>> header_bytes({"w": Entry(torch.int8, (3,), 0, 3)}, {}, 72)[8:]
        b'{"w":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}}           '
    """
    text = _text(entries, metadata)
    size = length - 8
    if not len(text) <= size <= MOST_BYTES:
        raise ValueError(f"the header takes {len(text)} bytes; there is room for {min(size, MOST_BYTES)}")
    return size.to_bytes(8, "little") + text.ljust(size)


def header_length(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> int:
    """Return how long the start of a file is at least, so that the data begins at a multiple of eight.

    Example:
        >>> header_length({"w": Entry(torch.int8, (3,), 0, 3)}, {})
        64
    """
    return -(-(8 + len(_text(entries, metadata))) // 8) * 8


def _text(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.end]
        fields[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def read_header(start: bytes | memoryview, size: int) -> Header:
    """Return what the header says of a file of ``size`` bytes, of which ``start`` is the beginning, or all.

    Raises:
        ValueError: unless every byte of the file belongs to one tensor, of a type and shape that fit.

    Example:
        >>> start = header_bytes({"w": Entry(torch.int8, (3,), 0, 3)}, {}, 72)
        >>> read_header(start, 75).entries["w"].shape
        (3,)
    """
    if size < 8 or len(start) < 8:
        raise ValueError(f"it has {size} bytes, and is no safetensors file or cut off")
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, MOST_BYTES):
        raise ValueError(f"its header is to have {length} bytes of {size}; it is no safetensors file or cut off")
    try:
        fields = json.loads(bytes(start[8 : 8 + length]), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"its header is {shown(fields)}, and must be an object")
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise ValueError(f"its {METADATA} is {shown(metadata)}; all of its values must be strings")
    entries = {name: _entry(name, one) for name, one in fields.items()}
    _check_data(entries, size - 8 - length)
    return Header(entries, metadata, 8 + length)


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields


def is_count(value: object) -> bool:
    """Whether what JSON holds is a number of elements or bytes."""
    return type(value) is int and 0 <= value <= LARGEST_INT


def is_shape(value: object) -> bool:
    """Whether what JSON holds is a list of sizes of a tensor that could exist."""
    return isinstance(value, list) and all(is_count(size) for size in value) and is_count(prod(value))


def _entry(name: str, fields: Any) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: its entry is {shown(fields)}; it must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: its dtype is {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"{name}: its shape is {shown(shape)}; it must be a list of sizes of at most 2**63 elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(one) for one in offsets):
        raise ValueError(f"{name}: its data_offsets are {shown(offsets)}; they must be two numbers of bytes")
    entry = Entry(DTYPES[dtype], tuple(shape), *offsets)
    if entry.count * entry.dtype.itemsize != entry.end - entry.begin:
        raise ValueError(
            f"{name}: shape {shown(shape)} of {dtype} takes {entry.count * entry.dtype.itemsize} bytes, and "
            f"data_offsets {shown(offsets)} leave {entry.end - entry.begin}"
        )
    return entry


def _check_data(entries: Mapping[str, Entry], size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"{name}: it begins at {entry.begin} of the data, and what is before it ends at {end}")
        end = entry.end
        if end > size:
            raise ValueError(f"{name}: it ends at {end}, and there are {size} bytes of data; the file is cut off")
    if end != size:
        raise ValueError(f"there are {size} bytes of data, and its tensors take {end}")
