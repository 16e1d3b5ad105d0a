"""What a trace has seen of a model."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyprune.structured.coordinates import Coordinates, Coords
from pyprune.structured.rules.call import Contraction
from pyprune.structured.size_uses import SizeUse


@dataclass(frozen=True, eq=False)
class Traced:
    """A parameter or buffer, by all of its names, and its coordinates along each axis (None: of size 1)."""

    names: tuple[str, ...]
    tensor: Tensor
    coords: tuple[Coords | None, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Product:
    """Multiply-accumulates of one operation, and coordinates along each axis that they grow with."""

    macs: int
    factors: tuple[Coords, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """Entries that are multiplied and summed, and in which module."""

    contraction: Contraction
    module: str


@dataclass(eq=False)
class Trace:
    """What was seen of a model."""

    coordinates: Coordinates
    tensors: list[Traced]
    products: list[Product] = field(default_factory=list)
    sizes: list[SizeUse] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
