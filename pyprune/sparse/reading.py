"""A file of sparse tensors, read one by one: nothing is believed, and no memory taken, before it was checked."""

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pyprune import ops
from pyprune.checks import check_path
from pyprune.ops.crc32 import crc32
from pyprune.ops.pack import check_packed, count_bits
from pyprune.sparse.blocks import blocks_of, elements_in, expand_blocks
from pyprune.sparse.codec import decompress, join
from pyprune.sparse.format import Stored, contents_of, entries_of
from pyprune.sparse.header import is_shape, read_header

T = TypeVar("T")


class SparseFile:
    """The tensors of a safetensors file, sparse or dense, each read when it is asked for.

    The file is mapped, so opening it costs its header only. Close it, or use it in a ``with``; what was read stays.

    Args:
        path: of the file; without the metadata of pyprune, sparse tensors are found by the names of their entries.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the header does not describe a whole file, with the name of the tensor where it is one's fault.

    Example:
        >>> import tempfile, pyprune
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = pyprune.save_sparse({"w": torch.eye(64)}, path)
        >>> with SparseFile(path) as file:
        ...     print(list(file.names), file.shape("w"), file.read("w").sum().item())
        ['w'] (64, 64) 64.0
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("path", path)
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else None
        try:
            self.header = read_header(self._bytes(0, size), size)
            contents = contents_of(self.header)
        except ValueError as error:
            self.close()
            raise ValueError(f"{self.path}: {error}") from error
        self.tensors, self.tied = contents.tensors, contents.tied

    def __enter__(self) -> "SparseFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with suppress(BufferError):  # something still looks into it, and closes it when it goes
                mapped.close()

    @property
    def names(self) -> list[str]:
        """The tensors of the file, in its order, and the other names of those that are tied."""
        return [*self.tensors, *self.tied]

    @property
    def metadata(self) -> dict[str, str]:
        """What else whoever wrote the file put into it."""
        return self.header.metadata

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._stored(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        stored = self._stored(name)
        return stored.shape if stored.shape is not None else self._checked(name, self._shape_entry, stored)

    def entries(self, name: str) -> list[str]:
        """List the entries of the file that stand for a tensor."""
        return entries_of(self._stored(name))

    def read(self, name: str) -> Tensor:
        """Return a tensor, dense, in memory of its own.

        Raises:
            KeyError: if the file has no such tensor.
            ValueError: if it is damaged, with its name.
        """
        stored = self._stored(name)
        self._checked(name, self._check_crc32, stored)
        return self._checked(name, self._read_sparse if stored.sparse else self._read_dense, stored)

    def is_direct(self, name: str) -> bool:
        """Whether a tensor can be written to where it is to be, without another one on the way."""
        stored = self._stored(name)
        return not stored.codec and not stored.zero

    def check(self, name: str) -> None:
        """Raise what `read` would raise of a tensor that is direct, without memory for it."""
        stored = self._stored(name)
        self._checked(name, self._check_crc32, stored)
        if stored.sparse:
            self._checked(name, lambda stored: check_packed(*self._packed(stored)), stored)

    def read_into(self, name: str, out: Tensor) -> None:
        """Write a tensor that is direct, and was checked, into a contiguous one of its dtype and shape on the CPU."""
        stored = self._stored(name)
        if stored.sparse:
            bits, values, shape = self._checked(name, self._packed, stored)
            ops.unpack([bits], [values], [shape], out=[out])
        else:
            out.copy_(self._tensor(stored.names.values))

    def is_view(self, name: str) -> bool:
        """Whether `view` returns it as it lies in the file."""
        return self.entries(name) == [name]

    def view(self, name: str) -> Tensor:
        """Return a tensor as it lies in the file, unchecked and not to be written; one that is packed is read.

        It takes no memory but that of the page cache, and is there until the file is closed and all views are gone.
        """
        stored = self._stored(name)
        if stored.sparse or stored.codec:
            return self.read(name)
        return self._tensor(stored.names.values)

    def verify(self, name: str) -> None:
        """Raise ValueError if the bytes of a tensor are not those that were written; see `read` for the rest."""
        self._checked(name, self._check_crc32, self._stored(name))

    def _stored(self, name: str) -> Stored:
        name = self.tied.get(name, name)
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]

    def _checked(self, name: str, read: Callable[[Stored], T], stored: Stored) -> T:
        try:
            return read(stored)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from error

    def _bytes(self, begin: int, end: int) -> memoryview:
        if self._mapped is None:
            if end == 0:
                return memoryview(b"")
            raise ValueError("the file is closed")
        return memoryview(self._mapped)[begin:end]

    def _entry_bytes(self, entry: str) -> memoryview:
        found = self.header.entries[entry]
        return self._bytes(self.header.data + found.begin, self.header.data + found.end)

    def _tensor(self, entry: str) -> Tensor:
        """Return an entry as it lies in the file, or a copy if it lies where no such elements can."""
        found, data = self.header.entries[entry], self._entry_bytes(entry)
        if not found.count:
            return torch.empty(found.shape, dtype=found.dtype)
        if (self.header.data + found.begin) % found.dtype.itemsize:
            data = memoryview(bytearray(data))
        return torch.frombuffer(data, dtype=found.dtype).view(found.shape)

    def _raw(self, entry: str) -> Tensor:
        data = self._entry_bytes(entry)
        return torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)

    def _check_crc32(self, stored: Stored) -> None:
        if not stored.crc32:
            return
        names = stored.names
        values = [names.values, *([names.high] if stored.codec else []), *([names.zero] if stored.zero else [])]
        for what, entries, wanted in zip(
            ("values", "bitmask"), (values, [names.bitmask]), stored.crc32, strict=False
        ):
            found = 0
            for entry in entries:
                found = crc32(self._raw(entry), found)
            if found != wanted:
                raise ValueError(f"its {what} are damaged: their CRC-32 is {found:08x}, and must be {wanted:08x}")
        if (stored.sparse or stored.codec) and self._shape_entry(stored) != stored.shape:
            raise ValueError(f"its shape is damaged: {self._shape_entry(stored)}, and must be {stored.shape}")
        if stored.block is not None and self._numbers(names.block) != stored.block:
            raise ValueError(f"its block is damaged: {self._numbers(names.block)}, and must be {stored.block}")

    def _numbers(self, entry: str) -> tuple[int, ...]:
        found = self.header.entries[entry]
        if found.dtype is not torch.int64 or found.count > 64:
            raise ValueError(f"{entry} is {found.dtype} of shape {found.shape}, and must be a few sizes in int64")
        return tuple(self._tensor(entry).flatten().tolist())

    def _shape_entry(self, stored: Stored) -> tuple[int, ...]:
        shape = self._numbers(stored.names.shape)
        if not is_shape(list(shape)):
            raise ValueError(f"its shape is {shape}, which no tensor can have")
        return shape

    def _read_dense(self, stored: Stored) -> Tensor:
        if stored.codec:
            assert stored.shape is not None
            return self._decoded(stored, prod(stored.shape)).view(stored.shape)
        return self._tensor(stored.names.values).clone()

    def _read_sparse(self, stored: Stored) -> Tensor:
        bits, values, shape = self._packed(stored)
        [tensor] = ops.unpack([bits], [values], [shape])
        return _add_zero(tensor, self._tensor(stored.names.zero)) if stored.zero else tensor

    def _packed(self, stored: Stored) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        shape = self._shape_entry(stored) if stored.shape is None else stored.shape
        block = stored.block
        if block == (0, 0):
            found = self._numbers(stored.names.block)
            if len(found) != 2 or min(found) < 1:
                raise ValueError(f"its block is {found}, and must be rows and columns")
            block = (found[0], found[1])
        if block is not None and not shape:
            raise ValueError("it has blocks, but no dimension")
        bits = self._bits(stored, prod(shape if block is None else blocks_of(shape, block)))
        if stored.padded:
            bits = _without_padding(bits, shape)
        if block is not None:
            blocks = blocks_of(shape, block)
            # As many values as blocks cover, or the mask is not worth its memory.
            [mask] = ops.unpack([bits], [torch.ones(count_bits([bits])[0], dtype=torch.bool)], [blocks])
            if elements_in(mask, block, shape) != self._kept(stored):
                raise ValueError(
                    f"it has {self._kept(stored)} values for blocks of {elements_in(mask, block, shape)} elements; "
                    "there must be as many"
                )
            [bits], _ = ops.pack([expand_blocks(mask, block, shape)])
        values = self._decoded(stored, self._kept(stored)) if stored.codec else self._tensor(stored.names.values)
        return bits, values.flatten(), shape

    def _kept(self, stored: Stored) -> int:
        return self.header.entries[stored.names.values].count if stored.nnz is None else stored.nnz

    def _bits(self, stored: Stored, count: int) -> Tensor:
        if stored.codec:
            return torch.from_numpy(decompress(self._entry_bytes(stored.names.bitmask), -(-count // 8)).copy())
        bits = self._tensor(stored.names.bitmask)
        if bits.dtype is not torch.uint8:
            raise ValueError(f"its bitmask is {bits.dtype}, and must be torch.uint8")
        return bits.flatten()

    def _decoded(self, stored: Stored, count: int) -> Tensor:
        low = self._tensor(stored.names.values).numpy()
        return join(low, decompress(self._entry_bytes(stored.names.high), count), stored.dtype)


def _without_padding(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return bits in a row, of rows that each begin at a byte."""
    columns = shape[-1] if shape else 1
    rows = prod(shape[:-1])
    width = -(-columns // 8)
    if bits.numel() != rows * width:
        raise ValueError(f"its bitmask has {bits.numel()} bytes, and shape {shape} needs {rows * width}")
    if columns % 8 == 0:
        return bits
    each = np.unpackbits(bits.numpy().reshape(rows, width), axis=1, bitorder="little")
    if each[:, columns:].any():
        raise ValueError("its bitmask has bits set beyond the end of a row")
    return torch.from_numpy(np.packbits(each[:, :columns], bitorder="little"))


def _add_zero(tensor: Tensor, zero: Tensor) -> Tensor:
    if zero.dtype != tensor.dtype or zero.dim() != 1 or len(zero) not in (1, tensor.shape[0] if tensor.dim() else 1):
        raise ValueError(
            f"its zero point is {zero.dtype} of shape {tuple(zero.shape)}, and must be one, or one per row"
        )
    return tensor + zero.view(-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() else tensor + zero[0]
