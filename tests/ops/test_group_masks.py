import functools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts

# 2:4, 1:4 and 4:8 as the hardware and others want them; all that stays, nothing; any size; per row.
GROUPS = [
    (4, 2), (4, 1), (4, 3), (4, 0), (4, 4), (8, 4), (8, 1), (8, 7), (1, 1), (1, 0), (2, 1), (3, 2), (5, 3), (16, 8),
    (32, 5), (63, 20), (64, 32), (65, 30), (100, 99), (1000, 500),
]  # fmt: skip
SHAPES = [(37, 200), (3, 1029), (64, 64), (5, 3), (1, 1), (300, 7), (0, 8), (8, 0)]


def factors_for(weight: Tensor, row_dims: int, seed: int = 0) -> Tensor:
    columns = weight.shape[row_dims:].numel()
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    factors[torch.rand(columns, generator=generator) < 0.1] = 0
    return factors if weight.dtype == torch.float64 else factors.float()


def base_for(weight: Tensor, seed: int = 0) -> Tensor:
    base = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    return base.to(weight.device)


def check(weights: Sequence[Tensor], sizes, kept, *, device="cpu", row_dims=1, factors=None, bases=None) -> None:
    """Compare with the reference, everything on the device."""
    count = len(weights)
    sizes, kept, row_dims = ([one] * count if isinstance(one, int) else one for one in (sizes, kept, row_dims))
    factors, bases = ([None] * count if some is None else some for some in (factors, bases))
    expected, _ = reference.group_masks(weights, sizes, kept, row_dims=row_dims, factors=factors, bases=bases)
    there = [[None if one is None else one.to(device) for one in some] for some in (weights, factors, bases)]
    masks, nonfinite = ops.group_masks(there[0], sizes, kept, row_dims=row_dims, factors=there[1], bases=there[2])
    assert nonfinite.tolist() == [0] * count
    for index, (mask, want) in enumerate(zip(masks, expected, strict=True)):
        assert torch.equal(mask.cpu(), want), f"mask {index}: {(mask.cpu() != want).sum()} differ"


@functools.cache
def reference_cases(kind: str, dtype: torch.dtype):
    """Weights of many shapes, and which arguments give which masks."""
    weights = [adversarial(shape, kind, dtype, seed) for seed, shape in enumerate(SHAPES)]
    count = len(weights)
    factors = [factors_for(weight, 1) for weight in weights]
    bases = [base_for(weight, seed) for seed, weight in enumerate(weights)]
    none = [None] * count
    cases = []
    for number, (size, kept) in enumerate(GROUPS):
        others = ((factors, none), (none, bases), (factors, bases))
        for some_factors, some_bases in ((none, none), others[number % 3]):
            masks, _ = reference.group_masks(
                weights, [size] * count, [kept] * count, row_dims=[1] * count, factors=some_factors, bases=some_bases
            )
            cases.append((size, kept, some_factors, some_bases, masks))
    return weights, cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_masks_matches_the_reference(kind, dtype, device):
    weights, cases = reference_cases(kind, dtype)
    for size, kept, factors, bases, expected in cases:
        there = [[None if one is None else one.to(device) for one in some] for some in (weights, factors, bases)]
        masks, nonfinite = ops.group_masks(there[0], size, kept, factors=there[1], bases=there[2])
        assert nonfinite.tolist() == [0] * len(weights)
        assert all(torch.equal(mask.cpu(), want) for mask, want in zip(masks, expected, strict=True)), (size, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_dims", [0, 1, 2, 3])
def test_group_masks_takes_any_layout(dtype, row_dims, device):
    for shape in ((6, 10, 3, 3), (2, 5, 9, 11)):
        weight = adversarial(shape, "few values", dtype)
        variants = [*layouts(weight).values(), *(one.movedim(1, -1) for one in layouts(weight).values())]
        for size, kept in ((4, 2), (7, 2), (99, 44)):
            for one in variants:
                factors, base = factors_for(one, row_dims), base_for(one)
                there = torch.empty_strided(one.shape, one.stride(), dtype=dtype, device=device).copy_(one)
                expected = reference.group_masks(
                    [one], [size], [kept], row_dims=[row_dims], factors=[factors], bases=[base]
                )[0][0]
                turned = torch.empty(one.shape[::-1], dtype=torch.bool, device=device).permute(3, 2, 1, 0)
                for masks in (None, [turned]):
                    found, _ = ops.group_masks(
                        [there], size, kept, row_dims=row_dims, masks=masks,
                        factors=[factors.to(device)], bases=[base.to(device)],
                    )  # fmt: skip
                    assert torch.equal(found[0].cpu(), expected)


def test_group_masks_drops_the_first_of_equals(device):
    weight = torch.tensor([[1.0, -1.0, 1.0, 0.5], [2.0, 2.0, -2.0, 2.0]], device=device)
    masks, _ = ops.group_masks([weight], 4, 2)
    assert masks[0].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    # Wanda's example: |w| of 100 and 1 with norms of 0.01 and 10.
    weight, norms = torch.tensor([[100.0, 1.0, 0.0]], device=device), torch.tensor([0.01, 10.0, 1.0], device=device)
    masks, _ = ops.group_masks([weight], 3, 1, factors=[norms])
    assert masks[0].int().tolist() == [[0, 1, 0]]


def test_group_masks_of_short_groups_keep_up_to_kept(device):
    weight = torch.tensor([[5.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0]], device=device)
    assert ops.group_masks([weight], 4, 2)[0][0].int().tolist() == [[1, 0, 0, 1, 0, 1, 1]]
    assert ops.group_masks([weight], 4, 3)[0][0].int().tolist() == [[1, 0, 1, 1, 1, 1, 1]]
    assert ops.group_masks([weight], 100, 2)[0][0].int().tolist() == [[1, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("size", [4, 7, 100])
def test_group_masks_never_keep_what_the_base_drops(size, device):
    weight = adversarial((20, 200), "normal", torch.float32).to(device)
    base = base_for(weight)
    base[0] = False
    base[1] = True
    masks, _ = ops.group_masks([weight, weight], size, size // 2, bases=[base, None])
    assert not (masks[0] & ~base).any()
    assert masks[0][0].sum() == 0
    assert torch.equal(masks[0][1], masks[1][1])


def test_group_masks_writes_where_it_is_told_and_nothing_beside_it(device):
    weight = torch.randn(6, 10, device=device)
    room = torch.full((10, 24), True, device=device)
    expected = ops.group_masks([weight], 3, 1)[0][0]
    for view in (room[2:8, 3:13], room[2:8, 1:21:2], room[:, 2:8].t()):
        room.fill_(True)
        found, _ = ops.group_masks([weight], 3, 1, masks=[view])
        assert found[0] is view
        assert torch.equal(view, expected)
        assert room.sum() == room.numel() - (~expected).sum()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_group_masks_is_the_same_for_any_thread_count(threads, device):
    weights = [
        adversarial((300, 1030), "few values", torch.float32),
        adversarial((500, 64), "normal", torch.bfloat16),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(weights, [4, 500], [2, 250], device=device, factors=[None, factors_for(weights[1], 1)])
        check(weights, [900, 8], [2, 3], device=device)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_masks_of_long_rows(dtype, device):
    # Longer than what is kept in cache.
    weights = [adversarial((2, 70_003), kind, dtype) for kind in ("normal", "few values", "heavy tail")]
    factors = [factors_for(weight, 1) for weight in weights]
    check(weights, 70_003, 30_000, device=device, factors=factors)
    check(weights, 66_000, 30_000, device=device, factors=factors, bases=[base_for(weight) for weight in weights])
    check(weights, 64, 20, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_group_masks_of_giant_rows(dtype, device):
    # What is left to the threshold.
    weights = [adversarial((1, 1_100_000), "few values", dtype), adversarial((1_050_000, 2), "normal", dtype).t()]
    weights += [adversarial((2, 3, 350_000), "normal", dtype).transpose(1, 2)]
    check(weights, [1_060_000, 1_048_576, 1_050_000], 500_000, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_masks_of_rows_with_crowds_and_outliers(dtype, device):
    weight = adversarial((40, 500), "normal", dtype)
    weight[0, 17] = torch.finfo(dtype).max
    weight[1] = torch.finfo(dtype).smallest_normal
    weight[2, :250] = 0
    weight[3, ::2] = weight[3, 0]
    weight[4] = 0
    weight[4, 499] = 1
    for kept in (0, 1, 2, 249, 250, 251, 498, 499, 500):
        check([weight], 500, kept, device=device)
        check([weight], 500, kept, device=device, factors=[factors_for(weight, 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_masks_counts_what_is_not_finite(dtype, device):
    weights = [torch.randn(9, 133).to(dtype).to(device) for _ in range(3)]
    weights[0][3, 5] = math.nan
    weights[0][8, 132] = -math.inf
    weights[2][0] = math.inf
    for size, kept in ((4, 2), (8, 3), (5, 2), (64, 40), (133, 60)):
        for factors in (None, [factors_for(weight, 1).to(device) for weight in weights]):
            for bases in (None, [base_for(weight) for weight in weights]):
                for some in (weights, [weight.t().contiguous().t() for weight in weights]):
                    masks, nonfinite = ops.group_masks(some, size, kept, factors=factors, bases=bases)
                    assert nonfinite.tolist() == [2, 0, 133]
                    assert torch.cat(masks).view(torch.uint8).max() <= 1


def test_group_masks_takes_useless_factors_for_zero(device):
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 5.0, 1.0]], device=device)
    factors = torch.tensor([math.nan, math.inf, -1.0, 1.0, 0.0, 1.0], device=device)
    for size in (6, 100):
        masks, nonfinite = ops.group_masks([weight], size, 2, factors=[factors])
        assert masks[0].int().tolist() == [[0, 0, 0, 1, 0, 1]]
        assert nonfinite.tolist() == [0]


def test_group_masks_keeps_denormals_whatever_torch_is_told(device):
    weight = adversarial((10, 200), "denormal", torch.float32)
    factors = [torch.full((200,), 0.5)]
    for size in (4, 64, 200):
        expected = reference.group_masks([weight], [size], [size // 2], row_dims=[1], factors=factors, bases=[None])[
            0
        ]
        torch.set_flush_denormal(True)
        try:
            there = [one.to(device) for one in factors]
            found = ops.group_masks([weight.to(device)], size, size // 2, factors=there)[0]
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found[0].cpu(), expected[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_group_masks_matches_the_reference_on_anything(data):
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    size = data.draw(st.integers(1, 160))
    kept = data.draw(st.integers(0, size))
    kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(DTYPES))
    weight = adversarial((rows, columns), kind, dtype, data.draw(st.integers(0, 100)))
    if data.draw(st.booleans()):
        weight = weight.t().contiguous().t()
    factors = [factors_for(weight, 1)] if data.draw(st.booleans()) else None
    bases = [base_for(weight)] if data.draw(st.booleans()) else None
    check([weight], size, kept, factors=factors, bases=bases)


def test_group_masks_takes_numbers_per_weight_and_expanded_weights(device):
    weights = [torch.randn(12), torch.randn(4, 6, 2), torch.randn(5, 1).expand(5, 8), torch.randn(8).expand(5, 8)]
    check(weights, [12, 4, 8, 3], [3, 2, 4, 1], row_dims=[0, 2, 1, 1], device=device)
    factors = [torch.ones(()).expand(12), None, None, torch.rand(16)[::2]]
    check(weights, [12, 4, 8, 3], [3, 2, 4, 1], row_dims=[0, 2, 1, 1], device=device, factors=factors)


def test_group_masks_has_the_layout_of_its_weight():
    weight = torch.randn(4, 8, 3, 3).movedim(1, -1)
    masks, _ = ops.group_masks([weight], 4, 2, row_dims=3)
    assert masks[0].stride() == weight.stride()


def test_group_masks_is_seen_by_autograd():
    mask, weight = torch.ones(2, 4, dtype=torch.bool), torch.randn(2, 4, requires_grad=True)
    loss = torch.where(mask, weight, 0).square().sum()
    ops.group_masks([weight], 4, 2, masks=[mask])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_group_masks_passes_opcheck(device):
    weights = [torch.randn(30, 4, device=device), torch.randn(7, device=device)]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    factors, bases = [torch.rand(4, device=device), None], [None, masks[1].clone()]
    arguments = (weights, [4, 3], [2, 1], [1, 0], factors, bases, masks)
    torch.library.opcheck(torch.ops.pyprune.group_masks, arguments)


def test_group_masks_refuses_bad_input():
    weight = torch.ones(3, 8)
    with pytest.raises(TypeError, match="int32"):
        ops.group_masks([weight.int()], 4, 2)
    with pytest.raises(ValueError, match="sizes is 0"):
        ops.group_masks([weight], 0, 0)
    for kept in (-1, 5):
        with pytest.raises(ValueError, match="allowed are 0 to 4"):
            ops.group_masks([weight], 4, kept)
    for dims in (-1, 2):
        with pytest.raises(ValueError, match="row_dims"):
            ops.group_masks([weight], 4, 2, row_dims=dims)
    with pytest.raises(ValueError, match="row_dims"):
        ops.group_masks([torch.ones(())], 1, 1, row_dims=0)
    with pytest.raises(ValueError, match="sizes has 2 numbers for 1 weights"):
        ops.group_masks([weight], [4, 4], 2)
    with pytest.raises(TypeError):
        ops.group_masks([weight], 4.0, 2)
    with pytest.raises(ValueError, match="got 2 factors"):
        ops.group_masks([weight], 4, 2, factors=[None, None])
    for factors in (torch.ones(7), torch.ones(8, dtype=torch.float64), torch.ones(3, 8)):
        with pytest.raises(ValueError, match=r"expected torch\.float32 of shape \(8,\)"):
            ops.group_masks([weight], 4, 2, factors=[factors])
    with pytest.raises(ValueError, match=r"expected torch\.float64"):
        ops.group_masks([weight.double()], 4, 2, factors=[torch.ones(8)])
    for base in (torch.ones(3, 8), torch.ones(8, dtype=torch.bool)):
        with pytest.raises((TypeError, ValueError), match=r"bases\[0\]"):
            ops.group_masks([weight], 4, 2, bases=[base])
    with pytest.raises(ValueError, match="on meta"):
        ops.group_masks([weight], 4, 2, bases=[torch.ones(3, 8, dtype=torch.bool, device="meta")])
    with pytest.raises(ValueError, match="must agree"):
        ops.group_masks([weight], 4, 2, masks=[torch.ones(8, 3, dtype=torch.bool)])
    with pytest.raises(ValueError, match="expanded"):
        ops.group_masks([weight], 4, 2, masks=[torch.ones(8, dtype=torch.bool).expand(3, 8)])


def test_group_masks_of_nothing():
    masks, nonfinite = ops.group_masks([], 4, 2)
    assert masks == []
    assert nonfinite.shape == (0,)
