"""The command as shells run it: through a terminal and into a pipe."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from pyprune_command.arguments import parser
from pyprune_command.main import main
from tests.sparse.checkpoints import language_model, save_sharded

COMMANDS = ("stats", "prune", "compress", "expand", "diff", "verify", "bench", "info")
COMMAND = [sys.executable, "-m", "pyprune"]


@pytest.fixture
def model(tmp_path):
    return save_sharded(tmp_path / "in", language_model())


def run(capsys, *arguments):
    code = main([str(one) for one in arguments])
    return code, *capsys.readouterr()


def as_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert not err
    return code, json.loads(out)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_a_command_takes(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*filter(None, [command]), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: pyprune {command}".strip() in out
    assert all(f"    {one} " in out for one in COMMANDS) or command


def test_help_does_not_import_torch():
    script = "import sys; from pyprune_command.arguments import parser; parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["fold"], "invalid choice: 'fold'"),
        (["prune", "in", "out"], "give --ratio"),
        (["prune", "in", "-r", "0.5"], "give OUT, or --dry-run"),
        (["prune", "in", "out", "-r", "1"], "1 is no fraction to remove; give a number in [0, 1)"),
        (["prune", "in", "out", "-r", "half"], "invalid fraction value: 'half'"),
        (["prune", "in", "out", "-r", "0.5", "--n-of-m", "4:2"], "4:2 is no KEEP:OF"),
        (["prune", "in", "out", "--n-of-m", "2:4", "--scope", "row"], "--n-of-m says what competes"),
        (["prune", "in", "out", "-r", "0.5", "--unit", "4"], "4 is no unit"),
        (["prune", "in", "out", "-r", "0.5", "--max-memory", "much"], "much is no size"),
        (["prune", "in", "out", "-r", "0.5", "--method", "wanda"], "--method wanda needs --norms FILE"),
        (["prune", "in", "out", "-r", "0.5", "--norms", "x"], "--norms is for --method wanda"),
        (["prune", "in", "out", "-r", "0.5", "--codec", "zstd"], "say how to --compress"),
        (
            ["prune", "in", "out", "-r", "0.5", "--method", "random", "--normalize", "l2"],
            "is of magnitudes and wanda",
        ),
        (["bench", "in", "--batch", "0"], "0 is too small"),
        (["bench", "in", "--seconds", "-1"], "-1 is no time"),
        (["compress", "in", "out", "--codec", "gzip"], "invalid choice: 'gzip'"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "none"], "there is no such file or folder"),
        (["stats", "empty"], "has no safetensors file in it"),
        (["verify", "damaged.safetensors"], "is no safetensors file or cut off"),
        (["prune", "in", "in", "-r", "0.5"], "is there already"),
        (["prune", "in", "out", "-r", "0.5", "--include", "("], "regular expression"),
        (["prune", "in", "out", "-r", "0.5", "--include", "layers"], "matches no weight"),
        (["prune", "in", "out", "-r", "0.5", "--allocation", "erk"], "scope.tensor()"),
        (["compress", "in", "out", "--codec", "zstd", "--layout", "compressed-tensors"], "has no codec"),
        (
            ["prune", "in", "out", "-r", "0.5", "--compress", "--codec", "zstd", "--layout", "compressed-tensors"],
            "no codec",
        ),
        (["diff", "in", "none"], "there is no such file or folder"),
        (["bench", "empty.safetensors"], "no matrix"),
    ],
)
def test_wrong_input_is_1_and_one_line(capsys, monkeypatch, tmp_path, model, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"12345")
    save_file({"a": torch.ones(3)}, tmp_path / "empty.safetensors")
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("pyprune: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_checkpoint_goes_through_all_commands(capsys, tmp_path, model):
    sparse, packed, dense = tmp_path / "sparse", tmp_path / "packed", tmp_path / "dense"
    code, pruned = as_json(capsys, "prune", model, sparse, "--ratio", "0.5")
    assert code == 0
    assert pruned["zeros"] == pruned["removed_units"] == round(pruned["elements"] * 0.5)
    assert pruned["left_alone"]["embeddings"] == ["model.embed_tokens.weight"]
    assert pruned["normalize"] == "l2"
    assert "files by name" in pruned["order_of_ties"]
    code, stats = as_json(capsys, "stats", sparse)
    zeros = {one["name"]: one["zeros"] for one in stats["by_tensor"]}
    assert {name: zeros[name] for name in pruned["zeros_by_tensor"]} == pruned["zeros_by_tensor"]
    assert stats["bound_bytes"] < stats["bitmask_bytes"] < stats["dense_bytes"] == stats["stored_bytes"]
    code, smaller = as_json(capsys, "compress", sparse, packed)
    assert smaller["bytes_after"] < smaller["bytes_before"]
    assert as_json(capsys, "stats", packed)[1]["zeros"] == stats["zeros"]
    assert as_json(capsys, "verify", packed)[1]["problems"] == {}
    assert as_json(capsys, "expand", packed, dense)[0] == 0
    code, same = as_json(capsys, "diff", sparse, dense)
    assert (code, same["equal"]) == (0, same["tensors"])
    code, other = as_json(capsys, "diff", model, dense)
    changed = [one for one in other["by_tensor"] if one["status"] == "changed"]
    assert code == 1
    assert sum(one["zeros_gained"] for one in changed) == pruned["zeros"]
    code, timed = as_json(capsys, "bench", packed, "--seconds", "0.001", "--threads", "1")
    assert (code, timed["threads"]) == (0, 1)
    assert sum(one["layers"] for one in timed["by_shape"]) == 6
    assert all(one["milliseconds"] > 0 and 0.2 < one["sparsity"] < 0.9 for one in timed["by_shape"])


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["--n-of-m", "2:4"], "2:4"),
        (["--n-of-m", "1:4"], "1:4"),
        (["-r", "0.25", "--unit", "row", "--scope", "tensor"], "zero rows"),
        (["-r", "0.25", "--unit", "column", "--scope", "tensor"], "zero columns"),
        (["-r", "0.5", "--method", "random", "--seed", "3", "--compress"], ""),
        (["-r", "0.5", "--scope", "tensor", "--allocation", "erk", "--max-memory", "1G"], ""),
        (["-r", "0.5", "--method", "lamp", "--max-ratio", "0.8", "-q"], ""),
    ],
)
def test_prune_makes_the_patterns_that_stats_finds(capsys, tmp_path, model, options, patterns):
    code, out, err = run(capsys, "prune", model, tmp_path / "out", *options, "--exclude", "model.conv")
    assert (code, err) == (0, "")
    assert bool(out) != ("-q" in options)
    _, out, _ = run(capsys, "stats", tmp_path / "out")
    rows = [line for line in out.splitlines() if "attn" in line or "mlp" in line]
    assert len(rows) == 6
    assert all(patterns in row for row in rows)


def test_verify_names_each_damaged_tensor(capsys, tmp_path, model):
    assert run(capsys, "prune", model, tmp_path / "out", "-r", "0.5", "--compress", "-q") == (0, "", "")
    path = next((tmp_path / "out").glob("*1-of*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 4  # in a bitmask, which come last
    path.write_bytes(data)
    code, out, err = run(capsys, "verify", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "bitmask are damaged: their CRC-32" in err or "bitmask is damaged" in err or "damaged" in err
    assert "model.layers.0" in err


def test_minus_zero_is_counted_and_can_be_kept(capsys, tmp_path):
    weight = torch.randn(64, 64)
    weight[::2] = -0.0
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    _, out, _ = run(capsys, "compress", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert "2,048 elements that were -0.0 are 0.0 now" in out
    kept = tmp_path / "kept.safetensors"
    assert (
        as_json(capsys, "compress", tmp_path / "in.safetensors", kept, "--keep-negative-zero")[1]["negative_zeros"]
        == {}
    )
    assert run(capsys, "diff", tmp_path / "in.safetensors", kept, "-q") == (0, "", "")


def test_in_a_pipe_there_is_text_without_colour_or_bars(tmp_path, model):
    done = subprocess.run([*COMMAND, "stats", str(model)], capture_output=True, text=True, check=True)
    assert "model.layers.0.attn.q.weight" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_a_reader_that_has_seen_enough_is_no_error(model):
    shell = f"{sys.executable} -m pyprune stats {model} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_in_a_terminal_there_are_bars_which_go(tmp_path, model):
    parent, child = pty.openpty()
    arguments = [*COMMAND, "prune", str(model), str(tmp_path / "out"), "-r", "0.5"]
    with subprocess.Popen(
        arguments, stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "xterm"}
    ) as done:
        os.close(child)
        seen = b""
        while True:
            try:
                piece = os.read(parent, 4096)
            except OSError:  # the other end is gone
                break
            if not piece:
                break
            seen += piece
    os.close(parent)
    assert done.returncode == 0
    text = seen.decode()
    assert "written" in text
    assert "100%" in text
    assert "elements are zero" in text
    assert "\x1b[2K" in text  # the bars are taken away


def test_parser_knows_all_commands():
    arguments = {"diff": ["a", "b"], "prune": ["a", "b"], "compress": ["a", "b"], "expand": ["a", "b"], "info": []}
    for command in COMMANDS:
        found = parser().parse_args([command, *arguments.get(command, ["a"])])
        assert not (found.quiet)
        assert not (found.json)
