"""What people get to see: tables as text, and progress."""

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

Item = TypeVar("Item")


def as_text(table: "Table") -> str:
    """Return what a table looks like: as wide as it needs, and never coloured, because the text may go anywhere.

    Example:
        >>> from rich.table import Table
        >>> "".join(as_text(Table("name", box=None)).split())
        'name'
    """
    # Imported here: `import pyprune` must cost little.
    from rich.console import Console

    console = Console(file=io.StringIO(), width=1000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def tracked(items: Iterable[Item], total: int | None, description: str, *, shown: bool = True) -> Iterator[Item]:
    """Yield the items, under a progress bar if it is to be shown and stderr is a terminal.

    Example:
        >>> list(tracked([1, 2], 2, "Counting"))
        [1, 2]
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (shown and console.is_terminal)) as progress:
        yield from progress.track(items, total, description=description)
