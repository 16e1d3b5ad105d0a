import inspect
import subprocess
import sys
from pathlib import Path

from pyprune import importance

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_compare_methods_runs(tmp_path):
    picture = tmp_path / "curves.png"
    command = [sys.executable, EXAMPLES / "compare_methods.py", "--quick", "--plot", picture]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    rows = [line.split() for line in output.stdout.splitlines()]
    magnitude = next(row for row in rows if row[:2] == ["magnitude", "model"])
    # By elements, by blocks and by channels.
    assert [0 <= float(accuracy) <= 100 for accuracy in magnitude[2:]] == [True] * 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compare_methods_has_every_importance(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # one of its imports sets these two
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import compare_methods

    functions = inspect.getmembers(importance, inspect.isfunction)
    there = {name for name, function in functions if function.__annotations__.get("return") is importance.Importance}
    compared = {rule.importance.name.partition("(")[0] for rule in compare_methods.RULES}
    assert compared == there - {"custom", "given"}
    normalizations = {rule.importance.normalize for rule in compare_methods.RULES}
    assert normalizations == {"none", "l2", "mean", "gaussian", "lamp"}
