import math

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, adversarial, layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_matches_reference(device, dtype):
    shapes = [(70_001,), (3, 5), (), (0,), (129, 1000)]
    weights = [adversarial(shape, "normal", dtype, seed).to(device) for seed, shape in enumerate(shapes)]
    masks = [torch.rand(shape, device=device) < 0.5 for shape in shapes]
    expected = [weight.clone() for weight in weights]
    reference.fold(expected, masks)
    ops.fold(weights, masks)
    for weight, want in zip(weights, expected, strict=True):
        assert torch.equal(weight, want)


def test_fold_writes_plain_zeros_over_anything_and_leaves_the_rest(device):
    weight = torch.tensor([math.nan, -1.0, math.inf, math.nan, -0.0], device=device)
    ops.fold([weight], [torch.tensor([False, False, False, True, True], device=device)])
    assert weight[:3].tolist() == [0.0, 0.0, 0.0]
    assert not weight[:3].signbit().any()
    assert weight[3].isnan()
    assert weight[4].signbit()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_of_any_layout(device, dtype):
    base = torch.randn(300, 26, 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    mask = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)).to(device) < 0.5
    expected = torch.where(mask, base, torch.zeros_like(base))
    for weight_layout in layouts(base):
        for mask_layout, mask_view in layouts(mask).items():
            weight = layouts(base)[weight_layout]
            ops.fold([weight], [mask_view])
            assert torch.equal(weight, expected), (weight_layout, mask_layout)


def test_fold_touches_nothing_beside_a_slice(device):
    storage = torch.ones(10, 10, device=device)
    ops.fold([storage[2:4, 3:7]], [torch.zeros(2, 4, dtype=torch.bool, device=device)])
    assert storage.sum() == 100 - 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_with_blocks_matches_reference(device, dtype):
    cases = [
        ((70_001,), (100,)),
        ((3, 5), (1, 5)),
        ((), ()),
        ((0,), (1,)),
        ((129, 1000), (4, 1)),
        ((64, 1000), (1, 64)),
    ]
    weights = [adversarial(shape, "normal", dtype, seed).to(device) for seed, (shape, _) in enumerate(cases)]
    masks = [torch.rand(ops.unit_shape(shape, block), device=device) < 0.5 for shape, block in cases]
    blocks = [block for _, block in cases]
    expected = [weight.clone() for weight in weights]
    reference.fold(expected, masks, blocks)
    ops.fold(weights, masks, blocks)
    for weight, want in zip(weights, expected, strict=True):
        assert torch.equal(weight, want)


@pytest.mark.parametrize("size", [3, 100])
def test_fold_with_blocks_writes_plain_zeros_over_anything_and_leaves_the_rest(device, size):
    weight = torch.full((3, size), math.nan, device=device)
    weight[1] = -0.0
    ops.fold([weight], [torch.tensor([[False], [True], [True]], device=device)], [(1, size)])
    assert weight[0].tolist() == [0.0] * size
    assert not weight[0].signbit().any()
    assert weight[1].signbit().all()
    assert weight[2].isnan().all()


def test_fold_is_seen_by_autograd():
    weight = torch.randn(3, requires_grad=True)
    loss = weight.square().sum()
    ops.fold([weight], [torch.tensor([True, False, True])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fold_passes_opcheck(device):
    weights = [torch.randn(30, 4, device=device), torch.randn(7, device=device)]
    masks = [torch.rand(weight.shape, device=device) < 0.5 for weight in weights]
    torch.library.opcheck(torch.ops.pyprune.fold, (weights, masks))
    units = [torch.rand(8, 2, device=device) < 0.5, torch.rand(7, device=device) < 0.5]
    torch.library.opcheck(torch.ops.pyprune.fold_units, (weights, units, [4, 2, 1]))


def test_fold_refuses_bad_input():
    weight = torch.ones(3)
    with pytest.raises(TypeError, match="masks"):
        ops.fold([weight], [torch.zeros(3)])
    with pytest.raises(ValueError, match="1 weights"):
        ops.fold([weight], [])
    with pytest.raises(ValueError, match="must agree"):
        ops.fold([weight], [torch.zeros(4, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"weights\[0\] is expanded"):
        ops.fold([weight.expand(2, 3)], [torch.zeros(2, 3, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"need \(2,\)"):
        ops.fold([weight], [torch.zeros(3, dtype=torch.bool)], [(2,)])
    assert weight.sum() == 3
