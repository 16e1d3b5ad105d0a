import itertools

import pytest
import torch

from pyprune import scope, solvers
from tests.oneshot.layers import GOLDEN, golden

SOLVERS = {"block Fisher": solvers.block_fisher, "M-FAC": solvers.m_fac}


def fisher_of(gradients, block, damping):
    """The matrix of a weight, with zeros outside of its blocks."""
    g = gradients.double()
    fisher = g.T @ g / len(g)
    blocks = torch.arange(len(fisher)) // block
    fisher *= blocks[:, None] == blocks
    return fisher + damping * g.square().mean() * torch.eye(len(fisher)).double()


def joint(weight, fisher, mask):
    """What is kept if all that a mask drops goes together."""
    w, kept = weight.double().flatten(), mask.flatten()
    solved = torch.zeros_like(w)
    step = torch.linalg.solve(fisher[kept][:, kept], fisher[kept][:, ~kept] @ w[~kept])
    solved[kept] = w[kept] + step
    return solved.view(weight.shape)


def sample(rows=4, columns=6, samples=9, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, rows * columns, generator=generator, dtype=torch.float64)
    gradients[:, 1::2] += gradients[:, :1]
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype), gradients.to(dtype)


@pytest.mark.parametrize(
    ("block", "make"), [(1, "block Fisher"), (4, "block Fisher"), (8, "block Fisher"), (8, "M-FAC")]
)
def test_block_fisher_and_m_fac_are_the_golden_ones(block, make):
    name = f"obert_block_{block}"
    weight, gradients = golden(name, "w")[None], golden(name, "grads")
    damping = GOLDEN[name]["damp"] / float(gradients.square().mean())
    options = {} if make == "M-FAC" else {"block": block}
    solver = SOLVERS[make](damping=damping, **options)
    torch.testing.assert_close(solver.scores(weight, gradients, None)[0][0], golden(name, "score"), rtol=1e-5, atol=0)
    solution = solver.solve(weight, gradients, scope=None, ratio=0.5, mask=None)
    assert (~solution.mask[0]).nonzero().flatten().tolist() == GOLDEN[name]["pruned_4"]
    expected = golden(name, "weight_joint_obs_update")[None]
    torch.testing.assert_close(solution.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 5, 7, 24, 1000])
@pytest.mark.parametrize("samples", [1, 3, 40])
@pytest.mark.parametrize("has_base", [False, True])
def test_block_fisher_scores_and_joint_solution_are_those_of_the_matrix(dtype, block, samples, has_base):
    weight, gradients = sample(samples=samples, dtype=dtype)
    base = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.7 if has_base else None
    fisher = fisher_of(gradients, block, 0.01)
    makers = [solvers.block_fisher(block=block)] + ([solvers.m_fac()] if block >= 24 else [])
    for solver in makers:
        scores = solver.scores(weight, gradients, base)[0].flatten()
        there = torch.arange(24) if base is None else base.flatten().nonzero()[:, 0]
        inverse = torch.linalg.inv(fisher[there][:, there]).diagonal()
        expected = torch.zeros(24, dtype=torch.float64)
        expected[there] = weight.double().flatten()[there].square() / (2 * inverse)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=tolerance * 1e-2)
        solution = solver.solve(weight, gradients, scope=scope.tensor(), ratio=0.5, mask=base)
        assert int(solution.mask.sum()) == 12
        assert base is None or not (solution.mask & ~base).any()
        torch.testing.assert_close(
            solution.weight.double(), joint(weight, fisher, solution.mask), rtol=tolerance, atol=tolerance
        )


def test_block_fisher_of_one_weight_takes_the_one_that_costs_least():
    weight, gradients = sample(2, 4)
    fisher = fisher_of(gradients, 8, 0.01)
    solution = solvers.block_fisher(block=8).solve(weight, gradients, scope=None, ratio=1 / 8, mask=None)
    costs = []
    for index in range(8):
        mask = torch.ones(8, dtype=torch.bool)
        mask[index] = False
        step = (joint(weight, fisher, mask.view(2, 4)) - weight).flatten()
        costs.append(float(step @ fisher @ step) / 2)
    assert int((~solution.mask).flatten().nonzero()) == costs.index(min(costs))
    assert float(solvers.m_fac().scores(weight, gradients, None)[0].min()) == pytest.approx(min(costs))


def test_the_joint_solution_loses_less_than_any_other_weights():
    weight, gradients = sample()
    fisher = fisher_of(gradients, 24, 0.01)
    solution = solvers.m_fac().solve(weight, gradients, scope=None, ratio=0.5, mask=None)
    step = (solution.weight - weight).flatten()
    least = step @ fisher @ step
    for index, sign in itertools.product(solution.mask.flatten().nonzero()[:, 0], (-1e-3, 1e-3)):
        other = step.clone()
        other[index] += sign
        assert other @ fisher @ other > least


@pytest.mark.parametrize("make", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_solve_returns_the_weight_bit_for_bit_if_nothing_goes(make, dtype):
    weight, gradients = sample(dtype=torch.float32)
    weight = weight.to(dtype)
    weight[0, 0] = -0.0
    solution = SOLVERS[make]().solve(weight, gradients, scope=None, ratio=0.0, mask=None)
    assert torch.equal(solution.weight, weight.to(solution.weight.dtype))
    assert torch.equal(solution.weight.signbit(), weight.signbit())


@pytest.mark.parametrize("make", SOLVERS)
@pytest.mark.parametrize(
    ("competing", "ratio", "shape"),
    [(scope.row(), 0.5, (4, 6)), (scope.n_of_m(keep=1, of=3), None, (4, 2, 3)), (scope.tensor(), 0.99, (24,))],
)
def test_solve_keeps_exactly_so_many(make, competing, ratio, shape):
    weight, gradients = sample()
    mask = SOLVERS[make]().solve(weight, gradients, scope=competing, ratio=ratio, mask=None).mask
    kept = {(4, 6): 3, (4, 2, 3): 1, (24,): 1}[shape]
    assert (mask.view(shape).sum(-1) == kept).all()


@pytest.mark.parametrize("make", SOLVERS)
def test_solve_without_any_gradient_goes_by_magnitude_and_changes_nothing(make):
    weight, gradients = sample(dtype=torch.float32)
    solution = SOLVERS[make]().solve(weight, torch.zeros_like(gradients), scope=None, ratio=0.5, mask=None)
    assert torch.equal(solution.mask.flatten(), weight.flatten().abs().argsort().argsort() >= 12)
    assert torch.equal(solution.weight, torch.where(solution.mask, weight, 0))


@pytest.mark.parametrize("make", SOLVERS)
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"gradients": [1.0]}, TypeError, "gradients is a list"),
        ({"gradients": torch.ones(3, 24, dtype=torch.float16)}, TypeError, "gradients has dtype"),
        ({"gradients": torch.ones(3, 23)}, ValueError, "gradients is a float32 tensor"),
        ({"gradients": torch.ones(24)}, ValueError, "gradients is a float32 tensor"),
        ({"gradients": torch.ones(0, 24)}, ValueError, "gradients is a float32 tensor"),
        ({"gradients": torch.full((3, 24), float("nan"))}, ValueError, "gradients has NaN"),
        ({"gradients": torch.full((3, 24), float("inf"))}, ValueError, "gradients has NaN or infinite"),
        ({"weight": torch.full((4, 6), float("nan"))}, ValueError, "weight has NaN"),
        ({"weight": torch.ones(24)}, ValueError, "weight is"),
        ({"mask": torch.ones(4, 6)}, TypeError, "mask has dtype"),
        ({"scope": scope.model()}, ValueError, "scope model"),
        ({"ratio": 1}, ValueError, "ratio is 1"),
    ],
)
def test_solve_refuses_what_is_no_problem(make, change, error, said):
    weight, gradients = sample()
    arguments = {"weight": weight, "gradients": gradients, "scope": None, "ratio": 0.5, "mask": None} | change
    with pytest.raises(error, match=said):
        SOLVERS[make]().solve(arguments.pop("weight"), arguments.pop("gradients"), **arguments)


@pytest.mark.parametrize("block", [0, 1.5, "a"])
def test_block_fisher_refuses_other_values(block):
    with pytest.raises((TypeError, ValueError), match="block is"):
        solvers.block_fisher(block=block)


def test_m_fac_refuses_no_damping():
    with pytest.raises(ValueError, match="damping is 0"):
        solvers.m_fac(damping=0)
