import json
from pathlib import Path

import bench_shrink
import bench_units
import goals
import peers
import plan
import pytest
import report
import run
import torch
from architectures import ARCHITECTURES
from shapes import DISTRIBUTIONS, DTYPES, Case

from pyprune import ops
from pyprune.methods.lamp import lamp_removed
from pyprune.selection.limits import capped_threshold

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
# torch warns of itself while it loads its compiler
pytestmark = pytest.mark.filterwarnings("ignore")
CPU_JSON = BENCHMARKS / "results" / "cpu.json"
TINY = {
    "training": "convnet",
    "sparsegpt": "16x32",
    "admm": "16x32",
    "sparse_linear": "16x32",
}  # the others take the model "tiny"


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads(), torch._inductor.config.cpp.threads
    yield
    torch.set_num_threads(before[0])
    torch._inductor.config.cpp.threads = before[1]


def main(words):
    run.main([*words.split(), "--threads", "1", "--seconds", "0.01"])


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("job", plan.JOBS)
def test_run_measures_every_way_of_a_job(job, tmp_path, capsys):
    path, model = tmp_path / "results.json", TINY.get(job, "tiny")
    main(f"{job} --model {model} --no-compile --dtype float32 --peers all --repeats 2 --json {path}")
    results = json.loads(path.read_text())
    assert results["environment"]["pyprune"]
    assert results["speeds"][0]["copy_gb_per_s"] > 0
    for row in results["results"]:
        assert row["samples_ms"], row["way"]
        assert row["floor_ms"] > 0
        assert (row["job"], row["model"]) == (job, model)
    output = capsys.readouterr().out
    assert "x floor" in output
    assert "extra MiB" in output


@pytest.mark.usefixtures("threads_restored")
def test_run_measures_compiled_peers(capsys):
    main("rb_loss --model tiny --repeats 1")
    assert "NNCF, compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mask", "there is no job mask"),
        ("--ratio 0.7 1", "every ratio must be above 0 and below 1"),
        ("--threads 0", "every number must be at least 1"),
        ("--repeats 0", "must be above 0"),
        ("--json no/such/place.json", "make its directory first"),
        ("--model resnet", "invalid choice"),
    ],
)
def test_parse_arguments_refuses(words, said, capsys):
    with pytest.raises(SystemExit):
        run.parse_arguments(words.split())
    assert said in capsys.readouterr().err


def test_run_says_when_a_job_cannot_do_what_is_asked():
    with pytest.raises(SystemExit, match="none of these jobs"):
        run.main(["training", "--model", "bert"])


@pytest.mark.parametrize("slices", [plan.BENCH, plan.QUICK, plan.FULL])
def test_plan_measures_every_job_and_no_slice_is_empty(slices):
    cases = [list(part.cases(2)) for part in slices]
    assert all(cases)
    assert {job for some in cases for job, _ in some} == set(plan.JOBS)


def test_goals_refer_to_ways_that_exist():
    ways = [way for job in plan.JOBS for way in plan.JOBS[job].ways(Case(TINY.get(job, "tiny")))]
    names = {(way.group, way.name) for way in ways}
    for goal in goals.GOALS:
        for name in ("pyprune", *goal.peers):
            assert (goal.group, name) in names
        assert goal.floor is None or any(way.group == goal.group and way.floor for way in ways)
    assert {(group, "pyprune") for group in goals.MASKS} <= names


def row(way, samples, **facts):
    usual = {
        "job": "fold",
        "group": "fold",
        "model": "bert",
        "dtype": "float32",
        "threads": 2,
        "ratio": 0.7,
        "weights": "normal",
        "floor_ms": 10.0,
        "memory_mib": 1.0,
        "weight_bytes": 2**20,
    }
    return usual | {"way": way, "samples_ms": samples} | facts


def test_verdicts_judge_medians_of_the_usual_case():
    peer = "torch._foreach_mul_, bool masks"
    rows = [
        row("pyprune", [11.0, 14.0, 99.0]),
        row(peer, [35.0]),
        row("pyprune", [1.0], threads=1),
        row("pyprune", [1.0], ratio=0.5),
    ]
    beside_peer, beside_floor = goals.verdicts(rows)
    assert (beside_peer.measured, beside_peer.reached, beside_peer.text) == (2.5, True, "2.50 x")
    assert (beside_floor.measured, beside_floor.reached) == (1.4, False)
    assert beside_floor.text == "1.40 x, missed by 17%"


def test_verdicts_find_cliffs_and_memory():
    group = goals.MASKS[0]
    rows = [
        row("pyprune", [10.0], group=group, memory_mib=17.0),
        row("pyprune", [20.0], group=group, weights="equal"),
        row("pyprune", [40.0], group=group, weights="sorted"),
    ]
    _, cliff, memory = goals.verdicts(rows)
    assert (cliff.against, cliff.measured, cliff.reached) == ("worst weights", 4.0, False)
    assert (memory.against, memory.limit, memory.reached) == ("extra memory", 16.0, False)


def test_verdicts_look_at_the_seconds_that_shrink_takes():
    rows = [
        row("pyprune", [5100.0], group=bench_shrink.SHRINK),
        row("Torch-Pruning", [9e9], group=bench_shrink.SHRINK),
    ]
    (verdict,) = goals.verdicts(rows)
    assert (verdict.measured, verdict.reached, verdict.text) == (5.1, False, "5.10 s, missed by 2%")


@pytest.mark.parametrize(("name", "count"), [("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)])
def test_architectures_are_those_of_their_names(name, count):
    net, _ = ARCHITECTURES[name]()
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_peers_choose_the_masks_that_we_choose(ratio):
    weights = Case("tiny").draw()
    sizes = [weight.numel() for weight in weights]
    removed, each = int(ratio * sum(sizes)), [int(ratio * size) for size in sizes]
    ours, _ = ops.threshold(weights, removed)
    local, _ = ops.threshold(weights, each)
    for way in (peers.cat_kthvalue, peers.cat_topk, peers.cat_sort, peers.numpy_partition):
        assert all(map(torch.equal, way(weights, removed), ours)), way
    assert all(map(torch.equal, peers.kthvalue_per_tensor(weights, each), local))
    removed = int((sum(sizes) - 1) * ratio) + 1  # as NNCF counts
    normalised, _ = ops.threshold(weights, removed, scales=ops.norms(weights).reciprocal())
    assert all(map(torch.equal, peers.nncf_formula(weights, ratio), normalised))


def test_peers_choose_the_masks_that_we_choose_under_conditions():
    weights = [weight * (1 + 2 * (i % 2)) for i, weight in enumerate(Case("tiny").draw())]
    sizes = [weight.numel() for weight in weights]
    removed, most = int(0.7 * sum(sizes)), [int(0.75 * size) for size in sizes]
    bases, _ = ops.threshold(weights, removed // 2)
    ours, _ = ops.threshold(weights, removed, bases=bases)
    assert all(map(torch.equal, peers.cat_kthvalue_of_remaining(weights, bases, removed), ours))
    capped, _ = capped_threshold(weights, removed, least=[0] * len(sizes), most=most)
    assert all(map(torch.equal, peers.nni_capped(weights, removed, most), capped))
    lamp, _ = ops.threshold(weights, lamp_removed(weights, removed))
    theirs = peers.lamp_kthvalue(weights, removed)  # in float32: a few of its sums are off
    differ = sum(int((one != other).sum()) for one, other in zip(theirs, lamp, strict=True))
    assert differ < 1e-3 * sum(sizes)


@pytest.mark.parametrize("unit", bench_units.UNITS)
def test_peers_score_and_spread_units_as_we_do(unit):
    weights = Case("tiny").draw()
    shapes = [weight.shape for weight in weights]
    blocks = bench_units.blocks_of(unit, shapes)
    scores = ops.unit_scores(weights, blocks)
    peer = peers.scores_of_channels if unit in bench_units.CHANNELS else peers.scores_of_blocks
    for weight, block, score in zip(weights, blocks, scores, strict=True):
        torch.testing.assert_close(peer(weight, block), score)
    units = [score > score.mean() for score in scores]
    masks = [torch.empty(shape, dtype=torch.bool) for shape in shapes]
    ops.expand(units, blocks, masks)
    assert all(map(torch.equal, map(peers.spread_units, units, blocks, shapes), masks))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", DISTRIBUTIONS)
def test_draw_is_finite_and_the_same_every_time(weights, dtype):
    case = Case("tiny", dtype, weights=weights)
    drawn = case.draw()
    assert [tuple(one.shape) for one in drawn] == case.shapes
    assert all(one.dtype == DTYPES[dtype] and one.isfinite().all() for one in drawn)
    assert all(map(torch.equal, drawn, case.draw()))
    if weights == "sorted":
        joined = torch.cat([one.flatten() for one in drawn])
        assert (joined.diff() >= 0).all()
        assert joined[0] < joined[-1]


@pytest.mark.parametrize(
    ("name", "section"), [("README.md", report.readme_section), ("docs/performance.md", report.page_section)]
)
def test_documents_show_what_report_makes_of_the_results(name, section):
    text, shown = (ROOT / name).read_text(), section(report.load([CPU_JSON]))
    assert shown in text, "run: make bench-report"
    assert report.with_section(text, shown) == text


def test_document_without_its_two_comments_is_refused():
    with pytest.raises(ValueError, match="write them where figures go"):
        report.with_section("# pyprune\n", "figures")


def test_readme_section_says_what_was_not_measured():
    results = report.load([CPU_JSON])
    rows = [row for row in results["results"] if row["job"] != "training"]
    with pytest.raises(ValueError, match="the results lack 'training step, masked' of resnet18"):
        report.readme_section(results | {"results": rows})


def test_report_draws_small_pictures_of_the_results(tmp_path):
    results = report.load([CPU_JSON])
    report.draw_speed(results, tmp_path / "speed.png")
    report.draw_growth(results, tmp_path / "growth.png")
    for name in ("speed.png", "growth.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 300_000
        assert (BENCHMARKS / "results" / name).stat().st_size < 300_000


def test_report_tables_show_every_way():
    results = report.load([CPU_JSON])
    tables = report.every_table(results)
    assert all(row["way"].replace("|", r"\|") in tables for row in results["results"])
