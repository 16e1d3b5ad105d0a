import functools
import math

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, adversarial, layouts


@functools.cache
def reference_case(dtype):
    sizes = [0, 1, 15, 16, 17, 4095, 4096, 4097, 65_537, 300_001]
    tensors = [
        adversarial((size,), kind, dtype, size) for size in sizes for kind in ("normal", "heavy tail", "zeros")
    ]
    return tensors, reference.norms(tensors)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_the_bits_of_the_reference(device, dtype, threads):
    tensors, expected = reference_case(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = ops.norms([tensor.to(device) for tensor in tensors]).cpu()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, expected)


def test_norms_are_accurate(device):
    tensor = adversarial((1_000_003,), "normal", torch.float32)
    exact = math.sqrt(math.fsum(value * value for value in tensor.tolist()))
    assert ops.norms([tensor.to(device)]).item() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_of_extreme_values(device, dtype, size):
    tensor = torch.full((10_000,), size, dtype=dtype, device=device)
    assert ops.norms([tensor]).item() == pytest.approx(100 * tensor[0].item(), rel=1e-14)


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e200, 1e305])
def test_norms_of_float64_neither_overflow_nor_underflow(device, size):
    tensor = torch.full((9,), size, dtype=torch.float64, device=device)
    assert ops.norms([tensor]).item() == pytest.approx(3 * size, rel=1e-14)


def test_norms_of_what_is_not_finite(device):
    tensors = [torch.tensor([1.0, math.nan]), torch.tensor([1.0, -math.inf]), torch.tensor([math.inf]).double()]
    result = ops.norms([tensor.to(device) for tensor in tensors]).tolist()
    assert math.isnan(result[0])
    assert result[1:] == [math.inf, math.inf]


def test_norms_do_not_depend_on_the_layout(device):
    weight = torch.randn(300, 26, 3, 7, generator=torch.Generator().manual_seed(1)).to(device)
    values = {name: ops.norms([view]).item() for name, view in layouts(weight).items()}
    assert set(values.values()) == {reference.norms([weight.cpu()]).item()}


def test_norms_pass_opcheck(device):
    torch.library.opcheck(
        torch.ops.pyprune.norms, ([torch.randn(30, 4, device=device), torch.zeros(0, device=device)],)
    )


def test_norms_refuse_bad_input():
    assert ops.norms([]).shape == (0,)
    with pytest.raises(TypeError, match="complex64"):
        ops.norms([torch.zeros(2, dtype=torch.complex64)])
