import math

import numpy as np
import pytest

from pyprune.methods.tolerance import check_drop, worsening


def test_worsening_counts_what_is_lost():
    assert worsening(0.5, 0.25, higher_is_better=True) == 0.25
    assert worsening(0.5, 0.25, higher_is_better=False) == -0.25
    assert worsening(0.5, math.inf, higher_is_better=False) == math.inf


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_worsening_of_nan_is_infinite(higher_is_better):
    assert worsening(0.5, math.nan, higher_is_better) == math.inf


def test_check_drop_takes_numbers_and_none():
    assert check_drop("max_drop", None) is None
    assert check_drop("max_drop", np.float32(0.5)) == 0.5
    for drop, error in ((True, TypeError), ("1", TypeError), (-1, ValueError), (math.nan, ValueError)):
        with pytest.raises(error, match="max_drop is "):
            check_drop("max_drop", drop)
