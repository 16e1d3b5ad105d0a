import math
import random
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, SensitivityResult, SensitivityTarget, allocation_from_sensitivity, importance, scope

RULES = pytest.mark.parametrize("rule", ["least", "equal"])
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


def test_least_drops_take_the_cheapest_weights_first():
    # A weight of the first piece of a costs 0.1, of the second 0.4; of b 0.2 and 0.5 (per 500).
    result = curves(a={0.5: 0.1, 0.9: 0.42}, b={0.5: 0.2, 0.9: 0.6})
    assert allocation_from_sensitivity(result, 0.2) == {"a": 0.4, "b": 0.0}
    assert allocation_from_sensitivity(result, 0.4) == {"a": 0.5, "b": 0.3}
    assert allocation_from_sensitivity(result, 0.6) == {"a": 0.7, "b": 0.5}
    assert allocation_from_sensitivity(result, 0.8) == {"a": 0.9, "b": 0.7}


def test_least_drops_spare_small_targets():
    drops = {ratio: ratio**2 for ratio in RATIOS}
    scores = {ratio: 1 - drop for ratio, drop in drops.items()}
    result = SensitivityResult(
        1.0, {"large": SensitivityTarget(100_000, 100_000, scores), "small": SensitivityTarget(100, 100, scores)}
    )
    ratios = allocation_from_sensitivity(result, 0.5)
    assert ratios["small"] == 0.0
    assert ratios["large"] == 0.5005
    assert allocation_from_sensitivity(result, 0.5, rule="equal") == {"large": 0.5, "small": 0.5}


def test_least_drops_are_the_least_that_a_search_finds():
    noise = random.Random(1)
    grid = np.linspace(0, 0.9, 181)
    for _ in range(10):
        sizes = [noise.randrange(1000, 9000) for _ in range(3)]
        # Convex curves, between whose measured points the straight line is all that is known.
        drops = [list(accumulate(sorted(noise.random() for _ in RATIOS))) for _ in sizes]
        scores = [{ratio: 1 - drop for ratio, drop in zip(RATIOS, of, strict=True)} for of in drops]
        targets = [SensitivityTarget(size, size, of) for size, of in zip(sizes, scores, strict=True)]
        wanted = noise.uniform(0.1, 0.8)
        result = SensitivityResult(1.0, dict(zip("abc", targets, strict=True)))
        ratios = allocation_from_sensitivity(result, wanted)

        def cost(ratio, drop):
            return np.interp(ratio, [0, *RATIOS], [0, *drop])

        first, second = np.meshgrid(grid, grid)
        third = (wanted * sum(sizes) - first * sizes[0] - second * sizes[1]) / sizes[2]
        total = cost(first, drops[0]) + cost(second, drops[1]) + cost(third, drops[2])
        best = total[(third >= 0) & (third <= 0.9)].min()
        assert sum(cost(ratios[name], drop) for name, drop in zip("abc", drops, strict=True)) <= best + 0.005


def test_least_drops_see_behind_a_dip():
    result = curves(dip={0.3: 0.5, 0.6: 0.01, 0.9: 0.02}, smooth={0.3: 0.1, 0.6: 0.2, 0.9: 0.3})
    assert allocation_from_sensitivity(result, 0.45) == {"dip": 0.9, "smooth": 0.0}
    # What costs much at first is worth it, if little comes after.
    result = curves(step={0.3: 0.2, 0.9: 0.2}, smooth={0.3: 0.1, 0.6: 0.2, 0.9: 0.3})
    assert allocation_from_sensitivity(result, 0.45) == {"step": 0.9, "smooth": 0.0}


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_equal_drops_are_the_same_for_all(higher_is_better):
    # Straight curves, drop = ratio * slope: equal drops mean ratios in proportion 4 : 1, and 0.5 in the mean.
    result = curves(
        robust={ratio: 0.1 * ratio for ratio in RATIOS},
        fragile={ratio: 0.4 * ratio for ratio in RATIOS},
        higher_is_better=higher_is_better,
    )
    assert allocation_from_sensitivity(result, 0.5, rule="equal") == {"robust": 0.8, "fragile": 0.2}


def test_equal_drops_meet_the_drop_that_solves_for_the_target():
    # drop = ratio^2 and 4 ratio^2: ratios sqrt(d) and sqrt(d) / 2, which are 0.75 together at d = 1/4.
    fine = [ratio / 1000 for ratio in range(1, 1000)]
    result = curves(a={ratio: ratio**2 for ratio in fine}, b={ratio: 4 * ratio**2 for ratio in fine})
    assert allocation_from_sensitivity(result, 0.375, rule="equal") == pytest.approx({"a": 0.5, "b": 0.25}, abs=0.001)


def test_equal_drops_count_weights_not_targets():
    result = SensitivityResult(
        1.0,
        {
            "large": SensitivityTarget(9000, 9000, {0.5: 0.75, 0.9: 0.5}),
            "small": SensitivityTarget(1000, 1000, {0.5: 0.95, 0.9: 0.75}),
        },
    )
    ratios = allocation_from_sensitivity(result, 0.54, rule="equal")
    assert ratios == {"large": 0.5, "small": 0.9}
    assert lost(result, ratios) == 0.54


def test_equal_drops_see_behind_a_dip_and_a_plateau():
    result = curves(
        dip={0.3: 0.5, 0.6: 0.0, 0.9: 0.1},
        plateau={0.3: 0.1, 0.6: 0.1, 0.9: 0.1},
        steep={0.3: 0.5, 0.6: 0.9, 0.9: 1.0},
    )
    # At a drop of 0.1 dip and plateau lose 0.9, and steep 0.06.
    assert allocation_from_sensitivity(result, 0.62, rule="equal") == {"dip": 0.9, "plateau": 0.9, "steep": 0.06}
    # The plateau is taken part of the way if it is too much as a whole.
    ratios = allocation_from_sensitivity(result, 0.5, rule="equal")
    assert ratios["dip"] > 0.85
    assert ratios["plateau"] == pytest.approx(1.5 - ratios["dip"] - ratios["steep"], abs=1e-9)
    assert ratios["steep"] <= 0.06


@RULES
def test_allocation_of_targets_that_cost_nothing_is_even(rule):
    flat = dict.fromkeys(RATIOS, -0.01)
    assert allocation_from_sensitivity(curves(a=flat, b=flat), 0.3, rule=rule) == {"a": 0.3, "b": 0.3}
    assert allocation_from_sensitivity(curves(a=flat, b=flat), 0.9, rule=rule) == {"a": 0.9, "b": 0.9}
    assert allocation_from_sensitivity(curves(a=flat, b=flat), 0.0, rule=rule) == {"a": 0.0, "b": 0.0}


@RULES
def test_allocation_ends_at_what_was_measured(rule):
    result = curves(a={0.3: 0.1, 0.6: 0.3}, b={0.3: 0.0, 0.9: math.inf})
    # a was not pruned beyond 0.6, and b's infinite loss is none that could be tolerated.
    with pytest.raises(ValueError, match=r"target_ratio is 0.5.*can lose 0.4500 of their weights"):
        allocation_from_sensitivity(result, 0.5, rule=rule)
    assert allocation_from_sensitivity(result, 0.45, rule=rule) == {"a": 0.6, "b": 0.3}


@RULES
def test_allocation_keeps_to_max_drop_and_max_ratio(rule):
    result = curves(a={ratio: 0.1 * ratio for ratio in RATIOS}, b={ratio: 0.4 * ratio for ratio in RATIOS})
    with pytest.raises(ValueError, match=r"max_drop 0.08.*can lose 0.5000 of their weights"):
        allocation_from_sensitivity(result, 0.6, rule=rule, max_drop=0.08)
    assert allocation_from_sensitivity(result, 0.5, rule=rule, max_drop=0.08) == {"a": 0.8, "b": 0.2}
    assert allocation_from_sensitivity(result, 0.5, rule=rule, max_ratio=0.55) == {"a": 0.55, "b": 0.45}
    with pytest.raises(ValueError, match=r"max_ratio 0.55.*can lose 0.5500"):
        allocation_from_sensitivity(result, 0.6, rule=rule, max_ratio=0.55)


@RULES
def test_allocation_is_off_by_less_than_a_unit(rule):
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
            ratios = allocation_from_sensitivity(result, wanted, rule=rule)
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
        ({"rule": "fair"}, ValueError, "rule is 'fair'"),
        ({"max_ratio": 1}, ValueError, "max_ratio is 1"),
        ({"max_drop": -0.1}, ValueError, "max_drop is -0.1"),
        ({"max_drop": math.nan}, ValueError, "max_drop is nan"),
    ],
)
def test_allocation_says_what_is_wrong(arguments, error, message):
    good = {"result": curves(a={0.5: 0.1}), "target_ratio": 0.3}
    with pytest.raises(error, match=message):
        allocation_from_sensitivity(**(good | arguments))
