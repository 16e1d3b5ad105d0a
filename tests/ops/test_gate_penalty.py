import math

import pytest
import torch

from pyprune import _C, ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, layouts

SHAPES = [(), (0,), (1,), (3, 5), (1024,), (1025,), (70_001,), (129, 1000)]
L0_SHIFT = -2 / 3 * math.log(0.1 / 1.1)


def random_logits(dtype, device, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [(4 * torch.randn(shape, generator=generator)).to(dtype).to(device) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("shift", [0.0, L0_SHIFT])
def test_gate_penalty_matches_reference(device, dtype, hard, shift):
    logits = [one.requires_grad_() for one in random_logits(dtype, device)]
    expected_logits = [one.detach().clone().requires_grad_() for one in logits]
    sums = ops.gate_penalty(logits, hard=hard, shift=shift)
    expected = reference.gate_penalty(expected_logits, hard=hard, shift=shift)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    if hard:
        assert sums.tolist() == [int((one > 0).sum()) for one in logits]
    upstream = torch.linspace(-1, 2, len(logits), dtype=torch.float64, device=device)
    sums.backward(upstream)
    expected.backward(upstream)
    for one, want in zip(logits, expected_logits, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad, want.grad, rtol=4 * torch.finfo(dtype).eps + 1e-6, atol=1e-7)


def test_gate_penalty_golden_values(device):
    logits = torch.tensor([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0], device=device)
    expected = [0.08307, 0.40098, 0.64534, 0.83182, 0.93077, 0.97337, 0.99631]
    found = ops.gate_penalty(list(logits), shift=L0_SHIFT).tolist()
    assert found == pytest.approx(expected, abs=5e-6)
    assert ops.gate_penalty([logits], hard=True).tolist() == [3.0]


def test_gate_penalty_counts_beyond_what_float32_can_hold(device):
    logits = torch.ones(1, device=device).expand(2**24 + 3)
    assert ops.gate_penalty([logits], hard=True).tolist() == [2.0**24 + 3]


def test_gate_penalty_of_extreme_logits(device):
    logits = torch.tensor([-math.inf, -1e30, -0.0, 1e30, math.inf], device=device, requires_grad=True)
    assert ops.gate_penalty([logits], hard=True).tolist() == [2.0]
    total = ops.gate_penalty([logits])
    assert total.tolist() == pytest.approx([2.5])
    total.backward(torch.ones_like(total))
    assert logits.grad.tolist() == pytest.approx([0, 0, 0.25, 0, 0], abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_penalty_of_any_layout(device, dtype):
    base = random_logits(dtype, device, [(30, 26, 3, 7)])[0]
    want = torch.ops.pyprune.gate_penalty([base], False, 0.5)
    grad = torch.tensor([0.7], dtype=torch.float64, device=device)
    want_grad = torch.ops.pyprune.gate_penalty_backward(grad, [base], 0.5)[0]
    for name, view in layouts(base).items():
        assert torch.equal(torch.ops.pyprune.gate_penalty([view], False, 0.5), want), name
        assert torch.equal(torch.ops.pyprune.gate_penalty_backward(grad, [view], 0.5)[0], want_grad), name


@pytest.mark.parametrize("threads", [1, 3])
def test_gate_penalty_is_the_same_for_all_threads_and_capabilities(threads):
    logits = random_logits(torch.float32, "cpu", [(300_000,), (70_000,)])
    want = ops.gate_penalty(logits)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for capability in _C.available_cpu_capabilities():
            _C.set_cpu_capability(capability)
            assert torch.equal(ops.gate_penalty(logits), want)
    finally:
        torch.set_num_threads(before)
        _C.set_cpu_capability("auto")


def test_gate_penalty_of_nothing():
    assert ops.gate_penalty([]).shape == (0,)


def test_gate_penalty_passes_opcheck(device):
    logits = [torch.randn(5, 3, device=device, requires_grad=True), torch.randn(7, device=device, requires_grad=True)]
    torch.library.opcheck(torch.ops.pyprune.gate_penalty, (logits, True, 0.0))
    torch.library.opcheck(torch.ops.pyprune.gate_penalty, (logits, False, 1.5))


def test_gate_penalty_soft_passes_gradcheck():
    logits = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *all_logits: ops.gate_penalty(all_logits, shift=1.6), logits)


def test_gate_penalty_refuses_other_dtypes():
    with pytest.raises(TypeError, match="int64"):
        ops.gate_penalty([torch.ones(3, dtype=torch.int64)])


def test_gate_penalty_refuses_a_single_tensor():
    with pytest.raises(TypeError, match="list of tensors"):
        ops.gate_penalty(torch.ones(3, 4))


def test_gate_penalty_refuses_a_second_derivative():
    logits = torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.gate_penalty([logits]).sum(), logits, create_graph=True)
    assert grad.tolist() == [0.25, 0.25, 0.25]
    with pytest.raises(NotImplementedError, match="not twice"):
        grad.sum().backward()
