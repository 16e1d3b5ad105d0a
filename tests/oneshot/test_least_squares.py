import pytest
import torch

from pyprune import solvers
from tests.oneshot.layers import damped, golden, golden_layer, layer, least_squares, loss


@pytest.mark.parametrize("exact", [None, True, False])
def test_least_squares_is_the_golden_one(exact):
    weight, gram = golden_layer()
    mask = ~golden("sparsegpt_2of4_block8", "mask_pruned")
    solution = solvers.least_squares(exact=exact).solve(weight, gram, scope=None, ratio=None, mask=mask)
    expected = golden("least_squares_on_sparsegpt_2of4_mask", "weight")
    torch.testing.assert_close(solution.weight, expected, rtol=1e-5, atol=1e-5)
    assert loss(weight, solution.weight, damped(gram)) == pytest.approx(154.17152129709743, rel=1e-5)


def masks(shape):
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(shape, generator=generator)
    ragged = some < torch.linspace(0, 1, shape[0])[:, None]
    one = torch.zeros(shape, dtype=torch.bool)
    one[0, 2] = True
    return {"half": some < 0.5, "from none to all of a row": ragged, "one": one, "none": torch.zeros_like(one)}


@pytest.mark.parametrize("exact", [None, True, False])
@pytest.mark.parametrize("kind", masks((1, 3)))
@pytest.mark.parametrize(("rows", "columns"), [(6, 16), (1, 16), (20, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_is_that_of_each_row(exact, kind, rows, columns, dtype):
    weight, gram = layer(rows, columns, tokens=2 * columns, dtype=dtype, dead=(1,))
    mask = masks(weight.shape)[kind]
    solution = solvers.least_squares(exact=exact).solve(weight, gram, scope=None, ratio=None, mask=mask)
    matrix = damped(gram)
    mended = weight.clone()
    mended[:, 1] = 0
    expected = least_squares(mended, matrix, mask)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(solution.weight.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(solution.mask, mask)
    gradient = ((solution.weight.double() - mended.double()) @ matrix)[mask]
    before = ((mended.double() * mask - mended.double()) @ matrix)[mask]
    assert gradient.norm() <= 1e-5 * before.norm()


def test_least_squares_without_a_mask_says_so():
    with pytest.raises(ValueError, match="mask is None"):
        solvers.least_squares().solve(*layer(), scope=None, ratio=None, mask=None)


@pytest.mark.parametrize("exact", [1, "yes"])
def test_least_squares_refuses_other_values(exact):
    with pytest.raises(TypeError, match="exact is"):
        solvers.least_squares(exact=exact)
