import dataclasses

import pytest
import torch

from pyprune import scope, solvers
from pyprune.oneshot.solution import relative_error
from pyprune.oneshot.system import cholesky, damped, system_of
from tests.oneshot.layers import layer

SOLVERS = {
    "least squares": solvers.least_squares(),
    "ADMM": solvers.admm(),
    "swaps": solvers.swaps(),
    "SparseGPT": solvers.sparsegpt(),
}
NAN = float("nan")


def solve(solver, weight, gram, *, ratio=0.5, mask=None, **options):
    if not solver.chooses and mask is None and "mask" not in options:
        mask = torch.arange(weight.numel()).view(weight.shape) % 2 == 0 if isinstance(weight, torch.Tensor) else None
    return solver.solve(weight, gram, scope=options.get("scope", scope.row()), ratio=ratio, mask=mask)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_solve_returns_float32_or_the_float64_of_the_weight_and_leaves_its_arguments(name, dtype, gram_dtype):
    weight, gram = layer(dtype=dtype, gram_dtype=gram_dtype, dead=(3,))
    before = weight.clone(), gram.clone()
    solution = solve(SOLVERS[name], weight, gram)
    assert solution.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert solution.mask.dtype == torch.bool
    assert not solution.weight[~solution.mask].any()
    assert int((~solution.mask).sum()) == weight.numel() // 2
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert solution.damping == 0.01


GRADIENTS = {"block Fisher": solvers.block_fisher(), "M-FAC": solvers.m_fac()}


@pytest.mark.parametrize("name", [*SOLVERS, *GRADIENTS])
def test_solve_under_autocast_is_that_without(name):
    weight, gram = layer()
    solver = {**SOLVERS, **GRADIENTS}[name]
    if name in GRADIENTS:
        gram = torch.randn(20, weight.numel(), generator=torch.Generator().manual_seed(0))
    plain = solver.solve(weight, gram, scope=scope.row(), ratio=0.5, mask=weight > 0)
    with torch.autocast("cpu", torch.bfloat16):
        solution = solver.solve(weight, gram, scope=scope.row(), ratio=0.5, mask=weight > 0)
        error = relative_error(weight, weight / 2, torch.eye(weight.shape[1]))
    assert torch.equal(solution.mask, plain.mask)
    assert torch.equal(solution.weight, plain.weight)
    assert error == pytest.approx(0.25, abs=1e-6)


def strided(tensor):
    apart = tensor.new_zeros(2 * tensor.shape[0], 3 * tensor.shape[1])[::2, ::3]
    return [tensor.T.contiguous().T, apart.copy_(tensor)]


SCOPES = {"tensor": scope.tensor(), "row": scope.row(), "n_of_m": scope.n_of_m(keep=2, of=4)}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("competing", SCOPES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["weight", "gram", "mask"])
def test_solve_of_tensors_of_any_strides(name, competing, which):
    weight, gram = layer()
    mask = (torch.arange(weight.numel()) % 4 < 2).view(weight.shape)
    plain = [weight, gram, mask]
    options = {"scope": SCOPES[competing], "ratio": None if competing == "n_of_m" else 0.5}
    expected = SOLVERS[name].solve(weight, gram, mask=mask, **options)
    for other in strided(plain[which]):
        one, two, three = (*plain[:which], other, *plain[which + 1 :])
        solution = SOLVERS[name].solve(one, two, mask=three, **options)
        assert torch.equal(solution.mask, expected.mask)
        torch.testing.assert_close(solution.weight, expected.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_solve_returns_the_weight_bit_for_bit_if_nothing_goes(name, dtype):
    weight, gram = layer(dtype=dtype, dead=(2,))
    weight[0, 0] = -0.0
    solution = solve(SOLVERS[name], weight, gram, ratio=0.0, mask=torch.ones(weight.shape, dtype=torch.bool))
    assert bool(solution.mask.all())
    assert torch.equal(solution.weight, weight.to(solution.weight.dtype))
    assert torch.equal(solution.weight.signbit(), weight.signbit())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"weight": [[1.0]]}, TypeError, "weight is a list"),
        ({"weight": torch.ones(6, 16, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
        ({"weight": torch.ones(16)}, ValueError, "weight is a float32 tensor of shape"),
        ({"weight": torch.ones(0, 16)}, ValueError, "weight is a float32 tensor of shape"),
        ({"weight": torch.full((6, 16), NAN)}, ValueError, "weight has NaN"),
        ({"gram": None}, TypeError, "gram is a NoneType"),
        ({"gram": torch.eye(16, dtype=torch.bfloat16)}, TypeError, "gram has dtype torch.bfloat16"),
        ({"gram": torch.eye(15)}, ValueError, r"gram is a float32 tensor of shape \(15, 15\)"),
        ({"gram": torch.full((16, 16), NAN)}, ValueError, "gram has NaN"),
        ({"gram": torch.full((16, 16), float("inf"))}, ValueError, "gram has NaN or infinite"),
        ({"gram": -torch.eye(16)}, ValueError, "gram has negative"),
        ({"mask": torch.ones(6, 16)}, TypeError, "mask has dtype torch.float32"),
        ({"mask": torch.ones(5, 16, dtype=torch.bool)}, ValueError, r"mask is a bool tensor of shape \(5, 16\)"),
    ],
)
def test_solve_refuses_what_is_no_layer(name, change, error, said):
    weight, gram = layer()
    arguments = {"weight": weight, "gram": gram, "mask": torch.rand(weight.shape) < 0.5} | change
    with pytest.raises(error, match=said):
        solve(SOLVERS[name], **arguments)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scope": scope.model()}, ValueError, "scope model"),
        ({"scope": scope.group({"a": ["x"]})}, ValueError, "scope group"),
        ({"scope": scope.n_of_m(keep=2, of=4, among="model")}, ValueError, "scope n_of_m"),
        ({"scope": "row"}, TypeError, "scope is 'row'"),
        ({"ratio": 1.0}, ValueError, "ratio is 1.0"),
        ({"ratio": None}, TypeError, "ratio is None"),
        ({"ratio": 0.6, "scope": scope.n_of_m(keep=2, of=4)}, ValueError, "0.6"),
    ],
)
def test_solve_refuses_what_it_cannot_choose(options, error, said):
    weight, gram = layer()
    with pytest.raises(error, match=said):
        solve(SOLVERS["ADMM"], weight, gram, **options)


@pytest.mark.parametrize("make", [solvers.admm, solvers.least_squares, solvers.swaps, solvers.block_fisher])
@pytest.mark.parametrize("damping", [-0.1, 1.5, NAN, "0.1", None, True])
def test_solvers_refuse_a_damping_that_is_none(make, damping):
    with pytest.raises((TypeError, ValueError), match="damping is"):
        make(damping=damping)


def test_system_of_mends_dead_inputs_and_computes_in_the_wider_dtype():
    weight, gram = layer(dead=(1, 5), gram_dtype=torch.float64)
    system = system_of(weight, gram, None)
    assert system.weight.dtype == system.gram.dtype == torch.float64
    assert system.dead.nonzero().flatten().tolist() == [1, 5]
    assert not system.weight[:, [1, 5]].any()
    assert system.gram.diagonal()[[1, 5]].tolist() == [1, 1]
    assert not gram.diagonal()[[1, 5]].any()
    assert system_of(*layer(), None).dead is None


@pytest.mark.parametrize(
    ("gram", "asked", "used"),
    [
        ([[1.0, 0.5], [0.5, 1.0]], 0.01, 0.01),
        ([[1.0, 1.05], [1.05, 1.0]], 0.01, 0.1),
        ([[1.0, 1.05], [1.05, 1.0]], 0.001, 0.1),
        ([[1.0, 1.0], [1.0, 1.0]], 0.0, torch.finfo(torch.float64).eps),
    ],
)
def test_damped_takes_ten_times_as_much_until_it_works(gram, asked, used):
    gram = torch.tensor(gram, dtype=torch.float64)
    factor, damping = damped(gram, asked, cholesky)
    assert used <= damping <= used * 10 if asked == 0 else damping == used
    torch.testing.assert_close(factor @ factor.T, gram + damping * gram.diagonal().mean() * torch.eye(2).double())


def test_damped_says_when_no_damping_helps():
    with pytest.raises(ValueError, match="gram cannot be factorised"):
        damped(torch.eye(2), 0.01, lambda matrix: None)


@pytest.mark.parametrize("name", SOLVERS)
def test_solve_of_a_gram_without_rank_is_finite_at_any_damping(name):
    weight, gram = layer(4, 40, tokens=3)
    for damping in (0.0, 1e-6, 0.01):
        solution = solve(dataclasses.replace(SOLVERS[name], damping=damping), weight, gram)
        assert bool(solution.weight.isfinite().all())
        assert solution.damping >= damping
