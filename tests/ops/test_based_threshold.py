"""Masks that are pruned further: what a base lacks goes first, whatever its score, and is never kept."""

import functools

import pytest
import torch
from torch import Tensor

from pyprune import _C, ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts

SHAPES = [(200, 401), (3,), (0, 4), (), (70_000,), (64, 64)]


def random_base(shape: tuple[int, ...], kept: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < kept


def assert_matches_reference(weights, removed, bases, normalize=False, device="cpu") -> None:
    scales = ops.inverse_norms(weights) if normalize else None
    expected, _ = reference.threshold(weights, removed, scales=scales, bases=bases)
    masks, nonfinite = ops.threshold(
        [weight.to(device) for weight in weights],
        removed,
        normalize=normalize,
        bases=[None if base is None else base.to(device) for base in bases],
    )
    assert not nonfinite.any()
    for mask, want in zip(masks, expected, strict=True):
        assert torch.equal(mask.cpu(), want)


BASES = {
    "half": lambda: [random_base(shape, 0.5, i) for i, shape in enumerate(SHAPES)],
    "few left": lambda: [random_base(shape, 0.03, i) for i, shape in enumerate(SHAPES)],
    "few gone": lambda: [random_base(shape, 0.999, i) for i, shape in enumerate(SHAPES)],
    "all": lambda: [torch.ones(shape, dtype=torch.bool) for shape in SHAPES],
    "none": lambda: [torch.zeros(shape, dtype=torch.bool) for shape in SHAPES],
    "one whole weight": lambda: [torch.zeros(SHAPES[0], dtype=torch.bool), *[None] * 5],
    "of some": lambda: [None, None, None, None, random_base(SHAPES[4], 0.5, 4), None],
}


@functools.cache
def reference_cases(kind: str, dtype: torch.dtype):
    weights = [adversarial(shape, kind, dtype, seed) for seed, shape in enumerate(SHAPES)]
    total = sum(weight.numel() for weight in weights)
    scales = ops.inverse_norms(weights)
    cases = []
    for make in BASES.values():
        bases = make()
        lacking = [0 if base is None else int((~base).sum()) for base in bases]
        # Less than the bases lack, just that, a little and much more, and all.
        for more in (-1000, 0, 1, (total - sum(lacking)) // 3, total - sum(lacking)):
            removed = min(max(sum(lacking) + more, 0), total)
            options = {"scales": scales} if more in (-1000, 1) else {}
            cases.append((removed, bases, options, reference.threshold(weights, removed, bases=bases, **options)[0]))
        each = [(lacks + weight.numel()) // 2 for lacks, weight in zip(lacking, weights, strict=True)]
        for removed in (each, [lacks // 2 for lacks in lacking]):
            cases.append((removed, bases, {}, reference.threshold(weights, removed, bases=bases)[0]))
    return weights, cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_with_bases_matches_reference(device, dtype, kind):
    weights, cases = reference_cases(kind, dtype)
    weights = [weight.to(device) for weight in weights]
    for removed, bases, options, expected in cases:
        masks, nonfinite = ops.threshold(
            weights,
            removed,
            bases=[None if base is None else base.to(device) for base in bases],
            **{name: value.to(device) for name, value in options.items()},
        )
        assert nonfinite.tolist() == [0] * len(weights)
        for mask, want in zip(masks, expected, strict=True):
            assert torch.equal(mask.cpu(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_normalizes_by_whole_weights_whatever_the_bases(device, dtype, kind):
    weights = [adversarial(shape, kind, dtype, seed) * 2.0**-seed for seed, shape in enumerate(SHAPES)]
    for name in ("half", "few gone", "of some"):
        bases = BASES[name]()
        lacking = sum(0 if base is None else int((~base).sum()) for base in bases)
        for removed in (lacking - 5, lacking, lacking + 10_000):
            assert_matches_reference(weights, max(removed, 0), bases, normalize=True, device=device)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threshold_with_bases_recovers_from_a_missed_bracket(dtype, kind, normalize):
    weights = [adversarial((150_003,), kind, dtype), adversarial((100, 400), "normal", dtype)]
    bases = [random_base((150_003,), 0.6, 0), None]
    lacking = int((~bases[0]).sum())
    scales = ops.inverse_norms(weights) if normalize else None
    for removed in (1000, lacking - 10, lacking, lacking + 10, 110_000, 190_000):
        expected, _ = reference.threshold(weights, removed, bases=bases, scales=scales)
        for sigmas in (-40.0, -5.0, -3.7, 3.7, 5.0, 40.0):
            _C._shift_bracket(sigmas)
            try:
                masks, _ = ops.threshold(weights, removed, bases=bases, normalize=normalize)
            finally:
                _C._shift_bracket(0.0)
            assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_with_bases_of_any_layout(device, dtype):
    weight = (torch.randn(300, 26, 3, 7, generator=torch.Generator().manual_seed(1)) * 8).round().to(dtype)
    base = random_base((300, 26, 3, 7), 0.7, 1)
    (expected,), _ = reference.threshold([weight], 100_000, bases=[base])
    for name, view in layouts(weight.to(device)).items():
        for base_name, base_view in layouts(base.to(device)).items():
            (mask,), _ = ops.threshold([view], 100_000, bases=[base_view])
            assert torch.equal(mask.cpu(), expected), (name, base_name)
    row = random_base((7,), 0.5, 2)
    (mask,), _ = ops.threshold([weight.to(device)], 100_000, bases=[row.to(device).expand(300, 26, 3, 7)])
    (want,), _ = reference.threshold([weight], 100_000, bases=[row.expand(300, 26, 3, 7)])
    assert torch.equal(mask.cpu(), want)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["normal", "few values", "sorted"])
def test_threshold_with_bases_is_the_same_for_any_thread_count(device, kind, threads):
    weights = [adversarial((400_000,), kind, torch.float32), adversarial((300, 500), kind, torch.bfloat16)]
    bases = [random_base((400_000,), 0.5, 0), random_base((300, 500), 0.9, 1)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_matches_reference(weights, 380_000, bases, device=device)
    finally:
        torch.set_num_threads(before)


def test_threshold_with_bases_of_every_rank_of_a_small_list(device):
    weights = [adversarial((7,), "few values", torch.float32), adversarial((2, 3), "normal", torch.float16)]
    bases = [random_base((7,), 0.6, 0), random_base((2, 3), 0.6, 3)]
    for removed in range(14):
        assert_matches_reference(weights, removed, bases, device=device)
        assert_matches_reference(weights, removed, [None, bases[1]], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_with_bases_counts_all_that_is_not_finite(device, dtype):
    weights = [adversarial((70_001,), "normal", dtype), adversarial((33,), "normal", dtype)]
    weights[0][[0, 65_600]] = torch.nan
    weights[1][32] = torch.inf
    bases = [torch.ones(70_001, dtype=torch.bool), torch.zeros(33, dtype=torch.bool)]
    bases[0][0] = False
    weights, bases = ([one.to(device) for one in some] for some in (weights, bases))
    for removed in (0, 34, 50_000, 70_034, [0, 33], [50_000, 10]):
        assert ops.threshold(weights, removed, bases=bases)[1].tolist() == [2, 1]
        assert ops.threshold(weights, removed, bases=bases, normalize=True)[1].tolist() == [2, 1]


def test_threshold_of_an_empty_list_of_bases_is_refused():
    with pytest.raises(ValueError, match="0 bases for 1 weights"):
        ops.threshold([torch.randn(4)], 1, bases=[])


def test_threshold_refuses_bad_bases():
    weight, base = torch.randn(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 bases for 1 weights"):
        ops.threshold([weight], 1, bases=[base, None])
    with pytest.raises(TypeError, match="float32"):
        ops.threshold([weight], 1, bases=[weight])
    with pytest.raises(ValueError, match="must agree"):
        ops.threshold([weight], 1, bases=[base[:3]])
    with pytest.raises(ValueError, match="shares memory"):
        ops.threshold([weight], 1, bases=[base], masks=[base.view(4)])
