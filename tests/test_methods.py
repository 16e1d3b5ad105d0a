import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyprune.methods import (
    PruneMode,
    check_mode,
    check_ratio,
    global_magnitude,
    local_magnitude,
    removed_count,
)


@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [
        (0, 0.5, 0),
        (1, 0.99, 0),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (5, 0.5, 3),  # half up, not to even
        (10, 0.25, 3),
        (81, 0.0, 0),
        (81, 0.25, 20),
        (81, 0.99, 80),
        (10, 0.999, 9),  # one survives
        (2**40, 0.5, 2**39),
    ],
)
def test_removed_count_rounds_half_up_and_keeps_one(n, ratio, expected):
    assert removed_count(n, ratio) == expected


@pytest.mark.parametrize("ratio", [0, 0.0, 0.999, np.float32(0.5), np.float64(0.5), np.int64(0), Fraction(1, 2)])
def test_check_ratio_accepts_real_numbers_below_one(ratio):
    value = check_ratio(ratio)
    assert type(value) is float
    assert value == pytest.approx(float(ratio))


@pytest.mark.parametrize("ratio", [True, False, None, "0.5", np.bool_(True), 0.5j, [0.5], torch.tensor(0.5)])
def test_check_ratio_refuses_what_is_no_number(ratio):
    with pytest.raises(TypeError, match=r"number in \[0, 1\)"):
        check_ratio(ratio)


@pytest.mark.parametrize("ratio", [1, 1.0, 1.5, -0.1, math.nan, math.inf, -math.inf])
def test_check_ratio_refuses_numbers_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        check_ratio(ratio)


def test_check_mode_takes_members_and_strings():
    for name in ("UNSTRUCTURED_MAGNITUDE_LOCAL", "unstructured_magnitude_local"):
        assert check_mode(name) is PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    mode = PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    assert check_mode(mode) is mode


def test_check_mode_says_what_is_allowed():
    with pytest.raises(ValueError, match="allowed are UNSTRUCTURED_MAGNITUDE_LOCAL, "):
        check_mode("MAGNITUDE")
    with pytest.raises(TypeError, match="PruneMode or its name"):
        check_mode(3)


def numpy_keep(scores, count):
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_local_magnitude_matches_numpy(ratio):
    weights = [torch.randn(7, 5), torch.randint(-2, 3, (40,)).half(), torch.randn(3).double(), torch.zeros(6)]
    masks, nonfinite = local_magnitude(weights, ratio)
    for weight, mask in zip(weights, masks, strict=True):
        expected = numpy_keep(np.abs(weight.numpy().ravel()), removed_count(weight.numel(), ratio))
        np.testing.assert_array_equal(mask.numpy().ravel(), expected)
    assert nonfinite.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_global_magnitude_divides_by_the_norm_of_each_tensor(ratio):
    # Values whose scores do not tie or round alike.
    weights = [torch.randn(7, 5) * 1000, torch.randn(40), torch.randn(3) * 1e-6]
    masks, _ = global_magnitude(weights, ratio)
    arrays = [weight.double().numpy().ravel() for weight in weights]
    scores = np.concatenate([np.abs(array) / np.linalg.norm(array) for array in arrays])
    expected = numpy_keep(scores, removed_count(scores.size, ratio))
    np.testing.assert_array_equal(torch.cat([mask.ravel() for mask in masks]).numpy(), expected)


def test_global_magnitude_drops_an_all_zero_tensor_first():
    masks, _ = global_magnitude([torch.tensor([1e-30, 2e-30]), torch.zeros(3), torch.tensor([1e30])], 0.5)
    assert [mask.tolist() for mask in masks] == [[True, True], [False] * 3, [True]]


def test_global_magnitude_survives_norms_at_the_ends_of_float64():
    tiny = torch.tensor([5e-324, 0.0], dtype=torch.float64)
    huge = torch.full((2,), 1.7e308, dtype=torch.float64)
    masks, nonfinite = global_magnitude([tiny, huge], 0.25)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, True]]
    assert nonfinite.tolist() == [0, 0]


def test_global_magnitude_counts_nonfinite_elements():
    _, nonfinite = global_magnitude([torch.tensor([1.0, math.nan, math.inf]), torch.ones(2)], 0.5)
    assert nonfinite.tolist() == [2, 0]
