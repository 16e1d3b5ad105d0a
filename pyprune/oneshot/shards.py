"""Checkpoints of safetensors: tensors that stay in the files, and files in which some of them become others."""

import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyprune.console import listed
from pyprune.files import whole_file
from pyprune.sparse.header import MOST_BYTES, read_header

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, first byte in it, dtype and shape."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return math.prod(self.shape) * self.dtype.itemsize


class Mapped:
    """Tensors that lie in files, and take memory only while they are used; they are not to be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "three")
        >>> _ = path.write_bytes(bytes([1, 2, 3]))
        >>> mapped = Mapped()
        >>> mapped.tensor(Entry(path, 1, torch.uint8, (2,)))
        tensor([2, 3], dtype=torch.uint8)
        >>> mapped.forget()
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, entry: Entry) -> Tensor:
        """Return a tensor."""
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.path not in self._maps:
            with open(entry.path, "rb") as file:
                self._maps[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            found = torch.frombuffer(self._maps[entry.path], dtype=entry.dtype, count=count, offset=entry.begin)
        return found.view(entry.shape)

    def forget(self) -> None:
        """Let the memory go that was filled by reading; what is read next comes from the files again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for one in self._maps.values():
                one.madvise(mmap.MADV_DONTNEED)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Return where each tensor of a checkpoint lies: in ``model.safetensors``, or in the files that its index names.

    Raises:
        ValueError: if there is no such file, or one is damaged.
    """
    if (folder / INDEX).is_file():
        names = _indexed(folder)
        files = sorted(set(names.values()))
    elif (folder / WHOLE).is_file():
        names, files = None, [WHOLE]
    else:
        raise ValueError(f"source_folder is {str(folder)!r}, which has neither {WHOLE} nor {INDEX}")
    entries = {name: entry for file in files for name, entry in _header(folder / file)}
    if names is not None:
        lost = [name for name, file in names.items() if name not in entries or entries[name].path.name != file]
        if lost:
            raise ValueError(f"{folder / INDEX} names {listed(lost)}, which are not in the files that it says")
    return entries


def _indexed(folder: Path) -> dict[str, str]:
    """Return the name of the file of each tensor."""
    path = folder / INDEX
    try:
        names = json.loads(path.read_text())["weight_map"]
        files = {str(file) for file in names.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of safetensors: {error!s:.200}") from error
    away = sorted(file for file in files if file != os.path.basename(file) or not (folder / file).is_file())
    if away:
        raise ValueError(f"{path} names files that are not beside it: {listed(away)}")
    return {str(name): str(file) for name, file in names.items()}


def _header(path: Path) -> Iterator[tuple[str, Entry]]:
    """Yield what a file says of its tensors."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), MOST_BYTES))
            header = read_header(start, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error!s:.200}") from error
    for name, one in header.entries.items():
        yield name, Entry(path, header.data + one.begin, one.dtype, one.shape)


class NewShards:
    """Copies of the files of a checkpoint in which tensors become others of the same dtype and shape.

    Args:
        unfinished: folder for those that are not done; it is made if it is needed.
        destination: folder in which they are whole at last.
        entries: what `read_entries` returned.

    Example:
        >>> import tempfile
        >>> source, target = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> _ = (source / "one").write_bytes(bytes([1, 2, 3]))
        >>> shards = NewShards(target / "unfinished", target, {"x": Entry(source / "one", 1, torch.uint8, (2,))})
        >>> shards.write({"x": torch.zeros(2, dtype=torch.uint8)})
        >>> shards.finish()
        >>> (target / "one").read_bytes()
        b'\\x01\\x00\\x00'
    """

    def __init__(self, unfinished: Path, destination: Path, entries: Mapping[str, Entry]) -> None:
        self.unfinished = unfinished
        self.destination = destination
        self.entries = entries

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors by name; it may be done again."""
        self.unfinished.mkdir(exist_ok=True)
        for path in {self.entries[name].path for name in tensors}:
            new = self.unfinished / path.name
            if not new.exists():
                with whole_file(new) as copy:
                    shutil.copyfile(path, copy)
            with open(new, "rb+") as file:
                for name, tensor in tensors.items():
                    entry = self.entries[name]
                    if entry.path == path:
                        file.seek(entry.begin)
                        data = tensor.detach().to("cpu", entry.dtype).contiguous()
                        file.write(data.reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Let all files be whole in the destination; it may be done again."""
        for path in sorted({entry.path for entry in self.entries.values()}):
            target = self.destination / path.name
            if (self.unfinished / path.name).exists():
                os.replace(self.unfinished / path.name, target)
            elif not target.exists():
                with whole_file(target) as copy:
                    shutil.copyfile(path, copy)
        shutil.rmtree(self.unfinished, ignore_errors=True)
