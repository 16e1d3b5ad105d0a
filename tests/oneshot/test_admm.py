import pytest
import torch

from pyprune import scope, solvers
from pyprune.methods.allocation import removed_count
from pyprune.oneshot.admm import search
from tests.oneshot.layers import GOLDEN, best_of_rows, damped, golden, golden_layer, layer, loss

PAIRS = scope.n_of_m(keep=2, of=4)


@pytest.mark.parametrize(
    ("name", "competing", "ratio"), [("alps_tensor_.5", scope.tensor(), 0.5), ("alps_2of4", PAIRS, None)]
)
def test_admm_is_the_golden_one(name, competing, ratio):
    weight, gram = golden_layer()
    matrix = damped(gram)
    size = matrix.diagonal().sqrt()
    found = search(weight * size, matrix / size / size[:, None], competing, ratio, None, rho=0.1, iterations=300)
    assert found.iterations == GOLDEN[name]["iterations"]
    assert found.rhos == pytest.approx(GOLDEN[name]["rho"])
    solution = solvers.admm().solve(weight, gram, scope=competing, ratio=ratio, mask=None)
    assert torch.equal(solution.mask, ~golden(name, "mask_pruned"))
    expected = golden(name, "weight_after_exact_least_squares")
    torch.testing.assert_close(solution.weight, expected, rtol=1e-5, atol=1e-5)
    assert loss(weight, solution.weight, matrix) == pytest.approx(GOLDEN[name]["objective_damped"], rel=1e-5)


@pytest.mark.parametrize(("competing", "ratio", "size"), [(scope.row(), 0.5, 8), (PAIRS, None, 4)])
def test_admm_is_near_the_best_of_all_masks_and_never_below(competing, ratio, size):
    made, best = [], []
    for seed in range(8):
        weight, gram = layer(3, 8, seed=seed, dtype=torch.float64)
        matrix = damped(gram)
        solution = solvers.admm().solve(weight, gram, scope=competing, ratio=ratio, mask=None)
        made.append(loss(weight, solution.weight, matrix))
        best.append(best_of_rows(weight, matrix, size // 2, size))
    assert all(one >= least * (1 - 1e-9) for one, least in zip(made, best, strict=True))
    assert any(one <= least * (1 + 1e-9) for one, least in zip(made, best, strict=True))
    assert sorted(one / least for one, least in zip(made, best, strict=True))[4] < 1.4


@pytest.mark.parametrize(
    ("competing", "ratio", "shape"),
    [
        (scope.tensor(), 0.5, (-1,)),
        (scope.tensor(), 0.9999, (-1,)),
        (None, 0.3, (-1,)),
        (scope.row(), 0.7, (6, -1)),
        (scope.columns(16), 0.7, (1, -1)),
        (scope.columns(5), 0.5, None),
        (PAIRS, None, (6, -1, 4)),
        (scope.n_of_m(keep=1, of=4), None, (6, -1, 4)),
        (scope.n_of_m(keep=3, of=4), 0.25, (6, -1, 4)),
        (scope.n_of_m(keep=4, of=8), None, (6, -1, 8)),
    ],
)
@pytest.mark.parametrize("dead", [(), (0, 5)])
def test_admm_keeps_exactly_so_many(competing, ratio, shape, dead):
    weight, gram = layer(dead=dead)
    solution = solvers.admm().solve(weight, gram, scope=competing, ratio=ratio, mask=None)
    if shape is None:
        assert [int((~part).sum()) for part in solution.mask.split(5, 1)] == [15, 15, 15, 3]
        return
    groups = solution.mask.view(shape)
    size = groups.shape[-1]
    dropped = removed_count(size, competing.ratio if ratio is None else ratio)
    assert ((~groups).sum(-1) == dropped).all()
    assert not solution.weight[~solution.mask].any()
    assert not solution.weight[:, list(dead)].any()
    if dead and groups.dim() < 3 and ratio is not None and ratio >= 0.3:
        assert not solution.mask[:, list(dead)].any()  # they go first


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_admm_cuts_a_share_of_the_groups_of_n_of_m(ratio):
    weight, gram = layer()
    solution = solvers.admm().solve(weight, gram, scope=PAIRS, ratio=ratio, mask=None)
    kept = solution.mask.view(6, -1, 4).sum(-1)
    assert sorted(kept.unique().tolist()) == ([2, 4] if ratio < 0.5 else [2])
    assert int((~solution.mask).sum()) == ratio * weight.numel()


@pytest.mark.parametrize("dim", ["out", "both"])
def test_admm_takes_n_of_m_along_other_sides(dim):
    weight, gram = layer(8, 16)
    along = scope.n_of_m(keep=2, of=4, dim=dim)
    mask = solvers.admm().solve(weight, gram, scope=along, ratio=None, mask=None).mask
    assert (mask.view(2, 4, 16).sum(1) == 2).all()
    if dim == "both":
        assert (mask.view(8, 4, 4).sum(2) == 2).all()


@pytest.mark.parametrize("competing", [scope.tensor(), scope.columns(8), scope.row(), PAIRS])
def test_admm_keeps_what_is_dropped_already_dropped(competing):
    weight, gram = layer()
    base = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    base[2] = False
    solution = solvers.admm().solve(
        weight, gram, scope=competing, ratio=None if competing is PAIRS else 0.5, mask=base
    )
    assert not (solution.mask & ~base).any()
    if competing.name in ("tensor", "columns"):
        assert int((~solution.mask).sum()) == weight.numel() // 2
    nothing = torch.zeros_like(base)
    solution = solvers.admm().solve(weight, gram, scope=scope.tensor(), ratio=0.5, mask=nothing)
    assert not solution.mask.any()
    assert not solution.weight.any()


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(48, 64, 200), (1, 96, 300), (40, 100, 30)])
@pytest.mark.parametrize(("competing", "ratio"), [(scope.tensor(), 0.5), (scope.tensor(), 0.7), (PAIRS, None)])
def test_admm_is_better_than_least_squares_on_the_masks_of_wanda_and_sparsegpt(
    rows, columns, tokens, competing, ratio
):
    weight, gram = layer(rows, columns, tokens=tokens)
    matrix = damped(gram)
    scores = weight.abs() * gram.diagonal().sqrt()
    if competing is PAIRS:
        groups = scores.view(rows, -1, 4)
        mask = (groups.argsort(-1).argsort(-1) >= 2).view_as(weight)
    else:
        mask = (scores.flatten().argsort().argsort() >= removed_count(weight.numel(), ratio)).view_as(weight)
    found = solvers.admm().solve(weight, gram, scope=competing, ratio=ratio, mask=None)
    other = solvers.sparsegpt().solve(weight, gram, scope=competing, ratio=ratio, mask=None).mask
    for one in (mask, other):
        polished = solvers.least_squares().solve(weight, gram, scope=None, ratio=None, mask=one)
        assert loss(weight, found.weight, matrix) < loss(weight, polished.weight, matrix)


@pytest.mark.parametrize("rho", [1e-4, 0.1, 100.0])
@pytest.mark.parametrize("iterations", [1, 3, 7, 300])
def test_admm_ends_wherever_it_begins(rho, iterations):
    weight, gram = layer()
    for matrix in (gram, torch.diag(gram.diagonal()), torch.ones(16, 16)):
        solution = solvers.admm(rho=rho, iterations=iterations).solve(
            weight, matrix, scope=scope.tensor(), ratio=0.5, mask=None
        )
        assert int(solution.mask.sum()) == 48
        assert bool(solution.weight.isfinite().all())
        equal = solvers.admm().solve(torch.ones(6, 16), matrix, scope=PAIRS, ratio=None, mask=None)
        assert (equal.mask.view(6, 4, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("change", [{"rho": 0}, {"rho": "a"}, {"iterations": 0}, {"iterations": 1.5}])
def test_admm_refuses_other_values(change):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(change))} is"):
        solvers.admm(**change)
