import math

import numpy as np
import pytest

from pyprune.methods.allocation import removed_count
from pyprune.oneshot.share_out import share_out


def removed(sizes, ratios):
    return {name: removed_count(n, ratios[name]) for block in sizes for name, n in block.items()}


def random_blocks(seed):
    rng = np.random.default_rng(seed)
    sizes = [
        {f"{block}.{part}": int(rng.integers(1, 400)) for part in range(rng.integers(1, 5))}
        for block in range(rng.integers(1, 8))
    ]
    return sizes, rng.uniform(0.01, 2.0, len(sizes)).tolist(), float(rng.uniform(0, 0.99))


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_share_out_gives_the_ratio_exactly(seed, scales):
    sizes, shares, ratio = random_blocks(seed)
    ratios = share_out(sizes, shares, ratio, scales=scales)
    counts = removed(sizes, ratios)
    of = {name: n for block in sizes for name, n in block.items()}
    assert {name: counts[name] / of[name] for name in of} == ratios  # whole numbers of elements
    most = sum(n - 1 for n in of.values())
    assert sum(counts.values()) == min(math.floor(ratio * sum(of.values()) + 0.5), most)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_share_out_gives_weights_what_their_block_loses_within_one_element(seed, scales):
    sizes, shares, ratio = random_blocks(seed)
    sizes = [{name: 1000 * n for name, n in block.items()} for block in sizes]  # nothing of one element
    most = min(1.0, ratio * 1.2 + 0.01)
    ratios = share_out(sizes, shares, ratio, scales=scales, max_ratio=most)
    # The plain way: move shares in small steps until the mean is the ratio.
    totals = np.array([sum(block.values()) for block in sizes])
    low, high = (0.0, 1e3) if scales else (-3.0, 3.0)
    for _ in range(200):
        by = (low + high) / 2
        moved = np.clip(np.array(shares) * by if scales else np.array(shares) + by, 0, most)
        low, high = (by, high) if moved @ totals < ratio * totals.sum() else (low, by)
    # What is held back at the limit is a whole number, too, and the others have to lose the rest of it.
    is_held = [expected == most for block, expected in zip(sizes, moved, strict=True) for _ in block]
    more = sum(is_held) / max(1, len(is_held) - sum(is_held))
    for block, expected in zip(sizes, moved, strict=True):
        for name, n in block.items():
            assert abs(ratios[name] - expected) * n <= 1 + more + 1e-6
            assert 0 <= ratios[name] <= most


@pytest.mark.parametrize(
    ("sizes", "shares", "ratio", "options", "expected"),
    [
        ([{"a": 10}, {"b": 10}], [0.4, 0.6], 0.5, {}, {"a": 0.4, "b": 0.6}),
        ([{"a": 10}, {"b": 10}], [-0.4, 1.0], 0.5, {}, {"a": 0.1, "b": 0.9}),  # one element of b always stays
        ([{"a": 30}, {"b": 10}], [0.1, 0.5], 0.2, {}, {"a": 0.1, "b": 0.5}),  # the mean is that of elements
        ([{"a": 10}, {"b": 10}, {"c": 10}], [-1.0, 0.3, 0.5], 0.2, {}, {"a": 0.0, "b": 0.2, "c": 0.4}),
        ([{"a": 10}, {"b": 10}], [0.2, 0.8], 0.4, {"max_ratio": 0.5}, {"a": 0.3, "b": 0.5}),
        ([{"a": 10}, {"b": 10}], [0.9, 1.1], 0.5, {"max_ratio": 0.5}, {"a": 0.5, "b": 0.5}),
        (
            [{"a": 7}, {"b": 7}, {"c": 7}],
            [0.5] * 3,
            0.5,
            {},
            {"a": 4 / 7, "b": 4 / 7, "c": 3 / 7},
        ),  # first of equal ones
        ([{"a": 10, "b": 1}], [0.5], 0.5, {}, {"a": 0.6, "b": 0.0}),
        ([{"a": 10}, {"b": 10}], [0.8, 1.2], 0.0, {"scales": True}, {"a": 0.0, "b": 0.0}),
        ([{"a": 10}, {"b": 10}], [0.2, 0.4], 0.0, {}, {"a": 0.0, "b": 0.0}),
        ([{"a": 0}, {"b": 2}], [0.5, 0.5], 0.5, {}, {"a": 0.0, "b": 0.5}),
        ([{"a": 0}], [0.5], 0.5, {}, {"a": 0.0}),
    ],
)
def test_share_out_worked_out_by_hand(sizes, shares, ratio, options, expected):
    assert share_out(sizes, shares, ratio, **options) == expected


def test_share_out_refuses_more_than_a_weight_may_lose():
    with pytest.raises(ValueError, match=r"ratio is 0\.6, and at most 0\.5"):
        share_out([{"a": 10}], [0.5], 0.6, max_ratio=0.5)
