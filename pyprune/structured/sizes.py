"""Where the sizes come from that a forward pass gives to views and the like: attributes of the user's modules.

While a model is traced, the integers among the attributes of its modules are a subclass of int that knows its place.
Arithmetic on them is remembered, so that ``3 * self.width`` still says where it comes from.
"""

import operator
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.modules.undo import undoing
from pyprune.structured.coordinates import Axes, Coords

# The attribute of a module, or of an object that is one of its attributes ("config.width"); which number in it, if it
# is a tuple or dict of them.
Place = tuple[str, str, int | str | None]
Expression = Place | int | tuple[str, "Expression", "Expression"]

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


class Size(int):
    """An integer that knows from which attributes it was computed."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> "Size":
        """Make one of a value."""
        made = super().__new__(cls, value)
        made.expression = expression
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: object) -> int:
        return int(self)

    def __add__(self, other: Any) -> Any:
        return _computed("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return _computed("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return _computed("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _computed("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return _computed("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _computed("*", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _computed("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _computed("//", other, self)


def _computed(name: str, one: Any, other: Any) -> Any:
    if type(one) not in (int, Size) or type(other) not in (int, Size):
        if isinstance(one, int):
            one = int(one)
        return _OPERATORS[name](one, int(other) if isinstance(other, Size) else other)
    value = _OPERATORS[name](int(one), int(other))
    return Size(value, (name, _expression(one), _expression(other)))


def _expression(value: int) -> Expression:
    return value.expression if isinstance(value, Size) else int(value)


def evaluate(expression: Expression, values: Callable[[Place], int]) -> int:
    """Compute an expression anew, with other values of the attributes.

    Example:
        >>> evaluate(("*", 3, ("block", "width", None)), {("block", "width", None): 5}.__getitem__)
        15
    """
    if isinstance(expression, int):
        return expression
    if expression[0] in _OPERATORS and len(expression) == 3 and not isinstance(expression[1], str):
        name, one, other = expression
        return _OPERATORS[name](evaluate(one, values), evaluate(other, values))
    return values(expression)  # type: ignore[arg-type]


def places_in(expression: Expression) -> Iterator[Place]:
    """Yield the attributes in an expression."""
    if isinstance(expression, int):
        return
    if expression[0] in _OPERATORS and not isinstance(expression[1], str):
        yield from places_in(expression[1])
        yield from places_in(expression[2])
    else:
        yield expression  # type: ignore[misc]


# ---- attributes ----


def holders(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield what may have sizes among its attributes: modules, and configurations that they hold.

    With the name of the module, and what comes before the name of an attribute.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        yield name, "", module
        for attribute, value in list(vars(module).items()):
            is_config = (
                hasattr(value, "to_dict")
                or isinstance(value, (SimpleNamespace, Namespace))
                or (is_dataclass(value) and not isinstance(value, type))
            )
            if is_config and hasattr(value, "__dict__") and id(value) not in seen and not isinstance(value, Tensor):
                seen.add(id(value))
                yield name, f"{attribute}.", value


def integers(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that are integers above 1, or tuples, lists or dicts with such."""
    for attribute, value in list(vars(holder).items()):
        if attribute.startswith("_") or attribute in ("training", "layer_idx"):
            continue
        several = value.values() if type(value) is dict else value if type(value) in (tuple, list) else ()
        if (type(value) is int and value > 1) or (several and all(type(one) is int for one in several)):
            yield attribute, value


@contextmanager
def sizes_known(model: nn.Module) -> Iterator[None]:
    """While this is on, integers among the attributes of the model's modules are `Size`."""
    before: list[tuple[dict[str, Any], str, Any]] = []

    def undo() -> None:
        for attributes, name, value in before:
            attributes[name] = value

    with undoing(undo):
        for name, prefix, holder in list(holders(model)):
            for attribute, value in list(integers(holder)):
                known = _known(value, name, prefix + attribute)
                before.append((vars(holder), attribute, value))
                vars(holder)[attribute] = known
                if (pairs := pairs_of_einops(holder, attribute)) is not None:
                    before.append((vars(holder), *pairs))
                    vars(holder)[pairs[0]] = tuple(known.items())
        # einops keeps shapes by the values of what they were computed from, whosever these were.
        einops: Any = sys.modules.get("einops.einops")
        if hasattr(einops, "_reconstruct_from_shape_uncached"):
            before.append((vars(einops), "_reconstruct_from_shape", einops._reconstruct_from_shape))
            einops._reconstruct_from_shape = einops._reconstruct_from_shape_uncached
        yield


def pairs_of_einops(holder: Any, attribute: str) -> tuple[str, Any] | None:
    """The second place where a layer of einops keeps what is in its attribute ``axes_lengths``."""
    name = f"_{attribute}"
    return (name, vars(holder)[name]) if attribute == "axes_lengths" and name in vars(holder) else None


def _known(value: Any, name: str, attribute: str) -> Any:
    if isinstance(value, int):
        return Size(value, (name, attribute, None))
    if isinstance(value, dict):
        return {key: Size(one, (name, attribute, key)) if one > 1 else one for key, one in value.items()}
    return type(value)(Size(one, (name, attribute, index)) if one > 1 else one for index, one in enumerate(value))


# ---- what they are the sizes of ----


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
