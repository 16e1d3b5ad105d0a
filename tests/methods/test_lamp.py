import pytest
import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.lamp import lamp_removed, lamp_scores
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts


def scores_by_definition(weight: Tensor) -> Tensor:
    """Divide each square by the sum of it and all that come after it, one by one."""
    squares = weight.double().flatten().square()
    order = torch.sort(weight.abs().flatten(), stable=True).indices
    scores = torch.zeros(weight.numel(), dtype=torch.float64)
    for rank, place in enumerate(order):
        if squares[place] > 0:
            scores[place] = squares[place] / squares[order[rank:]].sum()
    return scores.view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lamp_scores_are_those_of_the_paper(dtype, kind):
    weight = adversarial((20, 13), kind, dtype)
    if kind == "denormal" and dtype == torch.float64:
        weight = weight * 2.0**600  # the definition in float64 would lose their squares
    scores = lamp_scores(weight)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, scores_by_definition(weight).float(), rtol=3e-7, atol=0)


def test_lamp_scores_by_hand():
    scores = lamp_scores(torch.tensor([[3.0, -1.0], [1.0, 2.0]]))
    expected = torch.tensor([[9 / 9, 1 / 15], [1 / 14, 4 / 13]])  # of the equal ones the first has more after it
    torch.testing.assert_close(scores, expected)


def test_lamp_scores_of_any_range_and_of_nothing():
    weight = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    for factor in (1e-300, 1e300):
        torch.testing.assert_close(lamp_scores(weight * factor), lamp_scores(weight))
    assert lamp_scores(torch.empty(0, 3)).shape == (0, 3)
    assert lamp_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def counts_of_a_sort(weights: list[Tensor], removed: int) -> list[int]:
    order = torch.cat([lamp_scores(weight).flatten() for weight in weights]).sort(stable=True).indices[:removed]
    owners = torch.arange(len(weights)).repeat_interleave(torch.tensor([weight.numel() for weight in weights]))
    return torch.bincount(owners[order], minlength=len(weights)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lamp_removed_agrees_with_sorted_scores(dtype, kind):
    shapes = [(300, 101), (3,), (0, 4), (), (70_000,), (9000,)]
    weights = [adversarial(shape, kind, dtype, seed) * (seed + 1) for seed, shape in enumerate(shapes)]
    total = sum(weight.numel() for weight in weights)
    for removed in (0, 1, total // 100, total // 2, total * 9 // 10, total - 1, total):
        found = lamp_removed(weights, removed)
        assert sum(found) == removed
        # Two ways of adding differ in the last bits, and so do a few scores that are as good as equal.
        for got, want in zip(found, counts_of_a_sort(weights, removed), strict=True):
            assert abs(got - want) <= 2
        masks, _ = ops.threshold(weights, found)
        kept = [lamp_scores(weight)[mask] for weight, mask in zip(weights, masks, strict=True)]
        gone = [lamp_scores(weight)[~mask] for weight, mask in zip(weights, masks, strict=True)]
        if 0 < removed < total:
            assert torch.cat(gone).max() <= torch.cat(kept).min() * (1 + 1e-6)


def test_lamp_removed_recovers_from_a_sample_that_misleads():
    # All squares are in a few elements that a sample hardly meets.
    weights = [torch.randn(100_000), torch.randn(100_000) * 0.1]
    weights[0][:20] = 1e4
    for removed in (1000, 100_000, 150_000):
        assert lamp_removed(weights, removed) == counts_of_a_sort(weights, removed)


def test_lamp_removed_of_any_layout_is_the_same():
    weight = torch.randn(30, 26, 7, 20)
    other = torch.randn(5000)
    for layout in layouts(weight).values():
        assert lamp_removed([layout, other], 60_000) == lamp_removed([weight, other], 60_000)


def test_lamp_removed_refuses_impossible_counts():
    with pytest.raises(ValueError, match="cannot remove 5 of 4"):
        lamp_removed([torch.ones(4)], 5)
    assert lamp_removed([], 0) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_lamp_removed_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match=r"weights\[1\] has NaN or infinite"):
        lamp_removed([torch.ones(4), torch.tensor([1.0, bad])], 2)
