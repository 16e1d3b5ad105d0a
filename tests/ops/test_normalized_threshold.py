"""Scores divided by norms that are known only when all is read: the same masks as with norms taken before."""

import pytest
import torch
from torch import Tensor

from pyprune import _C, ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts

RATIOS = (0.0, 0.02, 0.5, 0.7, 0.98, 1.0)


def reference_masks(weights: list[Tensor], removed: int) -> list[Tensor]:
    norms = reference.norms(weights).clamp(min=torch.finfo(torch.float64).tiny)
    return reference.threshold(weights, removed, scales=norms.reciprocal())[0]


def assert_normalized(weights: list[Tensor], removed: int, device: str = "cpu") -> None:
    masks, nonfinite = ops.threshold([weight.to(device) for weight in weights], removed, normalize=True)
    assert nonfinite.tolist() == [0] * len(weights)
    for mask, want in zip(masks, reference_masks(weights, removed), strict=True):
        assert torch.equal(mask.cpu(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_normalizes_as_with_norms(device, dtype, kind):
    shapes = [(300, 601), (3,), (0, 4), (), (70_000,), (64, 64), (9000,)]
    weights = [adversarial(shape, kind, dtype, seed) * 2.0**-seed for seed, shape in enumerate(shapes)]
    total = sum(weight.numel() for weight in weights)
    for ratio in RATIOS:
        assert_normalized(weights, int(ratio * total), device)


def test_threshold_normalizes_lists_of_mixed_dtypes(device):
    weights = [adversarial((300, 700), "normal", dtype, seed) for seed, dtype in enumerate(DTYPES)]
    halves = [weight for weight in weights if weight.dtype != torch.float64]
    for some in (weights, halves):
        assert_normalized(some, sum(weight.numel() for weight in some) // 3, device)


def rows_of_many_sizes(rows: int, columns: int, size_of_row: Tensor, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size_of_row[:, None]


@pytest.mark.parametrize("pattern", ["growing", "random", "half zero", "one huge row", "probes are zero"])
def test_threshold_normalizes_weights_whose_parts_differ(device, pattern):
    sizes = {
        "growing": torch.logspace(-3, 3, 500),
        "random": torch.logspace(-2, 2, 500)[torch.randperm(500, generator=torch.Generator().manual_seed(0))],
        "half zero": (torch.arange(500) < 250).float(),
        "one huge row": torch.where(torch.arange(500) == 400, 1e4, 1.0),
        "probes are zero": torch.ones(500),
    }[pattern]
    weights = [rows_of_many_sizes(500, 1000, sizes, 1), rows_of_many_sizes(500, 400, sizes.flip(0), 2)]
    if pattern == "probes are zero":
        for weight in weights:
            for start in range(0, weight.numel(), 65536):
                weight.view(-1)[start : start + 4096] = 0
    for ratio in (0.1, 0.5, 0.9):
        assert_normalized(weights, int(ratio * 700_000), device)


@pytest.mark.parametrize("sigmas", [-40.0, -5.0, -3.7, 3.7, 5.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threshold_normalizes_when_a_bracket_is_missed(dtype, sigmas):
    weights = [adversarial((200_003,), "normal", dtype), adversarial((300, 400), "heavy tail", dtype)]
    _C._shift_bracket(sigmas)
    try:
        for ratio in (0.02, 0.5, 0.98):
            assert_normalized(weights, int(ratio * 320_003))
    finally:
        _C._shift_bracket(0.0)


@pytest.mark.parametrize("threads", [1, 3])
def test_threshold_normalizes_any_layout_with_any_thread_count(threads):
    weight = adversarial((40, 30, 7, 20), "normal", torch.float32)
    other = adversarial((100_000,), "few values", torch.float16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layout in layouts(weight).values():
            assert_normalized([layout, other], 190_000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5000])
def test_threshold_normalized_counts_what_is_not_finite(device, bad, place):
    weights = [torch.randn(100_000), torch.randn(300)]
    weights[0][place] = bad
    _, nonfinite = ops.threshold([weight.to(device) for weight in weights], 50_000, normalize=True)
    assert nonfinite.tolist() == [1, 0]


def test_threshold_refuses_to_normalize_with_scales():
    with pytest.raises(ValueError, match="not both"):
        ops.threshold([torch.ones(3)], 1, normalize=True, scales=torch.ones(1, dtype=torch.float64))


def test_threshold_normalizes_each_weight_by_itself(device):
    weights = [torch.randn(50, generator=torch.Generator().manual_seed(i), device="cpu").to(device) for i in range(2)]
    masks, _ = ops.threshold(weights, [20, 30], normalize=True)
    expected, _ = ops.threshold(weights, [20, 30])
    assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


def test_normalized_threshold_passes_opcheck():
    weights = [torch.randn(4, 5), torch.randn(7)]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    for bases in ([], [torch.rand(4, 5) < 0.5, None]):
        torch.library.opcheck(torch.ops.pyprune.normalized_threshold, (weights, 10, masks, bases))
