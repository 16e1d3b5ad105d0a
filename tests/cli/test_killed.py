"""A command that is killed leaves what it was to write whole, or not there."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.cli.test_prune_by_data import saved, text
from tests.sparse.checkpoints import language_model, save_sharded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process want fork")
UNFINISHED = re.compile(r"\.out\..*unfinished(\.safetensors)?")
COMMANDS = {
    "compress": ["compress", "{}/in", "{}/out"],
    "compress, zstd": ["compress", "{}/in", "{}/out", "--codec", "zstd"],
    "compress a file": ["compress", "{}/in.safetensors", "{}/out.safetensors"],
    "expand": ["expand", "{}/packed", "{}/out"],
    "expand a file": ["expand", "{}/packed.safetensors", "{}/out.safetensors"],
    "prune": ["prune", "{}/in", "{}/out", "-r", "0.5"],
    "prune rows, packed": ["prune", "{}/in", "{}/out", "-r", "0.5", "--scope", "row", "--compress"],
    "prune a file": ["prune", "{}/in.safetensors", "{}/out.safetensors", "-r", "0.5"],
    "prune by a text": ["prune", "{}/model", "{}/out", "-r", "0.5", "--data", "{}/text.txt", "--length", "16"],
    "prune by a text, packed": [
        *("prune", "{}/model", "{}/out", "-r", "0.5", "--data", "{}/text.txt", "--length", "16", "--compress"),
    ],
}


def sources(folder):
    """Write what the commands read."""
    from pyprune.sparse.convert import compress_checkpoint

    shards = language_model()
    for tensors in shards:
        for weight in tensors.values():
            weight.view(-1)[::2] = 0
    save_sharded(folder / "in", shards)
    save_file(shards[0], folder / "in.safetensors", metadata={"format": "pt"})
    for name in ("", ".safetensors"):
        compress_checkpoint(folder / f"in{name}", folder / f"packed{name}")


def check_killed(command, points, folder):
    sources(folder)
    if "{}/model" in COMMANDS[command]:
        pytest.importorskip("transformers", minversion="5")
        saved(folder / "model", size="20KB")
        text(folder / "text.txt", 100)
    script = [sys.executable, "-m", "tests.cli.killed", str(folder), str(points), *COMMANDS[command]]
    done = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] > points
    assert {one["ended"] for one in found["points"]} == {-9}
    wrong = [one for one in found["points"] if one["target"] == "half" or not one["source"]]
    assert not wrong
    left = {name for one in found["points"] for name in one["left"]}
    assert all(UNFINISHED.fullmatch(name) for name in left), left
    assert left
    assert (found["again"], found["same"]) == (0, True)
    return Counter(one["target"] for one in found["points"])


@pytest.mark.parametrize("command", ["compress", "expand a file", "prune rows, packed"])
def test_a_killed_command_leaves_all_or_nothing(command, tmp_path):
    assert check_killed(command, 24, tmp_path)["absent"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_leaves_all_or_nothing_at_many_points(command, tmp_path):
    # Those that run a model take a second each.
    assert check_killed(command, 60 if "text" in command else 300, tmp_path)["absent"]


def test_checks_of_killed_commands_see_what_is_half(tmp_path):
    """A folder that is written in its place is found to be half."""
    sources(tmp_path)
    script = (
        "import contextlib, sys\n"
        "from pathlib import Path\n"
        "from pyprune.sparse import new_checkpoint\n"
        "@contextlib.contextmanager\n"
        "def in_place(target):\n"
        "    target.mkdir()\n"
        "    yield target\n"
        "new_checkpoint.whole_folder = in_place\n"
        "from tests.cli.killed import run\n"
        "print({one['target'] for one in run(Path(sys.argv[1]), 12, sys.argv[2:])['points']})\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), *COMMANDS["compress"]]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert "half" in done.stdout
