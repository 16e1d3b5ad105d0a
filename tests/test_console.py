import io
import warnings

import pytest
import torch
from rich.console import Console
from rich.table import Table

import pyprune
from pyprune.console import as_text, tracked, warn


def test_as_text_is_plain_and_as_wide_as_it_needs():
    table = Table("name", box=None)
    table.add_row("[bold]" + 120 * "x" + "[/bold]")
    assert [line.strip() for line in as_text(table).splitlines()] == ["name", 120 * "x"]


@pytest.mark.parametrize(
    ("terminal", "shown", "bar"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_tracked_shows_a_bar_on_terminals_only(monkeypatch, terminal, shown, bar):
    output = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda stderr, force_jupyter: Console(file=output, force_terminal=terminal)
    )
    assert list(tracked(iter("abc"), 3, "Counting", shown=shown)) == ["a", "b", "c"]
    assert ("Counting" in output.getvalue()) == bar


def test_nothing_is_shown_beside_text_and_bars_in_a_notebook(monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *output: shown.append(output))
    table = Table("name", box=None)
    table.add_row("x")
    assert as_text(table).split() == ["name", "x"]
    assert list(tracked(iter("abc"), 3, "Counting")) == ["a", "b", "c"]
    assert shown == []


def warned_from(call, tmp_path):
    """Call a function from a file that is no file of pyprune, deep below others."""
    path = tmp_path / "user.py"
    path.write_text("def run(call):\n    call()\n")
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope["run"](call)
    return [(one.filename, str(one.message)) for one in caught]


def test_warn_speaks_for_the_first_line_outside_of_pyprune(tmp_path):
    inside = compile("def deep():\n    warn('text')\ndef call():\n    deep()\n", pyprune.console.__file__, "exec")
    scope = {"warn": warn}
    exec(inside, scope)
    assert warned_from(scope["call"], tmp_path) == [(str(tmp_path / "user.py"), "text")]
    assert warned_from(torch.no_grad()(scope["call"]), tmp_path) == [(str(tmp_path / "user.py"), "text")]
