"""What is written must lie apart from all else, and may lie between its elements."""

import pytest
import torch

from pyprune import ops


def mask(*shape: int) -> torch.Tensor:
    return torch.zeros(shape or (2, 8), dtype=torch.bool)


def weight() -> torch.Tensor:
    return torch.randn(2, 8)


def halves(dtype: torch.dtype) -> list[torch.Tensor]:
    """Two of 16 elements that share 8."""
    long = torch.zeros(24, dtype=dtype)
    return [long[:16].view(2, 8), long[8:].view(2, 8)]


def columns(dtype: torch.dtype, step: int = 8) -> list[torch.Tensor]:
    """Two that lie side by side, or with a smaller step share columns."""
    matrix = torch.zeros(2, 16, dtype=dtype)
    return [matrix[:, :8], matrix[:, step : step + 8]]


def rolled(dtype: torch.dtype) -> torch.Tensor:
    """Rows of which each begins inside of the one before."""
    return torch.zeros(10, dtype=dtype).as_strided((4, 4), (2, 1))


one, memory, wide = mask(), weight(), torch.randn(2, 32)
in_memory = memory.view(torch.bool)

SHARED = {
    "one mask for two weights": lambda: ops.threshold([weight(), weight()], 8, masks=[one, one]),
    "masks that overlap": lambda: ops.threshold([weight(), weight()], 8, masks=halves(torch.bool)),
    "masks that share columns": lambda: ops.threshold([weight(), weight()], 8, masks=columns(torch.bool, 7)),
    "a mask that overlaps itself": lambda: ops.threshold([torch.randn(4, 4)], 8, masks=[rolled(torch.bool)]),
    "an expanded mask": lambda: ops.threshold([weight()], 8, masks=[mask(1, 8).expand(2, 8)]),
    "a mask in its weight": lambda: ops.threshold([memory], 8, masks=[in_memory[:, :8]]),
    "a mask in another weight": lambda: ops.threshold([weight(), memory], 8, masks=[mask(), in_memory[:, 8:16]]),
    "a mask that is its base": lambda: ops.threshold([weight()], 8, masks=[one], bases=[one]),
    "a mask in the scales": lambda: ops.threshold(
        [torch.randn(8)], 4, scales=(scales := torch.ones(1, dtype=torch.float64)), masks=[scales.view(torch.bool)]
    ),
    "one mask for two groups": lambda: ops.group_masks([weight(), weight()], 4, 2, masks=[one, one]),
    "a group mask that is its base": lambda: ops.group_masks([weight()], 4, 2, masks=[one], bases=[one]),
    "one expanded mask for two": lambda: ops.expand([mask(1, 1), mask(1, 1)], [(2, 8)] * 2, [one, one]),
    "a mask that is its units": lambda: ops.expand([one], [(1, 1)], [one]),
    "a folded weight twice": lambda: ops.fold([memory, memory], [mask(), mask()]),
    "a folded weight that overlaps itself": lambda: ops.fold([rolled(torch.float32)], [mask(4, 4)]),
    "folded weights that overlap": lambda: ops.fold(halves(torch.float64), [mask(), mask()]),
    "units in the weight": lambda: ops.fold([memory], [in_memory[:1, :1]], [(2, 8)]),
    "a parked weight twice": lambda: ops.park([memory, memory], [mask(), mask()]),
    "parked in the weight": lambda: ops.unpark([memory], [mask()], [memory.view(-1)]),
    "a weight that overlaps the next": lambda: ops.unpark(halves(torch.float32), [mask()] * 2, [torch.ones(16)] * 2),
    "sums that are the weight": lambda: ops.sparsegpt_block(memory, memory, torch.eye(8), mask()),
    "a solved mask in the sums": lambda: ops.sparsegpt_block(weight(), memory, torch.eye(8), in_memory[:, :8]),
    "a weight in the factor": lambda: ops.sparsegpt_block(
        (square := torch.eye(8))[:2], weight(), square, mask(), keep=2, of=4
    ),
    "sums that share columns": lambda: ops.sparsegpt_block(*columns(torch.float32, 4), torch.eye(8), mask()),
    "out in the logits": lambda: ops.bernoulli_gate(weight(), memory, None, out=memory),
    "out beside the weight": lambda: ops.bernoulli_gate(wide[:, :8], torch.zeros(2, 8), None, out=wide[:, 4:12]),
}  # fmt: skip

APART = {
    "columns of one mask": lambda: ops.threshold([weight(), weight()], 8, masks=columns(torch.bool)),
    "columns of one weight": lambda: ops.fold(columns(torch.float32), [mask(), mask()]),
    "rows of one weight": lambda: ops.park(list(torch.randn(4, 8).split(2)), [mask(), mask()]),
    "every other element": lambda: ops.fold([torch.randn(16)[::2], torch.randn(16)[1::2]], [mask(8), mask(8)]),
    "one weight twice, only read": lambda: ops.threshold([memory, memory], 8, masks=[mask(), mask()]),
    "one base twice": lambda: ops.threshold([weight(), weight()], 8, masks=[mask(), mask()], bases=[one, one]),
    "one mask for two folded weights": lambda: ops.fold([weight(), weight()], [one, one]),
    "an expanded mask that is read": lambda: ops.fold([weight()], [mask(1, 8).expand(2, 8)]),
    "out is the weight": lambda: ops.bernoulli_gate(memory, torch.zeros(2, 8), None, out=memory),
    "empty masks": lambda: ops.threshold([torch.empty(0), torch.empty(0)], 0, masks=[(nothing := mask(0)), nothing]),
    "interleaved dimensions": lambda: ops.fold([torch.zeros(12).as_strided((2, 3), (3, 2))], [mask(2, 3)]),
}


@pytest.mark.parametrize("name", SHARED)
def test_operators_refuse_to_write_what_is_shared(name):
    before = [tensor.clone() for tensor in (one, memory, wide)]
    with pytest.raises(ValueError, match=r"shares memory with|share memory"):
        SHARED[name]()
    assert all(torch.equal(now, then) for now, then in zip((one, memory, wide), before, strict=True))


@pytest.mark.parametrize("name", APART)
def test_operators_write_what_lies_apart(name):
    APART[name]()


def test_threshold_of_interleaved_columns_writes_both():
    matrix = torch.ones(2, 16, dtype=torch.bool)
    first, second = torch.arange(16.0).view(2, 8), torch.arange(16.0).view(2, 8) + 100
    masks, _ = ops.threshold([first, second], 16, masks=[matrix[:, ::2], matrix[:, 1::2]])
    assert not masks[0].any()
    assert masks[1].all()
