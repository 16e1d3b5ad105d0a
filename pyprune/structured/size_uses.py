"""What sizes are given to in a forward pass: views, pieces, groups, and tensors that are filled."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyprune.structured.coordinates import Axes, Coords
from pyprune.structured.sizes import Expression, Size


@dataclass(frozen=True, eq=False)
class SizeUse:
    """A number that was computed from attributes, and what it is the size of.

    Args:
        expression: how.
        value: what it was.
        entries: for each position that it counts, coordinates; it is kept if one of them is. None: it stays.
    """

    expression: Expression
    value: int
    entries: Coords | None

    def new_value(self, kept: Callable[[Coords], Any]) -> int:
        """What it is when only some coordinates are kept."""
        if self.entries is None:
            return self.value
        return int(np.count_nonzero(kept(self.entries).any(1)))


@dataclass(frozen=True, eq=False)
class OpenSize:
    """What gave the size of an axis along which all values of a tensor are the same: what it meets will say more."""

    expression: Expression
    tensor: Tensor
    axis: int


def along(axes: Axes, axis: int, part: slice = slice(None)) -> Coords | None:
    """Coordinates of each position along an axis, as rows; None if it has none."""
    factor = axes.on(axis)
    if factor is None:
        return None
    coords = np.moveaxis(factor.coords, factor.at(axis), 0)
    return coords.reshape(len(coords), -1)[part]


_SIZES = {
    *("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full", "zeros", "ones"),
    *("empty", "full", "resize"),
}


def size_uses(
    name: str, args: tuple[Any, ...], keywords: Mapping[str, Any], made: Any, axes: Callable[[Tensor], Axes]
) -> Iterator["SizeUse | OpenSize"]:
    """Yield what a function was given that was computed from attributes."""
    if name in _SIZES and isinstance(made, Tensor):
        sizes = _flat([*args[0 if name in ("zeros", "ones", "empty", "full") else 1 :], *keywords.values()])
        known = axes(made)
        for axis, size in enumerate(sizes[: made.dim()]):
            if not isinstance(size, Size):
                continue
            if known.on(axis) is None and (known.source == "number" or axis in known.stretched):
                yield OpenSize(size.expression, made, axis)
            else:
                yield _use(size, made, axis, known)
    elif name == "unflatten" and isinstance(made, Tensor):
        sizes = _flat([args[2] if len(args) > 2 else keywords.get("sizes", ())])
        dim = (args[1] if len(args) > 1 else keywords["dim"]) % args[0].dim()
        for axis, size in enumerate(sizes, dim):
            if isinstance(size, Size):
                yield _use(size, made, axis, axes(made))
    elif name.startswith("split"):
        sizes = _flat(
            [args[1] if len(args) > 1 else keywords.get("split_size_or_sections", keywords.get("split_size", ()))]
        )
        dim = (args[2] if len(args) > 2 else keywords.get("dim", 0)) % args[0].dim()
        for size, piece in zip(sizes, made, strict=False):
            if isinstance(size, Size):
                yield _use(size, piece, dim, axes(piece))
    elif name == "narrow" and isinstance(made, Tensor):
        dim, start, length = (
            args[index] if len(args) > index else keywords[key]
            for index, key in ((1, "dim"), (2, "start"), (3, "length"))
        )
        dim %= args[0].dim()
        if isinstance(length, Size):
            yield _use(length, made, dim, axes(made))
        if isinstance(start, Size):
            yield SizeUse(start.expression, int(start), along(axes(args[0]), dim, slice(0, int(start))))
    elif name == "getitem":
        yield from _slices(args[0], args[1], axes)
    elif name in (
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "group_norm",
    ):
        yield from _group_counts(name, args, keywords, axes)


def _use(size: Size, made: Tensor, axis: int, axes: Axes) -> SizeUse:
    is_right = int(size) == made.shape[axis]
    return SizeUse(size.expression, int(size), along(axes, axis) if is_right else None)


def _slices(tensor: Any, index: Any, axes: Callable[[Tensor], Axes]) -> Iterator[SizeUse]:
    if not isinstance(tensor, Tensor):
        return
    index = index if isinstance(index, tuple) else (index,)
    consumed = sum(1 for one in index if one is not None and one is not Ellipsis)
    axis = 0
    for one in index:
        if one is Ellipsis:
            axis += tensor.dim() - consumed
        elif isinstance(one, slice):
            for end in (one.start, one.stop):
                if not isinstance(end, Size):
                    if isinstance(end, int) and end < 0:
                        continue
                    continue
                place = int(end)
                part = slice(0, place) if place >= 0 else slice(place, None)
                entries = along(axes(tensor), axis, part)
                if place >= 0:
                    yield SizeUse(end.expression, place, entries)
                else:
                    yield SizeUse(("-", 0, end.expression), -place, entries)
            axis += 1
        elif one is not None:
            axis += 1


def _group_counts(
    name: str, args: tuple[Any, ...], keywords: Mapping[str, Any], axes: Callable[[Tensor], Axes]
) -> Iterator[SizeUse]:
    place = 1 if name == "group_norm" else 7 if "transpose" in name else 6
    key = "num_groups" if name == "group_norm" else "groups"
    groups = args[place] if len(args) > place else keywords.get(key)
    if isinstance(groups, Size) and args and isinstance(args[0], Tensor):
        channels = along(axes(args[0]), 1)
        if channels is not None and len(channels) % int(groups) == 0:
            yield SizeUse(groups.expression, int(groups), channels.reshape(int(groups), -1)[:, :1])
        else:
            yield SizeUse(groups.expression, int(groups), None)


def _flat(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            found.extend(value)
        elif isinstance(value, int):
            found.append(value)
    return found
