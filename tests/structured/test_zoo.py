"""What `make zoo` judges, as far as it takes no other library than those of the tests, and the judge itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pyprune

by_hand = pytest.importorskip("zoo.by_hand", reason="the benchmarks are not beside these tests")
from zoo import masking, report, shake, transformers_models  # noqa: E402
from zoo.case import draw  # noqa: E402
from zoo.judge import difference, judge  # noqa: E402

# One of each kind of attention, of experts, and of how a layer is written down.
TRANSFORMERS = (
    "llama",
    "mixtral",
    "qwen3",
    "qwen3_moe",
    "gemma3",
    "gpt2",
    "falcon",
    "mamba",
    "t5",
    "whisper",
    "albert",
    "deberta_v2",
)
CASES = {**by_hand.CASES, **{name: transformers_models.CASES[name] for name in TRANSFORMERS}}
# A size stands as a number in its forward.
HELD = {"hard_coded_view"}
# Of torch and transformers, and ours of what is held, which is asserted on.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CASES)
def test_shrink_leaves_the_masked_model(name):
    seen = judge(CASES[name], export=False)
    assert seen["finite"]
    assert seen["equal"], f"outputs differ by {seen['error']:.1e}"
    assert seen["rebuilt"] is True
    assert seen["trains"] is True
    assert seen.get("tokens", True) is True
    assert bool(seen["held"]) == (name in HELD), seen["held"]
    if name not in HELD:
        assert seen["moved"] > 1e-2
        assert seen["kept"] == []


def test_judge_sees_a_wrong_output(monkeypatch):
    right = pyprune.shrink

    def wrong(model, examples, **options):
        shrunk = right(model, examples, **options)
        with torch.no_grad():
            model.w2[0] *= 1.1
        return shrunk

    monkeypatch.setattr(pyprune, "shrink", wrong)
    seen = judge(CASES["bare_parameters"], export=False)
    assert not seen["equal"]
    assert not report.good({**seen, "export": True})


def test_judge_sees_what_shrink_left(monkeypatch):
    monkeypatch.setattr(pyprune, "shrink", lambda model, examples, optimizer: SHRUNK)
    monkeypatch.setattr(pyprune, "rebuild", lambda model, plan: model)
    monkeypatch.setattr(pyprune, "Plan", SimpleNamespace(from_json=json.loads))
    seen = judge(CASES["bare_parameters"], export=False)
    assert (seen["equal"], seen["rebuilt"], seen["left"]) == (True, True, 1.0)
    assert seen["kept"] == ["gate", "w1", "w2", "w3"]


SHRUNK = SimpleNamespace(held=[], kept=[], stale=[], guessed=[], plan=SimpleNamespace(to_json=lambda: "{}"))


@pytest.mark.parametrize(
    ("got", "wanted", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        ([0.0], [0.0], 0.0),
    ],
)
def test_difference_is_relative_to_the_largest_value(got, wanted, expected):
    assert difference([torch.tensor(got)], [torch.tensor(wanted)]) == pytest.approx(expected)


class Group(SimpleNamespace):
    def __len__(self):
        return self.units


def group(units, *members, is_exact=True):
    members = [SimpleNamespace(name=name, dim=dim, indices=np.array(rows)) for name, dim, rows in members]
    return Group(units=units, members=members, is_exact=is_exact)


def test_mask_units_writes_zeros_into_all_members_but_statistics():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    draw(lambda: shake.shake(model, torch.randn(8, 2)), 0)
    pairs = [[0, 2], [1, 3]]
    members = [("0.weight", 0, pairs), ("0.bias", 0, pairs), ("1.running_mean", 0, pairs), ("2.weight", 1, pairs)]
    groups = [
        group(2, *members),
        group(1, ("2.weight", 0, [[0]])),
        group(2, ("2.bias", 0, [[0], [1]]), is_exact=False),
    ]
    chosen = masking.choose_half(groups)
    assert [len(units) for _, units in chosen] == [1]
    gone = pairs[chosen[0][1][0]]
    before = {name: tensor.clone() for name, tensor in masking.tensors_of(model).items()}
    masking.mask_units(model, chosen)
    for name, tensor in masking.tensors_of(model).items():
        expected = before[name]
        if name in ("0.weight", "0.bias"):
            expected[gone] = 0
        elif name == "2.weight":
            expected[:, gone] = 0
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    sizes = masking.expected_sizes(model, chosen)
    assert (sizes["0.weight"], sizes["2.weight"], sizes["1.running_mean"]) == ((2, 2), (3, 2), (2,))


def test_shake_leaves_nothing_at_zero_or_one():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.register_parameter("layer_scale", nn.Parameter(torch.full((8, 1, 1), 1e-6)))
    nn.init.zeros_(model[3].weight)
    shake.shake(model, draw(lambda: torch.randn(8, 6), 1))
    for name, tensor in masking.tensors_of(model).items():
        if tensor.is_floating_point():
            assert not (tensor == 0).any(), name
            assert not (tensor == 1).any(), name
    assert 0.3 < model.layer_scale.mean() < 2
    assert model[3].weight.std() > 0.1


def test_page_has_bars_and_a_row_for_each_model():
    seen = {
        "equal": True,
        "error": 2e-7,
        "left": 0.4,
        "held": [],
        "kept": [],
        "trains": True,
        "export": True,
        "rebuilt": True,
    }
    seen.update(
        rebuilt_elsewhere=True,
        parameters=1000,
        exact=3,
        groups=4,
        forward_s=0.1,
        trace_s=0.2,
        shrink_s=0.3,
        operations=9,
    )
    results = {
        "by_hand/good": seen,
        "by_hand/wrong": {**seen, "equal": False, "error": 0.5},
        "timm/held": {**seen, "held": ["12 groups of a|b stay"]},
        "torchvision/failed": {"failed": "no answer in 3 s"},
        "unknown/absent": {"missing": "No module named 'absent'"},
    }
    bars = {what: got for what, got, _ in report.bars(results)}
    assert bars["public: run, equal, train, export"] == "2 of 4"
    assert bars["public: with no held group"] == "1 of 4"
    assert bars["public: wrong outputs"] == "1"
    page = report.page(results)
    for line in (
        "| good | 1,000 | 0.40 | 2e-07 |",
        "**5e-01**",
        "| failed | no answer in 3 s |",
        "a\\|b stay",
        "absent",
    ):
        assert line in page
