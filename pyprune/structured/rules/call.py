"""One operation, as rules see it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyprune.structured.coordinates import Axes, Coordinates, Coords, Factor, Flags

Result = Axes | list[Axes]


@dataclass(eq=False)
class Call:
    """One operation: its arguments by name, what came out, and what is known of the axes of tensors.

    Args:
        name: of the operator.
        args: by the names in its schema, defaults too.
        made: what it returned.
        axes: gives the axes of a tensor.
        coordinates: where ties go.
        on_contraction: told of each pair of axes that are multiplied and summed: a, its axis, b, its axis.
        on_product: told of multiply-accumulates, and of coordinates along each axis that they grow with.
        on_size: told of an expression that gave the size of an axis, and of the factor that it has met there.
        values: whether tensors have values, and fixed ones are to be followed.
    """

    name: str
    args: dict[str, Any]
    made: Any
    axes: Callable[[Tensor], Axes]
    coordinates: Coordinates
    on_contraction: Callable[["Contraction"], None]
    on_product: Callable[[int, list[Factor]], None]
    on_size: Callable[[Any, Factor, int], None]
    values: bool = False

    def tensors(self) -> list[Tensor]:
        """Tensors among the arguments, in their lists too."""
        return list(tensors_in(self.args.values()))

    def dim(self, tensor: Tensor, name: str = "dim", default: int = 0) -> int:
        """The argument that is a dimension of a tensor, counted from the front."""
        dim = self.args.get(name)
        return int(default if dim is None else dim) % max(1, tensor.dim())


@dataclass(eq=False)
class Contraction:
    """Entries of two tensors that are multiplied and summed.

    Args:
        coords: for each entry, of ``one`` and of ``other``; they are tied.
        one, other: the tensors, and the axis of each along which the entries lie.
        fixed: which entries of ``one`` do not depend on the inputs, and of ``other``.
        sources: what they were made of.
        padded: whether positions outside of ``one`` count as zeros.
    """

    coords: tuple[Coords, Coords]
    one: Tensor
    one_axis: int
    other: Tensor
    other_axis: int
    fixed: tuple[Flags, Flags]
    sources: tuple[str, str]
    name: str
    padded: bool = False


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors among values, and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def given_to(call: Call) -> tuple[Tensor, Axes]:
    """The tensor that an operation is of, and its axes."""
    tensor = call.args["self"] if "self" in call.args else call.tensors()[0]
    return tensor, call.axes(tensor)


def held(call: Call, factor: Factor, over: Iterable[int], why: str = "") -> Factor | None:
    """Keep the sizes of axes of a factor; returns what is left of it."""
    over = [axis for axis in factor.axes if axis in set(over)]
    if not over:
        return factor
    call.coordinates.hold(factor, over, why or f"{call.name} along it")
    return factor.first(over)


def all_held(call: Call, axes: Axes, over: Iterable[int], why: str = "") -> tuple[Factor, ...]:
    """Keep the sizes of axes of a tensor; returns what is left of its factors."""
    over = set(over)
    kept = (held(call, factor, over, why) for factor in axes.factors)
    return tuple(factor for factor in kept if factor is not None)


def with_rest(call: Call, made: Axes) -> Result:
    """What an operation returned first has these axes; what else it returned has no units."""
    rest = list(tensors_in([call.made]))[1:]
    return made if isinstance(call.made, Tensor) else [made, *(Axes(tuple(tensor.shape)) for tensor in rest)]
