"""What goes of weights of which one is in memory at a time: the masks of `pyprune.selection`, or pieces without any.

Weights come as functions that return them, mapped from a file. What competes in all of them is counted in one pass
(two or three for float32), and dropped in another, in the order of the list: ties too go as if all had been there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyprune import ops
from pyprune.console import listed
from pyprune.methods.allocation import Amount, limits, removed_count
from pyprune.methods.importance import normalized, without_signs
from pyprune.methods.layout import Layout
from pyprune.methods.method import Method
from pyprune.methods.name_rules import by_name
from pyprune.methods.unit_groups import Member, UnitGroup, Weight, spread_units
from pyprune.ops.cut import find_cut
from pyprune.ops.drop import kept_by
from pyprune.selection.choose_units import choose_units, ratios_of
from pyprune.selection.limits import capped_counts
from pyprune.selection.scores import is_magnitude_of_elements, keys, unit_scores

_PIECE = 1 << 20  # elements


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is read when it is needed, and what is known of it before."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    layout: Layout
    statistic: Callable[[], Tensor] | None = None

    def group(self, method: Method, values: Tensor | None = None) -> UnitGroup:
        """Return its units; without values, only of their number and size."""
        if values is None:
            values = torch.empty(self.shape, dtype=self.dtype, device="meta")
        statistic = None if self.statistic is None or values.is_meta else self.statistic()
        weight = Weight(self.name, values, self.layout, None, statistic, (self.name,))
        return UnitGroup(self.name, (Member(weight, method.granularity.block_of(weight)),))


class Choice:
    """What a method removes of stored weights; found once, then asked for each weight.

    Args:
        method: how, within scope model, tensor, row or n_of_m.
        amount: how much, from `pyprune.methods.method.check_amount`.
        weights: in the order in which ties go.
        seen: is told of each weight that is read to find what goes.
        ordered: whether weights will be asked for in their order; otherwise they are read once more to count ties.

    Raises:
        ValueError: for weights or scores that are not finite, with their names, or limits that cannot be met.
    """

    def __init__(
        self,
        method: Method,
        amount: Amount,
        weights: Sequence[StoredWeight],
        seen: Callable[[str], object] = lambda name: None,
        *,
        ordered: bool = True,
    ) -> None:
        self.method, self.amount, self.weights, self._seen = method, amount, list(weights), seen
        self._next = 0 if ordered else -1
        self.by_name = {weight.name: number for number, weight in enumerate(weights)}
        self.removed: int | None = None  # units in all, where all compete
        self.score: float | None = None  # at the cut
        self._cut: ops.Cut | None = None
        self._before: ops.Cut | None = None  # that of the weight that was asked for last
        self._scales: list[float] | None = None
        self._counts: list[int] | None = None
        self._ratios: Mapping[str, float] | None = None
        groups = [weight.group(method) for weight in weights]
        if method.scope.name == "model":
            self._find(groups)
        elif method.scope.weights_compete:
            raise ValueError(f"scope {method.scope.name} is for models in memory; give model, tensor, row or n_of_m")
        else:
            self._ratios = ratios_of(method, amount, groups)

    @property
    def is_cut(self) -> bool:
        """Whether pieces are made one by one, each without the others."""
        return self._cut is not None

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the pruned weight in pieces, in the order of the flat index; the last one may be asked for again."""
        number = self.by_name[name]
        weight = self.weights[number]
        values = weight.read()
        if self._cut is None:
            mask = self._mask(number, values)
            for piece, part in zip(
                torch.split(values.view(-1), _PIECE), torch.split(mask.reshape(-1), _PIECE), strict=True
            ):
                yield ops.mask_weight(piece, part)
            return
        if number == self._next:
            self._before = self._cut
            self._next += 1
        elif number != self._next - 1:
            raise ValueError(
                f"{name} is asked for before {self.weights[self._next].name}, and ties go in their order"
            )
        scales = None if self._scales is None else torch.tensor([self._scales[number]], dtype=torch.float64)
        cut = self._before
        for piece in torch.split(values.view(-1), _PIECE):
            dropped = piece.clone()
            assert cut is not None
            self._cut = cut = ops.drop([dropped], cut, scales=scales)
            yield dropped

    def _mask(self, number: int, values: Tensor) -> Tensor:
        weight = self.weights[number]
        group = weight.group(self.method, values)
        amount, method = self.amount, self.method
        if self._counts is not None:
            # Which of its own units go, as many as were found, is a choice within the weight.
            lamp = is_magnitude_of_elements(method) and method.importance.normalize == "lamp"
            units, scale = (values, None) if lamp else self._scores(group)  # it orders like the magnitude, but rounds
            scales = None if scale is None else torch.tensor([scale], dtype=torch.float64)
            [mask], _ = ops.threshold([units], [self._counts[number]], scales=scales)
            if method.granularity.name == "element":
                return mask
            spread = [torch.empty(weight.shape, dtype=torch.bool)]
            spread_units([group], [mask], spread)
            return spread[0]
        if self._ratios is not None:
            amount = replace(amount, ratio=self._ratios[weight.name], allocation="uniform")
        selected = choose_units(method, [group], amount)
        _check_finite([weight.name], selected.nonfinite.tolist(), method)
        return selected.masks[0]

    def _find(self, groups: Sequence[UnitGroup]) -> None:
        sizes = [torch.Size(group.unit_shape).numel() for group in groups]
        assert isinstance(self.amount.ratio, float)
        self.removed = removed_count(sum(sizes), self.amount.ratio)
        if self._is_direct() and not self.amount.is_capped and self._next == 0:
            self._scales = None if self.method.importance.normalize == "none" else []
            self._cut = self._cut_of(range(len(self.weights)), self.removed)
            return
        if not self.amount.is_capped:
            self._counts = self._count([True] * len(sizes), self.removed)
            return
        low, high = self._bounds(sizes)
        shares = capped_counts(self.removed, low, high, self._count)
        assert shares is not None
        self._counts = shares[0]

    def _is_direct(self) -> bool:
        """Whether kernels read the weights themselves, and multiply them with a number at most."""
        rule = self.method.importance
        scaled = rule.power == 1 and rule.normalize in ("l2", "mean")
        return is_magnitude_of_elements(self.method) and (scaled or rule.normalize == "none")

    def _count(self, chosen: Sequence[bool], removed: int) -> list[int]:
        """Return how many units each weight loses if these compete."""
        competing = [number for number, here in enumerate(chosen) if here]
        self._scales = []
        cut = self._cut_of(competing, removed)
        counts = [0] * len(chosen)
        for place, number in enumerate(competing):
            units, _ = self._scored(number)
            mask, cut = kept_by(cut, units, self._scales[place] if self._scales else None)
            counts[number] = int(ops.count_zeros([mask]))
        return counts

    def _cut_of(self, numbers: Sequence[int], removed: int) -> ops.Cut:
        """Find the cut through the units of some weights; their scales are found where they are read first."""
        scales = self._scales

        def read(place: int) -> Tensor:
            units, scale = self._scored(numbers[place])
            if scales is not None and len(scales) == place:
                scales.append(1.0 if scale is None else scale)
            self._seen(self.weights[numbers[place]].name)
            return units

        found = find_cut(read, [self._dtype(number) for number in numbers], removed, scales)
        _check_finite([self.weights[number].name for number in numbers], found.nonfinite, self.method)
        self.score = found.score
        return found

    def _dtype(self, number: int) -> torch.dtype:
        weight = self.weights[number]
        if self._is_signed():
            return torch.float64
        return weight.dtype if self._is_direct() or weight.dtype is torch.float64 else torch.float32

    def _is_signed(self) -> bool:
        return self.method.importance.signed or self.method.importance.normalize == "gaussian"

    def _scored(self, number: int) -> tuple[Tensor, float | None]:
        weight = self.weights[number]
        units, scale = self._scores(weight.group(self.method, weight.read()))
        return units.to(self._dtype(number)), scale

    def _scores(self, group: UnitGroup) -> tuple[Tensor, float | None]:
        """Return what orders like the scores of a weight, and what they are multiplied with."""
        if self._is_signed():
            # All weights alike, whether there is a score below zero in this one or not.
            [scores] = unit_scores(self.method, [group])
            return without_signs([normalized(scores, self.method.importance.normalize).float()])[0], None
        key = keys(self.method, [group], compared=True)
        units = key.tensors[0]
        if key.normalize:
            return units, float(ops.inverse_norms([units]))
        return units, None if key.scales is None else float(key.scales)

    def _bounds(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        names = [(weight.name,) for weight in self.weights]
        low = by_name(self.amount.min_ratio, names, 0.0, "min_ratio")
        high = by_name(self.amount.max_ratio, names, 1.0, "max_ratio")
        bounds = [limits(*one) for one in zip(sizes, low, high, strict=True)]
        least, most = [least for least, _ in bounds], [most for _, most in bounds]
        assert self.removed is not None
        if not sum(least) <= self.removed <= sum(most) or any(a > b for a, b in bounds):
            raise ValueError(
                f"{self.removed} of {sum(sizes)} units are to go, but min_ratio and max_ratio allow {sum(least)} to "
                f"{sum(most)}; give another ratio, or other limits"
            )
        return least, most


def _check_finite(names: Sequence[str], nonfinite: Sequence[int], method: Method) -> None:
    bad = [f"{count} in {name}" for name, count in zip(names, nonfinite, strict=False) if count]
    if bad:
        what = "weights" if method.importance.power is not None else f"scores by {method.importance.name}"
        raise ValueError(f"NaN or infinite {what}: {listed(bad)}. Repair them, or leave them out with --exclude")
