"""The search against brute force, and the exchange by its own objective."""

import itertools

import numpy as np
import pytest

from pyprune.oneshot.unit_search import best_units, exchanged, units_within


def brute(importances, costs, budget):
    """Return the best sum of importances over all choices that keep a unit of each group."""
    best = -1.0
    choices = [
        [flags for flags in itertools.product([False, True], repeat=len(own)) if any(flags)] for own in importances
    ]
    for flags in itertools.product(*choices):
        if sum(cost * sum(own) for cost, own in zip(costs, flags, strict=True)) <= budget + 1e-9:
            best = max(best, worth(importances, [np.array(own) for own in flags]))
    return best


def lost(gradients, kept):
    return float(np.square(gradients[:, ~kept].sum(1)).sum())


def worth(importances, kept):
    return float(sum(own[flags].sum() for own, flags in zip(importances, kept, strict=True)))


def price(costs, kept):
    return sum(cost * int(flags.sum()) for cost, flags in zip(costs, kept, strict=True))


@pytest.mark.parametrize(
    "costs", [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (5.0, 0.7), (3.0, 1.0, 3.0, 1.0), (2.5, 2.5, 1.0)]
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.71, 0.9, 1.0])
def test_best_units_of_two_costs_are_those_of_brute_force(costs, share):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        importances = [generator.exponential(size=3 if len(costs) > 2 else 5) for _ in costs]
        budget = max(share * sum(c * len(own) for c, own in zip(costs, importances, strict=True)), sum(costs))
        kept = best_units(importances, costs, budget)
        assert all(flags.any() for flags in kept)
        assert price(costs, kept) <= budget + 1e-9
        assert worth(importances, kept) == pytest.approx(brute(importances, costs, budget))


def test_best_units_of_many_costs_come_close_to_brute_force():
    for seed in range(10):
        generator = np.random.default_rng(seed)
        costs = generator.uniform(0.5, 4, 4)
        importances = [generator.exponential(size=3) for _ in costs]
        budget = 0.6 * 3 * costs.sum()
        kept = best_units(importances, costs, budget)
        assert price(costs, kept) <= budget
        assert worth(importances, kept) >= 0.95 * brute(importances, costs, budget)


@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_best_units_with_ties_lose_the_first(cost):
    (kept,) = best_units([np.ones(4)], [cost], 2.0)
    assert kept.tolist() == ([True] * 4 if cost == 0 else [False, False, True, True])


def test_units_within_meets_a_budget_where_costs_multiply():
    importances = [np.arange(1.0, 9.0), np.arange(1.0, 9.0)]

    def left(kept):  # a chain of three layers
        a, b = (int(flags.sum()) for flags in kept)
        return 4 * a + a * b + 4 * b

    whole = left([np.ones(8, bool)] * 2)
    costs = [12.0, 12.0]  # each alone
    for share in (0.2, 0.4, 0.5, 0.8):
        kept = units_within(importances, costs, left, share * whole)
        assert left(kept) <= share * whole
        sums = (
            sum(range(9 - a, 9)) + sum(range(9 - b, 9))
            for a in range(1, 9)
            for b in range(1, 9)
            if 4 * a + a * b + 4 * b <= share * whole
        )
        assert worth(importances, kept) >= 0.8 * max(sums)
    with pytest.raises(ValueError, match=r"with one unit of each group 0\.07"):
        units_within(importances, costs, left, 0.01 * whole)
    assert all(flags.all() for flags in units_within(importances, costs, left, whole))


def test_exchanged_never_loses_more_and_keeps_as_many():
    better = 0
    for seed in range(30):
        generator = np.random.default_rng(seed)
        gradients = generator.normal(size=(6, 12)) * generator.exponential(size=12)
        order = np.square(gradients).sum(0).argsort()
        for count in (0, 1, 5, 11, 12):
            kept = np.ones(12, bool)
            kept[order[:count]] = False
            new = exchanged(gradients, kept)
            assert new.sum() == kept.sum()
            assert lost(gradients, new) <= lost(gradients, kept) * (1 + 1e-12)
            better += lost(gradients, new) < 0.9 * lost(gradients, kept)
    assert better > 20


def test_exchanged_is_the_scan_of_the_paper():
    for seed in range(10):
        gradients = np.random.default_rng(seed).normal(size=(5, 9))
        order = np.square(gradients).sum(0).argsort()
        gone = order[:4].tolist()
        kept = np.ones(9, bool)
        kept[gone] = False
        for unit in order[4:].tolist():
            gone.append(unit)
            norms = [np.square(gradients[:, [j for j in gone if j != i]].sum(1)).sum() for i in gone]
            del gone[int(np.argmin(norms))]
        assert sorted(np.flatnonzero(~exchanged(gradients, kept))) == sorted(gone)
