"""The format, field by field: what stands for a sparse tensor in a safetensors file.

A tensor ``NAME`` with zeros becomes these entries:

- ``NAME``, of its own type, [kept]: the kept values, in the order of the flat index.
- ``NAME_bitmask``, U8, [ceil(n / 8)]: bit i = element i is kept, least significant first, bits beyond n are 0.
- ``NAME_shape``, I64, [dims]: the shape.
- ``NAME_block``, I64, [2], if bits are of blocks: their rows x columns, of the first dimension x all others.
- ``NAME_zero``, of its own type, [1] or one per row: what all elements have had subtracted (a zero point).

With a codec ``NAME`` is U8, [kept, bytes - 1], the lower bytes of the values after their bits were rotated left by
one; ``NAME_high`` is their upper bytes (of bfloat16 and float32, exponents) and ``NAME_bitmask`` the bits, both zstd
frames. Dense tensors may be coded, too, without a bitmask.

``__metadata__["pyprune"]`` is JSON: ``version``, ``layout``, ``tied`` (other names of tensors that are stored once)
and ``tensors``: of each its ``dtype``, ``shape``, and ``crc32`` of its values (``NAME``, ``NAME_high``,
``NAME_zero``) and its bitmask; ``nnz`` kept values, ``block``, ``codec``, ``zero`` (true). Files that lost it are
read without, but for coded ones.

In the layout of compressed-tensors a weight ``M.weight`` becomes ``M.compressed``, ``M.bitmask`` (rows padded to
bytes), ``M.shape`` and ``M.row_offsets``; in its "sparse-24-bitmask" there are no row_offsets.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from pyprune.checks import shown
from pyprune.sparse.header import DTYPES, Entry, Header, is_count, is_shape

VERSION = 1
KEY = "pyprune"
LAYOUTS = ("pyprune", "compressed-tensors")
CODECS = ("zstd",)
_PARTS = ("bitmask", "shape", "block", "zero", "high", "row_offsets")  # as in Names


@dataclass(frozen=True)
class Names:
    """What the entries of one sparse tensor are called."""

    values: str
    bitmask: str
    shape: str
    block: str
    zero: str
    high: str
    row_offsets: str


def names_of(name: str, layout: str = "pyprune") -> Names:
    """Return what the entries of a tensor are called.

    Example:
        >>> names_of("fc.weight").bitmask, names_of("fc.weight", "compressed-tensors").bitmask
        ('fc.weight_bitmask', 'fc.bitmask')
    """
    if layout == "pyprune":
        return Names(name, *(f"{name}_{part}" for part in _PARTS))
    stem = name.removesuffix(".weight")
    return Names(f"{stem}.compressed", *(f"{stem}.{part}" for part in _PARTS))


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it: what it is, and the names of its entries."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None  # None: in its entry
    names: Names
    sparse: bool
    codec: str | None = None
    block: tuple[int, int] | None = None  # (0, 0): in its entry
    zero: bool = False
    nnz: int | None = None
    crc32: tuple[int, ...] = ()
    padded: bool = False  # rows of bits begin at a byte


@dataclass(frozen=True)
class Contents:
    """The tensors of a file by their names, and the other names of some."""

    tensors: dict[str, Stored]
    tied: dict[str, str] = field(default_factory=dict)


def contents_of(header: Header) -> Contents:
    """Return which tensors the entries of a file stand for.

    Raises:
        ValueError: for what contradicts itself, with the name of the tensor.
    """
    text = header.metadata.get(KEY)
    if text is None:
        return Contents(_by_names(header.entries))
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'its metadata "{KEY}" is no JSON: {error}') from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f'its metadata "{KEY}" has version {shown(version)}, and must have a number')
    if version > VERSION:
        raise ValueError(
            f"it is of version {version} of the format, and this pyprune reads up to {VERSION}; update it"
        )
    layout, listed, tied = fields.get("layout"), fields.get("tensors"), fields.get("tied", {})
    if layout not in LAYOUTS or not isinstance(listed, dict) or not isinstance(tied, dict):
        raise ValueError(f'its metadata "{KEY}" is damaged: it must have a layout, and tensors')
    tensors = {name: _stored(name, one, layout, header.entries) for name, one in listed.items()}
    for alias, name in tied.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise ValueError(f"{alias}: it is to be tied to {shown(name)}, which must be another tensor of the file")
    _check_all_used(tensors, header.entries)
    return Contents(tensors, tied)


def _stored(name: str, fields: Any, layout: str, entries: Mapping[str, Entry]) -> Stored:
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: its metadata is {shown(fields)}, and must be an object")
    dtype, shape, codec, block = (fields.get(key) for key in ("dtype", "shape", "codec", "block"))
    crc32, nnz, zero = fields.get("crc32"), fields.get("nnz"), fields.get("zero", False)
    sparse = nnz is not None
    right = isinstance(dtype, str) and dtype in DTYPES and is_shape(shape)
    right &= codec is None or codec in CODECS
    right &= block is None or (sparse and is_shape(block) and len(block) == 2 and prod(block) > 0)
    right &= isinstance(crc32, list) and len(crc32) == 1 + sparse and all(is_count(one) for one in crc32)
    right &= (not sparse or is_count(nnz)) and isinstance(zero, bool) and (sparse or not zero)
    if not right:
        raise ValueError(f"{name}: its metadata is damaged: {shown(fields)}")
    names = names_of(name, layout if sparse else "pyprune")
    sizes, block = tuple(shape or ()), tuple(block) if block else None
    padded = layout != "pyprune"
    stored = Stored(DTYPES[str(dtype)], sizes, names, sparse, codec, block, zero, nnz, tuple(crc32 or ()), padded)
    _check_entries(name, stored, entries)
    return stored


def _check_entries(name: str, stored: Stored, entries: Mapping[str, Entry]) -> None:
    for one in entries_of(stored):
        if one not in entries:
            raise ValueError(f"{name}: there is no {one} in the file")
    values = entries[stored.names.values]
    expected = torch.uint8 if stored.codec else stored.dtype
    if values.dtype != expected:
        raise ValueError(f"{name}: its values are {values.dtype}, and must be {expected}")
    shape = (stored.nnz,) if stored.sparse else stored.shape
    assert shape is not None
    if stored.codec:
        shape = (prod(shape), stored.dtype.itemsize - 1)  # type: ignore[arg-type]
    if values.shape != shape:
        raise ValueError(f"{name}: its values have shape {values.shape}, and must have {shape}")


def entries_of(stored: Stored) -> list[str]:
    """List the entries that a tensor must have."""
    names = stored.names
    wanted = [names.values]
    wanted += [names.high] if stored.codec else []
    wanted += [names.bitmask] if stored.sparse else []
    wanted += [names.shape] if stored.sparse or stored.codec else []
    wanted += [names.block] if stored.block else []
    return wanted + ([names.zero] if stored.zero else [])


def _check_all_used(tensors: Mapping[str, Stored], entries: Mapping[str, Entry]) -> None:
    used = {one for stored in tensors.values() for one in entries_of(stored)}
    used |= {stored.names.row_offsets for stored in tensors.values() if stored.padded and stored.sparse}
    for name in entries:
        if name not in used:
            raise ValueError(f"{name}: it belongs to no tensor that the metadata lists")


def _by_names(entries: Mapping[str, Entry]) -> dict[str, Stored]:
    """Find sparse tensors by the names of their entries, in a file that has no metadata of ours."""
    tensors: dict[str, Stored] = {}
    used: set[str] = set()
    for layout in LAYOUTS:
        for name, values in entries.items():
            whole = name if layout == "pyprune" else name.removesuffix(".compressed") + ".weight"
            names = names_of(whole, layout)
            if names.values != name or names.shape not in entries:
                continue
            if layout == "pyprune" and names.high in entries:
                raise ValueError(f"{name}: it is coded, and the metadata that say how are lost")
            if names.bitmask not in entries:
                continue
            ours = layout == "pyprune"
            block = (0, 0) if ours and names.block in entries else None
            zero = ours and names.zero in entries
            stored = Stored(values.dtype, None, names, True, None, block, zero, values.count, padded=not ours)
            tensors[whole] = stored
            used |= {*entries_of(stored), *(() if ours else (names.row_offsets,))}
    dense = {name: one for name, one in entries.items() if name not in used}
    return tensors | {name: Stored(one.dtype, one.shape, names_of(name), False) for name, one in dense.items()}
