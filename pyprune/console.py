"""What people get to see: tables as text, progress, and warnings."""

import html
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

Item = TypeVar("Item")

# Files whose frames are no user's: ours, and where torch's decorators (inference_mode) call on.
_OURS = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.sep + os.path.join("torch", "utils", "_contextlib.py"),
)
_NAMED = 5


def as_text(table: "Table") -> str:
    """Return what a table looks like: as wide as it needs, and never coloured, because the text may go anywhere.

    Example:
        >>> from rich.table import Table
        >>> "".join(as_text(Table("name", box=None)).split())
        'name'
    """
    # Imported here: `import pyprune` must cost little.
    from rich.console import Console

    # In a notebook rich would put an empty output beside the text.
    console = Console(file=io.StringIO(), width=1000, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip("\n")


def as_html(text: str) -> str:
    """Return text as notebooks show it: in lines as long as they are.

    Example:
        >>> as_html("a < b")
        '<pre style="line-height:1.2;overflow-x:auto">a &lt; b</pre>'
    """
    return f'<pre style="line-height:1.2;overflow-x:auto">{html.escape(text)}</pre>'


def tracked(items: Iterable[Item], total: int | None, description: str, *, shown: bool = True) -> Iterator[Item]:
    """Yield the items, under a progress bar if it is to be shown and stderr is a terminal.

    Example:
        >>> list(tracked([1, 2], 2, "Counting"))
        [1, 2]
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, force_jupyter=False)
    with Progress(console=console, disable=not (shown and console.is_terminal)) as progress:
        yield from progress.track(items, total, description=description)


def warn(message: str) -> None:
    """Warn in the name of the line that called pyprune, however deep in it the warning arises."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_OURS[0]) or frame.f_code.co_filename.endswith(_OURS[1])
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def listed(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are.

    Example:
        >>> listed(["a", "b"]), listed([f"layer{i}" for i in range(9)])
        ('a, b', 'layer0, layer1, layer2, layer3, layer4 and 4 more')
    """
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
