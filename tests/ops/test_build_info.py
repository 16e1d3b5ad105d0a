import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyprune
from pyprune import _C


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_build_info_prints_one_fact_per_line():
    lines = str(pyprune.build_info()).splitlines()
    assert len(lines) == len(pyprune.build_info())
    assert lines[0].split() == ["pyprune", pyprune.__version__]


def test_build_info_says_why_there_are_no_cuda_kernels_and_what_to_do():
    info = pyprune.build_info()
    assert info["cuda_build"].startswith(("nvcc ", "none: "))
    if info["cuda_build"].startswith("none"):
        assert "To have them, " in info["cuda_build"]
    if torch.version.cuda is None:
        assert info["cuda_runtime"] == f"this torch ({torch.__version__}) has no CUDA"


def test_python_in_a_checkout_finds_the_native_module_of_the_installed_package(tmp_path):
    """The checkout's folder comes first there, without a native module."""
    checkout, installed = tmp_path / "checkout", tmp_path / "site" / "pyprune"
    shutil.copytree(Path(pyprune.__file__).parent, checkout / "pyprune", ignore=shutil.ignore_patterns("*.so"))
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise AssertionError('the checkout is to be imported')")
    native = shutil.copy(_C.__file__, installed)
    result = subprocess.run(
        # Without site, by which an editable installation goes before everything else.
        [sys.executable, "-S", "-c", "import pyprune; print(pyprune.__file__); print(pyprune._C.__file__)"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(installed.parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str(checkout / "pyprune" / "__init__.py"), native], result.stderr


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
