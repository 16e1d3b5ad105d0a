"""Where the sizes come from that a forward pass gives to views and the like: attributes of the user's modules.

While a model is traced, the integers among the attributes of its modules are a subclass of int that knows its place.
Arithmetic on them is remembered, so that ``3 * self.width`` still says where it comes from.
"""

import operator
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.modules.undo import undoing

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
