import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, adversarial, layouts

# A shape and a block: channels, kernels, blocks of several sizes, ragged edges, units that are cut into pieces.
UNITS = [
    ((64, 30, 3, 3), (1, 30, 3, 3)),
    ((300, 26, 3, 3), (300, 1, 3, 3)),
    ((40, 33, 3, 3), (1, 1, 3, 3)),
    ((40, 33, 3, 3), (16, 16, 1, 1)),
    ((40, 33, 3, 3), (1, 4, 1, 1)),
    ((70, 300), (4, 1)),
    ((70, 300), (1, 4)),
    ((70, 300), (16, 16)),
    ((70, 300), (7, 300)),
    ((700, 300), (700, 1)),
    ((3, 10_003), (2, 9000)),
    ((70_001,), (70_001,)),
    ((5, 3, 1, 9), (1, 2, 1, 9)),
    ((2, 3, 4, 5, 6), (1, 2, 4, 5, 6)),
    ((129,), (1,)),
    ((), ()),
    ((0, 3), (1, 3)),
    ((3, 0), (3, 2)),
]
WAYS = [{"p": 1, "reduction": "sum"}, {"p": 2, "reduction": "mean"}, {"p": None, "reduction": "sum"},
        {"p": 1, "reduction": "max"}, {"p": 2, "reduction": "max"}, {"p": None, "reduction": "max"}]  # fmt: skip


def assert_same_bits(scores, expected):
    for got, want in zip(scores, expected, strict=True):
        assert got.is_contiguous()
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.cpu().numpy().tobytes() == want.contiguous().numpy().tobytes()


@functools.cache
def reference_case(dtype):
    kinds = ("normal", "heavy tail", "zeros", "denormal")
    tensors = [adversarial(shape, kinds[i % 4], dtype, i) for i, (shape, _) in enumerate(UNITS)]
    blocks = [block for _, block in UNITS]
    return tensors, blocks, [reference.unit_scores(tensors, blocks, **way) for way in WAYS]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_scores_are_the_bits_of_the_reference(device, dtype, threads):
    tensors, blocks, expected = reference_case(dtype)
    tensors = [tensor.to(device) for tensor in tensors]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way, want in zip(WAYS, expected, strict=True):
            assert_same_bits(ops.unit_scores(tensors, blocks, **way), want)
    finally:
        torch.set_num_threads(before)


LAYOUT_BLOCKS = [(1, 26, 3, 7), (300, 1, 3, 7), (1, 1, 3, 7), (4, 1, 1, 1), (1, 4, 1, 1), (16, 16, 1, 1),
                 (7, 26, 3, 7), (300, 26, 3, 7), (1, 2, 3, 7)]  # fmt: skip


@pytest.mark.parametrize("block", LAYOUT_BLOCKS, ids=str)
def test_unit_scores_do_not_depend_on_the_layout(device, block):
    weight = adversarial((300, 26, 3, 7), "normal", torch.float32)
    for way in WAYS[:4]:
        expected = reference.unit_scores([weight], [block], **way)
        for view in layouts(weight.to(device)).values():
            assert_same_bits(ops.unit_scores([view], [block], **way), expected)


@st.composite
def units_in_memory(draw):
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 5, 9, 16, 17, 40]), max_size=4))
    block = [draw(st.sampled_from([1, size, size // 2 + 1])) for size in shape]
    order = draw(st.permutations(range(len(shape))))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    inverse = [order.index(dim) for dim in range(len(shape))]
    return weight.permute(order).contiguous().permute(inverse), tuple(block)


@settings(max_examples=60, deadline=None)
@given(units_in_memory(), st.sampled_from(WAYS))
def test_unit_scores_of_any_shape_block_and_order_of_dimensions(unit, way):
    weight, block = unit
    assert_same_bits(ops.unit_scores([weight], [block], **way), reference.unit_scores([weight], [block], **way))


def test_unit_scores_worked_out_by_hand(device):
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]], device=device)
    table = [
        ((1, 3), {"p": 1}, [[6.0], [15.0]]),
        ((2, 1), {"p": 2}, [[17.0, 29.0, 45.0]]),
        ((2, 2), {"p": None}, [[8.0, -3.0]]),
        ((1, 2), {"p": 1, "reduction": "mean"}, [[1.5, 3.0], [4.5, 6.0]]),
        ((2, 3), {"p": None, "reduction": "max"}, [[5.0]]),
        ((2, 3), {"p": 3, "reduction": "max"}, [[216.0]]),
        ((1, 2), {"p": 0.5}, [[1 + math.sqrt(2), math.sqrt(3)], [2 + math.sqrt(5), math.sqrt(6)]]),
        ((1, 1), {"p": 1}, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        ((9, 9), {"p": 1}, [[21.0]]),
    ]
    for block, way, expected in table:
        (scores,) = ops.unit_scores([weight], [block], **way)
        torch.testing.assert_close(scores.cpu(), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.5, 3.0])
def test_unit_scores_of_other_powers(device, p):
    tensors = [adversarial((70, 30), "normal", dtype, 1) for dtype in DTYPES]
    got = ops.unit_scores([tensor.to(device) for tensor in tensors], [(4, 7)] * len(DTYPES), p=p)
    for score, want in zip(got, reference.unit_scores(tensors, [(4, 7)] * len(DTYPES), p=p), strict=True):
        torch.testing.assert_close(score.cpu(), want, rtol=1e-6 if want.dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_scores_pass_on_what_is_not_finite(device, dtype, reduction):
    for size in (3, 4, 40, 5000):
        weight = torch.ones(4, size, dtype=dtype)
        weight[0, size // 2] = -math.nan
        weight[1, 1] = -math.inf
        weight[2, 0], weight[2, size - 1] = math.inf, math.nan
        (rows,) = ops.unit_scores([weight.to(device)], [(1, size)], p=1, reduction=reduction)
        assert rows[[0, 2]].isnan().all()
        assert rows[1].item() == math.inf
        assert rows[3].item() == (size if reduction == "sum" else 1)
        assert not rows.signbit().any()
        (columns,) = ops.unit_scores([weight.T.to(device)], [(size, 1)], p=1, reduction=reduction)
        assert_same_bits([columns.T], [rows.cpu()])


def test_unit_scores_of_negative_zeros_are_positive(device):
    for value in (-0.0, -1e-45):
        weight = torch.full((4, 4), value, dtype=torch.float32, device=device)
        for reduction in ("sum", "mean", "max"):
            for block in ((1, 4), (4, 1), (1, 1)):
                (scores,) = ops.unit_scores([weight], [block], p=None, reduction=reduction)
                assert_same_bits(
                    [scores], reference.unit_scores([weight.cpu()], [block], p=None, reduction=reduction)
                )
                assert not scores.signbit()[scores == 0].any()


def test_unit_scores_keep_denormals(device):
    weight = torch.full((100,), 1e-45, device=device)
    torch.set_flush_denormal(True)
    try:
        (scores,) = ops.unit_scores([weight], [(100,)])
    finally:
        torch.set_flush_denormal(False)
    assert scores.view(torch.int32).item() == 100


def test_unit_scores_of_masks_count(device):
    mask = torch.rand(300, 70, generator=torch.Generator().manual_seed(0)).to(device) < 0.01
    (counts,) = ops.unit_scores([mask], [(16, 16)], p=None)
    (filled,) = ops.unit_scores([mask], [(16, 16)], p=None, reduction="max")
    expected = reference.unit_scores([mask.cpu()], [(16, 16)], p=None)[0]
    assert counts.dtype == torch.float64
    assert torch.equal(counts.cpu(), expected)
    assert torch.equal(filled > 0, counts > 0)
    (many,) = ops.unit_scores([torch.ones(2**24 + 1, dtype=torch.bool, device=device)], [(2**24 + 1,)], p=None)
    assert many.item() == 2**24 + 1


def test_unit_scores_pass_opcheck(device):
    tensors = [torch.randn(30, 4, device=device), torch.zeros(0, 3, device=device).double()]
    for p, reduction in ((1.0, 0), (None, 2), (0.5, 1)):
        torch.library.opcheck(torch.ops.pyprune.unit_scores, (tensors, [4, 3, 1, 2], p, reduction))


def test_unit_scores_refuse_bad_input():
    weight = torch.ones(3, 4)
    assert ops.unit_scores([], []) == []
    with pytest.raises(TypeError, match="complex64"):
        ops.unit_scores([weight.to(torch.complex64)], [(1, 1)])
    with pytest.raises(TypeError, match="bool"):
        ops.unit_scores([weight > 0], [(1, 1)])
    with pytest.raises(ValueError, match="0 blocks for 1 tensors"):
        ops.unit_scores([weight], [])
    with pytest.raises(ValueError, match="give 2 sizes"):
        ops.unit_scores([weight], [(1,)])
    with pytest.raises(ValueError, match="at least 1"):
        ops.unit_scores([weight], [(0, 1)])
    with pytest.raises(TypeError, match=r"blocks\[0\] is 1.5; give integers"):
        ops.unit_scores([weight], [(1.5, 1)])
    for p in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive finite"):
            ops.unit_scores([weight], [(1, 1)], p=p)
    with pytest.raises(ValueError, match='"sum", "mean" and "max"'):
        ops.unit_scores([weight], [(1, 1)], reduction="median")
