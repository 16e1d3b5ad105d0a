import math

import pytest
import torch

from pyprune import ops
from tests.ops.cases import DTYPES, adversarial, layouts

SHAPES = [(70_001,), (3, 5), (), (0,), (129, 1000), (17,), (2**17 + 3,)]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_park_moves_what_is_dropped_and_unpark_brings_it_back(device, dtype, ratio):
    weights = [adversarial(shape, "heavy tail", dtype, seed).to(device) for seed, shape in enumerate(SHAPES)]
    masks = [torch.rand(shape, device=device) >= ratio for shape in SHAPES]
    before = [weight.clone() for weight in weights]
    parked = ops.park(weights, masks)
    for weight, mask, values, raw in zip(weights, masks, parked, before, strict=True):
        assert torch.equal(bits(values), bits(raw[~mask]))
        assert torch.equal(bits(weight), bits(torch.where(mask, raw, torch.zeros_like(raw))))
    ops.unpark(weights, masks, parked)
    for weight, raw in zip(weights, before, strict=True):
        assert torch.equal(bits(weight), bits(raw))


def test_park_keeps_all_bits(device):
    weight = torch.tensor([math.nan, -0.0, math.inf, 1.0, -math.inf] * 33, device=device)
    mask = torch.tensor([False, False, False, True, True] * 33, device=device)
    raw = weight.clone()
    (values,) = ops.park([weight], [mask])
    assert torch.equal(bits(values), bits(raw[~mask]))
    assert weight[~mask].eq(0).all()
    assert not weight[~mask].signbit().any()
    ops.unpark([weight], [mask], [values])
    assert torch.equal(bits(weight), bits(raw))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_park_does_not_depend_on_the_layout(device, dtype):
    base = torch.randn(300, 26, 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    mask = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)).to(device) < 0.5
    for weight_layout, weight in layouts(base.clone()).items():
        for mask_layout, mask_view in layouts(mask).items():
            (values,) = ops.park([weight], [mask_view])
            assert torch.equal(values, base[~mask]), (weight_layout, mask_layout)
            other = torch.where(mask, base, torch.full_like(base, 7))
            ops.unpark([other, weight], [mask, mask_view], [values, values])
            assert torch.equal(other, base)
            assert torch.equal(weight, base), (weight_layout, mask_layout)


def test_park_touches_nothing_beside_a_slice(device):
    storage = torch.ones(10, 10, device=device)
    mask = torch.zeros(2, 4, dtype=torch.bool, device=device)
    (values,) = ops.park([storage[2:4, 3:7]], [mask])
    assert storage.sum() == 100 - 8
    ops.unpark([storage[2:4, 3:7]], [mask], [values])
    assert storage.sum() == 100


def test_park_fills_the_tensors_that_it_is_given(device):
    weight, into = torch.arange(1.0, 4.0, device=device), torch.empty(0, device=device)
    (values,) = ops.park([weight], [torch.tensor([True, False, False], device=device)], into=[into])
    assert values is into
    assert (into.tolist(), weight.tolist()) == ([2.0, 3.0], [1.0, 0.0, 0.0])
    for wrong in ([], [torch.empty(1, device=device)], [torch.empty(0, dtype=torch.half, device=device)]):
        with pytest.raises(ValueError, match="into"):
            ops.park([weight], [torch.ones(3, dtype=torch.bool, device=device)], into=wrong)


def test_park_is_seen_by_autograd():
    weight = torch.randn(3, requires_grad=True)
    loss = weight.square().sum()
    ops.park([weight], [torch.tensor([True, False, True])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_park_refuses_bad_input():
    weight, mask = torch.ones(3), torch.tensor([True, False, False])
    with pytest.raises(TypeError, match="masks"):
        ops.park([weight], [torch.zeros(3)])
    with pytest.raises(ValueError, match="1 weights"):
        ops.park([weight], [])
    with pytest.raises(ValueError, match="must agree"):
        ops.park([weight], [torch.zeros(4, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"weights\[0\] is expanded"):
        ops.park([weight.expand(2, 3)], [torch.zeros(2, 3, dtype=torch.bool)])
    with pytest.raises(ValueError, match="1 weights"):
        ops.unpark([weight], [mask], [])
    with pytest.raises(ValueError, match="contiguous"):
        ops.unpark([weight], [mask], [torch.ones(2, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"parked\[0\] has shape \(3,\), and must be as much as its mask drops, 2"):
        ops.unpark([weight], [mask], [torch.ones(3)])
    assert weight.sum() == 3


def test_park_passes_opcheck():
    weights = [torch.randn(30, 4), torch.randn(7)]
    masks = [torch.rand(weight.shape) < 0.5 for weight in weights]
    parked = [weight[~mask] for weight, mask in zip(weights, masks, strict=True)]
    into = [torch.empty(0), torch.empty(0)]
    # Not traced by autograd's compiler: the sizes of what is written to become others.
    torch.library.opcheck(
        torch.ops.pyprune.park, (weights, masks, into), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(torch.ops.pyprune.unpark, (weights, masks, parked))
