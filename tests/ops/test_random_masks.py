"""threshold and group_masks on weights drawn at random that are hard to part, against NumPy's stable sort.

The sample takes seconds; what is marked slow searches twenty times as far (``SEED`` chooses where).
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pyprune import _C, ops
from tests.ops.cases import DTYPES
from tests.ops.families import FAMILIES, draw

SIZES = (1, 2, 7, 300, 3000, 20_000, 140_000)


def drop_smallest(scores: np.ndarray, removed: int, base: np.ndarray | None = None) -> np.ndarray:
    """Return what is kept. What the base lacks goes first, then the smallest, of equals the first."""
    kept = np.ones(scores.size, dtype=bool)
    order = np.argsort(scores if base is None else np.where(base, scores, -1.0), kind="stable")
    kept[order[:removed]] = False
    return kept if base is None else kept & base


def scores_of(weights: Sequence[Tensor], scales: Tensor | None) -> list[np.ndarray]:
    wide = np.float64 if any(weight.dtype == torch.float64 for weight in weights) else np.float32
    with np.errstate(over="ignore"):
        return [
            (weight.abs().double().numpy().ravel() * (1.0 if scales is None else scales[index].item())).astype(wide)
            for index, weight in enumerate(weights)
        ]


def random_count(rng: np.random.Generator, scores: np.ndarray) -> int:
    """As many as any ratio from 0 to 1 says, or all up to some score, or all below it."""
    size, one = scores.size, scores[rng.integers(scores.size)]
    counts = (
        int(rng.random() * size), int((1 - 10 ** rng.uniform(-6, -1)) * size), size - 1, size // 2, 1,
        int((scores <= one).sum()), int((scores < one).sum()),
    )  # fmt: skip
    return counts[rng.integers(len(counts))]


@contextlib.contextmanager
def brackets_shifted(sigmas: float) -> Iterator[None]:
    """Let the search look beside the score, so that it misses it, or nearly."""
    _C._shift_bracket(sigmas)
    try:
        yield
    finally:
        _C._shift_bracket(0.0)


def random_weights(rng: np.random.Generator, dtype: torch.dtype) -> list[Tensor]:
    dtypes = DTYPES if rng.random() < 0.2 else (dtype,)
    families, largest = list(FAMILIES), rng.integers(len(SIZES))
    return [
        draw(rng, rng.choice(families), int(rng.integers(1, SIZES[largest] + 1)), dtypes[rng.integers(len(dtypes))])
        for _ in range(rng.integers(1, 5))
    ]


def check_threshold(rng: np.random.Generator, weights: list[Tensor], device: torch.device) -> None:
    """One call among all weights or one for each, with scales, norms or neither, and bases or none."""
    scales, options = None, {}
    way = rng.integers(4)
    if way == 0:
        scales = torch.from_numpy(2.0 ** rng.uniform(-40, 40, len(weights)))
        options["scales"] = scales.to(device)
    elif way == 1:
        scales = ops.inverse_norms(weights)
        options["normalize"] = True
    scores = scores_of(weights, scales)
    bases = [rng.random(weight.numel()) < rng.random() if rng.random() < 0.5 else None for weight in weights]
    if rng.random() < 0.6:
        bases = [None] * len(weights)
    else:
        options["bases"] = [None if base is None else torch.from_numpy(base).to(device) for base in bases]
    if rng.random() < 0.5:
        removed = random_count(rng, np.concatenate(scores))
        whole = [
            np.ones(one.size, dtype=bool) if base is None else base for one, base in zip(scores, bases, strict=True)
        ]
        kept = drop_smallest(np.concatenate(scores), removed, np.concatenate(whole))
        expected = np.split(kept, np.cumsum([one.size for one in scores])[:-1])
    else:
        removed = [random_count(rng, one) for one in scores]
        expected = [drop_smallest(*each) for each in zip(scores, removed, bases, strict=True)]
    with brackets_shifted(rng.choice([0.0, 0.0, 0.0, -10.0, -3.5, 2.5, 3.0, 3.5, 10.0])):
        masks, nonfinite = ops.threshold([weight.to(device) for weight in weights], removed, **options)
    assert nonfinite.tolist() == [0] * len(weights)
    for index, (mask, want) in enumerate(zip(masks, expected, strict=True)):
        assert np.array_equal(mask.cpu().numpy(), want), f"mask {index} of {len(masks)}, {removed} removed, {options}"


def check_group_masks(rng: np.random.Generator, weight: Tensor, device: torch.device) -> None:
    """One call for rows, or for groups of a few in each row."""
    columns = int(rng.integers(1, min(weight.numel(), 5000) + 1))
    weight = weight[: weight.numel() // columns * columns].view(-1, columns)
    size = int(rng.choice([4, 8, 1, 3, 16, 64, 65, 1000, columns]))
    kept = int(rng.integers(size + 1))
    (mask,), _ = ops.group_masks([weight.to(device)], size, kept)
    scores, found = weight.abs().double().numpy(), mask.cpu().numpy()
    for start in range(0, columns, size):
        part = scores[:, start : start + size]
        order = np.argsort(part, axis=1, kind="stable")
        want = np.ones(part.shape, dtype=bool)
        np.put_along_axis(want, order[:, : max(part.shape[1] - kept, 0)], False, axis=1)
        assert np.array_equal(found[:, start : start + size], want), f"columns from {start}, {kept} of {size}"


def search(seeds: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    for seed in seeds:
        rng = np.random.default_rng(seed)
        weights = random_weights(rng, dtype)
        try:
            check_threshold(rng, weights, device)
            check_group_masks(rng, weights[0], device)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_random_families_match_numpy(device, dtype):
    search(range(40), dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_random_families_match_numpy_everywhere(device, dtype):
    first = 1_000_000 * int(os.environ.get("SEED", "1"))
    search(range(first, first + 2000), dtype, device)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("large", [1.0, 1e200, 1e308])
@pytest.mark.parametrize("small", [0.0, 5e-324, 1e-300, 2.0**-903, 2.0**-321, 1e-8])
def test_threshold_parts_a_crowd_from_a_few_large_ones(device, small, large, threads):
    # Brackets as wide as the range of float64: their ends do not fit 63 bits.
    size, few = 219_349, 400
    rng = np.random.default_rng(0)
    values = np.full(size, small)
    values[rng.choice(size, few, replace=False)] = (1 + 0.79 * rng.random(few)) * large
    weight = torch.from_numpy(values)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for removed in (size - few - 1, size - few, size - few + 1, size - 1):
            (mask,), _ = ops.threshold([weight.to(device)], removed)
            assert np.array_equal(mask.cpu().numpy(), drop_smallest(np.abs(values), removed))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "ladder"), [(16_053, 20), (70_000, 100), (200_000, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threshold_where_just_what_lies_below_the_bracket_goes(dtype, size, ladder):
    # A bracket of neighbouring values that begins one above the last that goes, though probes saw that one, too.
    rng = np.random.default_rng(0)
    steps = rng.integers(ladder, size=size)
    values = np.where(rng.random(size) < 0.5, 0.5, 1 + steps * float(torch.finfo(dtype).eps))
    weight = torch.from_numpy(values).to(dtype)
    kept = (values > 0.5) & (steps > ladder // 2)
    for sigmas in np.arange(1, 4, 0.1):
        with brackets_shifted(sigmas):
            (mask,), _ = ops.threshold([weight], size - int(kept.sum()))
        assert np.array_equal(mask.numpy(), kept), f"shifted by {sigmas}"
