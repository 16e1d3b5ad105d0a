"""Weights that are hard to part, drawn at random: crowds with outliers, gaps of the whole range, ties, denormals."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def _limits(dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the exponents of the smallest denormal, the smallest normal number and the largest, in powers of two."""
    limits = torch.finfo(dtype)
    return np.log2(limits.smallest_normal * limits.eps), np.log2(limits.smallest_normal), np.log2(limits.max)


def _crowd(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    """One value, or a few neighbours of it, or a narrow band, anywhere in the range."""
    lowest, _, highest = _limits(dtype)
    value = 2.0 ** rng.uniform(lowest, highest - 1)
    kind = rng.integers(3)
    if kind == 0:
        return np.full(size, value)
    if kind == 1:
        steps = rng.geometric(rng.uniform(0.2, 1), size) - 1  # many of the first, ever fewer of the next
        return value * (1 + steps * float(torch.finfo(dtype).eps))
    return value * (1 + rng.random(size) * 2.0 ** -rng.integers(40))


def _with_outliers(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    """A crowd, and a few that lie elsewhere."""
    values = _crowd(rng, size, dtype)
    few = min(size, 1 + int(size * 10.0 ** rng.uniform(-4, -1)))
    values[rng.choice(size, few, replace=False)] = _crowd(rng, few, dtype) * (1 - rng.random(few) / 2)
    return values


def _two_crowds(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    return np.where(rng.random(size) < rng.random(), _crowd(rng, size, dtype), _crowd(rng, size, dtype))


def _many_neighbours(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    """Half of it lower, the rest a ladder of which each step is shared by several."""
    lowest, _, highest = _limits(dtype)
    ladder = 1 + rng.integers(10 ** rng.uniform(0.5, 3), size=size) * float(torch.finfo(dtype).eps)
    return np.where(rng.random(size) < 0.5, 0.5, ladder) * 2.0 ** rng.uniform(lowest + 2, highest - 2)


def _whole_range(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    lowest, _, highest = _limits(dtype)
    return 2.0 ** rng.uniform(lowest, highest, size)


def _denormals(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    return float(torch.finfo(dtype).smallest_normal) * rng.random(size) ** rng.integers(1, 9)


def _one_binade(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    _, lowest, highest = _limits(dtype)
    return 2.0 ** np.floor(rng.uniform(lowest, highest - 1)) * (1 + rng.random(size))


def _mostly_zeros(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    return np.where(rng.random(size) < rng.random(), 0.0, _with_outliers(rng, size, dtype))


def _sorted(rng: np.random.Generator, size: int, dtype: torch.dtype) -> np.ndarray:
    """What neighbours have is nothing that others have: samples mislead."""
    return np.sort(_with_outliers(rng, size, dtype))[:: rng.choice([-1, 1])]


FAMILIES: dict[str, Callable[[np.random.Generator, int, torch.dtype], np.ndarray]] = {
    "all equal": lambda rng, size, dtype: np.full(size, _crowd(rng, 1, dtype)[0]),
    "crowd": _crowd,
    "crowd with outliers": _with_outliers,
    "two crowds": _two_crowds,
    "many neighbours": _many_neighbours,
    "whole range": _whole_range,
    "denormals": _denormals,
    "one binade": _one_binade,
    "mostly zeros": _mostly_zeros,
    "sorted": _sorted,
    "normal": lambda rng, size, dtype: rng.standard_normal(size),
}


def draw(rng: np.random.Generator, family: str, size: int, dtype: torch.dtype) -> Tensor:
    """Return a finite weight of this family, with random signs, also of its zeros."""
    values = FAMILIES[family](rng, size, dtype) if size else np.empty(0)
    signed = torch.from_numpy(values * rng.choice([-1.0, 1.0], size))
    largest = torch.finfo(dtype).max
    return signed.clamp(-largest, largest).to(dtype)
