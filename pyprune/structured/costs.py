"""What a model costs, parameters and multiply-accumulates, when only some of its units are kept."""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from pyprune.structured.coordinates import Coords, Flags
from pyprune.structured.seen import Product, Trace


class Costs:
    """Parameters and multiply-accumulates, as they are when only some units are kept."""

    def __init__(self, seen: Trace, groups: Sequence[Coords], units: Coords) -> None:
        group_of = np.full(len(units), -1)
        rank_of = np.zeros(len(units), np.int64)
        for index, labels in enumerate(groups):
            group_of[labels] = index
            rank_of[labels] = np.arange(len(labels))
        self._tensors = [
            (
                one.tensor.numel(),
                [_Shares(units[coords], group_of, rank_of) for coords in one.coords if coords is not None],
            )
            for one in seen.tensors
            if isinstance(one.tensor, nn.Parameter)
        ]
        # Products of one shape are counted together.
        products: dict[tuple[bytes, ...], tuple[int, Product]] = {}
        for product in seen.products:
            key = tuple(coords.tobytes() for coords in product.factors)
            count = products[key][0] if key in products else 0
            products[key] = (count + product.macs, product)
        self._products = [
            (macs, [_Shares(units[coords.ravel()], group_of, rank_of) for coords in product.factors])
            for macs, product in products.values()
        ]

    def parameters(self, kept: Sequence[Flags] | None) -> int:
        """Floats in parameters."""
        return round(_total(self._tensors, kept))

    def macs(self, kept: Sequence[Flags] | None) -> int:
        """Multiply-accumulates of the passes that were traced."""
        return round(_total(self._products, kept))

    def of_one(self, index: int, units: int) -> tuple[float, float]:
        """What one of the units of a group costs on the average: parameters, and multiply-accumulates."""
        return _share_of(self._tensors, index, units), _share_of(self._products, index, units)


class _Shares:
    """How the entries of an axis spread over groups and their units."""

    def __init__(self, labels: Coords, group_of: Coords, rank_of: Coords) -> None:
        self.size = len(labels)
        own = group_of[labels]
        self.parts = {
            int(index): np.bincount(rank_of[labels[own == index]]) for index in np.unique(own[own >= 0]).tolist()
        }

    def left(self, kept: Sequence[Flags] | None) -> float:
        """Which share of the entries is left."""
        if kept is None or not self.size:
            return 1.0
        gone = 0
        for index, counts in self.parts.items():
            gone += int(counts[~kept[index][: len(counts)]].sum())
        return 1 - gone / self.size


def _total(costs: Iterable[tuple[int, list[_Shares]]], kept: Sequence[Flags] | None) -> float:
    total = 0.0
    for cost, shares in costs:
        left = 1.0
        for share in shares:
            left *= share.left(kept)
        total += cost * left
    return total


def _share_of(costs: Iterable[tuple[int, list[_Shares]]], index: int, units: int) -> float:
    total = 0.0
    for cost, shares in costs:
        left = 1.0
        for share in shares:
            if index in share.parts:
                left *= 1 - int(share.parts[index].sum()) / units / share.size
        total += cost * (1 - left)
    return total
