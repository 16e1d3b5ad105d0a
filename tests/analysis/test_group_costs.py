import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from pyprune import SensitivityResult, SensitivityTarget, allocation_from_sensitivity, coupled_groups
from pyprune.analysis.sensitivity_allocation import rising

RATIOS = [ratio / 10 for ratio in range(1, 10)]
RULES = pytest.mark.parametrize("rule", ["least", "equal"])


class Heads(nn.Module):
    """Attention with 4 heads of 8, and an MLP."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 30, 3, padding=1), nn.Conv2d(30, 20, 1)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc((x + self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 3)), torch.ones(
        1, 8
    )


MODELS = {
    "mlp": mlp,
    "residual": lambda: (Residual(), torch.ones(1, 3, 9, 9)),
    "heads": lambda: (Heads(), torch.ones(1, 5, 32)),
}


def of_model(name, *, exponent=2.0):
    """Groups of a model, and an analysis in which every group is more fragile than the one before."""
    torch.manual_seed(0)
    groups = coupled_groups(*MODELS[name]())
    targets = {
        group.name: SensitivityTarget(100, len(group), {r: 1 - (i + 1) * r**exponent for r in RATIOS})
        for i, group in enumerate(groups)
        if group.is_exact
    }
    return groups, SensitivityResult(1.0, targets)


def cost(groups, what, counts):
    kept = [np.arange(len(group)) >= counts.get(group.name, 0) for group in groups]
    return groups.macs(kept) if what == "target_macs" else groups.parameters(kept)


def counts_of(groups, ratios):
    sizes = {group.name: len(group) for group in groups}
    return {name: round(ratio * sizes[name]) for name, ratio in ratios.items()}


@RULES
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("what", ["target_macs", "target_params"])
@pytest.mark.parametrize("name", MODELS)
def test_allocation_meets_a_cost_from_below_within_a_unit(name, what, round_to, rule):
    groups, result = of_model(name)
    whole = cost(groups, what, {})
    for left in (0.9, 0.6, 0.4):
        ratios = allocation_from_sensitivity(result, **{what: left}, groups=groups, round_to=round_to, rule=rule)
        counts = counts_of(groups, ratios)
        assert cost(groups, what, counts) <= left * whole
        for group in groups:
            step = round_to if group.what == "channels" else 1
            if count := counts.get(group.name):
                assert (len(group) - count) % step == 0
                assert cost(groups, what, {**counts, group.name: max(0, count - step)}) > left * whole


def test_allocation_counts_macs_of_layers_that_shrink_on_both_sides():
    groups, result = of_model("mlp")
    first, second = counts_of(groups, allocation_from_sensitivity(result, target_macs=0.5, groups=groups)).values()
    macs = 8 * (24 - first) + (24 - first) * (40 - second) + (40 - second) * 3
    assert macs == cost(groups, "target_macs", {"0.weight": first, "2.weight": second})
    assert macs <= 0.5 * (8 * 24 + 24 * 40 + 40 * 3)


def test_equal_drops_are_the_smallest_that_reach_a_cost():
    groups, result = of_model("mlp")
    allowed = 0.5 * cost(groups, "target_macs", {})
    ratios = allocation_from_sensitivity(result, target_macs=0.5, groups=groups, rule="equal")

    def drop(name, count, size):
        scores = {0.0: 1.0} | dict(result.targets[name].scores)
        return 1 - np.interp(count / size, list(scores), list(scores.values()))

    sizes = {"0.weight": 24, "2.weight": 40}
    worst = {
        (one, two): max(drop("0.weight", one, 24), drop("2.weight", two, 40))
        for one, two in product(range(22), range(37))
        if cost(groups, "target_macs", {"0.weight": one, "2.weight": two}) <= allowed
    }
    counts = counts_of(groups, ratios)
    assert max(drop(name, counts[name], sizes[name]) for name in sizes) == pytest.approx(min(worst.values()))


def test_least_drops_are_near_the_least_that_reach_a_cost():
    groups, result = of_model("mlp")
    allowed = 0.5 * cost(groups, "target_macs", {})

    def total(one, two):
        return sum(
            1 - np.interp(count / size, [0, *RATIOS], [1, *result.targets[name].scores.values()])
            for name, count, size in (("0.weight", one, 24), ("2.weight", two, 40))
        )

    best = min(
        total(one, two)
        for one, two in product(range(22), range(37))
        if cost(groups, "target_macs", {"0.weight": one, "2.weight": two}) <= allowed
    )
    ratios = allocation_from_sensitivity(result, target_macs=0.5, groups=groups)
    assert total(*counts_of(groups, ratios).values()) <= 1.1 * best


def test_allocation_of_a_saved_analysis_is_the_same(tmp_path):
    groups, result = of_model("residual")
    result.to_json(tmp_path / "scores.json")
    again = SensitivityResult.from_json(tmp_path / "scores.json")
    for left in (0.7, 0.4):
        wanted = allocation_from_sensitivity(result, target_macs=left, groups=groups, rule="equal")
        assert allocation_from_sensitivity(again, target_macs=left, groups=groups, rule="equal") == wanted
    assert wanted["stem.weight"] > 0


def test_allocation_of_a_whole_model_removes_nothing():
    groups, result = of_model("mlp")
    assert not any(allocation_from_sensitivity(result, target_params=1, groups=groups).values())


def test_rising_is_the_isotonic_regression():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        values = rng.normal(size=count).tolist()
        wanted = [
            max(min(np.mean(values[a : b + 1]) for b in range(i, count)) for a in range(i + 1)) for i in range(count)
        ]
        assert rising(values) == pytest.approx(wanted)


def test_monotonic_fit_is_not_led_by_one_lucky_measurement():
    noisy = {0.2: 0.7, 0.4: 0.6, 0.6: 0.95, 0.8: 0.4}
    steady = {0.2: 0.95, 0.4: 0.9, 0.6: 0.85, 0.8: 0.8}
    result = SensitivityResult(
        1.0, {"a": SensitivityTarget(100, 100, noisy), "b": SensitivityTarget(100, 100, steady)}
    )
    assert allocation_from_sensitivity(result, 0.3) == {"a": 0.6, "b": 0.0}
    fitted = allocation_from_sensitivity(result, 0.3, monotonic_fit=True)
    assert fitted == {"a": 0.0, "b": 0.6}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"target_macs": 0.01},
            ValueError,
            r"target_macs is 0.01, but within max_ratio 0.95 and .* at least 0.\d+ is left",
        ),
        ({"target_macs": 0.5, "max_drop": 0.01}, ValueError, r"max_drop 0.01, max_ratio .* is left"),
        ({"target_macs": 0.0}, ValueError, r"target_macs is 0.0.*in \(0, 1\]"),
        ({"target_params": 1.5}, ValueError, r"target_params is 1.5"),
        ({"target_params": math.nan}, ValueError, r"target_params is nan"),
        ({"target_macs": 0.5, "groups": None}, TypeError, r"groups is None.*coupled_groups\(model, examples\)"),
        (
            {"target_macs": 0.5, "target_ratio": 0.5},
            ValueError,
            "target_ratio and target_macs of .* give one of them",
        ),
        ({}, ValueError, "none of target_ratio, target_params, target_macs given"),
        ({"target_ratio": 0.5}, ValueError, "groups and round_to are for target_params and target_macs"),
        ({"target_ratio": 0.5, "groups": None, "round_to": 8}, ValueError, "groups and round_to"),
        ({"target_macs": 0.5, "round_to": 0}, ValueError, "round_to is 0"),
        ({"target_macs": 0.5, "monotonic_fit": 1}, TypeError, "monotonic_fit is 1"),
    ],
)
def test_allocation_of_costs_says_what_is_wrong(arguments, error, message):
    groups, result = of_model("mlp")
    with pytest.raises(error, match=message):
        allocation_from_sensitivity(result, **({"groups": groups} | arguments))


def test_allocation_refuses_groups_of_another_model():
    _, result = of_model("mlp")
    other = coupled_groups(nn.Sequential(nn.Linear(8, 25), nn.ReLU(), nn.Linear(25, 3)), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"result has the target 0.weight of 24 units, and groups has not"):
        allocation_from_sensitivity(result, target_macs=0.5, groups=other)
