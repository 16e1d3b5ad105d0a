import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyprune.allocation import check_ratio, removed_count


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
