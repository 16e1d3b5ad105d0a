import copy
import json
import subprocess
import sys
import zlib

import pytest
import torch
from torch import nn

import pyprune
from pyprune import BenchmarkResult, ModelBenchmark
from pyprune.analysis import benchmark as module
from pyprune.analysis.benchmark_costs import memory_of
from pyprune.analysis.peak_memory import NotMeasured, peak_memory

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
QUICK = {"seconds": 0, "memory": False, "files": False}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))


def benchmark(model, examples=IMAGES, **options):
    return pyprune.benchmark(model, examples, **{**QUICK, **options})


def test_benchmark_counts_what_is_there():
    dense = small()
    model = pyprune.prune(copy.deepcopy(dense), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
    result = benchmark(model, dense=dense, files=True)
    parameters = sum(one.numel() for one in dense.parameters())
    zeros = sum(int((one == 0).sum()) for one in (model[0].weight, model[4].weight))
    one, other = result.model, result.dense
    assert (one.parameters, one.nonzero) == (parameters, parameters - zeros)
    assert (other.parameters, other.nonzero) == (parameters, parameters)
    macs = 2 * (36 * 4 * 27 + 1440)
    assert (other.macs, other.macs_without_zeros) == (macs, macs)
    assert (one.macs, one.macs_without_zeros) == (macs, macs // 4)
    state = sum(tensor.nbytes for tensor in dense.state_dict().values())
    assert (one.file, other.file, one.memory) == (state, state, state)
    assert one.zipped_file == sum(len(zlib.compress(t.numpy().tobytes(), 6)) for t in model.state_dict().values())
    assert one.sparse_file < 0.6 * other.sparse_file
    assert (result.items, result.unit) == (2, "images")
    assert len(one.seconds) == len(other.seconds) == 5
    assert not one.notes


def test_benchmark_leaves_models_as_they_were():
    dense, model = small(), pyprune.prune(small(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    seen = []
    handle = model.register_forward_hook(lambda one, args, out: seen.append(one.training))
    model[1].eval()
    state = [copy.deepcopy(one.state_dict()) for one in (dense, model)]
    flags = [[part.training for part in one.modules()] for one in (dense, model)]
    random = torch.get_rng_state()
    benchmark(model, dense=dense)
    assert seen
    assert not any(seen)
    assert torch.equal(torch.get_rng_state(), random)
    assert [[part.training for part in one.modules()] for one in (dense, model)] == flags
    for one, before in zip((dense, model), state, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert list(model._forward_hooks) == [handle.id]


class Cached(nn.Module):
    """Puts what it saw into a list that it is given."""

    def forward(self, tokens, seen):
        assert not seen.tokens
        seen.tokens.append(tokens)
        return tokens.float()


class Seen:
    def __init__(self):
        self.tokens = []


def test_benchmark_gives_each_run_its_own_cache():
    example = {"tokens": torch.ones(3, 5, dtype=torch.int64), "seen": Seen()}
    # The run that finds out whether the model takes them is on a copy, too.
    result = benchmark(Cached(), example)
    assert not example["seen"].tokens
    assert (result.items, result.unit) == (15, "tokens")


@pytest.mark.parametrize(
    ("examples", "items"),
    [
        (IMAGES, (2, "images")),
        ([IMAGES, (IMAGES[:1],)], (3, "images")),
        ({"input": IMAGES}, (2, "images")),
        (torch.ones(2, 7), (0, "")),
        ([torch.ones(2, 7, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int32)], (18, "tokens")),
        ([IMAGES, torch.ones(2, 7, dtype=torch.int64)], (0, "")),
    ],
)
def test_benchmark_counts_images_and_tokens(examples, items):
    result = benchmark(nn.Identity(), examples)
    assert (result.items, result.unit) == items
    assert (result.per_second is None) == (items[0] == 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 1}, TypeError, "model is of type int"),
        ({"dense": "dense"}, TypeError, "dense is of type str"),
        ({"examples": "text"}, TypeError, "examples has 'text', without a tensor"),
        ({"examples": []}, ValueError, "examples is an empty list"),
        ({"examples": (IMAGES, IMAGES)}, TypeError, "examples is a tuple of 2"),
        ({"examples": IMAGES * float("nan")}, ValueError, "examples has NaN"),
        ({"model": nn.LazyLinear(3)}, ValueError, "lazy"),
        ({"dense": nn.Linear(2, 2, device="meta")}, ValueError, "meta"),
        ({"seconds": -1}, ValueError, "seconds is -1"),
    ],
)
def test_benchmark_says_what_is_wrong_before_anything_is_measured(monkeypatch, options, error, message):
    monkeypatch.setattr(module, "in_turns", lambda *args, **keywords: pytest.fail("something was timed"))
    arguments = {"model": small(), "examples": IMAGES, "dense": small(), **QUICK, **options}
    with pytest.raises(error, match=message):
        pyprune.benchmark(arguments.pop("model"), arguments.pop("examples"), **arguments)


def test_benchmark_says_that_a_model_was_pruned_in_place():
    model = small()
    with pytest.raises(ValueError, match="dense is the model itself"):
        benchmark(model, dense=model)


def test_benchmark_says_what_it_could_not_measure():
    model = nn.Sequential(nn.Linear(4, 4))
    model.not_pickled = lambda: None
    gated = pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_HARD_CONCRETE")
    result = benchmark(gated, torch.ones(2, 4), dense=model, memory=True, files=True)
    assert result.dense.peak_memory is None
    assert "peak memory not measured: Sequential cannot be pickled" in result.dense.notes[0]
    assert result.model.file is None
    assert "the model has gates" in result.model.notes[0]
    assert "dense: peak memory not measured" in str(result)


def test_memory_of_counts_tied_weights_once():
    one = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(one, nn.Linear(4, 4, bias=False))
    model[1].weight = one.weight
    assert memory_of(model) == 64
    assert memory_of(nn.Module()) == 0


class Greedy(nn.Module):
    """Takes 64 MiB for as long as a pass is, in a module that another process can import."""

    def forward(self, x):
        return torch.ones(1 << 24).sum() + x.sum()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process")
def test_peak_memory_is_that_of_the_passes_and_the_weights():
    ones = [torch.ones(2)]
    idle, greedy = peak_memory(nn.Identity(), ones), peak_memory(Greedy(), ones)
    heavy = peak_memory(nn.Sequential(nn.Embedding(1 << 12, 1 << 12), nn.Identity()), [torch.ones(1).long()])
    assert 64 << 20 <= greedy - idle < 80 << 20
    assert 64 << 20 <= heavy - idle < 80 << 20


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("only in this process")


def test_peak_memory_says_what_failed():
    with pytest.raises(NotMeasured, match="RuntimeError: only in this process"):
        peak_memory(Failing(), [torch.ones(1)])


def test_benchmark_of_a_class_of_the_main_program_says_so():
    code = """
import torch, pyprune
class Net(torch.nn.Linear):
    pass
print(pyprune.benchmark(Net(4, 4), torch.ones(2, 4), seconds=0, files=False))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Net is a class of the main program" in done.stdout


def result(dense=True):
    one = ModelBenchmark((0.002, 0.001), 5000, 400, 300, 200, 100, 80, 20, 640, 160, ("why",))
    other = ModelBenchmark((0.004, 0.004), None, 400, 400, 390, 380, 80, 80, 640, 640)
    return BenchmarkResult(one, other if dense else None, 8, "images", {"threads": 1})


def test_str_is_a_table_of_both():
    rows = [" ".join(line.split()) for line in str(result()).splitlines()]
    assert rows[0] == "model dense left"
    assert "ms, median 1.500 4.000 37.5%" in rows
    assert "images / s 5,333.3 2,000.0" in rows
    assert "peak memory 5,000 -" in rows
    assert "file, sparse 100 380 26.3%" in rows
    assert rows[-3:] == ["3.00 x as fast as dense", "threads: 1", "model: why"]
    assert "dense" not in str(result(dense=False)).splitlines()[0]
    assert "<pre" in result()._repr_html_()


def test_json_gives_the_same_back(tmp_path):
    for one in (result(), result(dense=False)):
        one.to_json(tmp_path / "result.json")
        assert BenchmarkResult.from_json(tmp_path / "result.json") == one


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"model": None},
        {"items": -1},
        {"unit": 3},
        {"dense": {}},
        {"setting": []},
        {"model": {"seconds": []}},
        {"model": {"seconds": [0.0, 1.0]}},
        {"model": {"seconds": [1.0]}},
        {"model": {"macs": "many"}},
        {"model": {"macs": -1}},
        {"model": {"notes": [1]}},
        {"model": {"more": 1}},
    ],
)
def test_from_dict_refuses_what_is_damaged(change):
    content = json.loads(json.dumps(result().to_dict()))
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and value else value
    with pytest.raises(ValueError, match="benchmark result"):
        BenchmarkResult.from_dict(content)


def test_plot_draws_both(tmp_path):
    for name, one in (("both", result()), ("one", result(dense=False))):
        one.plot(tmp_path / name)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plot_says_that_it_takes_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result().plot(tmp_path / "picture.png")
