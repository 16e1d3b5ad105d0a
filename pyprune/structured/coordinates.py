"""Coordinates: a number for every position along the axes of a model's tensors, and which of them go together.

Operations of a forward pass tie coordinates to each other. What is tied in the end is a unit: it can only be removed
as a whole. A tensor carries its coordinates in *factors*: an array of them that lies along one of its axes, or along
several jointly (heads x head size, after a view has cut an axis).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Coords = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
# Belongs to no unit: something that cannot be removed.
NONE = 0


@dataclass(frozen=True, eq=False)
class Factor:
    """Coordinates along axes of a tensor.

    Args:
        axes: of the tensor, in the order of the array's dimensions; where an axis was cut, outer parts come first.
        coords: the array.
        fixed: for each, whether the tensor's values there do not depend on the inputs of the model.
    """

    axes: tuple[int, ...]
    coords: Coords
    fixed: Flags

    def moved(self, axes: Iterable[int]) -> "Factor":
        """The same along other axes of another tensor."""
        return replace(self, axes=tuple(axes))

    def each(self, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> "Factor":
        """Change the arrays, both alike."""
        return replace(self, coords=change(self.coords), fixed=change(self.fixed))

    def at(self, axis: int) -> int:
        """Which dimension of the array lies along an axis."""
        return self.axes.index(axis)

    def first(self, axes: Iterable[int]) -> "Factor | None":
        """What is left of it when axes go, along which all is tied; None if nothing is."""
        gone = [self.at(axis) for axis in axes if axis in self.axes]
        left = tuple(axis for axis in self.axes if self.at(axis) not in gone)
        index = tuple(0 if dim in gone else slice(None) for dim in range(len(self.axes)))
        return self.each(lambda array: array[index]).moved(left) if left else None


# What a tensor was made of: among other things the inputs; parameters, buffers and numbers alone; one number.
Source = Literal["inputs", "parameters", "number"]


@dataclass(frozen=True, eq=False)
class Axes:
    """What is known of the axes of a tensor.

    Args:
        shape: of the tensor.
        factors: no axis is in two of them.
        source: what the tensor was made of.
        stretched: axes along which all of its values are the same (it was expanded, or filled), with the expression
            of attributes that gave the size, if one did.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    source: Source = "inputs"
    stretched: Mapping[int, Any] = field(default_factory=dict)

    def on(self, axis: int) -> Factor | None:
        """The factor that has an axis."""
        return next((factor for factor in self.factors if axis in factor.axes), None)


class Coordinates:
    """Hands out coordinates, and remembers what is tied, what stays and why."""

    def __init__(self) -> None:
        self.count = 1
        self._ties: list[tuple[Coords, Coords]] = []
        self._units: Coords | None = None  # of these ties
        # Coordinates that stay, and why; others that can go, but not so that the model computes the same.
        self.stays: list[tuple[Coords, str]] = []
        self.inexact: list[tuple[Coords, str]] = []
        # In which modules that was.
        self.place = ""
        self.inexact_in: list[tuple[Coords, str]] = []
        # Arrays that a view has cut: what is kept of them must be a rectangle.
        self.cuts: list[Coords] = []
        # Units of attention, and of convolutions in groups.
        self.heads: list[Coords] = []
        self.groups: list[Coords] = []
        self._read: set[int] = set()

    def new(self, count: int) -> Coords:
        """Return coordinates that were not there before."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def tie(self, one: Coords, other: Coords, why: str = "it meets what stays") -> None:
        """Tie coordinates elementwise, with broadcasting; what meets none of a unit's stays."""
        one, other = np.broadcast_arrays(one, other)
        one, other = one.ravel(), other.ravel()
        differ = one != other
        one, other = one[differ], other[differ]
        lone = (one == NONE) | (other == NONE)
        if lone.any():
            self.stay(np.maximum(one[lone], other[lone]), why)
            one, other = one[~lone], other[~lone]
        if len(one):
            self._ties.append((one, other))
            self._units = None

    def stay(self, coords: Coords, why: str) -> None:
        """These stay."""
        if coords.size:
            self.stays.append((np.unique(coords), why))

    def is_inexact(self, coords: Coords, why: str) -> None:
        """Without these the model computes something else, even where they are zero."""
        coords = np.unique(coords)
        self.inexact.append((coords, why))
        self.inexact_in.append((coords, self.place))

    def hold(self, factor: Factor, axes: Iterable[int], why: str) -> None:
        """Keep the sizes of axes: tie what lies along them; if there is nothing else in the factor, it stays."""
        dims = tuple(factor.at(axis) for axis in axes if axis in factor.axes)
        if len(dims) == factor.coords.ndim:
            self.stay(factor.coords, why)
        elif dims:
            index = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(factor.coords.ndim))
            self.tie(factor.coords, factor.coords[index])

    def read(self, coords: Coords) -> None:
        """Entries along an axis of a weight are what it reads."""
        if coords.size:
            self._read.update((int(coords.flat[0]), int(coords.flat[-1])))

    def is_read(self, coords: Coords | None) -> bool:
        """Whether an axis of a weight is one that reads."""
        return coords is not None and (int(coords[0]) in self._read or int(coords[-1]) in self._read)

    def cut(self, coords: Coords) -> None:
        """Remember an array of two dimensions or more that came out of a view."""
        self.cuts.append(coords)

    def units(self) -> Coords:
        """Return for each coordinate which unit it is in: the lowest coordinate that it is tied to.

        What a view has cut, and nothing has tied in all directions but one, is tied along its smaller dimensions.
        """
        if self._units is not None and len(self._units) == self.count:
            return self._units
        units = self._tied(np.arange(self.count))
        while True:
            before = len(self._ties)
            for cut in self.cuts:
                coords = units[cut]
                for dim in sorted(_loose(coords), key=lambda dim: coords.shape[dim])[:-1]:
                    self.tie(coords, coords.take([0], dim))
            if len(self._ties) == before:
                self._units = units
                return units
            units = self._tied(units)

    def _tied(self, units: Coords) -> Coords:
        if not self._ties:
            return units
        one, other = (np.concatenate(side) for side in zip(*self._ties, strict=True))
        self._ties = [(one, other)]
        while True:
            left, right = units[one], units[other]
            differ = left != right
            if not differ.any():
                return units
            one, other, left, right = one[differ], other[differ], left[differ], right[differ]
            np.minimum.at(units, np.maximum(left, right), np.minimum(left, right))
            while (units[units] != units).any():
                units = units[units]


def _loose(units: Coords) -> list[int]:
    """Return the dimensions along which an array is not the same."""
    return [dim for dim in range(units.ndim) if (units != units.take([0], dim)).any()]
