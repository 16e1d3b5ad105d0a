import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyprune.methods.allocation import check_ratio, er, erk, limits, removed_count
from pyprune.methods.name_rules import by_name


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


def test_by_name_takes_names_modules_and_patterns():
    names = ["net.conv1.weight", "net.conv12.weight", "net.fc.weight", "head.weight"]
    assert by_name(0.3, names, 0.0) == [0.3] * 4
    assert by_name({"net.conv1": 0.1, "net": 0.2}, names, 0.0) == [0.1, 0.2, 0.2, 0.0]
    assert by_name({r".*conv\d+": 0.5, "head.weight": 0.9}, names, 0.25) == [0.5, 0.5, 0.25, 0.9]
    # the longest name first, patterns last
    assert by_name({r".*": 0.5, "net": 0.1, "net.fc.weight": 0.9}, names, 0.0) == [0.1, 0.1, 0.9, 0.5]


@pytest.mark.parametrize("rules", [{"conv": 0.5}, {"net.conv": 0.5}, {"fc.weight": 0.5}, {"(": 0.5}])
def test_by_name_refuses_rules_that_match_nothing(rules):
    with pytest.raises(ValueError, match=r"nearest: net\.conv1\.weight|neither a name"):
        by_name(rules, ["net.conv1.weight"], 0.0)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_erk_keeps_the_total_and_gives_thin_layers_more(ratio):
    shapes = [(64, 3, 7, 7), (128, 64, 3, 3), (512, 512, 3, 3), (10, 512), (4, 4), (0, 3)]
    sizes = [math.prod(shape) for shape in shapes]
    ratios = erk(shapes, ratio)
    assert all(0 <= one < 1 for one in ratios)
    total = sum(one * size for one, size in zip(ratios, sizes, strict=True))
    assert total == pytest.approx(ratio * sum(sizes), rel=1e-9)
    densities = [(1 - one) for one in ratios[:5]]
    raw = [sum(shape) / math.prod(shape) for shape in shapes[:5]]
    limited = [density for density in densities if density < 1]
    factors = [density / part for density, part in zip(densities, raw, strict=True) if density < 1]
    assert factors == pytest.approx([factors[0]] * len(limited)) if limited else ratio == 0


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_er_is_erk_of_the_channels_alone(ratio):
    shapes = [(64, 8, 7, 7), (8, 64, 3), (512, 256), (4, 4), (0, 3), (5,)]
    channels = [(64, 8), (8, 64), (512, 256), (4, 4), (0, 3), (1, 5)]
    sizes = [math.prod(shape) for shape in shapes]
    ratios = er(shapes, channels, ratio)
    assert sum(one * size for one, size in zip(ratios, sizes, strict=True)) == pytest.approx(ratio * sum(sizes))
    below = [
        (1 - one) / (sum(pair) / math.prod(pair))
        for one, pair in zip(ratios, channels, strict=True)
        if math.prod(pair) and one > 0
    ]
    assert below == pytest.approx([below[0]] * len(below)) if below else ratio == 0
    matrices = [(300, 20), (64, 64), (10, 5)]
    assert er(matrices, matrices, ratio) == erk(matrices, ratio)


@pytest.mark.parametrize(
    ("n", "low", "high", "expected"),
    [
        (10, 0.0, 1.0, (0, 10)),
        (10, 0.25, 0.75, (3, 7)),
        (100, 0.07, 0.07, (7, 7)),
        (3, 0.1, 0.3, (1, 0)),
        (0, 0.5, 1, (0, 0)),
    ],
)
def test_limits_are_whole_units_within_both_ratios(n, low, high, expected):
    assert limits(n, low, high) == expected
