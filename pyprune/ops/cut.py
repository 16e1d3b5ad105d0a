"""Where a threshold lies that drops exactly the smallest scores of many weights, without masks of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyprune.checks import check_count
from pyprune.ops._keys import Integers, Keys, largest_key, magnitude_bits
from pyprune.ops._library import WEIGHT_DTYPES, check_scales, check_tensors, register_fake

# At the first look half types have a counter for each magnitude; at later ones, which see few, there may be more.
_FIRST_BITS, _LATER_BITS = 15, 18
_MOST_COUNTERS = 1 << 20


@dataclass(frozen=True)
class Cut:
    """What goes: all scores below a key, and the first of those that are equal to it.

    Attributes:
        key: the bits of that score in float32, or in float64 if it is ``wide``; -1 if nothing goes.
        ties: how many with just this score go, the lowest (tensor, flat index) first.
        wide: whether scores are compared in float64, because one of the weights is.
        nonfinite: how many elements of each weight are NaN or infinite. If any are, the rest means nothing.
    """

    key: int
    ties: int
    wide: bool = False
    nonfinite: tuple[int, ...] = ()

    @property
    def score(self) -> float:
        """The score at the cut; what is smaller goes."""
        if self.key < 0:
            return 0.0
        return float(np.array(self.key, np.int64 if self.wide else np.int32).view("f8" if self.wide else "f4"))


@torch.no_grad()
def cut(weights: Sequence[Tensor], removed: int, *, scales: Tensor | None = None) -> Cut:
    """Find what `threshold` would drop: exactly ``removed`` of the smallest scores |w| or |w| * scale of all weights.

    Nothing is allocated but counters, so weights may be mapped files that are larger than memory. Half types are read
    once, float32 twice or three times; what was found is applied by `drop`.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device, any strides.
        removed: how many elements go in all.
        scales: float64, [len(weights)], positive and finite.

    Raises:
        TypeError, ValueError: as `threshold` does.

    Example:
        >>> found = cut([torch.tensor([3.0, -1.0]), torch.tensor([2.0, 1.0, 0.5])], removed=2)
        >>> found.score, found.ties
        (1.0, 1)
    """
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    total = sum(weight.numel() for weight in weights)
    removed = check_count("removed", removed, most=total, what=f"a number of the {total} elements")
    if scales is not None:
        check_scales(scales, weights)
    factors = None if scales is None else scales.tolist()
    return find_cut(weights.__getitem__, [weight.dtype for weight in weights], removed, factors)


def find_cut(
    read: Callable[[int], Tensor],
    dtypes: Sequence[torch.dtype],
    removed: int,
    scales: Sequence[float] | None = None,
) -> Cut:
    """Find a cut through weights, or scores, of which one is there at a time.

    Args:
        read: returns a tensor by its number, the same at each call.
        dtypes: of the tensors.
        removed: how many elements go in all; not more than there are.
        scales: what scores are multiplied with, one for each tensor, which is there once the tensor was read.
    """
    wide = torch.float64 in dtypes

    def up_to(bound: int) -> int:
        """Count the scores whose key is not above a bound."""
        counted = 0
        for i, dtype in enumerate(dtypes):
            tensor = read(i)
            last = Keys(dtype, None if scales is None else scales[i], wide).bits_up_to(bound)
            counted += magnitude_counts(tensor, last + 1, 0, 1)[1]
        return counted

    low, high = -1, largest_key(wide)  # the key is above low, and up to high
    nonfinite: list[int] = []
    while True:
        counters, below = _Counters(), 0
        for i, dtype in enumerate(dtypes):
            tensor = read(i)
            key = Keys(dtype, None if scales is None else scales[i], wide)
            first, last, bits = 0, 2**key.magnitude_bits - 1, _FIRST_BITS
            if high != largest_key(wide):
                first, last, bits = key.bits_up_to(low) + 1, key.bits_up_to(high), _LATER_BITS
            shift = max(0, (last - first).bit_length() - bits)
            counts, under = magnitude_counts(tensor, first, shift, max(1, ((last - first) >> shift) + 1))
            below += under
            if first > last:
                continue
            if first == 0 and last > key.infinity:
                behind = key.infinity >> shift
                nonfinite.append(int(counts[behind:].sum()))
                counts = counts[:behind]
            places = counts.nonzero()[0]
            begin = first + (places << shift)
            counters.add(key.of(begin), key.of(begin + ((1 << shift) - 1)), counts[places])
        if any(nonfinite) or removed == 0:
            return Cut(-1, 0, wide, tuple(nonfinite))
        found_low, found_high = counters.between(removed - below)
        found_high = min(found_high, high)
        if counters.are_exact(found_low, found_high):
            return Cut(found_low, removed - below - counters.below(found_low), wide, tuple(nonfinite))
        width = high - low
        low, high = found_low - 1, found_high
        if high - low > width // 2:
            # Scores that leave the range of floats crowd at its ends, whatever their magnitudes.
            middle = low + (high - low) // 2
            low, high = (low, middle) if up_to(middle) >= removed else (middle, high)
        if high - low == 1:
            return Cut(high, removed - up_to(low), wide, tuple(nonfinite))


class _Counters:
    """How many scores lie between two keys, both included, for as many pairs as there are; in bounded memory."""

    def __init__(self) -> None:
        self.parts: list[tuple[Integers, Integers, Integers]] = []
        self.size = 0

    def add(self, first: Integers, last: Integers, counts: Integers) -> None:
        self.parts.append((first, last, counts))
        self.size += len(first)
        if self.size > _MOST_COUNTERS:
            self._merge()

    def between(self, rank: int) -> tuple[int, int]:
        """Return the least and the largest key that the rank-th smallest score (from 1) can have."""
        first, last, counts = self._joined()
        ends = []
        for keys in (first, last):
            order = np.argsort(keys, kind="stable")
            ends.append(int(keys[order[np.searchsorted(np.cumsum(counts[order]), rank)]]))
        return ends[0], ends[1]

    def below(self, key: int) -> int:
        _, last, counts = self._joined()
        return int(counts[last < key].sum())

    def are_exact(self, low: int, high: int) -> bool:
        first, last, _ = self._joined()
        inside = (first <= high) & (last >= low)
        return bool((first[inside] == last[inside]).all())

    def _joined(self) -> tuple[Integers, Integers, Integers]:
        if len(self.parts) > 1:
            columns = zip(*self.parts, strict=True)
            first, last, counts = (np.concatenate(column) for column in columns)
            self.parts = [(first, last, counts)]
        return self.parts[0]

    def _merge(self) -> None:
        """Make one of those that begin alike, and of neighbours if there still are too many."""
        first, last, counts = self._joined()
        shift = 0
        while True:
            groups, places = np.unique(first >> shift, return_inverse=True)
            if len(groups) <= _MOST_COUNTERS // 2:
                break
            shift += 1
        order = np.argsort(places, kind="stable")
        starts = np.searchsorted(places[order], np.arange(len(groups)))
        self.parts = [
            (
                np.minimum.reduceat(first[order], starts),
                np.maximum.reduceat(last[order], starts),
                np.add.reduceat(counts[order], starts),
            )
        ]
        self.size = len(groups)


def magnitude_counts(tensor: Tensor, low: int, shift: int, bins: int) -> tuple[Integers, int]:
    """Return how many elements have bits of |w| in each of so many intervals of 2^shift, and how many below ``low``.

    Example:
        >>> counts, below = magnitude_counts(torch.tensor([0.0, -0.0, 1.0]), 0, 16, 1 << 15)
        >>> counts.nonzero()[0].tolist(), below
        ([0, 16256], 0)
    """
    if tensor.is_cuda:
        bits = magnitude_bits(tensor).long()
        places = (bits - low) >> shift
        counts = torch.bincount(places[(places >= 0) & (places < bins)], minlength=bins).cpu().numpy()
        return counts, int((bits < low).sum())
    counts = torch.ops.pyprune.magnitude_counts(tensor.detach(), low, shift, bins).numpy()
    return counts[:-1], int(counts[-1])


def _fake(weight: Tensor, low: int, shift: int, bins: int) -> Tensor:
    return weight.new_empty(bins + 1, dtype=torch.int64)


register_fake("pyprune::magnitude_counts", _fake)
