import itertools
import math

import numpy as np
import pytest
import torch

from pyprune.schedules import check_epoch, exponential, multi_step


@pytest.mark.parametrize(
    ("epoch", "ratio"), [(0, 0.3), (4, 0.3), (5, 0.7), (9, 0.7), (10, 0.5), (11, 0.5), (10**9, 0.5)]
)
@pytest.mark.parametrize("steps", [{0: 0.3, 5: 0.7, 10: 0.5}, {10: 0.5, 0: 0.3, 5: 0.7}])
def test_multi_step_holds_a_ratio_until_the_next_step(steps, epoch, ratio):
    assert multi_step(epoch, steps) == ratio


def test_multi_step_takes_numpy_numbers():
    assert multi_step(np.int64(3), {np.int64(0): 0, np.int64(2): np.float32(0.5)}) == 0.5


@pytest.mark.parametrize("steps", [{}, {1: 0.5}, {5: 0.3, 10: 0.5}])
def test_multi_step_needs_the_ratio_of_epoch_0(steps):
    with pytest.raises(ValueError, match="give the ratio for epoch 0"):
        multi_step(20, steps)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        ([0.3, 0.5], TypeError, "give a dict from epoch to ratio"),
        ({"0": 0.3}, TypeError, "epochs are integers"),
        ({0: 0.3, 2.5: 0.5}, TypeError, "epochs are integers"),
        ({0: 0.3, -1: 0.5}, ValueError, "counted from 0"),
        ({0: 0.3, 5: 1.0}, ValueError, r"must be in \[0, 1\)"),
        ({0: math.nan}, ValueError, r"must be in \[0, 1\)"),
        ({0: True}, TypeError, r"number in \[0, 1\)"),
    ],
)
def test_multi_step_checks_all_steps(steps, error, message):
    with pytest.raises(error, match=message):
        multi_step(0, steps)


def test_exponential_golden_values():
    values = [exponential(epoch, 0.2, 0.8, 10) for epoch in range(11)]
    golden = [0.2, 0.3036, 0.3937, 0.4722, 0.5405, 0.6, 0.6518, 0.6969, 0.7361, 0.7703, 0.8]
    assert [round(value, 4) for value in values] == golden


@pytest.mark.parametrize(("initial", "target"), [(0, 0.999), (0.3, 0.7), (0.1, 0.1 + 1e-12), (0.0, 5e-324)])
@pytest.mark.parametrize("last", [1, 2, 7, 1000])
def test_exponential_rises_from_the_initial_ratio_to_the_target_exactly(initial, target, last):
    values = [exponential(epoch, initial, target, last) for epoch in range(last + 2)]
    assert values == sorted(values)
    assert (values[0], values[last], values[last + 1]) == (initial, target, target)


def test_exponential_removes_the_same_fraction_of_what_is_left():
    kept = [1 - exponential(epoch, 0.1, 0.9, 8) for epoch in range(9)]
    factors = [after / before for before, after in itertools.pairwise(kept)]
    assert factors == pytest.approx([(0.1 / 0.9) ** (1 / 8)] * 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0.8, 0.8, 10), ValueError, "target must be above the initial ratio"),
        ((0, 0.8, 0.2, 10), ValueError, "target must be above the initial ratio"),
        ((0, 0.2, 1.0, 10), ValueError, r"must be in \[0, 1\)"),
        ((0, -0.1, 0.5, 10), ValueError, r"must be in \[0, 1\)"),
        ((0, 0.2, math.nan, 10), ValueError, r"must be in \[0, 1\)"),
        ((0, False, 0.5, 10), TypeError, r"number in \[0, 1\)"),
        ((0, 0.2, 0.8, 0), ValueError, "give at least 1"),
        ((0, 0.2, 0.8, -1), ValueError, "counted from 0"),
        ((0, 0.2, 0.8, 10.0), TypeError, "epochs are integers"),
        ((-1, 0.2, 0.8, 10), ValueError, "counted from 0"),
    ],
)
def test_exponential_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        exponential(*arguments)


@pytest.mark.parametrize("epoch", [None, 1.0, "1", True, torch.tensor(1)])
def test_check_epoch_refuses_what_is_no_integer(epoch):
    with pytest.raises(TypeError, match="epochs are integers"):
        check_epoch(epoch)
