"""Weights as matrices: what comes out of a layer is the matrix times its inputs, and the way back is exact."""

import pytest
import torch
from torch import nn

from pyprune.methods.layout import Layout
from pyprune.modules.targets import find_targets
from pyprune.oneshot.matrices import as_matrices, as_weight, from_matrices, matrices

# Shapes of weights, layouts, and what some entry of the matrices is: (group, row, column) and where it was.
LAYOUTS = {
    "linear": ((6, 4), Layout(0, 1), (1, 6, 4), (0, 5, 2), (5, 2)),
    "inputs first": ((4, 6), Layout(1, 0), (1, 6, 4), (0, 5, 2), (2, 5)),
    "conv": ((6, 2, 3), Layout(0, 1), (1, 6, 6), (0, 4, 2 * 2 + 1), (4, 1, 2)),
    "grouped conv": ((6, 2, 3, 5), Layout(0, 1, 2), (2, 3, 30), (1, 2, (1 * 5 + 4) * 2 + 1), (5, 1, 1, 4)),
    "depthwise conv": ((6, 1, 3), Layout(0, 1, 6), (6, 1, 3), (4, 0, 2), (4, 0, 2)),
    "transposed conv": ((4, 6, 3), Layout(1, 0), (1, 6, 12), (0, 5, 2 * 4 + 3), (3, 5, 2)),
    "grouped transposed conv": ((4, 6, 3), Layout(1, 0, 2), (2, 6, 6), (1, 5, 2 * 2 + 1), (3, 5, 2)),
    "experts": ((3, 6, 4), Layout(1, 2, 3), (3, 6, 4), (2, 5, 1), (2, 5, 1)),
    "experts, inputs first": ((3, 4, 6), Layout(2, 1, 3), (3, 6, 4), (2, 5, 1), (2, 1, 5)),
    "a vector": ((5,), Layout(), (1, 1, 5), (0, 0, 3), (3,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_matrices_and_back(name, dtype):
    shape, layout, expected, entry, place = LAYOUTS[name]
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    made = as_matrices(weight, layout)
    assert tuple(made.shape) == expected
    assert made[entry] == weight[place]
    values = torch.randn(shape).gt(0) if dtype == torch.bool else torch.randn(shape, dtype=dtype)
    back = from_matrices(as_matrices(values, layout), layout, values.shape)
    assert back.dtype == dtype
    assert torch.equal(back, values)


def test_as_matrices_refuses_unknown_layouts():
    with pytest.raises(ValueError, match="not known: two inputs at once"):
        as_matrices(torch.ones(2, 3, 4), Layout(0, None, problem="two inputs at once"))


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_matrices_are_wide_copies(dtype, wide):
    linear = nn.Linear(4, 6).to(dtype)
    (target,) = find_targets(linear)
    before = linear.weight.detach().clone()
    made = matrices(target)
    assert made.dtype == wide
    back = as_weight(target, made)
    assert back.dtype == dtype
    assert torch.equal(back, before)
    made.zero_()
    assert torch.equal(linear.weight, before)
    assert as_weight(target, made > 0).dtype == torch.bool
