import io

import pytest
from rich.console import Console
from rich.table import Table

from pyprune.console import as_text, tracked


def test_as_text_is_plain_and_as_wide_as_it_needs():
    table = Table("name", box=None)
    table.add_row("[bold]" + 120 * "x" + "[/bold]")
    assert [line.strip() for line in as_text(table).splitlines()] == ["name", 120 * "x"]


@pytest.mark.parametrize(
    ("terminal", "shown", "bar"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_tracked_shows_a_bar_on_terminals_only(monkeypatch, terminal, shown, bar):
    output = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=output, force_terminal=terminal))
    assert list(tracked(iter("abc"), 3, "Counting", shown=shown)) == ["a", "b", "c"]
    assert ("Counting" in output.getvalue()) == bar
