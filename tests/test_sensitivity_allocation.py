import math
import random

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, SensitivityResult, SensitivityTarget, allocation_from_sensitivity, importance, scope

RATIOS = [ratio / 10 for ratio in range(1, 10)]


def curves(baseline=1.0, units=None, higher_is_better=True, **drops):
    """A result with the drop of each target at each ratio."""
    sign = -1 if higher_is_better else 1
    targets = {
        name: SensitivityTarget(1000, units or 1000, {ratio: baseline + sign * drop for ratio, drop in of.items()})
        for name, of in drops.items()
    }
    return SensitivityResult(baseline, targets, higher_is_better)


def lost(result, ratios):
    targets = result.targets
    return sum(round(ratios[name] * targets[name].units) * targets[name].weights / targets[name].units
               for name in targets) / sum(target.weights for target in targets.values())  # fmt: skip


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_allocation_makes_targets_cost_the_same(higher_is_better):
    # Straight curves, drop = ratio * slope: equal drops mean ratios in proportion 4 : 1, and 0.5 in the mean.
    result = curves(
        robust={ratio: 0.1 * ratio for ratio in RATIOS},
        fragile={ratio: 0.4 * ratio for ratio in RATIOS},
        higher_is_better=higher_is_better,
    )
    assert allocation_from_sensitivity(result, 0.5) == {"robust": 0.8, "fragile": 0.2}


def test_allocation_of_concave_curves_meets_the_drop_that_solves_for_the_target():
    # drop = ratio^2 and 4 ratio^2: ratios sqrt(d) and sqrt(d) / 2, which are 0.75 together at d = 1/4.
    fine = [ratio / 1000 for ratio in range(1, 1000)]
    result = curves(a={ratio: ratio**2 for ratio in fine}, b={ratio: 4 * ratio**2 for ratio in fine})
    assert allocation_from_sensitivity(result, 0.375) == pytest.approx({"a": 0.5, "b": 0.25}, abs=0.001)


def test_allocation_counts_weights_not_targets():
    result = SensitivityResult(
        1.0,
        {
            "large": SensitivityTarget(9000, 9000, {0.5: 0.75, 0.9: 0.5}),
            "small": SensitivityTarget(1000, 1000, {0.5: 0.95, 0.9: 0.75}),
        },
    )
    ratios = allocation_from_sensitivity(result, 0.54)
    assert ratios == {"large": 0.5, "small": 0.9}
    assert lost(result, ratios) == 0.54


def test_allocation_sees_behind_a_dip_and_a_plateau():
    result = curves(
        dip={0.3: 0.5, 0.6: 0.0, 0.9: 0.1},
        plateau={0.3: 0.1, 0.6: 0.1, 0.9: 0.1},
        steep={0.3: 0.5, 0.6: 0.9, 0.9: 1.0},
    )
    # At a drop of 0.1 dip and plateau lose 0.9, and steep 0.06.
    assert allocation_from_sensitivity(result, 0.62) == {"dip": 0.9, "plateau": 0.9, "steep": 0.06}
    # The plateau is taken part of the way if it is too much as a whole.
    ratios = allocation_from_sensitivity(result, 0.5)
    assert ratios["dip"] > 0.85
    assert ratios["plateau"] == pytest.approx(1.5 - ratios["dip"] - ratios["steep"], abs=1e-9)
    assert ratios["steep"] <= 0.06


def test_allocation_of_targets_that_cost_nothing_is_exact():
    flat = dict.fromkeys(RATIOS, -0.01)
    assert allocation_from_sensitivity(curves(a=flat, b=flat), 0.3) == {"a": 0.3, "b": 0.3}
    assert allocation_from_sensitivity(curves(a=flat, b=flat), 0.9) == {"a": 0.9, "b": 0.9}
    assert allocation_from_sensitivity(curves(a=flat, b=flat), 0.0) == {"a": 0.0, "b": 0.0}


def test_allocation_ends_at_what_was_measured():
    result = curves(a={0.3: 0.1, 0.6: 0.3}, b={0.3: 0.0, 0.9: math.inf})
    # a was not pruned beyond 0.6, and b's infinite loss is none that could be tolerated.
    with pytest.raises(ValueError, match=r"target_ratio is 0.5.*can lose 0.4500 of their weights"):
        allocation_from_sensitivity(result, 0.5)
    assert allocation_from_sensitivity(result, 0.45) == {"a": 0.6, "b": 0.3}


def test_allocation_keeps_to_max_drop_and_max_ratio():
    result = curves(a={ratio: 0.1 * ratio for ratio in RATIOS}, b={ratio: 0.4 * ratio for ratio in RATIOS})
    with pytest.raises(ValueError, match=r"max_drop 0.08.*can lose 0.5000 of their weights"):
        allocation_from_sensitivity(result, 0.6, max_drop=0.08)
    assert allocation_from_sensitivity(result, 0.5, max_drop=0.08) == {"a": 0.8, "b": 0.2}
    assert allocation_from_sensitivity(result, 0.5, max_ratio=0.55) == {"a": 0.55, "b": 0.45}
    with pytest.raises(ValueError, match=r"max_ratio 0.55.*can lose 0.5500"):
        allocation_from_sensitivity(result, 0.6, max_ratio=0.55)


def test_allocation_is_off_by_less_than_a_unit():
    noise = random.Random(0)
    for units in (7, 50, 1000):
        names = [f"w{i}" for i in range(20)]
        result = curves(
            units=units,
            **{
                name: {ratio: noise.uniform(0, 1) * ratio ** noise.uniform(0.3, 5) for ratio in RATIOS}
                for name in names
            },
        )
        for wanted in (0.1, 0.35, 0.5, 0.8):
            ratios = allocation_from_sensitivity(result, wanted)
            assert abs(lost(result, ratios) - wanted) <= 0.5 / units / len(names) + 1e-12
            assert all(0 <= ratio <= 0.9 for ratio in ratios.values())


def test_allocation_is_what_prune_removes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(31, 17), nn.ReLU(), nn.Linear(17, 13), nn.Linear(13, 3))
    sizes = [31 * 17, 17 * 13, 13 * 3]
    targets = {
        f"{i}.weight": SensitivityTarget(size, size, {ratio: 1 - ratio / (slope + 1) for ratio in RATIOS})
        for slope, (i, size) in enumerate(zip((0, 2, 3), sizes, strict=True))
    }
    ratios = allocation_from_sensitivity(SensitivityResult(1.0, targets), 0.5)
    pyprune.prune(model, Method(importance.magnitude(), scope=scope.tensor()), ratio=ratios)
    zeros = sum(tensor.pruned_units for tensor in pyprune.pruning_statistic(model).pruned_tensors)
    assert zeros == round(0.5 * sum(sizes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"result": {}}, TypeError, "result is a dict"),
        ({"result": SensitivityResult(1.0, {})}, ValueError, "no targets"),
        ({"target_ratio": 1.0}, ValueError, r"target_ratio is 1.0.*\[0, 1\)"),
        ({"target_ratio": "half"}, TypeError, "target_ratio is 'half'"),
        ({"max_ratio": 1}, ValueError, "max_ratio is 1"),
        ({"max_drop": -0.1}, ValueError, "max_drop is -0.1"),
        ({"max_drop": math.nan}, ValueError, "max_drop is nan"),
    ],
)
def test_allocation_says_what_is_wrong(arguments, error, message):
    good = {"result": curves(a={0.5: 0.1}), "target_ratio": 0.3}
    with pytest.raises(error, match=message):
        allocation_from_sensitivity(**(good | arguments))
