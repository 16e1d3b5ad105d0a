"""The package is built in floors, and imports only go down (ARCHITECTURE.md)."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pyprune

ROOT = Path(pyprune.__file__).parent
FLOORS = {
    "_C": 0,
    "ops": 1,
    "_build_info": 1,
    "capped": 2,
    "lamp": 2,
    "allocation": 2,
    "competitors": 2,
    "contests": 2,
    "drops": 2,
    "granularity": 2,
    "importance": 2,
    "methods": 2,
    "scope": 2,
    "scores": 2,
    "ignored_scope": 2,
    "memory": 2,
    "places": 2,
    "schedules": 2,
    "sensitivity_allocation": 2,
    "sensitivity_plot": 2,
    "sensitivity_result": 2,
    "stages": 2,
    "terminal": 2,
    "activations": 3,
    "attachments": 3,
    "attention": 3,
    "batches": 3,
    "following": 3,
    "calibration": 3,
    "choosing": 3,
    "flops": 3,
    "gates": 3,
    "gathering": 3,
    "masks": 3,
    "passes": 3,
    "sampling": 3,
    "snapshots": 3,
    "targets": 3,
    "tracing": 3,
    "training_sums": 3,
    "_batch_norm": 4,
    "_calibrate": 4,
    "_config": 4,
    "_losses": 4,
    "_optimizer": 4,
    "_prune": 4,
    "_statistics": 4,
    "_slimming": 4,
    "_strip": 4,
    "torch_prune": 4,
    "_iterative": 5,
    "_keep_sparse": 5,
    "_pruner": 5,
    "_schedulers": 5,
    "_sensitivity": 5,
    "_snip": 5,
    "_ac_dc": 6,
    "_gmp": 6,
    "_movement": 6,
    "_rigl": 6,
    "_recipe_pruner": 7,
    "recipes": 8,
    "integrations": 9,
    "__init__": 10,
}
# What floor 2 computes with; it never sees a module.
PURE = {name for name, floor in FLOORS.items() if floor == 2}


def sources():
    return sorted(path for path in ROOT.rglob("*.py"))


def room(path_or_name):
    """Return the first name below pyprune."""
    if isinstance(path_or_name, Path):
        return path_or_name.relative_to(ROOT).parts[0].removesuffix(".py")
    return path_or_name.split(".")[1] if "." in path_or_name else "__init__"


def imports(path):
    """Yield the pyprune modules that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pyprune")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            if node.module == "pyprune":
                yield from (f"pyprune.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("pyprune."):
                yield node.module


def test_every_source_file_has_a_floor():
    assert {room(path) for path in sources()} | {"_C"} == set(FLOORS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    floor = FLOORS[room(path)]
    for name in imports(path):
        target = room(name)
        assert FLOORS[target] <= floor, f"{path.name} imports {name}, which is a floor above"
        same_floor_is_fine = floor in (1, 2, 3) or target == room(path)
        assert FLOORS[target] < floor or same_floor_is_fine, f"{path.name} imports {name} of its own floor"


def test_masks_and_gates_do_not_know_why_they_were_chosen():
    for name in ("attachments", "masks", "gates", "sampling", "passes", "calibration", "tracing"):
        allowed = {"ops"} if name in ("gates", "masks") else set()
        assert not {room(found) for found in imports(ROOT / f"{name}.py")} & {"methods", "ops"} - allowed


def test_pure_floor_never_sees_a_module():
    for name in PURE:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not any(isinstance(node, ast.Attribute | ast.Name) and "nn" in ast.unparse(node).split(".")
                       for node in ast.walk(tree))  # fmt: skip
        assert not any(alias.name == "nn" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                       for alias in node.names)  # fmt: skip


def test_only_ops_use_the_operators():
    for path in sources():
        if room(path) != "ops":
            assert "torch.ops" not in path.read_text(), path


def test_exported_names_are_sorted_and_exist():
    assert pyprune.__all__ == sorted(pyprune.__all__)
    public = {name for name, value in vars(pyprune).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public | {"__version__"} == set(pyprune.__all__)
    for name in pyprune.__all__:
        assert name == "__version__" or getattr(pyprune, name).__doc__


def test_version_is_that_of_the_native_module():
    assert pyprune.__version__ == pyprune.build_info()["pyprune"]


def test_import_adds_little_to_torch():
    code = "import sys, torch; before = set(sys.modules); import pyprune; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in added if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert {name.split(".")[0] for name in added} <= {"pyprune", "torch"} | set(sys.stdlib_module_names)
