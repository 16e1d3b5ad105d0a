import itertools

import pytest
import torch

from pyprune.methods.transposable import transposable_mask

COUNTS = {(1, 2): 2, (1, 3): 6, (2, 3): 6, (1, 4): 24, (2, 4): 90, (3, 4): 24}


def patterns_of(keep, of):
    """All patterns by brute force, those that lose the lowest indices first."""
    found = []
    for bits in itertools.product((False, True), repeat=of * of):
        square = torch.tensor(bits).view(of, of)
        if (square.sum(0) == keep).all() and (square.sum(1) == keep).all():
            found.append(square)
    return found


PATTERNS = {case: patterns_of(*case) for case in COUNTS}


def brute_force(scores, keep, of):
    """The first pattern of the largest sum, square by square; beyond the edge lie the lowest scores."""
    rows, columns = scores.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for top, left in itertools.product(range(0, rows, of), range(0, columns, of)):
        part = scores[top : top + of, left : left + of].double()
        square = torch.full((of, of), min(0.0, float(part.min())), dtype=torch.float64)
        square[: part.shape[0], : part.shape[1]] = part
        sums = [float(square[pattern].sum()) for pattern in PATTERNS[keep, of]]
        best = PATTERNS[keep, of][sums.index(max(sums))]
        mask[top : top + of, left : left + of] = best[: part.shape[0], : part.shape[1]]
    return mask


@pytest.mark.parametrize(("keep", "of"), COUNTS)
@pytest.mark.parametrize("shape", [(8, 12), (4, 4), (7, 9), (3, 2), (1, 5), (6, 1)])
@pytest.mark.parametrize("values", ["normal", "ties", "signed"])
def test_transposable_mask_keeps_the_largest_sum(keep, of, shape, values):
    assert len(PATTERNS[keep, of]) == COUNTS[keep, of]
    generator = torch.Generator().manual_seed(keep * 10 + of)
    scores = torch.randn(shape, generator=generator)
    if values == "normal":
        scores = scores.abs()
    elif values == "ties":
        scores = torch.randint(3, shape, generator=generator) / 2
    mask = transposable_mask(scores, keep, of)
    assert torch.equal(mask, brute_force(scores, keep, of))
    for part in mask.split(of):
        assert (part.sum(0) <= keep).all()
    for part in mask.split(of, dim=1):
        assert (part.sum(1) <= keep).all()


def test_transposable_mask_of_many_squares_and_dimensions():
    scores = torch.rand(3, 2, 8, 8)
    mask = transposable_mask(scores, 2, 4)
    for index in itertools.product(range(3), range(2)):
        assert torch.equal(mask[index], brute_force(scores[index], 2, 4))
    many = torch.rand(2**10, 2**10 + 8)  # more squares than are compared at once
    mask = transposable_mask(many, 2, 4)
    assert torch.equal(mask[-4:, -8:], brute_force(many[-4:, -8:], 2, 4))
    assert int(mask.sum()) == many.numel() // 2
    assert transposable_mask(torch.empty(0, 4), 2, 4).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_transposable_mask_of_other_dtypes(dtype):
    scores = torch.rand(8, 8).to(dtype)
    assert torch.equal(transposable_mask(scores, 2, 4), brute_force(scores, 2, 4))
