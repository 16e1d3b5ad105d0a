"""Tests of grams: half of X^T X is computed, the rest is its mirror."""

import numpy as np
import pytest
import torch

from pyprune.oneshot.grams import add_gram, symmetric

SIZES = [(5, 1), (1, 7), (300, 95), (33, 96), (200, 97), (64, 800), (0, 12), (40, 0)]


@pytest.mark.parametrize(("tokens", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_add_gram_sums_the_products_of_all_batches(tokens, columns, dtype):
    torch.manual_seed(0)
    batches = [torch.randn(tokens, columns).to(dtype) for _ in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gram = torch.zeros(columns, columns, dtype=wide)
    for batch in batches:
        assert add_gram(gram, batch) is gram
    assert symmetric(gram) is gram
    expected = sum(x.T @ x for x in (batch.double().numpy() for batch in batches))
    np.testing.assert_allclose(gram.numpy(), expected, rtol=1e-5, atol=1e-4 if wide == torch.float32 else 1e-12)
    assert torch.equal(gram, gram.T)


def test_add_gram_writes_the_upper_triangle_and_goes_on_after_symmetric():
    torch.manual_seed(0)
    first, second = torch.randn(2, 50, 900).double()
    gram = add_gram(torch.zeros(900, 900, dtype=torch.float64), first)
    assert gram[800:, :100].count_nonzero() == 0
    add_gram(symmetric(gram), second)
    torch.testing.assert_close(symmetric(gram), first.T @ first + second.T @ second)


def test_add_gram_takes_any_leading_dimensions_strides_and_gradients():
    torch.manual_seed(0)
    inputs = torch.randn(6, 3, 4, requires_grad=True).transpose(0, 1)
    flat = inputs.detach().reshape(-1, 4)
    torch.testing.assert_close(symmetric(add_gram(torch.zeros(4, 4), inputs)), flat.T @ flat)
    torch.testing.assert_close(symmetric(add_gram(torch.zeros(4, 4), flat[0])), flat[:1].T @ flat[:1])


def test_add_gram_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    inputs = torch.randn(64, 128)
    plain = add_gram(torch.zeros(128, 128), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(add_gram(torch.zeros(128, 128), inputs), plain)


@pytest.mark.parametrize(
    ("gram", "inputs", "error", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 3), ValueError, "columns, columns"),
        (torch.zeros(3), torch.zeros(2, 3), ValueError, "columns, columns"),
        (torch.zeros(3, 3).half(), torch.zeros(2, 3), TypeError, "float32 or float64"),
        ([[1.0]], torch.zeros(2, 1), TypeError, "list"),
        (torch.zeros(3, 3), torch.zeros(2, 4), ValueError, "of columns, 3"),
        (torch.zeros(3, 3), torch.tensor(1.0), ValueError, "of columns, 3"),
        (torch.zeros(3, 3), torch.zeros(2, 3).int(), TypeError, "int32"),
        (torch.zeros(3, 3), None, TypeError, "NoneType"),
    ],
)
def test_add_gram_says_what_is_wrong(gram, inputs, error, words):
    with pytest.raises(error, match=words):
        add_gram(gram, inputs)
