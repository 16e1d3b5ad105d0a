import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyprune
from pyprune import importance, scope
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method
from pyprune.methods.unit_groups import Member, UnitGroup, Weight
from pyprune.selection.choose_units import choose_units
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.encoding import Options
from pyprune.sparse.prune_files import prune_files
from tests.ops.cases import DTYPES
from tests.sparse.checkpoints import language_model, save_sharded

GLOBAL = Method(importance.magnitude())
LEFT_ALONE = {"model.embed_tokens.weight", "lm_head.bias"}


def expected_of(folder, method, amount, statistics=None):
    """What choosing among all weights in memory leaves, in the order that `prune_files` promises."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        with Checkpoint(path) as checkpoint:
            weights |= {name: tensors[name] for name in checkpoint}
    groups = []
    for name, values in weights.items():
        if name not in LEFT_ALONE and values.dim() > 1:
            weight = Weight(name, values, statistic=(statistics or {}).get(name), names=(name,))
            groups.append(UnitGroup(name, (Member(weight, method.granularity.block_of(weight)),)))
    masks = choose_units(method, groups, amount).masks
    kept = {group.name: torch.where(mask, group.weight.values, 0) for group, mask in zip(groups, masks, strict=True)}
    return weights | kept


def found_in(folder):
    return {
        name: tensor for path in folder.glob("*.safetensors") for name, tensor in pyprune.load_sparse(path).items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_prune_files_removes_what_the_whole_list_would_lose(tmp_path):
    source = save_sharded(tmp_path / "in", language_model("few values", DTYPES))
    method = Method(importance.magnitude(normalize="l2"))
    pruned = prune_files(source, tmp_path / "out", method, 0.5)
    expected = expected_of(source, method, Amount(0.5))
    assert_same(found_in(tmp_path / "out"), expected)
    assert list(pruned.zeros.values()) == [int((expected[name] == 0).sum()) for name in pruned.zeros]


def test_prune_files_takes_norms_of_inputs_and_scores(tmp_path):
    shards = language_model()
    source = save_sharded(tmp_path / "in", shards)
    weights = {
        name: one for shard in shards for name, one in shard.items() if one.dim() > 1 and name not in LEFT_ALONE
    }
    norms = {name: torch.rand(one.shape[1]) + 0.1 for name, one in weights.items()}
    by_module = {name.removesuffix(".weight"): norm for name, norm in norms.items()}
    save_file(by_module, tmp_path / "norms.safetensors")
    scores = {name: torch.randn(one.shape) for name, one in weights.items()}
    save_file(scores, tmp_path / "scores.safetensors")
    spread = {name: norm.view(1, -1, *(1,) * (weights[name].dim() - 2)) for name, norm in norms.items()}
    for number, (method, ratio, file, statistics) in enumerate(
        [
            (Method(importance.wanda(), scope=scope.row()), 0.5, "norms", spread),
            (Method(importance.wanda(), scope=scope.n_of_m(keep=2, of=4)), None, "norms", spread),
            (Method(importance.wanda()), 0.5, "norms", spread),
            (Method(importance.given({})), 0.5, "scores", scores),
            (Method(importance.given({}), scope=scope.tensor()), 0.5, "scores", scores),
        ]
    ):
        target = tmp_path / f"out{number}"
        prune_files(source, target, method, ratio, statistics=tmp_path / f"{file}.safetensors")
        assert_same(found_in(target), expected_of(source, method, Amount(ratio), statistics))


@pytest.mark.parametrize("options", [Options(), Options(layout="compressed-tensors")], ids=["pyprune", "theirs"])
def test_prune_files_packs_and_reads_what_is_packed(tmp_path, options):
    source = save_sharded(tmp_path / "in", language_model("few values", DTYPES))
    prune_files(source, tmp_path / "dense", GLOBAL, 0.5)
    prune_files(source, tmp_path / "packed", GLOBAL, 0.5, compress=options)
    assert_same(found_in(tmp_path / "packed"), found_in(tmp_path / "dense"))
    prune_files(tmp_path / "dense", tmp_path / "more", GLOBAL, 0.9)
    prune_files(tmp_path / "packed", tmp_path / "again", GLOBAL, 0.9)
    assert_same(found_in(tmp_path / "again"), found_in(tmp_path / "more"))


def test_prune_files_of_coded_files_is_the_same(tmp_path):
    pytest.importorskip("zstandard")
    source = save_sharded(tmp_path / "in", language_model("few values", DTYPES))
    prune_files(source, tmp_path / "dense", GLOBAL, 0.5)
    prune_files(source, tmp_path / "packed", GLOBAL, 0.5, compress=Options("zstd"))
    assert_same(found_in(tmp_path / "packed"), found_in(tmp_path / "dense"))


def test_prune_files_keeps_everything_else(tmp_path):
    source = save_sharded(tmp_path / "in", language_model())
    pruned = prune_files(source, tmp_path / "out", GLOBAL, 0.5)
    for name in ("config.json", "tokenizer/merges.txt"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert before == after | {"weight_map": before["weight_map"]}
    assert dict(before["weight_map"]) == dict(after["weight_map"])
    assert set(pruned.left_alone) == {"embeddings", "vectors and integers"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    # safetensors itself reads what was written, with the same metadata.
    for path in source.glob("*.safetensors"):
        assert load_file(tmp_path / "out" / path.name).keys() == load_file(path).keys()
        with Checkpoint(tmp_path / "out" / path.name) as written:
            assert written.files[0].metadata == {"format": "pt"}


def test_prune_files_of_one_file_and_of_a_dry_run(tmp_path):
    save_file({"a.weight": torch.randn(8, 8), "b": torch.ones(0, 3)}, tmp_path / "in.safetensors")
    dry = prune_files(tmp_path / "in.safetensors", None, GLOBAL, 0.5)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}
    pruned = prune_files(tmp_path / "in.safetensors", tmp_path / "out.safetensors", GLOBAL, 0.5)
    assert dry == pruned
    assert pruned.zeros == {"a.weight": 32, "b": 0}
    assert pruned.removed == 32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method", [GLOBAL, Method(importance.magnitude(), scope=scope.tensor())], ids=["all", "each"]
)
def test_prune_files_names_what_is_not_finite_and_writes_nothing(tmp_path, method, value):
    shards = language_model()
    shards[1]["model.layers.1.mlp.up.weight"][3, 4] = value
    source = save_sharded(tmp_path / "in", shards)
    with pytest.raises(ValueError, match=r"NaN or infinite weights: 1 in model.layers.1.mlp.up.weight"):
        prune_files(source, tmp_path / "out", method, 0.5)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    prune_files(source, tmp_path / "out", method, 0.5, exclude=["model.layers.1.mlp.up"])


def test_prune_files_includes_and_excludes(tmp_path):
    source = save_sharded(tmp_path / "in", language_model())
    found = prune_files(source, None, GLOBAL, 0.5, include=["model.layers.0", "model.embed"], exclude=[".*q.weight"])
    assert set(found.zeros) == {
        "model.embed_tokens.weight", "model.layers.0.mlp.up.weight", "model.layers.0.mlp.down.weight",
    }  # fmt: skip
    assert set(prune_files(source, None, GLOBAL, 0.5, min_size=4000).left_alone) >= {"smaller than 4000"}
    with pytest.raises(ValueError, match=r"'layers' matches no weight of .* from the beginning of its name"):
        prune_files(source, None, GLOBAL, 0.5, include=["layers"])
    with pytest.raises(ValueError, match="no weight that would be pruned"):
        prune_files(source, None, GLOBAL, 0.5, min_size=10**9)


def test_prune_files_refuses_before_it_writes(tmp_path):
    source = save_sharded(tmp_path / "in", language_model())
    (tmp_path / "there").mkdir()
    for target, kind in (("there", FileExistsError), ("no/folder", FileNotFoundError), ("in/out", ValueError)):
        with pytest.raises(kind):
            prune_files(source, tmp_path / target, GLOBAL, 0.5)
    with pytest.raises(ValueError, match=r"needs about \d+ MiB, and 0 MiB may be taken"):
        prune_files(source, tmp_path / "out", GLOBAL, 0.5, max_memory=1000)
    with pytest.raises(ValueError, match="wanda needs input norm; give its file"):
        prune_files(source, tmp_path / "out", Method(importance.wanda()), 0.5)
    with pytest.raises(ValueError, match="taylor needs squared gradient"):
        prune_files(source, tmp_path / "out", Method(importance.taylor()), 0.5, statistics="x")
    with pytest.raises(ValueError, match="min_ratio and max_ratio allow"):
        prune_files(source, tmp_path / "out", GLOBAL, 0.9, max_ratio=0.5)
    save_file({"model.conv": torch.ones(8)}, tmp_path / "norms.safetensors")
    with pytest.raises(ValueError, match=r"has nothing for model.layers.0.attn.q.weight"):
        prune_files(
            source, tmp_path / "out", Method(importance.wanda()), 0.5, statistics=tmp_path / "norms.safetensors"
        )
    assert not (tmp_path / "out").exists()


_MEASURE = """
import sys
from pyprune import importance
from pyprune.methods.method import Method
from pyprune.sparse.prune_files import prune_files

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous"))

method = Method(importance.magnitude(normalize="l2"))
prune_files(sys.argv[1], sys.argv[2], method, 0.5)
before, peak = anonymous(), [0]
prune_files(sys.argv[3], sys.argv[4], method, 0.5, seen=lambda *_: peak.append(anonymous()))
print(max(peak) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_prune_files_takes_no_more_memory_for_larger_files(tmp_path):
    save_file({"a.weight": torch.randn(64, 64).bfloat16()}, tmp_path / "small.safetensors")
    many = {f"{number}.weight": torch.randn(2048, 2048).bfloat16() for number in range(6)}
    save_file(many | {"wide.weight": torch.randn(2**23, 2).bfloat16()}, tmp_path / "large.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("small", "small_out", "large", "large_out")]
    found = subprocess.run([sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 24 << 20  # of 84 MB
