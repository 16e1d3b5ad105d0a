import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import layouts
from tests.ops.test_unit_scores import UNITS


def draw_units(shape, block, seed=0):
    return torch.rand(ops.unit_shape(shape, block), generator=torch.Generator().manual_seed(seed)) < 0.5


def test_expand_matches_reference(device):
    units = [draw_units(shape, block, seed) for seed, (shape, block) in enumerate(UNITS)]
    blocks = [block for _, block in UNITS]
    expected = [torch.empty(shape, dtype=torch.bool) for shape, _ in UNITS]
    reference.expand(units, blocks, expected)
    masks = [torch.rand(shape, device=device) < 0.5 for shape, _ in UNITS]
    ops.expand([one.to(device) for one in units], blocks, masks)
    for mask, want in zip(masks, expected, strict=True):
        assert torch.equal(mask.cpu(), want)


BLOCKS = [(1, 26, 3, 7), (300, 1, 3, 7), (1, 1, 3, 7), (4, 1, 1, 1), (1, 4, 1, 1), (16, 16, 1, 1), (1, 1, 1, 1),
          (8, 2, 3, 7), (1, 1, 3, 2), (300, 26, 3, 7)]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_expand_and_fold_of_any_layout(device, block):
    shape = (300, 26, 3, 7)
    units = draw_units(shape, block).to(device)
    expected = torch.empty(shape, dtype=torch.bool, device=device)
    reference.expand([units], [block], [expected])
    for name in layouts(expected):
        for turned in (units, units.transpose(0, 1).contiguous().transpose(0, 1)):
            mask = layouts(~expected)[name]
            ops.expand([turned], [block], [mask])
            assert torch.equal(mask, expected), name
            for dtype in (torch.float32, torch.bfloat16):
                weight = layouts(torch.ones(shape, dtype=dtype, device=device))[name]
                ops.fold([weight], [turned], [block])
                assert torch.equal(weight != 0, expected), (name, dtype)


def test_expand_touches_nothing_beside_a_slice(device):
    storage = torch.zeros(10, 10, dtype=torch.bool, device=device)
    ops.expand([torch.ones(1, 2, dtype=torch.bool, device=device)], [(2, 2)], [storage[2:4, 3:7]])
    assert storage.sum() == 8


def test_expand_passes_opcheck(device):
    masks = [torch.zeros(30, 4, dtype=torch.bool, device=device), torch.zeros(7, dtype=torch.bool, device=device)]
    units = [draw_units((30, 4), (4, 3)).to(device), draw_units((7,), (7,)).to(device)]
    torch.library.opcheck(torch.ops.pyprune.expand, (units, [4, 3, 7], masks))


def test_expand_refuses_bad_input():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    units = torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(TypeError, match="float32"):
        ops.expand([units], [(1, 4)], [mask.float()])
    with pytest.raises(TypeError, match="float32"):
        ops.expand([units.float()], [(1, 4)], [mask])
    with pytest.raises(ValueError, match="0 unit_masks"):
        ops.expand([], [(1, 4)], [mask])
    with pytest.raises(ValueError, match=r"need \(3, 2\)"):
        ops.expand([units], [(1, 2)], [mask])
    with pytest.raises(ValueError, match="expanded"):
        ops.expand([units], [(1, 4)], [mask[:, :1].expand(3, 4)])
    assert not mask.any()
