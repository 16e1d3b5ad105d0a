"""The package is built in rooms on floors, and imports only go down (ARCHITECTURE.md)."""

import ast
import graphlib
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pyprune

ROOT = Path(pyprune.__file__).parent
# A file may import what is in its own room or on a floor below; rooms on one floor do not know each other.
FLOORS = {
    "_C": 0,
    "checks": 0,
    "console": 0,
    "files": 0,
    "ops": 1,
    "methods": 2,
    "modules": 3,
    "calibration": 4,
    "structured": 5,
    "selection": 6,
    "runtime": 7,
    "sparse": 7,
    "torch_prune": 7,
    "training": 7,
    "analysis": 8,
    "oneshot": 8,
    "recipes": 8,
    "integrations": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
# How a weight is masked, whatever the mask was chosen by.
BLIND = (
    "attachments",
    "evaluation",
    "forward_pass",
    "gated_attributes",
    "gated_classes",
    "gates",
    "holding",
    "masks",
    "sampling",
    "steps",
    "tracing",
    "undo",
    "unit_gates",
    "watching",
    "zeros",
)


def sources():
    return sorted(ROOT.rglob("*.py"))


def name_of(path):
    """Return the dotted name of a module, without "pyprune"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """Yield the pyprune modules that a file imports, at the top or inside a function, without "pyprune"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] == "pyprune"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found = [node.module] if node.module.split(".")[0] == "pyprune" else []
            # "from pyprune.methods import scope" imports a module, "from pyprune.methods.scope import model" a name.
            folder = ROOT.joinpath(*node.module.split(".")[1:])
            modules = {one.stem for one in folder.glob("*")} if found else set()
            found = [
                f"{name}.{alias.name}" if alias.name in modules else name for name in found for alias in node.names
            ]
        else:
            continue
        yield from (name.partition(".")[2] or "__init__" for name in found)


def file_of(name):
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_source_file_is_in_a_room():
    rooms = {name_of(path).split(".")[0] for path in sources()}
    assert rooms | {"_C"} == set(FLOORS)
    assert {path.name for path in ROOT.glob("*.py")} == {
        "__init__.py", "__main__.py", "checks.py", "console.py", "files.py",
    }  # fmt: skip


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_only_go_down(path):
    room = name_of(path).split(".")[0]
    for name in imports(path):
        other = name.split(".")[0]
        assert other in FLOORS, f"{path} imports {name} by its public name; import it from where it is"
        assert other == room or FLOORS[other] < FLOORS[room], (
            f"{path.relative_to(ROOT)} (floor {FLOORS[room]}) imports {file_of(name).relative_to(ROOT)} "
            f"(floor {FLOORS[other]}); imports only go down"
        )


def test_files_of_a_room_import_each_other_in_one_direction():
    graph = {str(path.relative_to(ROOT)): set() for path in sources()}
    for path in sources():
        graph[str(path.relative_to(ROOT))] = {str(file_of(name).relative_to(ROOT)) for name in imports(path)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these files import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("room", [room for room in FLOORS if (ROOT / room).is_dir()])
def test_every_room_says_what_lives_there(room):
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1 or room in ("ops", "torch_prune"), f"{room}/__init__.py is to import nothing"


def test_masks_and_gates_do_not_know_why_they_were_chosen():
    for name in BLIND:
        found = set(imports(ROOT / "modules" / f"{name}.py"))
        # What the dimensions of a weight count is no reason.
        assert not {one for one in found if one.startswith("methods")} - {"methods.layout"}


def test_methods_never_see_a_module():
    for path in (ROOT / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            seen = isinstance(node, ast.Attribute | ast.Name) and "nn" in ast.unparse(node).split(".")
            seen |= isinstance(node, ast.ImportFrom) and any(alias.name == "nn" for alias in node.names)
            assert not seen, f"{path} uses torch.nn"


def test_only_ops_use_the_operators():
    for path in sources():
        if not name_of(path).startswith("ops."):
            assert "torch.ops" not in path.read_text() or path == ROOT / "ops" / "__init__.py", path


def test_exported_names_are_sorted_and_exist():
    assert pyprune.__all__ == sorted(pyprune.__all__)
    assert dir(pyprune) == pyprune.__all__
    for name in pyprune.__all__:
        assert name == "__version__" or getattr(pyprune, name).__doc__


def test_type_checkers_see_what_is_exported_where_it_is():
    tree = ast.parse((ROOT / "__init__.pyi").read_text())
    seen = {
        alias.asname: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) | {"__version__"} == set(pyprune.__all__)
    for public, (module, name) in seen.items():
        assert public == name
        there = importlib.import_module(module)
        found = getattr(pyprune, name)
        assert found is getattr(there, name)
        assert isinstance(found, types.ModuleType) or getattr(found, "__module__", module) == module


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pyprune' has no attribute 'prun'") as error:
        pyprune.prun  # noqa: B018
    assert (error.value.name, error.value.obj) == ("prun", pyprune)
    with pytest.raises(ImportError, match="prun"):
        from pyprune import prun  # noqa: F401


def test_version_is_that_of_the_native_module():
    assert pyprune.__version__ == pyprune.build_info()["pyprune"]


def test_types_are_shipped():
    assert (ROOT / "py.typed").exists()


def test_import_adds_little_to_torch():
    code = "import sys, torch; before = set(sys.modules); import pyprune; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in added if name.startswith(("pyprune.modules", "torch._dynamo", "torch._inductor"))]
    assert {name.split(".")[0] for name in added} <= {"pyprune", "torch"} | set(sys.stdlib_module_names)
