import inspect
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_trainers_prune_resume_and_save_plain_models(library):
    pytest.importorskip(library)
    command = [sys.executable, EXAMPLES / f"train_{library}.py", "--quick"]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "ends with the same weights, bit for bit" in output.stdout
    final = "90.00%" if library == "lightning" else "80.00%"
    assert [line for line in output.stdout.splitlines() if line.startswith("epoch")][-1].split()[3] == final


def test_sensitivity_runs(tmp_path):
    picture = tmp_path / "sensitivity.png"
    command = [sys.executable, EXAMPLES / "sensitivity.py", "--quick", "--plot", picture]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    rows = [line.split() for line in output.stdout.splitlines()]
    assert any(row[:2] == ["features.0.weight", "288"] for row in rows)
    least = next(row for row in rows if row[1:3] == ["sensitivity,", "least"])
    assert [0 <= float(accuracy) <= 100 for accuracy in least[3:5]] == [True] * 2
    # In all 90 % of 288, 18432, 36864 and 640 weights, up to the rounding of what is printed.
    ratios = [float(ratio.rstrip("%")) / 100 for ratio in least[5:]]
    weights = (288, 18432, 36864, 640)
    removed = sum(ratio * size for ratio, size in zip(ratios, weights, strict=True)) / sum(weights)
    assert abs(removed - 0.9) < 0.006
    assert picture.read_bytes().startswith(b"\x89PNG")
