import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import pyprune
from pyprune import ops
from pyprune.runtime import measure
from pyprune.runtime.candidates import CANDIDATES
from pyprune.runtime.sparse_layer import SparseLayer
from pyprune.runtime.sparse_layers import SparseLinear
from tests.runtime.sparse_models import mlp, sparse

MAGNITUDE = "UNSTRUCTURED_MAGNITUDE_LOCAL"
ROWS = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)


class Gpt(nn.Module):
    """A block with layers of transformers, which have inputs first."""

    def __init__(self):
        super().__init__()
        self.up, self.down = Conv1D(96, 64), Conv1D(64, 96)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


MODELS = {
    "a layer": lambda: sparse(nn.Linear(64, 40)),
    "layers": mlp,
    "Conv1D": lambda: sparse(Gpt()),
    "one layer twice": lambda: sparse(nn.Sequential(*[nn.Linear(64, 64)] * 2)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rows", [ROWS, ROWS.reshape(5, 1, 64), ROWS[0], ROWS[:0]])
def test_accelerate_computes_what_the_dense_model_does(times, make, rows):
    model, dense = make(), make()
    report = pyprune.accelerate(model, ROWS)
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    assert len(layers) == len(report.replaced) > 0
    assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]
    with torch.no_grad():
        torch.testing.assert_close(model(rows), dense(rows), rtol=1e-4, atol=1e-4)
    assert report.speedup == 2
    assert report.difference < 1e-5


def test_accelerate_keeps_all_but_the_weight(times):
    model = mlp()
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append("after"))
    model[0].note, bias = "mine", model[0].bias
    report = pyprune.accelerate(model, ROWS)
    assert report.replaced == ["0", "2", "3"]
    assert isinstance(model[0], nn.Linear)
    assert (model[0].note, model[0].in_features) == ("mine", 64)
    assert model[0].bias is bias
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "3.bias"]
    assert {name for name in model.state_dict() if name.startswith("2.")} >= {
        "2.weight_values", "2.weight_index", "2.weight_offsets",
    }  # fmt: skip
    seen.clear()
    with torch.no_grad():
        model(ROWS)
    assert seen == ["after"]
    torch.testing.assert_close(model[0].weight, mlp()[0].weight.detach())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_densify_gives_the_dense_model_back(times, make):
    model, dense = make(), make()
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    pyprune.accelerate(model, ROWS)
    assert pyprune.densify(model) is model
    assert [type(one) for one in model.modules()] == [type(one) for one in dense.modules()]
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == [
        (name, flag) for (name, _), flag in zip(dense.named_parameters(), flags, strict=True)
    ]
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in dense.state_dict().items())
    assert [set(vars(one)) for one in model.modules()] == [set(vars(one)) for one in dense.modules()]


def test_accelerate_rounds_values_only_if_it_is_told(times):
    exact, rounded = mlp(), mlp()
    pyprune.accelerate(exact, ROWS)
    report = pyprune.accelerate(rounded, ROWS, dtype=torch.bfloat16)
    assert exact[0].weight_values.dtype == torch.float32
    assert rounded[0].weight_values.dtype == torch.bfloat16
    assert 1e-4 < report.difference < 0.05
    torch.testing.assert_close(pyprune.densify(rounded)[0].weight, mlp()[0].weight.bfloat16().float())


def test_accelerate_replaces_nothing_without_zeros(times):
    model = sparse(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), zeros=0)
    report = pyprune.accelerate(model, ROWS)
    assert not report.replaced
    assert [layer.reason for layer in report.layers] == ["no zeros"] * 2
    assert "2 weights without zeros stay dense\nnothing was replaced" in str(report)


@pytest.mark.parametrize(
    ("gain", "min_gain", "replaced"), [(1.05, 1.1, 0), (1.2, 1.1, 3), (1.2, 1.3, 0), (0.5, 1, 0)]
)
def test_accelerate_replaces_what_is_faster_by_min_gain(times, gain, min_gain, replaced):
    times |= dict.fromkeys(ops.SPARSE_LAYOUTS, 1 / gain)
    report = pyprune.accelerate(mlp(), ROWS, min_gain=min_gain)
    assert len(report.replaced) == replaced
    assert [layer.gain for layer in report.layers] == pytest.approx([gain] * 3)
    assert all(layer.reason.startswith("at best ") != bool(replaced) for layer in report.layers)


@pytest.mark.parametrize(("gain", "kept"), [(0.9, False), (1.01, False), (1.1, True)])
def test_accelerate_puts_all_back_if_the_whole_is_not_faster(times, gain, kept):
    times["sparse"] = 1 / gain
    model = mlp()
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    report = pyprune.accelerate(model, ROWS)
    assert bool(report.replaced) == kept
    if not kept:
        assert [layer.weight for layer in model if isinstance(layer, nn.Linear)] == weights
        assert {layer.reason for layer in report.layers} == {"the model as a whole was not faster"}
        assert report.speedup == 1
        assert "the model as a whole was not faster: 1,000.000 ms dense" in str(report)


def test_accelerate_times_each_shape_and_layers_that_are_alike_once(times, monkeypatch):
    timed = []
    instead = measure.in_turns
    monkeypatch.setattr(
        measure, "in_turns", lambda ways, **options: (timed.append(list(ways)), instead(ways, **options))[1]
    )
    model = sparse(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 8)))
    report = pyprune.accelerate(model, [ROWS, ROWS[:2]])
    assert len(report.replaced) == 5
    assert len(timed) == 4  # two kinds of layers, two shapes
    assert all(ways[0] == "dense" for ways in timed)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 64), nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x.argmax(-1) % 20) + x)


class Reads(nn.Module):
    """Looks at a weight as T5 does, and calls one layer of two."""

    def __init__(self):
        super().__init__()
        self.wo, self.other = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x):
        return self.wo(x.to(self.wo.weight.dtype))


class Sub(nn.Linear):
    pass


def few_zeros():
    return sparse(nn.Sequential(nn.Linear(64, 64)), zeros=0.1)


REASONS = {
    "tied": (Tied, {"embed.weight": "no operator takes weight of Embedding", "head": None}),
    "read": (Reads, {"wo": "read past its call", "other": "the examples do not call it"}),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(64, 4, 64, batch_first=True),
        {
            "self_attn.in_proj_weight": "read past its call",
            "linear1": "read past its call",
            "linear2": "read past its call",
        },
    ),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(64, 64))),
        {"0.parametrizations.weight.original": "no operator takes"},
    ),
    "a subclass": (lambda: nn.Sequential(Sub(64, 8)), {"0.weight": "no operator takes weight of Sub"}),
    "recurrent": (lambda: nn.LSTM(64, 8), {"weight_ih_l0": "no operator takes weight_ih_l0 of LSTM"}),
    "few zeros": (few_zeros, {"0": "10% zeros are too few"}),
    "float64": (lambda: nn.Sequential(nn.Linear(64, 8)).double(), {"0": "float64"}),
    "a convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3)),
        {"1.weight": "no operator takes weight of Conv2d"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), REASONS.values(), ids=REASONS)
def test_accelerate_says_why_weights_stay_dense(times, make, expected):
    model = make().eval()
    if make is not few_zeros:
        sparse(model)
    dtype = next(model.parameters()).dtype
    state = copy.deepcopy(model.state_dict())
    report = pyprune.accelerate(
        model, ROWS.reshape(1, 5, 64).to(dtype) if make is not REASONS["a convolution"][0] else ROWS
    )
    rows = {layer.name: layer for layer in report.layers}
    assert not report.replaced
    for name, reason in expected.items():
        if reason is None:
            assert name not in rows
        else:
            assert reason in rows[name].reason, rows[name].reason
            assert rows[name].layout == "dense"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_accelerate_leaves_what_takes_other_dtypes(times):
    model = sparse(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        report = pyprune.accelerate(model, ROWS)
    assert report.layers[1].reason == "it is called with other dtypes than its weight has"


ERRORS = {
    "training": (lambda: mlp().train(), {}, "model is in training mode"),
    "masks": (lambda: pyprune.prune(mlp(), MAGNITUDE, ratio=0.8), {}, "masks or gates on 0.weight"),
    "gates": (lambda: pyprune.prune(mlp(), "UNSTRUCTURED_HARD_CONCRETE").eval(), {}, "masks or gates on 0.weight"),
    "compiled": (lambda: torch.compile(mlp()), {}, "wraps what is to"),
    "meta": (lambda: mlp().to("meta"), {}, "meta"),
    "examples": (mlp, {"examples": (ROWS, ROWS)}, "examples is a tuple of 2"),
    "dtype": (mlp, {"dtype": torch.float64}, "dtype is torch.float64; allowed are None, torch.float32"),
    "min_gain": (mlp, {"min_gain": 0.5}, "min_gain is 0.5"),
    "verify": (mlp, {"dtype": torch.bfloat16, "verify": 1e-6}, "outputs differ by .* more than verify=1e-06"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(("make", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_accelerate_that_fails_leaves_the_model_as_it_was(times, make, options, message):
    model = make()
    before = {name: (id(value), value._version) for name, value in model.named_parameters()}
    classes = [type(one) for one in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        pyprune.accelerate(model, **{"examples": ROWS, **options})
    assert {name: (id(value), value._version) for name, value in model.named_parameters()} == before
    assert [type(one) for one in model.modules()] == classes


def test_accelerate_again_is_an_error(times):
    model = mlp()
    pyprune.accelerate(model, ROWS)
    with pytest.raises(ValueError, match=r"model is accelerated already \(0, 2, 3\)"):
        pyprune.accelerate(model, ROWS)
    pyprune.accelerate(pyprune.densify(model), ROWS)


def test_accelerate_takes_no_wrong_products(times, monkeypatch):
    monkeypatch.setattr(SparseLinear, "forward", lambda self, input: ops.sparse_linear(input, self.packed(), None))
    with pytest.raises(ValueError, match=r"outputs differ by .* more than verify=0.001; the model is as it was"):
        pyprune.accelerate(mlp(), ROWS)


# ---- copies, files, compilers ----


def accelerated():
    model = mlp()
    pyprune.accelerate(model, ROWS)
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated(times, copied):
    model = accelerated()
    other = copied(model)
    assert [type(one) for one in other.modules()] == [type(one) for one in model.modules()]
    with torch.no_grad():
        assert torch.equal(other(ROWS), model(ROWS))
    pyprune.densify(other)
    assert isinstance(model[0], SparseLayer)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
def test_compiled_models_have_one_operator_for_each_layer(times, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = accelerated()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (ROWS, ROWS[:3], ROWS.repeat(4, 1)):
            torch.testing.assert_close(compiled(rows), model(rows))


def test_exported_models_have_one_operator_for_each_layer(times):
    model = accelerated()
    batch = torch.export.Dim("batch", min=1, max=512)
    with torch.no_grad():
        program = torch.export.export(model, (ROWS,), dynamic_shapes=({0: batch},))
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("sparse_linear" in name for name in names) == 3
        for rows in (ROWS, ROWS.repeat(7, 1)):
            torch.testing.assert_close(program.module()(rows), model(rows))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_accelerated_models_take_other_dtypes(times, dtype, to):
    model = mlp()
    pyprune.accelerate(model, ROWS, dtype=dtype)
    with torch.no_grad():
        expected = model(ROWS)
        found = model.to(to)(ROWS.to(to))
    assert found.dtype == to
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.2)
    pyprune.densify(model)
    assert {parameter.dtype for parameter in model.parameters()} == {to}


def test_gradients_are_an_error(times):
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="grad"):
        accelerated()(ROWS.clone().requires_grad_()).sum().backward()


def test_state_dict_goes_into_a_model_that_was_accelerated_otherwise(times):
    model, other = accelerated(), sparse(mlp(), zeros=0.5)
    pyprune.accelerate(other, ROWS, dtype=torch.bfloat16)
    assert other[0].weight_values.shape != model[0].weight_values.shape
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ROWS), model(ROWS))
    assert other[0].weight_values.data_ptr() != model[0].weight_values.data_ptr()


def test_load_state_dict_says_that_a_state_is_dense(times):
    with pytest.raises(RuntimeError, match=r"2\.weight is a dense weight, and the layer is accelerated"):
        accelerated().load_state_dict(mlp().state_dict())


@pytest.mark.parametrize("make", [mlp, lambda: sparse(mlp(), zeros=0.4), lambda: mlp().to("meta"), accelerated])
def test_load_accelerated_needs_no_measuring(times, make):
    model, other = accelerated(), make()
    assert pyprune.load_accelerated(other, model.state_dict()) is other
    with torch.no_grad():
        assert torch.equal(other(ROWS), model(ROWS))
    assert torch.equal(pyprune.densify(other)[0].weight, mlp()[0].weight)


def test_load_accelerated_takes_a_file_with_weights_only(times, tmp_path):
    model = accelerated()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = pyprune.load_accelerated(mlp(), torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(ROWS), model(ROWS))


def changed(name, change):
    def damage(state):
        state[name] = change(state[name])

    return damage


DAMAGE = {
    "index beyond": changed("0.weight_index", lambda x: torch.full_like(x, 200)),
    "offsets beyond": changed("0.weight_offsets", lambda x: x + 1000),
    "offsets that fall": changed("0.weight_offsets", lambda x: x.flip(0)),
    "offsets below 0": changed("0.weight_offsets", lambda x: x - 1),
    "fewer offsets": changed("0.weight_offsets", lambda x: x[:-1]),
    "fewer values": changed("0.weight_values", lambda x: x[: len(x) // 2]),
    "no values": changed("0.weight_values", lambda x: x[:0]),
    "another dtype": changed("0.weight_values", lambda x: x.to(torch.complex64)),
    "wide index": changed("0.weight_index", lambda x: x.double()),
    "layout": changed("0.weight_layout", lambda x: x + 77),
    "no layout": changed("0.weight_layout", lambda x: x[:0]),
    "a list": changed("0.weight_values", lambda x: x.tolist()),
    "another shape": changed("0.weight_offsets", lambda x: x.reshape(1, -1)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("make", [mlp, accelerated])
def test_hostile_states_are_refused(times, damage, make):
    state = dict(accelerated().state_dict())
    damage(state)
    model = make()
    with torch.no_grad():
        before = model(ROWS)
    with pytest.raises(ValueError, match=r"state_dict has a damaged weight, 0\.weight"):
        pyprune.load_accelerated(model, state)
    if make is accelerated:
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            copy.deepcopy(model).load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(ROWS), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("3.bias"), "lacks 3.bias, and has nothing too much"),
        (lambda state: state.update(more=torch.ones(1)), "lacks nothing, and has more too much"),
        (lambda state: state.update({"3.bias": torch.ones(7)}), r"3.bias of shape \(7,\), and the model \(3,\)"),
        (lambda state: state.pop("0.weight_offsets"), "0.weight_offsets is missing"),
        (lambda state: state.update({"1.weight_layout": torch.ones(1)}), "and has 1.weight_layout too much"),
    ],
)
def test_load_accelerated_refuses_what_does_not_fit(times, change, message):
    state = dict(accelerated().state_dict())
    change(state)
    model = mlp()
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        pyprune.load_accelerated(model, state)
    assert [type(one) for one in model.modules()] == [type(one) for one in mlp().modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- 2:4 ----


def two_of_four(rows, columns, dtype=torch.float16):
    return torch.tensor([0, 1, 0, 2.0]).repeat(rows, columns // 4).to(dtype)


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (two_of_four(32, 64), ""),
        (two_of_four(32, 64, torch.bfloat16), ""),
        (two_of_four(32, 64, torch.float64), "torch has no 2:4 products of torch.float64"),
        (two_of_four(24, 64), "24 outputs are no multiple of 16"),
        (two_of_four(32, 8), "8 inputs are no multiple of 16"),
        (two_of_four(32, 64) + 1, "more than 2 of 4 neighbours are not zero"),
    ],
)
def test_2_of_4_says_what_does_not_fit(weight, problem):
    (candidate,) = [one for one in CANDIDATES if one.layout == "2:4"]
    assert candidate.problem(weight) == problem


def test_weights_on_a_gpu_become_2_of_4(times, monkeypatch):
    """Without a GPU: the candidate of CUDA is let run on the CPU, where torch's tensors are stood in for."""

    class Halves(torch.Tensor):
        pass

    (candidate,) = [one for one in CANDIDATES if one.layout == "2:4"]
    monkeypatch.setattr("pyprune.runtime.candidates.CANDIDATES", (dataclasses.replace(candidate, device="cpu"),))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone().as_subclass(Halves))
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensor", Halves)
    for name, value in {"_FORCE_CUTLASS": False, "packed": two_of_four(4, 4), "meta": None}.items():
        monkeypatch.setattr(Halves, name, value, raising=False)
    monkeypatch.setattr(Halves, "to_dense", lambda weight: weight.as_subclass(torch.Tensor).clone())
    times["2:4"] = 0.5
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 24)).to(torch.bfloat16).eval()
    with torch.no_grad():
        model[0].weight.copy_(two_of_four(32, 64))
        model[1].weight.copy_(two_of_four(24, 32))
    rows = ROWS.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(rows)
    report = pyprune.accelerate(model, rows)
    assert [layer.layout for layer in report.layers] == ["2:4", "dense"]
    assert (report.layers[0].bytes, report.layers[0].dense_bytes) == (32, 4096)
    assert report.layers[1].reason == "2:4: 24 outputs are no multiple of 16"
    assert type(model[0].weight) is not nn.Parameter
    with torch.no_grad():
        assert torch.equal(model(rows), expected)
    with pytest.raises(ValueError, match=r"model is accelerated already \(0.weight\)"):
        pyprune.accelerate(model, rows)
    assert not isinstance(pyprune.densify(model)[0].weight, Halves)
    assert torch.equal(model[0].weight, two_of_four(32, 64, torch.bfloat16))


# ---- the report ----


def test_report_is_a_table_and_json(times, tmp_path):
    report = pyprune.accelerate(sparse(nn.Sequential(nn.Linear(64, 48), nn.Flatten())), ROWS)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    (layer,) = report.layers
    assert lines[0] == "layer zeros layout gain bytes dense reason"
    assert lines[1] == f"0 75.0% {layer.layout} 2.00 x {layer.bytes:,} 12,288"
    assert lines[2].startswith("1 of 1 weights replaced: 1,000.000 ms before, 500.000 ms now, 2.00 x as fast with")
    assert layer.bytes < layer.dense_bytes
    report.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert (content["version"], content["layers"][0]["name"]) == (1, "0")
    assert "<pre" in report._repr_html_()


def test_benchmark_counts_the_weights_that_packed_ones_stand_for(times):
    model, dense = accelerated(), mlp()
    result = pyprune.benchmark(model, ROWS, dense=dense, seconds=0, memory=False)
    one, other = result.model, result.dense
    for cost in ("parameters", "nonzero", "macs", "macs_without_zeros", "sparse_file"):
        assert getattr(one, cost) == getattr(other, cost), cost
    assert one.memory < other.memory
    assert one.file == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert isinstance(model[0], SparseLayer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_packages_of_aotinductor_run_packed_weights(times, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = accelerated()
    program = torch.export.export(model, (ROWS,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for rows in (ROWS, ROWS[:2], ROWS.repeat(4, 1)):
        torch.testing.assert_close(package(rows), model(rows))
