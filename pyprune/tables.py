"""Tables as plain text."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


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
