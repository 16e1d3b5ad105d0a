import math

import numpy as np
import pytest
import torch

from pyprune.allocation import Amount, removed_count
from pyprune.competitors import Competitor, Member, Weight
from pyprune.contests import hold_contest
from pyprune.methods import METHODS, PruneMode

LOCAL, GLOBAL = METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL], METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL]


def competitors_of(method, weights, **options):
    described = [Weight(str(index), weight, **options) for index, weight in enumerate(weights)]
    return [Competitor(one.name, (Member(one, method.granularity.block_of(one)),)) for one in described]


def magnitude_masks(method, weights, ratio):
    outcome = hold_contest(method, competitors_of(method, weights), Amount(ratio))
    return outcome.masks, outcome.nonfinite


def numpy_keep(scores, count):
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_local_magnitude_matches_numpy(ratio):
    weights = [torch.randn(7, 5), torch.randint(-2, 3, (40,)).half(), torch.randn(3).double(), torch.zeros(6)]
    masks, nonfinite = magnitude_masks(LOCAL, weights, ratio)
    for weight, mask in zip(weights, masks, strict=True):
        expected = numpy_keep(np.abs(weight.numpy().ravel()), removed_count(weight.numel(), ratio))
        np.testing.assert_array_equal(mask.numpy().ravel(), expected)
    assert nonfinite == [0, 0, 0, 0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_global_magnitude_divides_by_the_norm_of_each_tensor(ratio):
    # Values whose scores do not tie or round alike.
    weights = [torch.randn(7, 5) * 1000, torch.randn(40), torch.randn(3) * 1e-6]
    masks, _ = magnitude_masks(GLOBAL, weights, ratio)
    arrays = [weight.double().numpy().ravel() for weight in weights]
    scores = np.concatenate([np.abs(array) / np.linalg.norm(array) for array in arrays])
    expected = numpy_keep(scores, removed_count(scores.size, ratio))
    np.testing.assert_array_equal(torch.cat([mask.ravel() for mask in masks]).numpy(), expected)


def test_global_magnitude_drops_an_all_zero_tensor_first():
    masks, _ = magnitude_masks(GLOBAL, [torch.tensor([1e-30, 2e-30]), torch.zeros(3), torch.tensor([1e30])], 0.5)
    assert [mask.tolist() for mask in masks] == [[True, True], [False] * 3, [True]]


def test_global_magnitude_survives_norms_at_the_ends_of_float64():
    tiny = torch.tensor([5e-324, 0.0], dtype=torch.float64)
    huge = torch.full((2,), 1.7e308, dtype=torch.float64)
    masks, nonfinite = magnitude_masks(GLOBAL, [tiny, huge], 0.25)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, True]]
    assert nonfinite == [0, 0]


def test_global_magnitude_counts_nonfinite_elements():
    _, nonfinite = magnitude_masks(GLOBAL, [torch.tensor([1.0, math.nan, math.inf]), torch.ones(2)], 0.5)
    assert nonfinite == [2, 0]
