"""Which units stay: the contests of each scope, decided by the kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyprune import ops
from pyprune.allocation import Amount, by_name, erk, limits, removed_in_all
from pyprune.capped import capped_threshold
from pyprune.competitors import Competitor, reduce_units, spread_units
from pyprune.lamp import lamp_removed
from pyprune.methods import Method
from pyprune.scope import group_of
from pyprune.scores import is_magnitude_of_elements, keys, keys_in_rows


@dataclass(frozen=True)
class Outcome:
    """What stays: a mask (True = kept) for each member of each competitor, in order.

    ``nonfinite`` counts the NaN and infinite scores of each competitor; if there are any, the masks mean nothing.
    Reading it is the only synchronisation with the device that most contests have.
    """

    masks: list[Tensor]
    nonfinite: Tensor


@torch.no_grad()
def hold_contest(
    method: Method, competitors: Sequence[Competitor], amount: Amount, masks: Sequence[Tensor] | None = None
) -> Outcome:
    """Choose the units of the competitors that stay.

    Args:
        method: how.
        competitors: whose units; on one device where they compete with each other.
        amount: how much goes, from `pyprune.methods.check_amount`.
        masks: bool tensors to write, one for each member of each competitor, which share no memory with bases; new
            ones if None.

    Raises:
        TypeError, ValueError: for an amount, a rule or scores that do not fit these weights.

    Example:
        >>> from pyprune.competitors import Member, Weight
        >>> from pyprune.methods import METHODS, PruneMode
        >>> weights = [Weight("a", torch.tensor([3.0, -1.0])), Weight("b", torch.tensor([0.1, 0.2]))]
        >>> competitors = [Competitor(weight.name, (Member(weight, (1,)),)) for weight in weights]
        >>> outcome = hold_contest(METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL], competitors, Amount(0.5))
        >>> [mask.tolist() for mask in outcome.masks]
        [[True, False], [False, True]]
    """
    bases = _unit_bases(method, competitors) if amount.has_bases else [None] * len(competitors)
    of_elements = method.granularity.name == "element"
    units = _HOLD[method.scope.name](_Contest(method, competitors, bases, amount, masks if of_elements else None))
    if of_elements:
        return units
    members = [member for competitor in competitors for member in competitor.members]
    if masks is None:
        masks = [torch.empty_like(member.weight.values, dtype=torch.bool) for member in members]
    spread_units(competitors, units.masks, masks)
    for member, mask in zip(members, masks, strict=True):
        if amount.has_bases and member.weight.base is not None:
            mask &= member.weight.base  # a unit that is kept may have lost elements before
    return Outcome(list(masks), units.nonfinite)


def ratios_of(method: Method, amount: Amount, competitors: Sequence[Competitor]) -> dict[str, float] | None:
    """Return the ratio of each competitor by its name, if they may have different ones and do not compete.

    Raises:
        ValueError: if a ratio is for a name that there is not.
    """
    if method.scope.name not in ("tensor", "row") or amount.ratio is None:
        return None
    if isinstance(amount.ratio, Mapping):
        ratios = by_name(amount.ratio, [competitor.names for competitor in competitors], 0.0)
    elif amount.allocation == "erk":
        ratios = erk([tuple(competitor.weight.values.shape) for competitor in competitors], amount.ratio)
    else:
        return None
    return dict(zip([competitor.name for competitor in competitors], ratios, strict=True))


@dataclass(frozen=True)
class _Contest:
    """What competes; the outcome has a mask of units for each competitor."""

    method: Method
    competitors: Sequence[Competitor]
    bases: Sequence[Tensor | None]  # of units
    amount: Amount
    masks: Sequence[Tensor] | None = None  # to write; new ones if None

    @property
    def names(self) -> list[tuple[str, ...]]:
        return [competitor.names for competitor in self.competitors]

    @property
    def sizes(self) -> list[int]:
        return [torch.Size(competitor.unit_shape).numel() for competitor in self.competitors]

    @property
    def known_bases(self) -> Sequence[Tensor | None] | None:
        return self.bases if any(base is not None for base in self.bases) else None

    def subset(self, chosen: Sequence[int]) -> "_Contest":
        return replace(
            self,
            competitors=[self.competitors[i] for i in chosen],
            bases=[self.bases[i] for i in chosen],
            masks=None if self.masks is None else [self.masks[i] for i in chosen],
        )

    def ratios(self) -> list[float]:
        """Return the ratio of each competitor."""
        known = ratios_of(self.method, self.amount, self.competitors)
        assert known is not None or isinstance(self.amount.ratio, float)
        return [self.amount.ratio if known is None else known[c.name] for c in self.competitors]  # type: ignore[misc]

    def dropped(self) -> list[int]:
        """Return how many units of each competitor are pruned already."""
        there = [(i, base) for i, base in enumerate(self.bases) if base is not None]
        counts = [0] * len(self.bases)
        if there:
            for (i, _), count in zip(there, ops.count_zeros([base for _, base in there]).tolist(), strict=True):
                counts[i] = count
        return counts


def _among_all(contest: _Contest) -> Outcome:
    method, amount, sizes, dropped = contest.method, contest.amount, contest.sizes, contest.dropped()
    assert isinstance(amount.ratio, float)
    removed = removed_in_all(sum(sizes), sum(dropped), amount, amount.ratio)
    bases = contest.known_bases
    is_lamp = method.importance.normalize == "lamp" and is_magnitude_of_elements(method)
    if is_lamp and method.importance.power == 1 and bases is None and not amount.is_capped:
        # Within a weight LAMP orders like |w|, so the weights' counts are all there is to find.
        weights = [competitor.weight.values for competitor in contest.competitors]
        finite = bool(ops.norms(weights).isfinite().all())
        return Outcome(*ops.threshold(weights, lamp_removed(weights, removed) if finite else 0, masks=contest.masks))
    key = keys(method, contest.competitors, compared=True)
    if not amount.is_capped:
        return Outcome(
            *ops.threshold(
                key.tensors,
                removed,
                scales=key.scales,
                normalize=key.normalize,
                bases=bases,
                masks=contest.masks,
            )
        )
    bounds = _bounds(contest, sizes, dropped, removed)
    return Outcome(
        *capped_threshold(
            key.tensors,
            removed,
            least=[least for least, _ in bounds],
            most=[most for _, most in bounds],
            scales=key.scales,
            normalize=key.normalize,
            bases=bases,
            masks=contest.masks,
        )
    )


def _bounds(contest: _Contest, sizes: Sequence[int], dropped: Sequence[int], removed: int) -> list[tuple[int, int]]:
    """Return how many units of each competitor must go at least, and may at most."""
    low = by_name(contest.amount.min_ratio, contest.names, 0.0)
    high = by_name(contest.amount.max_ratio, contest.names, 1.0)
    bounds = []
    for (name, *_), size, gone, min_ratio, max_ratio in zip(contest.names, sizes, dropped, low, high, strict=True):
        least, most = limits(size, min_ratio, max_ratio)
        if least > most:
            raise ValueError(
                f"no number of the {size} units of {name} is at least min_ratio {min_ratio} and at most max_ratio "
                f"{max_ratio} of them; give limits further apart"
            )
        # What was pruned before stays so, whatever the limits say.
        bounds.append((max(least, gone), max(most, gone)))
    fewest, all_most = sum(least for least, _ in bounds), sum(most for _, most in bounds)
    if not fewest <= removed <= all_most:
        raise ValueError(
            f"{removed} of {sum(sizes)} units are to go, but min_ratio and max_ratio allow {fewest} to {all_most}; "
            "give another ratio, or other limits"
        )
    return bounds


def _in_groups(contest: _Contest) -> Outcome:
    amount = contest.amount
    assert amount.ratio is not None
    sets: dict[str, list[int]] = {}
    for i, names in enumerate(contest.names):
        sets.setdefault(group_of(contest.method.scope, names) or "", []).append(i)
    # Rules are about all weights; each group gets the numbers of its own.
    low = by_name(amount.min_ratio, contest.names, 0.0)
    high = by_name(amount.max_ratio, contest.names, 1.0)
    ratios = by_name(amount.ratio, list(sets), 0.0)
    masks: dict[int, Tensor] = {}
    nonfinite: dict[int, Tensor] = {}
    for chosen, ratio in zip(sets.values(), ratios, strict=True):
        part = contest.subset(chosen)
        own = replace(amount, ratio=ratio)
        if amount.is_capped:
            called = [competitor.name for competitor in part.competitors]
            own = replace(
                own,
                min_ratio=dict(zip(called, [low[i] for i in chosen], strict=True)),
                max_ratio=dict(zip(called, [high[i] for i in chosen], strict=True)),
            )
        outcome = _among_all(replace(part, amount=own))
        masks.update(zip(chosen, outcome.masks, strict=True))
        nonfinite.update(zip(chosen, outcome.nonfinite, strict=True))
    order = range(len(contest.competitors))
    return Outcome([masks[i] for i in order], torch.stack([nonfinite[i] for i in order]))


def _by_tensor(contest: _Contest) -> Outcome:
    removed = [
        removed_in_all(size, dropped, contest.amount, ratio)
        for size, ratio, dropped in zip(contest.sizes, contest.ratios(), contest.dropped(), strict=True)
    ]
    key = keys(contest.method, contest.competitors, compared=False)
    return Outcome(*ops.threshold(key.tensors, removed, bases=contest.known_bases, masks=contest.masks))


def _by_row(contest: _Contest) -> Outcome:
    sizes, kept = [], []
    for competitor, base, ratio in zip(contest.competitors, contest.bases, contest.ratios(), strict=True):
        shape = competitor.unit_shape
        columns = torch.Size(shape).numel() // max(1, shape[competitor.weight.out_dim] if len(shape) > 1 else 1)
        left = columns if base is None else _left_in_rows(base, competitor)
        sizes.append(max(1, columns))
        kept.append(columns - removed_in_all(columns, columns - left, contest.amount, ratio))
    return _in_rows(contest, sizes, kept, neighbours_are_inputs=False)


def _left_in_rows(base: Tensor, competitor: Competitor) -> int:
    left = _outputs_first(base, competitor).flatten(1).sum(1) if base.dim() > 1 else base.sum().reshape(1)
    if left.numel() and left.min() != left.max():
        raise ValueError(
            f"the rows of {competitor.name} have from {int(left.min())} to {int(left.max())} units left; to lose "
            "more within scope row they need equally many: use scope.tensor(), or choose among all units"
        )
    return int(left.max()) if left.numel() else 0


def _n_of_m(contest: _Contest) -> Outcome:
    count, scope = len(contest.competitors), contest.method.scope
    return _in_rows(contest, [scope.of] * count, [scope.keep] * count, neighbours_are_inputs=True)


def _outputs_first(tensor: Tensor, competitor: Competitor) -> Tensor:
    return tensor.movedim(competitor.weight.out_dim, 0)


def _in_rows(contest: _Contest, sizes: list[int], kept: list[int], *, neighbours_are_inputs: bool) -> Outcome:
    """Keep ``kept`` of each ``sizes`` neighbours of a row: all units of an output, or only its input channels."""

    def in_rows(tensor: Tensor, competitor: Competitor) -> Tensor:
        if tensor.dim() < 2:
            return tensor.reshape(-1)
        return (
            tensor.movedim(competitor.weight.in_dim, -1)
            if neighbours_are_inputs
            else _outputs_first(tensor, competitor)
        )

    def per_column(factor: Tensor, competitor: Competitor) -> Tensor:
        shape = list(competitor.weight.values.shape)
        if neighbours_are_inputs or len(shape) < 2:
            return factor.flatten()
        shape[competitor.weight.out_dim] = 1
        return _outputs_first(factor.expand(shape), competitor).flatten()

    pairs = contest.competitors
    key = keys_in_rows(contest.method, pairs)
    masks = contest.masks or [torch.empty_like(tensor, dtype=torch.bool) for tensor in key.tensors]
    views = [in_rows(tensor, competitor) for tensor, competitor in zip(key.tensors, pairs, strict=True)]
    factors = [
        None if f is None else per_column(f, c)
        for f, c in zip(key.factors or [None] * len(pairs), pairs, strict=True)
    ]
    bases = [None if base is None else in_rows(base, c) for base, c in zip(contest.bases, pairs, strict=True)]
    _, nonfinite = ops.group_masks(
        views,
        sizes,
        kept,
        row_dims=[view.dim() - 1 if neighbours_are_inputs else min(1, view.dim() - 1) for view in views],
        factors=factors,
        bases=bases,
        masks=[in_rows(mask, competitor) for mask, competitor in zip(masks, pairs, strict=True)],
    )
    return Outcome(list(masks), nonfinite)


_HOLD: Mapping[str, Callable[[_Contest], Outcome]] = {
    "model": _among_all,
    "tensor": _by_tensor,
    "row": _by_row,
    "n_of_m": _n_of_m,
    "group": _in_groups,
}


def _unit_bases(method: Method, competitors: Sequence[Competitor]) -> list[Tensor | None]:
    """Say which units are still kept, in part at least; None for competitors that carry no masks."""
    if method.granularity.name == "element":
        return [competitor.weight.base for competitor in competitors]
    masked = [c for c in competitors if any(member.weight.base is not None for member in c.members)]
    tensors = [
        torch.ones_like(member.weight.values, dtype=torch.bool) if member.weight.base is None else member.weight.base
        for competitor in masked
        for member in competitor.members
    ]
    kept = dict(zip(map(id, masked), reduce_units(masked, tensors, None, "max"), strict=True))
    return [kept[id(competitor)] > 0 if id(competitor) in kept else None for competitor in competitors]
