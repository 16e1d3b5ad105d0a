import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune import _C, ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, layouts

GATES = {
    "bernoulli": (ops.bernoulli_gate, reference.bernoulli_gate, {}),
    "hard concrete": (ops.hard_concrete_gate, reference.hard_concrete_gate, {}),
    "straight through": (ops.hard_concrete_gate, reference.hard_concrete_gate, {"straight_through": True}),
    "other parameters": (
        ops.hard_concrete_gate,
        reference.hard_concrete_gate,
        {"beta": 0.5, "gamma": -0.3, "zeta": 1.2},
    ),
}
# Weight and logits. The third runs over several chunks of the kernels; the rest share gates.
ELEMENTWISE = [((), ()), ((0, 3), (0, 3)), ((3, 47, 1000), (3, 47, 1000)), ((5, 1), (5, 1))]
SHARED = [
    ((16, 3, 5, 5), (16, 1, 1, 1)),  # output channels
    ((16, 30, 3, 3), (1, 30, 1, 1)),  # input channels
    ((12 * 64, 100), (12, 1)),  # heads
    ((64, 96), (16, 24)),  # blocks of 4 x 4
    ((300, 700), (1, 1)),  # one gate for all
    ((5000, 4), (1, 4)),  # few columns, many rows
    ((2, 8, 6, 10), (1, 4, 2, 5)),  # all dimensions in blocks, but the first
    ((4, 3000), (4, 2)),  # runs longer than a block of the kernels
    ((9, 70_000), (3, 1)),  # runs longer than a chunk
    ((4, 2, 3), (4, 1, 3)),
    ((0, 4), (0, 2)),
    ((6, 0), (3, 1)),
]


def near_a_jump(weight, logits, noise, options):
    """Return where float32 may fall on the other side of a comparison than float64."""
    gamma, zeta, beta = options.get("gamma", -0.1), options.get("zeta", 1.1), options.get("beta", 2 / 3)
    x = logits.detach().double() if noise is None else logits.detach().double() + torch.logit(noise.double())
    jump = x.abs() < 1e-5
    soft = torch.sigmoid(x if noise is None else x / beta) * (zeta - gamma) + gamma
    return jump | (soft.abs() < 1e-5) | ((soft - 1).abs() < 1e-5)


def check_against_reference(name, weight, logits, seed, stream=3):
    """Compare output and both gradients with the float64 reference on the same noise."""
    gate, in_torch, options = GATES[name]
    noise = None if seed is None else ops.gate_noise(logits.shape, seed, stream=stream)
    with torch.no_grad():  # keep away from the jumps, where the smallest rounding decides
        logits[near_a_jump(weight, logits, noise, options)] = 3.7
    weight, logits = weight.requires_grad_(), logits.requires_grad_()
    out = gate(weight, logits, seed, stream=stream, **options)
    assert (out.dtype, out.shape, out.device) == (weight.dtype, weight.shape, weight.device)
    assert out.stride() == torch.empty_like(weight).stride()
    expected_weight, expected_logits = (one.detach().clone().requires_grad_() for one in (weight, logits))
    expected = in_torch(expected_weight, expected_logits, noise, **options)
    eps = 2 * torch.finfo(weight.dtype).eps + (1e-6 if logits.dtype != torch.float64 else 1e-13)
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=1e-6)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(8)).to(weight)
    out.backward(grad)
    expected.backward(grad.double())
    assert (weight.grad.dtype, logits.grad.dtype) == (weight.dtype, logits.dtype)
    torch.testing.assert_close(weight.grad, expected_weight.grad, rtol=eps, atol=1e-6)
    size = max(1.0, (weight.numel() / max(1, logits.numel())) ** 0.5)  # of a sum of so many products
    tolerance = 2 * torch.finfo(logits.dtype).eps + (2e-6 if logits.dtype != torch.float64 else 1e-13)
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=5 * tolerance, atol=5 * tolerance * size)


def random_pair(shapes, dtype, logits_dtype, device):
    generator = torch.Generator().manual_seed(5)
    weight_shape, logits_shape = shapes
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    logits = (3 * torch.randn(logits_shape, generator=generator, dtype=torch.float64)).to(logits_dtype).to(device)
    return weight, logits


@pytest.fixture(params=["sampled", "deterministic"])
def seed(request, device):
    return torch.tensor(-77, device=device) if request.param == "sampled" else None


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_logits", [False, True], ids=["float32 logits", "own logits"])
def test_gate_matches_reference(device, seed, name, dtype, own_logits):
    for shapes in ELEMENTWISE:
        weight, logits = random_pair(shapes, dtype, dtype if own_logits else torch.float32, device)
        check_against_reference(name, weight, logits, seed)


@pytest.mark.parametrize("shapes", SHARED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_shared_matches_reference(device, seed, shapes, dtype):
    for name, logits_dtype in (("bernoulli", torch.float32), ("hard concrete", dtype)):
        check_against_reference(name, *random_pair(shapes, dtype, logits_dtype, device), seed)


@pytest.mark.parametrize("name", ["bernoulli", "hard concrete"])
@pytest.mark.parametrize("gates", [(30, 26, 3, 7), (1, 26, 1, 1), (15, 13, 1, 7)], ids=str)
def test_gate_of_any_layout(device, seed, name, gates):
    gate, _, _ = GATES[name]
    weight, logits = random_pair(((30, 26, 3, 7), gates), torch.float32, torch.float32, device)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(8)).to(device)

    def results(weight, logits, grad):
        leaves = [weight.detach().requires_grad_(), logits.detach().requires_grad_()]
        out = gate(*leaves, seed)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    want = results(weight, logits, grad)
    for layout in layouts(weight):
        for logits_layout, logits_view in layouts(logits).items():
            for view in (grad, layouts(grad)["channels_last"]):
                found = results(layouts(weight)[layout], logits_view, view)
                assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)), (layout, logits_layout)


def test_hard_concrete_gate_golden_values(device):
    logits = torch.tensor([-4.0, -2.397896, -2.397894, -2.0, -1.0, 0.0, 1.0, 2.0, 2.397896, 4.0], device=device)
    found = ops.hard_concrete_gate(torch.ones(10, device=device), logits, None).tolist()
    golden = [0, 0, 0, 0.04304, 0.22273, 0.5, 0.77727, 0.95696, 1, 1]
    assert found == pytest.approx(golden, abs=5e-6)
    assert found[0] == found[1] == 0 < found[2]
    assert found[-1] == found[-2] == 1


def test_gate_keeps_infinities_and_drops_anything(device):
    weight = torch.tensor([math.inf, math.nan, math.inf, math.nan, -0.0], device=device)
    logits = torch.tensor([-9.0, -9.0, 9.0, 9.0, 9.0], device=device)
    for gate in (ops.bernoulli_gate, ops.hard_concrete_gate):
        out = gate(weight, logits, None)
        assert out[:3].tolist() == [0.0, 0.0, math.inf]
        assert not out[:2].signbit().any()
        assert out[3].isnan()
        assert out[4].signbit()


def test_gate_of_extreme_logits(device):
    logits = torch.tensor([-math.inf, -1e30, -41.0, 41.0, 1e30, math.inf], device=device, requires_grad=True)
    for gate in (ops.bernoulli_gate, ops.hard_concrete_gate):
        for seed in (None, torch.tensor(4, device=device)):
            out = gate(torch.ones(6, device=device), logits, seed)
            assert out.tolist() == [0, 0, 0, 1, 1, 1]
            (grad,) = torch.autograd.grad(out.sum(), logits)
            assert grad.abs().max() < 1e-8


def test_gate_with_a_nan_logit_has_a_nan_gradient(device):
    logits = torch.tensor([math.nan, 0.5], device=device, requires_grad=True)
    out = ops.bernoulli_gate(torch.ones(2, device=device), logits, None)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert out.tolist() == [0.0, 1.0]
    assert grad.isnan().tolist() == [True, False]
    assert ops.hard_concrete_gate(torch.ones(2, device=device), logits, None).isnan().tolist() == [True, False]


@pytest.mark.parametrize("logit", [-5.0, -2.0, -0.5, 0.0, 0.5, 2.0, 5.0])
def test_bernoulli_gate_keeps_with_probability_sigma(device, logit):
    n = 1_000_000
    seed = torch.tensor(11, device=device)
    kept = ops.bernoulli_gate(torch.ones(n, device=device), torch.full((n,), logit, device=device), seed).sum().item()
    p = 1 / (1 + math.exp(-logit))
    assert abs(kept / n - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("beta", [2 / 3, 0.5])
def test_hard_concrete_gate_has_the_atoms_and_moments_of_the_distribution(device, logit, beta):
    n, gamma, zeta = 1_000_000, -0.1, 1.1
    z = ops.hard_concrete_gate(
        torch.ones(n, device=device),
        torch.full((n,), logit, device=device),
        torch.tensor(12, device=device),
        beta=beta,
    ).double()

    def cdf(x):  # of the stretched variable
        return 1 / (1 + math.exp(logit - beta * math.log((x - gamma) / (zeta - x))))

    for atom, p in ((0.0, cdf(0.0)), (1.0, 1 - cdf(1.0))):
        assert abs((z == atom).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    # E[z] = integral of P(z > x) over [0, 1], and E[z^2] that of 2 x P(z > x), by the midpoint rule.
    steps = 100_000
    points = [(i + 0.5) / steps for i in range(steps)]
    mean = sum(1 - cdf(x) for x in points) / steps
    variance = sum(2 * x * (1 - cdf(x)) for x in points) / steps - mean**2
    assert abs(z.mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert z.var().item() == pytest.approx(variance, rel=0.02)
    shift = -beta * math.log(-gamma / zeta)
    expected_l0 = ops.gate_penalty([torch.full((n,), logit, device=device)], shift=shift).item()
    assert expected_l0 / n == pytest.approx(1 - cdf(0.0), rel=1e-5)


@pytest.mark.parametrize("name", GATES)
def test_gate_forward_and_backward_make_the_same_decisions(device, name):
    gate, _, options = GATES[name]
    n = 10_000_000
    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(n, generator=generator)).to(device).requires_grad_()
    weight = torch.ones(n, device=device, requires_grad=True)
    out = gate(weight, logits, torch.tensor(9, device=device), **options)
    grad_weight, grad_logits = torch.autograd.grad(out.sum(), [weight, logits])
    # The gradient of a product with weights of one is the gate itself.
    assert torch.equal(grad_weight, out)
    if name in ("hard concrete", "other parameters"):
        assert torch.equal(grad_logits != 0, (out > 0) & (out < 1))


def test_bernoulli_gate_decides_as_float64_does(device):
    n = 10_000_000
    logits = (2 * torch.randn(n, generator=torch.Generator().manual_seed(2))).to(device)
    seed = torch.tensor(10, device=device)
    kept = ops.bernoulli_gate(torch.ones(n, device=device), logits, seed) != 0
    exact = logits.double() + torch.logit(ops.gate_noise((n,), seed).double()) > 0
    # The odds are off by at most about 2e-6, which the noise hits with a chance of 5e-7 p (1 - p) per gate.
    assert (kept != exact).sum() <= 5


@pytest.mark.parametrize("name", GATES)
def test_gate_is_the_same_for_all_threads_and_capabilities(name):
    gate, _, options = GATES[name]
    for shapes in (((70, 3000), (70, 3000)), ((70, 3000), (1, 1500)), ((200_000, 2), (1, 2))):
        weight, logits = random_pair(shapes, torch.float32, torch.float32, "cpu")
        weight, logits = weight.requires_grad_(), logits.requires_grad_()

        def results(weight=weight, logits=logits):
            out = gate(weight, logits, torch.tensor(6), **options)
            return [out, *torch.autograd.grad(out.sum(), [weight, logits])]

        want = results()
        threads = torch.get_num_threads()
        try:
            for capability in _C.available_cpu_capabilities():
                _C.set_cpu_capability(capability)
                for count in (1, 3):
                    torch.set_num_threads(count)
                    assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True)), (capability, count)
        finally:
            torch.set_num_threads(threads)
            _C.set_cpu_capability("auto")


def test_gate_ignores_flushed_denormals():
    weight = torch.full((70_000,), 1e-40, requires_grad=True)
    try:
        torch.set_flush_denormal(True)
        out = ops.bernoulli_gate(weight, torch.full((70_000,), 9.0), None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, weight)


def test_gate_computes_only_the_gradients_that_are_wanted(device):
    weight, logits = random_pair(((6, 4), (6, 1)), torch.float32, torch.float32, device)
    seed = torch.tensor(3, device=device)
    both = [one.clone().requires_grad_() for one in (weight, logits)]
    grads = torch.autograd.grad(ops.hard_concrete_gate(*both, seed).sum(), both)
    only_weight = weight.clone().requires_grad_()
    ops.hard_concrete_gate(only_weight, logits, seed).sum().backward()
    assert torch.equal(only_weight.grad, grads[0])
    only_logits = logits.clone().requires_grad_()
    ops.hard_concrete_gate(weight, only_logits, seed).sum().backward()
    assert torch.equal(only_logits.grad, grads[1])


class Calls(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gates", [(6, 4), (6, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gate_is_one_operator_forward_and_one_backward(device, gates, transposed):
    weight, logits = random_pair(((6, 4), gates), torch.float32, torch.float32, device)
    weight, logits = (weight.t().contiguous().t() if transposed else weight).requires_grad_(), logits.requires_grad_()
    seed, grad = torch.tensor(3, device=device), torch.ones_like(weight)
    with Calls() as calls:
        ops.bernoulli_gate(weight, logits, seed).backward(grad)
    # No copy: what the backward pass wrote is the gradient that a leaf gets.
    assert [name for name in calls.names if name != "aten::detach"] == ["pyprune::gate", "pyprune::gate_backward"]


def test_gate_differentiates_as_the_registered_operator(device):
    weight, logits = (
        one.requires_grad_() for one in random_pair(((6, 4), (6, 1)), torch.float32, torch.float32, device)
    )
    seed = torch.tensor(3, device=device)
    found = ops.hard_concrete_gate(weight, logits, seed, stream=2)
    registered = torch.ops.pyprune.gate(weight, logits, seed, 2, 1, 2 / 3, -0.1, 1.1)
    assert torch.equal(found, registered)
    grads = [torch.autograd.grad(out.square().sum(), [weight, logits]) for out in (found, registered)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    # Both under torch.func, which the operator takes part in by its registration.
    batch = torch.stack([weight.detach(), -weight.detach()])
    expected = torch.stack([ops.bernoulli_gate(one, logits, seed) for one in batch])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs one by one
        assert torch.equal(torch.func.vmap(lambda one: ops.bernoulli_gate(one, logits, seed))(batch), expected)


def test_gate_into_a_given_tensor(device):
    weight, logits = random_pair(((6, 4), (6, 4)), torch.float32, torch.float32, device)
    seed = torch.tensor(3, device=device)
    out = torch.empty_like(weight)
    assert ops.bernoulli_gate(weight, logits, seed, out=out) is out
    assert torch.equal(out, ops.bernoulli_gate(weight, logits, seed))
    assert ops.bernoulli_gate(weight, logits, seed, out=weight) is weight
    assert torch.equal(weight, out)


def test_hard_concrete_gate_passes_gradcheck():
    weight, logits = random_pair(((4, 6), (2, 6)), torch.float64, torch.float64, "cpu")
    for seed in (None, torch.tensor(5)):
        for beta in (2 / 3, 0.5):
            assert torch.autograd.gradcheck(
                lambda w, m, seed=seed, beta=beta: ops.hard_concrete_gate(w, m, seed, beta=beta),
                [weight.requires_grad_(), logits.requires_grad_()],
            )


def test_gate_passes_opcheck(device):
    for shapes in (((4, 6), (4, 6)), ((4, 6), (2, 1))):
        weight, logits = random_pair(shapes, torch.float32, torch.float32, device)
        weight, logits = weight.requires_grad_(), logits.requires_grad_()
        for seed in (None, torch.tensor(5, device=device)):
            for rule in (0, 1, 2):
                parameters = (rule, 2 / 3, -0.1, 1.1)
                torch.library.opcheck(torch.ops.pyprune.gate, (weight, logits, seed, 3, *parameters))
                for wanted in ((True, True), (True, False), (False, True)):
                    torch.library.opcheck(
                        torch.ops.pyprune.gate_backward,
                        (weight.detach(), weight.detach(), logits.detach(), seed, 3, *parameters, *wanted),
                    )
                out = torch.empty_like(weight)
                torch.library.opcheck(
                    torch.ops.pyprune.gate_out, (weight.detach(), logits.detach(), seed, 3, *parameters, out)
                )


def test_gate_refuses_bad_input():
    weight, logits, seed = torch.ones(4, 6), torch.ones(4, 6), torch.tensor(1)
    with pytest.raises(TypeError, match="int64"):
        ops.bernoulli_gate(weight.long(), logits, seed)
    with pytest.raises(TypeError, match=r"float64; allowed are torch\.float32$"):
        ops.bernoulli_gate(weight, logits.double(), seed)
    for shape in [(4,), (3, 6), (8, 6), (4, 6, 1), (0, 6)]:
        with pytest.raises(ValueError, match="must divide"):
            ops.bernoulli_gate(weight, torch.ones(shape), seed)
    for bad in (3, torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="seed"):
            ops.bernoulli_gate(weight, logits, bad)
    for bad in (1.0, None):
        with pytest.raises(TypeError, match="give a tensor"):
            ops.bernoulli_gate(bad, logits, seed)
        with pytest.raises(TypeError, match="give a tensor"):
            ops.bernoulli_gate(weight, bad, seed)
    for options in ({"beta": "1"}, {"gamma": True}, {"zeta": None}):
        with pytest.raises(TypeError, match="give a number"):
            ops.hard_concrete_gate(weight, logits, seed, **options)
    for options in (
        {"beta": 0.0},
        {"beta": math.nan},
        {"gamma": 0.1},
        {"zeta": 1.0},
        {"zeta": math.inf},
        {"zeta": 1e300},
    ):
        with pytest.raises(ValueError, match=r"beta|gamma|zeta"):
            ops.hard_concrete_gate(weight, logits, seed, **options)
    with pytest.raises(ValueError, match="must agree"):
        ops.bernoulli_gate(weight, logits, seed, out=torch.empty(4, 5))
    with pytest.raises(TypeError, match="out"):
        ops.bernoulli_gate(weight, logits, seed, out=torch.empty(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="expanded"):
        ops.bernoulli_gate(weight, logits, seed, out=torch.empty(4, 1).expand(4, 6))
    with pytest.raises(ValueError, match="autograd"):
        ops.bernoulli_gate(weight.requires_grad_(), logits, seed, out=torch.empty(4, 6))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in forward mode
def test_gate_refuses_derivatives_that_it_does_not_have():
    weight, logits = random_pair(((3, 4), (3, 4)), torch.float32, torch.float32, "cpu")
    logits = logits.requires_grad_()
    for incoming in (torch.ones(3, 4), torch.ones(3, 4, requires_grad=True)):
        out = ops.hard_concrete_gate(weight, logits, torch.tensor(1))
        (grad,) = torch.autograd.grad(out, logits, incoming, create_graph=True)
        with pytest.raises(NotImplementedError, match="not twice"):
            grad.sum().backward()
    with pytest.raises(NotImplementedError, match="reverse mode"):
        torch.func.jvp(lambda w: ops.bernoulli_gate(w, logits, None), (weight,), (torch.ones_like(weight),))
    # Tangents of something else do not matter.
    _, tangent = torch.func.jvp(
        lambda x: x * ops.bernoulli_gate(weight, torch.ones(3, 4), None), (torch.ones(3, 4),), (torch.ones(3, 4),)
    )
    assert torch.equal(tangent, weight)
