"""Files that are the old ones or the new ones, never half."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield where to write a file, in the same folder, which takes the place of the old one once it is whole.

    If the body fails, the old file is there as it was, and nothing is left of the new one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "result.txt")
        >>> with whole_file(path) as unfinished:
        ...     _ = unfinished.write_text("all of it")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('all of it', 1)
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():  # a pipe or a device, which keeps nothing
        yield path
        return
    # The suffix stays, because it may say the format; a dot hides it from who looks for files by their names.
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        try:
            yield unfinished
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())  # or the name may be on the disk before the content
            os.replace(unfinished, path)
            _sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # if that was interrupted
        raise


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write a JSON file; whoever reads it meanwhile sees the old one or the new one, whole.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "result.json")
        >>> write_json(path, {"ratio": 0.5})
        >>> json.loads(path.read_text())
        {'ratio': 0.5}
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1))


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where folders can be opened and waited for."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
