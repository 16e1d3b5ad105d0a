import numpy as np
import pytest
import torch

from pyprune.structured.elimination import Reading, eliminate
from pyprune.structured.least_squares import Sums


def reading(units, entries, outputs, seed, bias=False, samples=80):
    """A layer whose inputs depend on each other, and its samples."""
    rng = np.random.default_rng(seed)
    count = units * entries + 2  # two inputs in no unit
    x = rng.standard_normal((samples, count)) @ rng.standard_normal((count, count))
    weight = rng.standard_normal((count, outputs))
    y = x @ weight + bias * rng.standard_normal(outputs)
    order = rng.permutation(count)[: units * entries].reshape(units, entries)
    sums = Sums(1, count, outputs)
    sums.add(torch.tensor(x)[None], torch.tensor(y)[None])
    return Reading(sums.system(bias), torch.tensor(weight)[None], torch.tensor(order)), x, y


def error(layers, gone, bias):
    """Sum of squares that least squares leaves without some units; what is in no unit stays."""
    total = 0.0
    for one, x, y in layers:
        wanted, inputs = y, np.delete(x, one.units.numpy()[gone].flatten(), 1)
        if bias:
            wanted, inputs = wanted - wanted.mean(0), inputs - inputs.mean(0)
        solution = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
        total += np.square(wanted - inputs @ solution).sum()
    return total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("units", "shapes"), [(6, [(1, 4)]), (5, [(3, 2)]), (6, [(1, 4), (2, 3)])])
def test_eliminate_takes_what_least_squares_can_best_do_without(units, shapes, bias):
    layers = [reading(units, *shape, seed, bias) for seed, shape in enumerate(shapes)]
    scores = eliminate([one for one, _, _ in layers], damping=0)
    gone: list[int] = []
    while len(gone) < units:
        costs = {unit: error(layers, [*gone, unit], bias) for unit in range(units) if unit not in gone}
        best = min(costs, key=costs.get)
        assert scores[best].item() == pytest.approx(costs[best], rel=1e-5)
        gone.append(best)
    assert scores.argsort().tolist() == gone


def test_eliminate_takes_copies_and_dead_units_first():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 5))
    x[:, 3], x[:, 4] = x[:, 1], 0
    weight = rng.standard_normal((5, 3)) + 2
    sums = Sums(1, 5, 3)
    sums.add(torch.tensor(x)[None], torch.tensor(x @ weight)[None])
    one = Reading(sums.system(False), torch.tensor(weight)[None], torch.arange(5)[:, None])
    scores = eliminate([one], damping=1e-6)
    assert scores[4] == scores.min() < 1e-3
    assert min(scores[1], scores[3]) < 1e-3 * scores[[0, 2]].min()


def test_eliminate_without_any_input():
    sums = Sums(1, 3, 2)
    one = Reading(sums.system(False), torch.ones(1, 3, 2), torch.arange(3)[:, None])
    assert eliminate([one], damping=1e-4).shape == (3,)
