import functools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from pyprune import _C, ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts

RATIOS = (0.0, 0.01, 0.5, 0.7, 0.99, 1.0)


def assert_matches(masks: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (mask, want) in enumerate(zip(masks, expected, strict=True)):
        torch.testing.assert_close(mask.cpu(), want, rtol=0, atol=0, msg=lambda text, i=index: f"mask {i}: {text}")


def assert_matches_reference(weights: Sequence[Tensor], removed, scales: Tensor | None = None, device="cpu") -> None:
    expected, _ = reference.threshold(weights, removed, scales=scales)
    scales = None if scales is None else scales.to(device)
    masks, nonfinite = ops.threshold([weight.to(device) for weight in weights], removed, scales=scales)
    assert nonfinite.tolist() == [0] * len(weights)
    assert_matches(masks, expected)


@functools.cache
def reference_cases(kind: str, dtype: torch.dtype):
    """Weights of many shapes, and what to remove from them with which scales to get which masks."""
    shapes = [(300, 101), (3,), (0, 4), (), (70_000,), (64, 64)]
    weights = [adversarial(shape, kind, dtype, seed) for seed, shape in enumerate(shapes)]
    total = sum(weight.numel() for weight in weights)
    norms = reference.norms(weights).clamp(min=torch.finfo(torch.float64).tiny)
    cases = []
    for ratio in RATIOS:
        each = [int(ratio * weight.numel()) for weight in weights]
        for removed, scales in ((int(ratio * total), None), (int(ratio * total), norms.reciprocal()), (each, None)):
            cases.append((removed, scales, reference.threshold(weights, removed, scales=scales)[0]))
    return weights, cases


def numpy_oracle(weights: Sequence[np.ndarray], removed: int) -> list[np.ndarray]:
    """Partition for the threshold, then the first of its ties."""
    scores = np.abs(np.concatenate([weight.ravel() for weight in weights]))
    keep = np.ones(scores.size, dtype=bool)
    if removed:
        kth = np.partition(scores, removed - 1)[removed - 1]
        keep[scores < kth] = False
        ties = np.flatnonzero(scores == kth)
        keep[ties[: removed - (scores < kth).sum()]] = False
    parts = np.split(keep, np.cumsum([weight.size for weight in weights])[:-1])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_matches_reference(device, dtype, kind):
    weights, cases = reference_cases(kind, dtype)
    weights = [weight.to(device) for weight in weights]
    for removed, scales, expected in cases:
        scales = None if scales is None else scales.to(device)
        masks, nonfinite = ops.threshold(weights, removed, scales=scales)
        assert nonfinite.tolist() == [0] * len(weights)
        assert_matches(masks, expected)


@functools.cache
def large_case(kind: str):
    weights = [adversarial((400_000,), kind, torch.float32), adversarial((300, 500), kind, torch.bfloat16)]
    return weights, [torch.from_numpy(mask) for mask in numpy_oracle([w.float().numpy() for w in weights], 380_000)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_is_the_same_for_any_thread_count(device, kind, threads):
    weights, expected = large_case(kind)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        masks, _ = ops.threshold([weight.to(device) for weight in weights], 380_000)
    finally:
        torch.set_num_threads(before)
    assert_matches(masks, expected)


@pytest.mark.parametrize("sigmas", [-40.0, -6.0, -3.7, 3.7, 6.0, 40.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threshold_recovers_from_a_missed_bracket(dtype, kind, sigmas):
    weight = adversarial((200_003,), kind, dtype)
    _C._shift_bracket(sigmas)
    try:
        for ratio in (0.02, 0.5, 0.7, 0.98):
            assert_matches_reference([weight], int(ratio * weight.numel()))
    finally:
        _C._shift_bracket(0.0)


def test_threshold_with_every_rank_of_a_small_tensor(device):
    weights = [adversarial((7,), "few values", torch.float32), adversarial((2, 3), "normal", torch.float16)]
    for removed in range(14):
        assert_matches_reference(weights, removed, device=device)


@pytest.mark.parametrize("more", [-5, -1, 0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_of_pruned_weights_when_its_bracket_lies_beside_the_zeros(device, dtype, more):
    weights = [adversarial(shape, "normal", dtype, seed) for seed, shape in enumerate([(70_000,), (300, 1001)])]
    removed = int(0.7 * sum(weight.numel() for weight in weights))
    for weight, mask in zip(weights, reference.threshold(weights, removed)[0], strict=True):
        weight.mul_(mask)
    assert_matches_reference(weights, removed + more, device=device)


def test_threshold_of_mixed_dtypes_compares_in_the_widest(device):
    weights = [adversarial((5000,), "normal", dtype, seed) for seed, dtype in enumerate(DTYPES)]
    scales = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    assert_matches_reference(weights, 11_000, scales, device=device)
    assert_matches_reference([weights[0], weights[2], weights[3]], 9_000, device=device)
    # Next to a float64 weight, float32 scores are not rounded: 1 + 2**-40 is above 1.
    weights = [torch.tensor([1 + 2.0**-40], dtype=torch.float64, device=device), torch.ones(1, device=device)]
    masks, _ = ops.threshold(weights, 1)
    assert [mask.item() for mask in masks] == [True, False]


def test_threshold_drops_the_first_of_equals(device):
    weights = [torch.tensor([2.0, 1.0, -1.0]), torch.tensor([1.0, 3.0])]
    masks, _ = ops.threshold([weight.to(device) for weight in weights], 2)
    assert [mask.tolist() for mask in masks] == [[True, False, False], [True, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_of_any_layout_equals_the_contiguous_one(device, dtype):
    # Three channels of 3x3: big enough for several chunks, with many ties.
    weight = (torch.randn(300, 26, 3, 7, generator=torch.Generator().manual_seed(1)) * 8).round().to(dtype).to(device)
    (expected,), _ = ops.threshold([weight], 100_000)
    for name, view in layouts(weight).items():
        strides = view.stride()
        (mask,), _ = ops.threshold([view], 100_000)
        assert torch.equal(mask, expected), name
        assert view.stride() == strides
        assert mask.stride() == torch.empty_like(view).stride(), name
        reversed_mask = torch.empty(7, 3, 26, 300, dtype=torch.bool, device=device).permute(3, 2, 1, 0)
        (mask,), _ = ops.threshold([view], 100_000, masks=[reversed_mask])
        assert torch.equal(mask, expected), name


def test_threshold_of_an_expanded_weight(device):
    weight = torch.arange(6.0, device=device).reshape(6, 1).expand(6, 4)
    (mask,), _ = ops.threshold([weight], 9)
    assert torch.equal(mask, ops.threshold([weight.contiguous()], 9)[0][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_threshold_counts_what_is_not_finite(device, dtype, value):
    weights = [adversarial((70_001,), "normal", dtype), adversarial((33,), "normal", dtype)]
    weights[0][[0, 65_600]] = value
    weights[1][32] = value
    on_device = [weight.to(device) for weight in weights]
    for removed in (0, 100, 70_034, [0, 0], [50_000, 10]):
        _, nonfinite = ops.threshold(on_device, removed)
        assert nonfinite.tolist() == [2, 1]
    assert ops.threshold(on_device, 100, scales=ops.inverse_norms(on_device))[1].tolist() == [2, 1]
    # A scale of NaN, which nobody looks at on a GPU: still counted, still no crash.
    scales, masks = ops.norms(on_device).reciprocal(), [torch.empty_like(one, dtype=torch.bool) for one in on_device]
    assert torch.ops.pyprune.threshold(on_device, scales, [100], masks, []).tolist() == [2, 1]


def arrays(dtype: type) -> st.SearchStrategy[np.ndarray]:
    limits = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, float(limits.smallest_subnormal), float(limits.max)]
    width = limits.bits
    elements = st.floats(width=width, allow_nan=False, allow_infinity=False) | st.sampled_from(special)
    found = hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40), elements=elements)
    return found | found.map(np.transpose)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(weights=st.lists(arrays(np.float32), min_size=1, max_size=4), fraction=st.floats(0, 1))
def test_threshold_matches_numpy_partition(weights, fraction):
    removed = int(fraction * sum(weight.size for weight in weights))
    masks, nonfinite = ops.threshold([torch.from_numpy(weight) for weight in weights], removed)
    assert_matches(masks, [torch.from_numpy(np.asarray(mask)) for mask in numpy_oracle(weights, removed)])
    assert nonfinite.sum() == 0


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    weights=st.lists(arrays(np.float16) | arrays(np.float32) | arrays(np.float64), min_size=1, max_size=4),
    fraction=st.floats(0, 1),
    exponents=st.lists(st.integers(-40, 40), min_size=4, max_size=4),
)
def test_threshold_matches_numpy_partition_with_scales_and_mixed_dtypes(weights, fraction, exponents):
    removed = int(fraction * sum(weight.size for weight in weights))
    scales = [1.1 * 2.0**exponent for exponent in exponents[: len(weights)]]
    wide = np.float64 if any(weight.dtype == np.float64 for weight in weights) else np.float32
    with np.errstate(over="ignore"):
        scores = [
            (np.abs(weight.astype(np.float64)) * scale).astype(wide)
            for weight, scale in zip(weights, scales, strict=True)
        ]
    masks, _ = ops.threshold(
        [torch.from_numpy(weight) for weight in weights], removed, scales=torch.tensor(scales, dtype=torch.float64)
    )
    assert_matches(masks, [torch.from_numpy(np.asarray(mask)) for mask in numpy_oracle(scores, removed)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_keeps_denormals_whatever_torch_is_told(device, dtype):
    # The flag is one of each thread: without care, threads that were started before would round differently.
    weights = [adversarial((300_000,), "denormal", dtype), adversarial((300,), "normal", dtype)]
    scales = torch.tensor([0.7, 1e-3], dtype=torch.float64)
    expected = [reference.threshold(weights, 100_000, scales=s)[0] for s in (None, scales)]
    norms = reference.norms(weights)
    weights = [weight.to(device) for weight in weights]
    ops.threshold(weights, 5)
    torch.set_flush_denormal(True)
    try:
        masks = [ops.threshold(weights, 100_000, scales=s)[0] for s in (None, scales.to(device))]
        result = ops.norms(weights)
    finally:
        torch.set_flush_denormal(False)
    assert_matches(masks[0], expected[0])
    assert_matches(masks[1], expected[1])
    assert torch.equal(result.cpu(), norms)


def test_operators_guard_what_the_python_layer_promises(device):
    weight, mask = torch.randn(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    scales, factors = torch.ones(1, dtype=torch.float64, device=device), torch.ones(4, device=device)
    for removed in ([5], [-1], [1, 1]):
        with pytest.raises(RuntimeError):
            torch.ops.pyprune.threshold([weight], None, removed, [mask], [])
    for operator, arguments in (
        (torch.ops.pyprune.threshold, ([mask], None, [1], [mask], [])),
        (torch.ops.pyprune.threshold, ([weight], None, [1], [mask[:3]], [])),
        (torch.ops.pyprune.threshold, ([weight], None, [1], [mask], [None, None])),
        (torch.ops.pyprune.threshold, ([weight], None, [1], [mask], [mask[:3]])),
        (torch.ops.pyprune.threshold, ([weight], None, [1], [mask], [weight])),
        (torch.ops.pyprune.threshold, ([weight], scales.to("meta"), [1], [mask], [])),
        (torch.ops.pyprune.threshold, ([weight], None, [1], [mask], [mask.to("meta")])),
        (torch.ops.pyprune.group_masks, ([weight], [4], [2], [0], [factors.to("meta")], [None], [mask])),
        (torch.ops.pyprune.fold_units, ([weight], [mask.to("meta")], [1])),
        (torch.ops.pyprune.gate, (weight, weight, torch.tensor(1, device="meta"), 0, 0, 1.0, 0.0, 1.0)),
        (torch.ops.pyprune.gate_noise, (weight, [4], 0)),
        (torch.ops.pyprune.norms, ([mask],)),
        (torch.ops.pyprune.fold, ([mask], [mask])),
        (torch.ops.pyprune.fold, ([weight], [mask, mask])),
        (torch.ops.pyprune.count_zeros, ([weight.int()],)),
    ):
        with pytest.raises(RuntimeError):
            operator(*arguments)
    assert mask.all()


# Peak memory is of a whole process, so each measurement has one to itself.
MEASURE_EXTRA_MEMORY = """
import resource, sys, torch
from pyprune import ops
shape, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
weight = torch.randn(shape).to(dtype)
weight = torch.cat([weight] * 8)
masks = [torch.ones(weight.shape, dtype=torch.bool)]
ops.threshold([weight[:100_000]], 70_000)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
ops.threshold([weight], weight.numel() * 7 // 10, masks=masks)
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threshold_keeps_extra_memory_under_16_mib(dtype):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_EXTRA_MEMORY, str(8_000_000), dtype],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout) < 16 * 2**20


def available_memory() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@pytest.mark.skipif(available_memory() < 10 * 2**30, reason="needs 10 GiB of memory")
def test_threshold_of_more_than_2_to_the_31_elements():
    size = 2**31 + 1000
    weight = torch.ones(size, dtype=torch.bfloat16)
    weight[-5:] = torch.tensor([0.0, 2.0, 3.0, -0.0, 4.0])
    other = torch.full((1000,), 1.5)
    masks, nonfinite = ops.threshold([other, weight], 2**31 + 500)
    assert nonfinite.tolist() == [0, 0]
    assert ops.count_zeros(masks).tolist() == [0, 2**31 + 500]
    # The two zeros went, and of the ones the first: 497 of them are left.
    assert masks[1][-502:].tolist() == [True] * 497 + [False, True, True, False, True]
    ops.fold([weight], masks[1:])
    assert ops.count_zeros([weight]).item() == 2**31 + 500
    assert ops.norms([weight]).item() == pytest.approx(math.sqrt(497 + 4 + 9 + 16), rel=1e-15)


def test_threshold_passes_opcheck(device):
    weights = [torch.randn(30, 4, device=device), torch.randn(7, device=device)]
    masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    scales = torch.ones(2, dtype=torch.float64, device=device)
    bases = [torch.rand(30, 4, device=device) < 0.5, None]
    torch.library.opcheck(torch.ops.pyprune.threshold, (weights, scales, [20], masks, []))
    torch.library.opcheck(torch.ops.pyprune.threshold, (weights, None, [20, 3], masks, bases))


def test_threshold_refuses_bad_input():
    weight = torch.randn(4)
    with pytest.raises(ValueError, match="cannot remove 5 of 4"):
        ops.threshold([weight], 5)
    with pytest.raises(ValueError, match="cannot remove -1"):
        ops.threshold([weight], [-1])
    with pytest.raises(ValueError, match="one per weight"):
        ops.threshold([weight], [1, 2])
    with pytest.raises(TypeError, match="int32; allowed are"):
        ops.threshold([weight.int()], 1)
    with pytest.raises(TypeError, match="layout"):
        ops.threshold([weight.to_sparse()], 1)
    for scales in (torch.ones(2, dtype=torch.float64), torch.tensor([math.nan], dtype=torch.float64)):
        with pytest.raises(ValueError, match="scales"):
            ops.threshold([weight], 1, scales=scales)
    with pytest.raises(ValueError, match="must agree"):
        ops.threshold([weight], 1, masks=[torch.ones(3, dtype=torch.bool)])
    with pytest.raises(ValueError, match="expanded"):
        ops.threshold([weight], 1, masks=[torch.ones(1, dtype=torch.bool).expand(4)])
    with pytest.raises(TypeError):
        ops.threshold([weight], 1.5)
    with pytest.raises(ValueError, match="one device"):
        ops.threshold([weight, torch.empty(4, device="meta")], 1)


def test_threshold_of_nothing():
    assert ops.threshold([], 0)[0] == []
    masks, nonfinite = ops.threshold([torch.empty(0, 3)], 0)
    assert masks[0].shape == (0, 3)
    assert nonfinite.tolist() == [0]
