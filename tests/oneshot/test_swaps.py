import itertools

import pytest
import torch

from pyprune import scope, solvers
from tests.oneshot.layers import damped, layer, least_squares, loss

SCOPES = {
    "row": (scope.row(), 16),
    "tensor": (scope.tensor(), 16),
    "columns": (scope.columns(8), 8),
    "2 of 4": (scope.n_of_m(keep=2, of=4), 4),
    "1 of 4": (scope.n_of_m(keep=1, of=4), 4),
    "5 of 8": (scope.n_of_m(keep=5, of=8), 8),
}


def masks(weight, size, seed=0):
    """Masks that keep half of each group, whatever they are worth."""
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).view(len(weight), -1, size)
    return (order.argsort(-1).argsort(-1) >= size // 2).view_as(weight)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_swaps_lose_less_with_every_round_and_keep_as_many_of_what_competes(name, dtype, seed):
    competing, size = SCOPES[name]
    weight, gram = layer(dtype=dtype, seed=seed)
    mask = masks(weight, size, seed)
    matrix, before = damped(gram), [loss(weight, weight * mask, damped(gram))]
    for rounds in (0, 1, 2, 4, 100):
        solver = solvers.swaps(rounds=rounds, polish=False)
        solution = solver.solve(weight, gram, scope=competing, ratio=None, mask=mask)
        assert torch.equal(solution.weight, torch.where(solution.mask, weight, 0))
        assert torch.equal(solution.mask.view(6, -1, size).sum(-1), mask.view(6, -1, size).sum(-1))
        before.append(loss(weight, solution.weight, matrix))
        assert before[-1] <= before[-2] * (1 + 1e-6)
    assert before[1] == before[0]
    assert before[-1] < 0.8 * before[0]
    polished = solvers.swaps().solve(weight, gram, scope=competing, ratio=None, mask=mask)
    expected = least_squares(weight, matrix, solution.mask)
    torch.testing.assert_close(polished.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert loss(weight, polished.weight, matrix) <= before[-1]


@pytest.mark.parametrize("name", SCOPES)
def test_swaps_end_where_no_swap_gains(name):
    competing, size = SCOPES[name]
    weight, gram = layer(dtype=torch.float64)
    solver = solvers.swaps(polish=False)
    found = solver.solve(weight, gram, scope=competing, ratio=None, mask=masks(weight, size)).mask
    matrix = damped(gram)
    for row, kept in zip(weight, found, strict=True):
        least = loss(row[None], (row * kept)[None], matrix)
        for u, p in itertools.product(range(16), repeat=2):
            if u // size == p // size and kept[u] and not kept[p]:
                other = kept.clone()
                other[u], other[p] = False, True
                assert loss(row[None], (row * other)[None], matrix) >= least * (1 - 1e-9)


def test_swaps_find_the_first_swap_by_hand():
    weight, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, False, False, True]])
    found = solvers.swaps(rounds=1, polish=False).solve(
        weight, torch.eye(4), scope=scope.row(), ratio=None, mask=mask
    )
    assert found.weight.tolist() == [[0, 0, 3, 4]]


@pytest.mark.parametrize("name", SCOPES)
def test_swaps_bring_nothing_back_that_is_zero_and_leave_rows_that_have_no_choice(name):
    competing, size = SCOPES[name]
    weight, gram = layer(dead=(3, 7))
    weight[:, :2] = 0
    mask = masks(weight, size)
    mask[:, :2] = False
    mask[0], mask[1] = True, False
    solution = solvers.swaps(polish=False).solve(weight, gram, scope=competing, ratio=None, mask=mask)
    assert not solution.mask[1:, :2].any()
    assert solution.mask[0].all()
    assert not solution.mask[1].any()
    assert not (solution.mask & ~mask)[:, [3, 7]].any()


@pytest.mark.parametrize("columns", [6, 130, 300])
def test_swaps_take_groups_that_do_not_divide_a_row_and_rows_longer_than_a_block(columns):
    weight, gram = layer(5, columns, tokens=2 * columns, dtype=torch.float64)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    pairs = scope.n_of_m(keep=2, of=4)
    matrix, before = damped(gram), loss(weight, weight * mask, damped(gram))
    solution = solvers.swaps(polish=False).solve(weight, gram, scope=pairs, ratio=None, mask=mask)
    for start in range(0, columns, 4):
        group = slice(start, start + 4)
        assert torch.equal(solution.mask[:, group].sum(1), mask[:, group].sum(1))
    assert loss(weight, solution.weight, matrix) < before


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"mask": None}, ValueError, "mask is None"),
        ({"scope": None}, ValueError, "scope is None"),
        ({"scope": scope.model()}, ValueError, "scope model"),
        ({"scope": scope.n_of_m(keep=2, of=4, dim="out")}, ValueError, 'dim="out"'),
    ],
)
def test_swaps_refuse_what_they_cannot_stay_within(change, error, said):
    weight, gram = layer()
    arguments = {"scope": scope.row(), "ratio": None, "mask": torch.ones(weight.shape, dtype=torch.bool)} | change
    with pytest.raises(error, match=said):
        solvers.swaps().solve(weight, gram, **arguments)


@pytest.mark.parametrize("change", [{"rounds": -1}, {"polish": 1}])
def test_swaps_refuse_other_values(change):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(change))} is"):
        solvers.swaps(**change)
