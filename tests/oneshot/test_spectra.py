import numpy as np
import pytest
import torch

from pyprune.oneshot.spectra import tail_exponent


def hill(matrix):
    """As written in the paper's code: of the sorted eigenvalues those from the middle on."""
    small = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    values = np.sort(np.linalg.eigvalsh(small @ small.T))
    values = values[values > 1e-9 * values[-1]]
    start = len(values) // 2
    logs = np.log(values)
    return 1 + (len(values) - start) / (logs[start:].sum() - (len(values) - start) * logs[start])


@pytest.mark.parametrize("shape", [(3, 3), (8, 5), (5, 8), (64, 64), (40, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_tail_exponent_is_hills_estimate(shape, dtype, scale):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=dtype) * scale
    assert tail_exponent(matrix) == pytest.approx(hill(matrix.double().numpy()), rel=1e-4)


def test_tail_exponent_does_not_count_zeros_and_takes_half_precision():
    torch.manual_seed(0)
    matrix = torch.randn(16, 16, dtype=torch.float64)
    with_zeros = torch.zeros(32, 20, dtype=torch.float64)
    with_zeros[:16, 2:18] = matrix
    assert tail_exponent(with_zeros) == pytest.approx(tail_exponent(matrix))
    assert tail_exponent(matrix.bfloat16()) == pytest.approx(tail_exponent(matrix), rel=0.1)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(4, 4),
        torch.ones(1, 5),
        torch.ones(3, 3),
        torch.diag(torch.tensor([1.0, 2.0])),  # the larger half is one
        torch.empty(0, 4),
        torch.empty(4, 0),
    ],
)
def test_tail_exponent_is_none_where_nothing_differs(matrix):
    assert tail_exponent(matrix) is None


def test_heavier_tails_have_smaller_exponents():
    plain = torch.diag(torch.linspace(1, 2, 20))
    heavy = torch.diag(torch.linspace(1, 2, 20) ** 8)
    assert tail_exponent(heavy) < tail_exponent(plain)
