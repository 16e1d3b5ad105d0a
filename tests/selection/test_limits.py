import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from pyprune import ops
from pyprune.selection.limits import capped_threshold
from tests.ops.cases import DTYPES, adversarial


def walk_the_cut(scores: list[Tensor], removed: int, least: list[int], most: list[int]) -> list[int]:
    """Lower all elements below the cut one by one, until as many have gone as must."""
    order = torch.sort(torch.cat([score.flatten() for score in scores]), stable=True).indices.tolist()
    owners = [i for i, score in enumerate(scores) for _ in range(score.numel())]
    below = [0] * len(scores)
    for element in [*order, None]:
        lost = [min(max(n, low), high) for n, low, high in zip(below, least, most, strict=True)]
        if sum(lost) == removed:
            return lost
        below[owners[element]] += 1
    raise AssertionError("no cut")


def assert_capped(weights, removed, least, most, *, bases=None, scales=None, normalize=False) -> None:
    norms = ops.inverse_norms(weights) if normalize else scales
    wide = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    scores = []
    for i, weight in enumerate(weights):
        score = (weight.abs().double() * (1 if norms is None else norms[i])).to(wide)
        base = None if bases is None else bases[i]
        scores.append(score if base is None else torch.where(base, score, -1))
    high = [min(cap, weight.numel()) for cap, weight in zip(most, weights, strict=True)]
    lost = walk_the_cut(scores, removed, least, high)
    expected = [torch.ones(weight.numel(), dtype=torch.bool) for weight in weights]
    for mask, score, loss in zip(expected, scores, lost, strict=True):
        mask[torch.sort(score.flatten(), stable=True).indices[:loss]] = False
    masks, nonfinite = capped_threshold(
        weights, removed, least=least, most=most, normalize=normalize, scales=scales, bases=bases
    )
    assert not nonfinite.any()
    assert sum((~mask).sum().item() for mask in masks) == removed
    for mask, want in zip(masks, expected, strict=True):
        assert torch.equal(mask.flatten(), want)


@st.composite
def problems(draw):
    """Weights with many ties, some empty, with caps that can be met, at times with bases."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    values = st.sampled_from([0.0, 0.5, -0.5, 1.0, 1.5, -2.0, 3.0])
    weights = []
    for size in sizes:
        dtype = draw(st.sampled_from(DTYPES))
        weights.append(torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype))
    bases = None
    lacking = [0] * len(sizes)
    if draw(st.booleans()):
        bases = [torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool) for n in sizes]
        bases = [base if draw(st.booleans()) else None for base in bases]
        lacking = [0 if base is None else int((~base).sum()) for base in bases]
    most = [draw(st.integers(lacks, size + 1)) for lacks, size in zip(lacking, sizes, strict=True)]
    least = [draw(st.integers(0, min(cap, size))) for cap, size in zip(most, sizes, strict=True)]
    fewest = sum(max(low, lacks) for low, lacks in zip(least, lacking, strict=True))
    removed = draw(st.integers(fewest, sum(min(cap, size) for cap, size in zip(most, sizes, strict=True))))
    return weights, removed, least, most, bases


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(problem=problems(), kind=st.sampled_from(["raw", "scales", "normalize"]))
def test_capped_threshold_cuts_where_a_walk_does(problem, kind):
    weights, removed, least, most, bases = problem
    scales = torch.tensor([1.0, 0.7, 3.0, 0.1, 1.0, 2.0][: len(weights)], dtype=torch.float64)
    options = {"raw": {}, "scales": {"scales": scales}, "normalize": {"normalize": True}}[kind]
    assert_capped(weights, removed, least, most, bases=bases, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_threshold_of_larger_weights(dtype):
    sizes = [30_000, 5000, 70_000]
    weights = [adversarial((size,), "normal", dtype, i) * 4.0**-i for i, size in enumerate(sizes)]
    # Without caps the last weight would lose nearly all and the first next to nothing.
    assert_capped(weights, 60_000, [10_000, 0, 0], [30_000, 5000, 35_000])
    assert_capped(weights, 60_000, [0, 0, 0], [30_000, 1000, 40_000], bases=[None, None, weights[2].abs() > 0.01])


def test_capped_threshold_without_room_is_a_local_threshold():
    weights = [torch.randn(50), torch.randn(30), torch.randn(0)]
    masks, _ = capped_threshold(weights, 37, least=[20, 17, 0], most=[20, 17, 0])
    expected, _ = ops.threshold(weights, [20, 17, 0])
    assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


def test_capped_threshold_compares_in_float64_also_when_the_float64_weight_is_at_its_cap():
    tiny = 2.0**-30
    close = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.0, 0.0], dtype=torch.float64)]
    scales = torch.tensor([1 + tiny, 1.0, 1.0], dtype=torch.float64)
    masks, _ = capped_threshold(close, 2, least=[0, 0, 0], most=[1, 1, 1], scales=scales)
    assert [mask.tolist() for mask in masks] == [[True], [False], [False, True]]


def test_capped_threshold_writes_given_masks():
    weights = [torch.randn(20, 3), torch.randn(5)]
    masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    found, _ = capped_threshold(weights, 30, least=[0, 4], most=[40, 5], masks=masks)
    assert [one.data_ptr() for one in found] == [one.data_ptr() for one in masks]
    assert sum((~mask).sum().item() for mask in masks) == 30


@pytest.mark.parametrize("caps", [([0, 0], [5, 5]), ([3, 2], [3, 5]), ([3, 2], [3, 2])])
def test_capped_threshold_counts_what_is_not_finite(caps):
    weights = [torch.tensor([1.0, float("nan"), 2.0, float("inf"), 3.0]), torch.ones(5)]
    assert capped_threshold(weights, 5, least=caps[0], most=caps[1])[1].tolist() == [2, 0]


def test_capped_threshold_of_nothing():
    masks, nonfinite = capped_threshold([], 0, least=[], most=[])
    assert masks == []
    assert nonfinite.tolist() == []


def test_capped_threshold_refuses_caps_that_cannot_be_met():
    weights = [torch.randn(4), torch.randn(3)]
    with pytest.raises(ValueError, match=r"least\[1\] is 3 and most\[1\] 2"):
        capped_threshold(weights, 3, least=[0, 3], most=[4, 2])
    with pytest.raises(ValueError, match="of 4 elements"):
        capped_threshold(weights, 5, least=[5, 0], most=[9, 3])
    with pytest.raises(ValueError, match="removed is 3, but least comes to 4"):
        capped_threshold(weights, 3, least=[2, 2], most=[4, 3])
    with pytest.raises(ValueError, match=r"most .* to 4"):
        capped_threshold(weights, 5, least=[0, 0], most=[2, 2])
    with pytest.raises(ValueError, match="one per weight"):
        capped_threshold(weights, 5, least=[0], most=[2, 2])
    base = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match=r"bases\[1\] lacks 2 elements, and most\[1\] is 1"):
        capped_threshold(weights, 3, least=[0, 0], most=[4, 1], bases=[None, base])
    with pytest.raises(ValueError, match="what the bases lack"):
        capped_threshold(weights, 1, least=[0, 0], most=[4, 3], bases=[None, base])
    with pytest.raises(ValueError, match="not both"):
        capped_threshold(weights, 1, least=[0, 0], most=[4, 3], normalize=True, scales=torch.ones(2))
