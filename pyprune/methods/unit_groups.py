"""Unit groups: the units of one weight, or of several that lose them together, in pure tensors and numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.layout import LINEAR, Layout

Reduction = Literal["sum", "mean", "max"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight in plain tensors: its values, what its dimensions count, and what is known of it.

    Args:
        name: its name in the dense model.
        values: the raw weight.
        layout: which of its dimensions count outputs, inputs and groups.
        base: bool tensor of the same shape, False where the weight is pruned already and stays so; or None.
        statistic: what calibration measured for it, or None.
        names: all its names, if it is tied.
    """

    name: str
    values: Tensor
    layout: Layout = LINEAR
    base: Tensor | None = None
    statistic: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def out_dim(self) -> int:
        """Which dimension counts output channels, of one group if it is not the first; raise if it cannot be told."""
        return self._known(self.layout.outputs, "outputs")

    @property
    def in_dim(self) -> int:
        """Which dimension counts input channels, of one group if it is not the first; raise if it cannot be told."""
        return self._known(self.layout.inputs, "inputs")

    def _known(self, dim: int | None, what: str) -> int:
        if self.values.dim() < 2:
            return 0
        if dim is None:
            raise ValueError(
                f"which dimension of {self.name} of shape {tuple(self.values.shape)} counts {what} cannot be told: "
                f"{self.layout.problem}. Name it in ignored_scope, or remove single elements"
            )
        return dim


@dataclass(frozen=True, eq=False)
class Member:
    """A weight that units lie in. Its blocks tile it; ``parts`` projections are stacked along its outputs."""

    weight: Weight
    block: tuple[int, ...]
    parts: int = 1

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """How many blocks there are along each dimension."""
        return ops.unit_shape(self.weight.values.shape, self.block)


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are masked together: those of one weight, or heads, which have blocks in several weights."""

    name: str
    members: tuple[Member, ...]

    @property
    def weight(self) -> Weight:
        """The weight, or the first of several."""
        return self.members[0].weight

    @property
    def names(self) -> tuple[str, ...]:
        """By what rules may call it: every name of a tied weight; heads by that of their attention layer."""
        return self.weight.names or (self.name,) if self.is_one_weight else (self.name,)

    @property
    def is_one_weight(self) -> bool:
        """Whether the units lie in one weight, so that they keep its dimensions."""
        return len(self.members) == 1 and self.members[0].parts == 1

    @cached_property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of the scores; heads are a vector."""
        first = self.members[0]
        if self.is_one_weight:
            return first.unit_shape
        return (first.unit_shape[0] * first.unit_shape[1] // first.parts,)


def units_as_rows(member: Member) -> Tensor:
    """Return the elements of each unit of a weight as a row of a matrix, where all units are of one size."""
    values, block = member.weight.values, member.block
    sizes = [size for whole, part in zip(values.shape, block, strict=True) for size in (whole // part, part)]
    dims = range(len(sizes))
    return values.reshape(sizes).permute(*dims[::2], *dims[1::2]).reshape(math.prod(member.unit_shape), -1)


def reduce_units(
    unit_groups: Sequence[UnitGroup], tensors: Sequence[Tensor], p: float | None, how: Reduction
) -> list[Tensor]:
    """Reduce |x|^p (of x itself if ``p`` is None) over every unit.

    Args:
        unit_groups: whose units.
        tensors: one for each member of each unit group, of the shape of its weight.
        p: the power, or None.
        how: "sum", "mean" or "max".

    Returns:
        For each unit group a tensor of its unit shape.
    """
    members = [member for unit_group in unit_groups for member in unit_group.members]
    blocks = [member.block for member in members]
    # The blocks of a head are of different sizes, so their means are no mean over the head.
    whole = all(unit_group.is_one_weight for unit_group in unit_groups)
    parts = iter(ops.unit_scores(tensors, blocks, p=p, reduction=how if whole or how == "max" else "sum"))
    if whole:
        return list(parts)
    reduced = []
    for unit_group in unit_groups:
        stacked = [next(parts).reshape(member.parts, -1) for member in unit_group.members]
        rows = torch.cat(stacked)
        joined = rows.amax(0) if how == "max" else rows.sum(0)
        elements = sum(member.weight.values.numel() for member in unit_group.members)
        reduced.append(joined * (joined.numel() / elements) if how == "mean" else joined)
    return reduced


def spread_units(unit_groups: Sequence[UnitGroup], unit_masks: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write the mask of each unit into ``masks``, one for each member of each unit group, element by element."""
    spread, blocks = [], []
    for unit_group, unit_mask in zip(unit_groups, unit_masks, strict=True):
        for member in unit_group.members:
            stacked = unit_mask.flatten().repeat(member.parts)
            spread.append(stacked.reshape(member.unit_shape))
            blocks.append(member.block)
    ops.expand(spread, blocks, masks)
