"""Coupled units in pure numbers: one score of many, in which order units go, and how many of each group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyprune.methods.granularity import Coupled, Granularity, RatioOf
from pyprune.methods.unit_groups import Reduction

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def combined(scores: Sequence[Tensor], how: Coupled) -> Tensor:
    """Return one score for each unit of a group.

    Args:
        scores: of the units in each weight.
        how: with ``normalize`` and ``reduce``.

    Example:
        >>> combined([torch.tensor([1.0, 3.0]), torch.tensor([10.0, 10.0])], Coupled()).tolist()
        [0.75, 1.25]
    """
    rows = torch.stack([score.double() for score in scores])
    if how.normalize is not None:
        whole = _REDUCED[how.normalize](rows, 1)[:, None]
        rows = torch.where(whole == 0, 0, rows / whole)  # what is zero everywhere says nothing
    return _REDUCED[how.reduce](rows, 0)


_REDUCED: Mapping[Reduction, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda rows, dim: rows.mean(dim),
    "sum": lambda rows, dim: rows.sum(dim),
    "max": lambda rows, dim: rows.amax(dim),
}


@dataclass(frozen=True, eq=False)
class Pool:
    """Groups whose units compete with each other.

    Args:
        groups: their numbers.
        scores: of the units of each; -inf for what is gone already.
        least, most: how many units of each go at least, and at most.
    """

    groups: Sequence[int]
    scores: Sequence[Numbers]
    least: Sequence[int]
    most: Sequence[int]

    @property
    def units(self) -> int:
        """How many units there are in all."""
        return sum(map(len, self.scores))

    def order(self) -> Ints:
        """Return the number of the group of each unit that may go, in the order in which they do.

        The lowest score goes first, of equals that in the first group, and there the first. What must go goes before
        all else. A group loses its units in the order of their scores, so how many it loses says which.

        Example:
            >>> pool = Pool([4, 7], [np.array([3.0, 1.0]), np.array([2.0, 0.0])], [0, 0], [1, 2])
            >>> pool.order().tolist()
            [7, 4, 7]
        """
        columns = []
        for group, scores, least, most in zip(self.groups, self.scores, self.least, self.most, strict=True):
            ordered = np.sort(scores, kind="stable")[:most]
            forced = np.arange(len(ordered)) < least
            columns.append(np.stack([np.full(len(ordered), group), ordered, ~forced]))
        group_of, scored, free = np.concatenate(columns, 1) if columns else np.empty((3, 0))
        return group_of[np.lexsort((group_of, scored, free))].astype(np.int64)


def lowest(scores: Numbers, count: int) -> Flags:
    """Return which units are kept when so many with the lowest scores go; of equals the first.

    Example:
        >>> lowest(np.array([2.0, 1.0, 1.0]), 1).tolist()
        [True, False, True]
    """
    kept = np.ones(len(scores), bool)
    kept[np.argsort(scores, kind="stable")[:count]] = False
    return kept


def rounded(size: int, removed: int, multiple: int) -> int:
    """Return how many of the units go, so that a multiple remains, and no more than were asked for.

    Example:
        >>> [rounded(20, removed, 8) for removed in (3, 4, 11, 12, 19)]
        [0, 4, 4, 12, 12]
    """
    kept = size - removed
    return size - min(size, -(-kept // multiple) * multiple)


def merged(pools: Sequence[Pool]) -> Ints:
    """Return the groups of all units that may go, in an order in which every pool loses about the same share.

    Example:
        >>> one = Pool([0], [np.arange(4.0)], [0], [3])
        >>> merged([one, Pool([1], [np.arange(2.0)], [0], [1])]).tolist()
        [0, 1, 0, 0]
    """
    orders = [pool.order() for pool in pools]
    shares = [(np.arange(len(order)) + 0.5) / pool.units for pool, order in zip(pools, orders, strict=True)]
    which = np.argsort(np.concatenate(shares), kind="stable") if shares else np.empty(0, np.int64)
    return np.concatenate(orders)[which] if orders else which


def fewest(count: int, costs_too_much: Callable[[int], bool]) -> int | None:
    """Return the smallest number, up to ``count``, that does not cost too much; None if there is none.

    Example:
        >>> fewest(10, lambda number: number < 7), fewest(10, lambda number: True)
        (7, None)
    """
    if costs_too_much(count):
        return None
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if costs_too_much(middle):
            low = middle + 1
        else:
            high = middle
    return low


def counting(units: Granularity, ratio_of: RatioOf) -> Granularity:
    """Return the same coupled units, of which a ratio is another one.

    Example:
        >>> from pyprune.methods.granularity import coupled
        >>> counting(coupled(), "macs").coupled.ratio_of
        'macs'
    """
    assert units.coupled is not None
    return replace(units, coupled=replace(units.coupled, ratio_of=ratio_of))
