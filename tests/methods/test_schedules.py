import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from pyprune import schedules
from pyprune.methods.schedules import (
    alternating,
    as_schedule,
    check_step,
    constant,
    custom,
    exponential,
    in_turn,
    multi_step,
    one_shot,
)

CURVES = [
    schedules.linear,
    schedules.cubic,
    schedules.inverse_cubic,
    schedules.exponential,
    schedules.cosine,
    schedules.cube,
]
# 0 to 0.9 in four steps; those of Neural Compressor, SparseML, NNCF and the papers.
GOLDEN = {
    "linear": [0, 0.225, 0.45, 0.675, 0.9],
    "cosine": [0, 0.0685, 0.2636, 0.5556, 0.9],
    "exponential": [0, 0.4377, 0.6838, 0.8222, 0.9],
    "cube": [0, 0.0141, 0.1125, 0.3797, 0.9],
}


def ratios_of(schedule, steps):
    return [schedule(step) for step in range(steps)]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_of_neural_compressor(name):
    schedule = getattr(schedules, name)(0.9, end=4)
    assert [round(ratio, 4) for ratio in ratios_of(schedule, 5)] == GOLDEN[name]


def test_golden_values_of_zhu_and_gupta():
    golden = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    assert ratios_of(schedules.cubic(0.9, end=10), 11) == pytest.approx(golden, abs=1e-9)
    assert [round(ratio, 4) for ratio in ratios_of(schedules.agp(0.8, end=4), 5)] == [0, 0.4625, 0.7, 0.7875, 0.8]


def test_golden_values_of_nncf():
    golden = [0.2, 0.3036, 0.3937, 0.4722, 0.5405, 0.6, 0.6518, 0.6969, 0.7361, 0.7703, 0.8]
    schedule = exponential(0.8, initial=0.2, end=10)
    assert [round(ratio, 4) for ratio in ratios_of(schedule, 11)] == golden


def test_polynomial_has_linear_and_cube_as_its_cases():
    for power, curve in ((1, schedules.linear), (3, schedules.cube)):
        other = schedules.polynomial(0.7, power=power, initial=0.1, end=9)
        assert ratios_of(other, 12) == ratios_of(curve(0.7, initial=0.1, end=9), 12)


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.__name__)
@pytest.mark.parametrize(
    ("initial", "final"), [(0, 0.999), (0.3, 0.7), (0.1, 0.1 + 1e-12), (0.0, 5e-324), (0.9, 0.2)]
)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 2), (5, 7), (0, 1000)])
def test_curves_go_from_initial_to_final_exactly(curve, initial, final, start, length):
    end = start + length
    schedule = curve(final, initial=initial, start=start, end=end)
    values = [schedule(step) for step in range(start, end + 2)]
    assert values == sorted(values, reverse=initial > final)
    assert (values[0], values[-2], values[-1], schedule(10**9)) == (initial, final, final, final)
    assert all(schedule(step) == 0 for step in range(start))


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.__name__)
def test_the_ratio_stays_between_updates(curve):
    schedule = curve(0.9, start=2, end=12, frequency=4)
    every = curve(0.9, start=2, end=12)
    due = [2, 6, 10, 12]
    assert [step for step in range(30) if schedule.is_due(step)] == due
    for step in range(2, 30):
        assert schedule(step) == every(max(other for other in due if other <= step))


def test_a_dict_gives_each_name_a_curve_of_its_own():
    schedule = schedules.linear({"fc": 0.8, "conv.*": 0.4}, start=1, end=5)
    assert schedule(0) == {"fc": 0.0, "conv.*": 0.0}
    assert schedule(3) == {"fc": 0.4, "conv.*": 0.2}
    assert schedule(9) == {"fc": 0.8, "conv.*": 0.4}


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.__name__)
def test_a_dict_of_initial_ratios_gives_each_name_a_beginning_of_its_own(curve):
    initial = {"fc": 0.2, "conv": 0.5}
    for final in (0.8, {"fc": 0.8, "conv": 0.4}):
        schedule = curve(final, end=4, start=1, initial=initial)
        assert schedule(0) == {"fc": 0.0, "conv": 0.0}
        for step in range(1, 6):
            assert schedule(step) == {
                name: curve(final[name] if isinstance(final, dict) else final, end=4, start=1, initial=first)(step)
                for name, first in initial.items()
            }


def test_one_shot_prunes_once():
    schedule = one_shot(0.5, start=3)
    assert ratios_of(schedule, 6) == [0, 0, 0, 0.5, 0.5, 0.5]
    assert [step for step in range(9) if schedule.is_due(step)] == [3]


def test_constant_holds_the_ratio_and_updates():
    schedule = constant(0.5, start=2, end=8, frequency=3)
    assert ratios_of(schedule, 4) == [0, 0, 0.5, 0.5]
    assert [step for step in range(12) if schedule.is_due(step)] == [2, 5, 8]


@pytest.mark.parametrize("steps", [{0: 0.3, 5: 0.7, 10: 0.5}, {10: 0.5, 0: 0.3, 5: 0.7}])
def test_multi_step_holds_a_ratio_until_the_next_step(steps):
    schedule = multi_step(steps)
    cases = [(0, 0.3), (4, 0.3), (5, 0.7), (9, 0.7), (10, 0.5), (11, 0.5), (10**9, 0.5)]
    assert [schedule(step) for step, _ in cases] == [ratio for _, ratio in cases]
    assert [step for step in range(20) if schedule.is_due(step)] == [0, 5, 10]


@pytest.mark.parametrize("pairs", [[("a", 0.5), ("b", 0.8)], {"a": 0.5, "b": 0.8}, [["a", 0.5], ["b", 0.8]]])
def test_in_turn_prunes_one_name_after_the_other(pairs):
    schedule = in_turn(pairs, start=2, frequency=3)
    nothing, first, both = {"a": 0.0, "b": 0.0}, {"a": 0.5, "b": 0.0}, {"a": 0.5, "b": 0.8}
    assert ratios_of(schedule, 7) == [nothing, nothing, first, first, first, both, both]
    assert [step for step in range(9) if schedule.is_due(step)] == [2, 5]


def test_multi_step_prunes_nothing_before_its_first_step():
    assert ratios_of(multi_step({2: 0.5}), 4) == [0, 0, 0.5, 0.5]


def test_multi_step_takes_numpy_numbers_and_dicts():
    assert multi_step({np.int64(0): 0, np.int64(2): np.float32(0.5)})(np.int64(3)) == 0.5
    assert multi_step({0: {"fc": 0.1}, 2: {"fc": 0.5}})(2) == {"fc": 0.5}


@pytest.mark.parametrize(
    ("start", "end", "frequency", "phases"),
    [
        (0, 20, 5, {0: "dense", 5: "pruned", 10: "dense", 15: "pruned"}),
        # The fifth phase is even, but the last: it goes on as the fourth.
        (0, 25, 5, {0: "dense", 5: "pruned", 10: "dense", 15: "pruned"}),
        (0, 26, 5, {0: "dense", 5: "pruned", 10: "dense", 15: "pruned", 20: "dense", 25: "pruned"}),
        (3, 13, 5, {3: "dense", 8: "pruned"}),
        (0, 5, 5, {0: "pruned"}),
    ],
)
def test_alternating_has_the_phases_of_ac_dc(start, end, frequency, phases):
    schedule = alternating(0.9, start=start, end=end, frequency=frequency)
    due = {step: "pruned" if schedule(step) else "dense" for step in range(end + 9) if schedule.is_due(step)}
    assert due == phases
    for step in range(end + 9):
        phase = (step - start) // frequency
        dense = step < start or (phase % 2 == 0 and end - start - phase * frequency > frequency)
        assert schedule(step) == (0.0 if dense else 0.9)


def test_custom_takes_any_function():
    schedule = custom(lambda step: 0.1 * step, start=2, end=7, frequency=3)
    assert ratios_of(schedule, 9) == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.5, 0.5, 0.7, 0.7])
    assert [step for step in range(12) if schedule.is_due(step)] == [2, 5, 7]
    with pytest.raises(ValueError, match=r"the ratio of step 12 is 1.2"):
        custom(lambda step: 0.1 * step)(12)


def test_a_bare_function_is_due_at_every_step():
    schedule = as_schedule(lambda step: 0.5)
    assert all(schedule.is_due(step) for step in range(5))
    assert as_schedule(schedule) is schedule
    with pytest.raises(TypeError, match=r"give one of pyprune\.schedules"):
        as_schedule(0.5)


@pytest.mark.parametrize("curve", [*CURVES, schedules.constant], ids=lambda curve: curve.__name__)
def test_schedules_can_be_pickled(curve):
    schedule = curve(0.5, end=10)
    copy = pickle.loads(pickle.dumps(schedule))
    assert ratios_of(copy, 12) == ratios_of(schedule, 12)
    assert (copy.name, copy.start, copy.end) == (schedule.name, 0, 10)


def test_exponential_removes_the_same_fraction_of_what_is_left():
    kept = [1 - ratio for ratio in ratios_of(exponential(0.9, initial=0.1, end=8), 9)]
    factors = [after / before for before, after in itertools.pairwise(kept)]
    assert factors == pytest.approx([(0.1 / 0.9) ** (1 / 8)] * 8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: in_turn(["a", "b"]), TypeError, r"ratios is \['a', 'b'\]; give a dict of ratios by name, or pairs"),
        (lambda: in_turn([]), ValueError, "ratios is empty"),
        (lambda: in_turn(0.5), TypeError, "ratios is 0.5"),
        (lambda: in_turn([(1, 0.5)]), TypeError, "ratios has 1 for a name"),
        (lambda: in_turn([("a", 1)]), ValueError, r"ratios\['a'\] is 1"),
        (lambda: multi_step([0.3, 0.5]), TypeError, "give a dict from step to ratio"),
        (lambda: multi_step({}), ValueError, "steps is empty"),
        (lambda: multi_step({"0": 0.3, 1: 0.5}), TypeError, "a key of steps is '0'"),
        (lambda: multi_step({0: 0.3, 2.5: 0.5}), TypeError, "a key of steps is 2.5"),
        (lambda: multi_step({0: 0.3, -1: 0.5}), ValueError, "a key of steps is -1"),
        (lambda: multi_step({0: 0.3, 5: 1.0}), ValueError, r"must be in \[0, 1\)"),
        (lambda: multi_step({0: math.nan}), ValueError, r"must be in \[0, 1\)"),
        (lambda: multi_step({0: True}), TypeError, r"number in \[0, 1\)"),
        (lambda: multi_step({0: 0.5, 3: 10}), ValueError, r"steps\[3\] is 10"),
        (lambda: multi_step({np.int64(3): {"fc": 10}}), ValueError, r"steps\[3\]\['fc'\] is 10"),
        (lambda: schedules.cubic({"fc": 0.9}, end=5, initial={"fd": 0.1}), ValueError, "initial has ratios for fd"),
        (lambda: schedules.cubic(0.9, end=5, initial={"fc": 1}), ValueError, r"initial\['fc'\] is 1"),
        (lambda: one_shot(1.0), ValueError, r"final is 1.0"),
        (lambda: one_shot(0.5, start=-1), ValueError, "start is -1"),
        (lambda: one_shot({"fc": 2}), ValueError, r"final\['fc'\] is 2"),
        (lambda: schedules.cubic(0.9, end=0), ValueError, "the end must come after the start"),
        (lambda: schedules.cubic(0.9, end=5, start=5), ValueError, "the end must come after the start"),
        (lambda: schedules.cubic(0.9, end=5.0), TypeError, "end is 5.0"),
        (lambda: schedules.cubic(0.9, end=5, frequency=0), ValueError, "frequency is 0"),
        (lambda: schedules.cubic(0.9, end=5, initial=-0.1), ValueError, "initial is -0.1"),
        (lambda: schedules.polynomial(0.9, end=5, power=0), ValueError, "power is 0"),
        (lambda: schedules.polynomial(0.9, end=5, power="2"), TypeError, "power is '2'"),
        (lambda: alternating(0.9, end=0, frequency=5), ValueError, "the end must come after the start"),
        (lambda: custom(0.5), TypeError, "give a function"),
        (lambda: custom(abs, start=5, end=4), ValueError, "end is 4"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("step", [None, 1.0, "1", True, torch.tensor(1)])
def test_check_step_refuses_what_is_no_integer(step):
    with pytest.raises(TypeError, match="give an integer"):
        check_step(step)
