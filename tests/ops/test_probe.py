import pytest
import torch

from pyprune import ops
from tests.ops.cases import DTYPES, layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turn", [0, 5, None])
def test_probe_sees_what_wrote_to_a_whole_weight(dtype, turn, device):
    shapes = [(), (0,), (7,), (100, 40), (70_001,), (64, 32, 3, 3)]
    weights = [torch.randn(shape).to(dtype).to(device) for shape in shapes]
    masks = [torch.rand(shape, device=device) < 0.5 for shape in shapes]
    expected = [bool((weight[~mask] != 0).any()) for weight, mask in zip(weights, masks, strict=True)]
    on_cpu_or_all = device.type == "cpu" or turn is None
    assert ops.probe(weights, masks, turn) == (expected if on_cpu_or_all else [True] * len(weights))
    ops.fold(weights, masks)
    assert any(ops.probe(weights, masks, turn)) != on_cpu_or_all


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probe_of_all_finds_a_single_element_of_any_layout(dtype, device):
    base = torch.zeros(30, 26, 3, 7, dtype=dtype, device=device)
    mask = torch.rand(base.shape, device=device) < 0.5
    stray = base.clone()
    stray[tuple((~mask).nonzero()[1234])] = 1e-7
    kept = torch.where(mask, torch.ones_like(base), 0)
    for mask_view in layouts(mask).values():
        assert all(ops.probe([weight], [mask_view], None) == [True] for weight in layouts(stray).values())
        assert all(ops.probe([weight], [mask_view], None) == [False] for weight in layouts(kept).values())


def test_probe_finds_a_single_element_in_the_end():
    weight, mask = torch.zeros(5_000), torch.zeros(5_000, dtype=torch.bool)
    weight[1234] = 1.0
    assert any(ops.probe([weight], [mask], turn)[0] for turn in range(100))
    weight, mask = torch.ones(5_000), torch.ones(5_000, dtype=torch.bool)
    assert not any(ops.probe([weight], [mask], turn)[0] for turn in range(100))


def test_probe_of_any_layout():
    base, mask = torch.randn(30, 26, 3, 7), torch.rand(30, 26, 3, 7) < 0.5
    for weight in layouts(base.clone()).values():
        for mask_view in layouts(mask.clone()).values():
            assert ops.probe([weight], [mask_view]) == [True]
            if weight.stride() == mask_view.stride() and weight.is_contiguous():
                assert ops.probe([torch.where(mask, weight, 0)], [mask_view]) == [False]


def test_probe_refuses_bad_input():
    with pytest.raises(TypeError, match="masks"):
        ops.probe([torch.ones(3)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="must agree"):
        ops.probe([torch.ones(3)], [torch.zeros(4, dtype=torch.bool)])
    assert ops.probe([], []) == []


def test_probe_passes_opcheck():
    weights = [torch.randn(30, 4), torch.randn(7)]
    masks = [torch.rand(weight.shape) < 0.5 for weight in weights]
    torch.library.opcheck(torch.ops.pyprune.probe, (weights, masks, -1))
