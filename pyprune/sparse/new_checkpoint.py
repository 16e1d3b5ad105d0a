"""A checkpoint written beside the one that it comes from: whole, or not there."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyprune.checks import check_path
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.model_config import say_how_stored
from pyprune.sparse.reading import SparseFile


def write_like(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    write: Callable[[SparseFile, Path], object],
    *,
    layout: str | None = None,
) -> None:
    """Write a checkpoint with the files of another, in their order; other files are copied, the index made anew.

    Args:
        checkpoint: what it comes from.
        target: the path of a file if that is one file, otherwise of a folder. Nothing may be there.
        write: writes what one of its files becomes to a path.
        layout: in which tensors are packed; None if they are dense. A config of transformers says it.

    Raises:
        FileExistsError: if something is there.
    """
    check_target(checkpoint, target)
    target = Path(target)
    if checkpoint.folder is None:
        write(checkpoint.files[0], target)
        return
    with whole_folder(target) as unfinished:
        for file in checkpoint.files:
            write(file, unfinished / file.path.name)
        for other in checkpoint.others():
            copy = shutil.copytree if other.is_dir() else shutil.copy2
            copy(other, unfinished / other.name)
        if checkpoint.index_file is not None:
            _write_index(checkpoint, unfinished)
        say_how_stored(unfinished, [file.path.name for file in checkpoint.files], layout)


def check_target(checkpoint: Checkpoint, target: str | os.PathLike[str]) -> None:
    """Raise unless a checkpoint can be written there.

    Raises:
        FileExistsError: if something is there.
        ValueError: if it would be part of what it comes from.
        FileNotFoundError: if the folder that it is to be in is not there.
    """
    check_path("target", target)
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} is there already; give a path where nothing is")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.absolute().parent} is no folder; make it before")
    if checkpoint.folder is not None and checkpoint.folder.resolve() in target.resolve().parents:
        raise ValueError(f"{target} is in {checkpoint.folder}, which is read; give a path outside of it")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``, which becomes it once it is whole; if the body fails nothing is left.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp(), "out")
        >>> with whole_folder(target) as unfinished:
        ...     _ = (unfinished / "a").write_text("all of it")
        >>> [path.name for path in target.iterdir()], len(list(target.parent.iterdir()))
        (['a'], 1)
    """
    # No process number: in containers the next one has the same, and one that was killed leaves its folder.
    unfinished = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}.unfinished")
    try:
        unfinished.mkdir()
        yield unfinished
        for path in [*sorted(unfinished.rglob("*")), unfinished]:
            _sync(path)
        unfinished.rename(target)
        _sync(target.absolute().parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(checkpoint: Checkpoint, folder: Path) -> None:
    index, index_file = checkpoint.index(), checkpoint.index_file
    assert index is not None
    assert index_file is not None
    shards: dict[str, str] = {}
    size = 0
    for file in checkpoint.files:
        with SparseFile(folder / file.path.name) as written:
            entries = written.header.entries
            shards |= dict.fromkeys(entries, file.path.name)
            size += sum(entry.end - entry.begin for entry in entries.values())
    about = index.get("metadata")
    about = about if isinstance(about, dict) else {}
    index |= {"metadata": about | {"total_size": size}, "weight_map": dict(sorted(shards.items()))}
    (folder / index_file.name).write_text(json.dumps(index, indent=2) + "\n")
