import os
import subprocess
import sys

import pytest

import pyprune
from pyprune import _C


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_build_info_prints_one_fact_per_line():
    lines = str(pyprune.build_info()).splitlines()
    assert len(lines) == len(pyprune.build_info())
    assert lines[0].split() == ["pyprune", pyprune.__version__]


@pytest.mark.parametrize("name", _C.available_cpu_capabilities())
def test_cpu_capability_is_taken_from_the_environment(name):
    result = run("import pyprune; print(pyprune.build_info()['cpu_capability'])", PYPRUNE_CPU_CAPABILITY=name)
    assert result.stdout.strip() == name


def test_cpu_capability_that_is_unknown_fails_at_import_with_the_choices():
    result = run("import pyprune", PYPRUNE_CPU_CAPABILITY="mmx")
    assert result.returncode == 1
    assert "'mmx' is not available here; allowed are auto, default" in result.stderr


def test_set_cpu_capability_refuses_unknown_names_and_keeps_the_choice():
    before = _C.cpu_capability()
    with pytest.raises(ValueError, match="allowed are auto, default"):
        _C.set_cpu_capability("sse9")
    assert _C.cpu_capability() == before


def test_import_loads_neither_rich_nor_anything_slow():
    code = "import torch, sys; before = set(sys.modules); import pyprune; print(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run(code).stdout.split()}
    assert loaded.isdisjoint({"rich", "sklearn", "pandas", "matplotlib"})
    assert "pyprune" in loaded
