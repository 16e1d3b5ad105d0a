import sys

import pytest
import torch

from pyprune import ops
from pyprune.ops._keys import Keys
from pyprune.ops.cut import Cut, find_cut
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts

cut_module = sys.modules["pyprune.ops.cut"]  # the name is that of the function, too
SHAPES = [(7, 501), (), (0,), (1,), (3001,), (64, 3, 3)]
COUNTS = (0.0, 0.001, 0.3, 0.5, 0.77, 0.999, 1.0)


def weights_of(kind, dtypes, device):
    return [
        adversarial(shape, kind, dtypes[seed % len(dtypes)], seed).to(device) * 2.0 ** (seed % 3)
        for seed, shape in enumerate(SHAPES)
    ]


def check(weights, scales, removed):
    masks, _ = ops.threshold(weights, removed, scales=scales)
    found = ops.cut(weights, removed, scales=scales)
    assert not any(found.nonfinite)
    dropped = [weight.clone() for weight in weights]
    left = ops.drop(dropped, found, scales=scales)
    assert left.ties == 0
    assert sum(int((~mask).sum()) for mask in masks) == removed
    for weight, mask, after in zip(weights, masks, dropped, strict=True):
        assert torch.equal(after, torch.where(mask, weight, 0))
        assert torch.equal(after.signbit(), torch.where(mask, weight, 0).signbit())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed", "narrow"], ids=str)
def test_cut_and_drop_remove_what_threshold_does(device, dtype, kind, scaled):
    dtypes = {"mixed": DTYPES, "narrow": DTYPES[2:]}.get(dtype, (dtype,))
    weights = weights_of(kind, dtypes, device)
    scales = torch.tensor([1.0, 3.7, 1.0, 0.5, 1e-3, 0.7], dtype=torch.float64, device=device) if scaled else None
    total = sum(weight.numel() for weight in weights)
    for share in COUNTS:
        check(weights, scales, round(share * total))


def test_cut_takes_norms_for_scales(device):
    weights = weights_of("normal", DTYPES[2:], device)
    check(weights, ops.inverse_norms(weights), 3000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300, 4.49e307])
def test_cut_of_scores_that_leave_the_range(device, dtype, scale):
    weights = weights_of("mostly zeros", (dtype,), device) + weights_of("zeros", (dtype,), device)
    scales = torch.full((len(weights),), 1.0, dtype=torch.float64, device=device)
    scales[::2] = scale
    total = sum(weight.numel() for weight in weights)
    for share in COUNTS:
        check(weights, scales, round(share * total))


@pytest.mark.parametrize("most", [16, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cut_with_few_counters_reads_more_often_and_finds_the_same(monkeypatch, dtype, most):
    weights = weights_of("normal", (dtype,), "cpu")
    scales = torch.rand(len(weights), dtype=torch.float64) + 0.5
    expected = ops.cut(weights, 2500, scales=scales)
    monkeypatch.setattr(cut_module, "_MOST_COUNTERS", most)
    assert ops.cut(weights, 2500, scales=scales) == expected


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 3), (torch.float64, 5)]
)
def test_find_cut_reads_half_types_once(dtype, most):
    reads = []
    weights = weights_of("normal", (dtype,), "cpu")

    def read(index):
        reads.append(index)
        return weights[index]

    find_cut(read, [dtype] * len(weights), 3000, [1.0, 3.7, 1.0, 0.5, 1e-3, 0.7])
    assert len(weights) <= len(reads) <= most * len(weights)


def test_cut_counts_what_is_not_finite(device):
    weights = [torch.ones(5, device=device), torch.tensor([1.0, float("nan"), float("-inf")], device=device)]
    for dtype in DTYPES:
        assert ops.cut([weight.to(dtype) for weight in weights], 2).nonfinite == (0, 2)


def test_cut_says_its_score():
    assert ops.cut([torch.tensor([1.0, -2.0, 3.0])], 2).score == 2.0
    assert ops.cut([torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)], 2).score == 2.0
    assert ops.cut([torch.tensor([1.0, -2.0])], 0).score == 0.0
    assert ops.cut([], 0) == Cut(-1, 0)


def test_drop_of_parts_is_drop_of_all(device):
    weight = adversarial((40_000,), "few values", torch.float32).to(device)
    found = ops.cut([weight], 20_000)
    whole, parts = weight.clone(), weight.clone()
    ops.drop([whole], found)
    for part in parts.split(777):
        found = ops.drop([part], found)
    assert torch.equal(whole, parts)
    assert int((whole == 0).sum()) >= 20_000


def test_drop_of_any_layout(device):
    weight = adversarial((30, 26, 3, 7), "few values", torch.bfloat16).to(device)
    expected, _ = ops.threshold([weight], 9000)
    for name, view in layouts(weight).items():
        found = ops.cut([view], 9000)
        ops.drop([view], found)
        assert torch.equal(view, torch.where(expected[0], weight, 0)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_bits_up_to_is_the_inverse_of_keys(dtype):
    for scale in (None, 0.37, 1e-30, 1e30):
        keys = Keys(dtype, scale, dtype == torch.float64)
        bits = torch.randint(0, keys.infinity, (200,)).sort().values.numpy()
        for one, key in zip(bits.tolist(), keys.of(bits).tolist(), strict=True):
            found = keys.bits_up_to(key)
            assert found >= one
            assert keys.of(bits[:1] * 0 + found)[0] <= key
            assert found == keys.infinity or keys.of(bits[:1] * 0 + found + 1)[0] > key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_counts_matches_a_plain_histogram(device, dtype):
    weight = adversarial((100_003,), "normal", dtype).to(device)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = (weight.view(integers) & torch.iinfo(integers).max).long().cpu()
    width = 8 * weight.element_size() - 1
    for low, shift, bins in ((0, width - 15, 1 << 15), (int(bits.median()), width - 15, 3), (int(bits[0]), 0, 1)):
        places = (bits - low) >> shift
        expected = torch.bincount(places[(places >= 0) & (places < bins)], minlength=bins)
        counts, below = cut_module.magnitude_counts(weight, low, shift, bins)
        assert counts.tolist() == expected.tolist()
        assert below == int((bits < low).sum())


def test_magnitude_counts_passes_opcheck():
    torch.library.opcheck(torch.ops.pyprune.magnitude_counts, (torch.randn(30, 4), 0, 16, 1 << 15))


def test_cut_and_drop_refuse_bad_input():
    weight = torch.ones(3)
    with pytest.raises(ValueError, match=r"removed is 4; give a number of the 3 elements"):
        ops.cut([weight], 4)
    with pytest.raises(TypeError, match="int64"):
        ops.cut([weight.long()], 1)
    with pytest.raises(ValueError, match=r"scales\[0\] is -1.0"):
        ops.cut([weight], 1, scales=torch.tensor([-1.0], dtype=torch.float64))
    with pytest.raises(TypeError, match=r"cut is 3; give what pyprune.ops.cut returned"):
        ops.drop([weight], 3)
    with pytest.raises(ValueError, match="share"):
        ops.drop([weight, weight], ops.cut([weight], 1))
