"""What people and programs get to see: tables and lines, or JSON, on stdout; complaints and progress on stderr."""

import json as json_format
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyprune.console import as_text


@dataclass(frozen=True)
class Output:
    """Where results go: as JSON, as text, or nowhere."""

    json: bool = False
    quiet: bool = False

    def result(self, fields: dict[str, Any]) -> None:
        """Print a result for programs, if that is wanted."""
        if self.json:
            print(json_format.dumps(_plain(fields), indent=2, allow_nan=False))

    def line(self, text: str) -> None:
        """Print a line for people."""
        if not self.json and not self.quiet:
            print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table for people; the first column is a name, others are numbers."""
        if self.json or self.quiet or not rows:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row))
        if sys.stdout.isatty():
            Console().print(table, markup=False)
        else:
            print(as_text(table))

    def complain(self, kind: str, text: str) -> None:
        """Print an error or a warning."""
        if kind == "error" or not self.quiet:
            print(f"pyprune: {kind}: {text}", file=sys.stderr)

    @contextmanager
    def progress(self, **totals: int) -> Iterator[Callable[[str], None]]:
        """Show bars, by what they count and up to where; yield what to call for one more of a kind."""
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True, force_jupyter=False)
        with Progress(console=console, transient=True, disable=self.quiet or not console.is_terminal) as progress:
            bars = {what: progress.add_task(what, total=total) for what, total in totals.items()}
            yield lambda what: progress.advance(bars[what])


def bytes_text(count: float | None) -> str:
    """Return a number of bytes as people read it.

    Example:
        >>> bytes_text(1234567), bytes_text(12)
        ('1.23 MB', '12 B')
    """
    if count is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def percent(part: float, whole: float) -> str:
    """Return a share as people read it.

    Example:
        >>> percent(1, 3), percent(0, 0)
        ('33.33 %', '0.00 %')
    """
    return f"{100 * part / whole if whole else 0:.2f} %"


def _plain(value: Any) -> Any:
    """Return what JSON can hold: what is not finite has no number there."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
