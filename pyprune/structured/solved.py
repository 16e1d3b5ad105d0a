"""What became of a layer that was solved."""

from dataclasses import dataclass

from pyprune.structured.paired_layers import Reader


@dataclass(frozen=True)
class Solved:
    """What became of a layer.

    Attributes:
        name: of the layer.
        inputs: how many one of its outputs reads.
        outputs: how many there are.
        samples: how many it was solved by.
        before, after: distance to the wanted outputs, relative to their size (Frobenius norms).
        method: how it was solved.
    """

    name: str
    inputs: int
    outputs: int
    samples: int
    before: float
    after: float
    method: str


def solved(reader: Reader, samples: int, before: float, after: float, method: str) -> Solved:
    """Say what became of a layer."""
    groups, inputs, outputs = reader.matrix().shape
    return Solved(reader.name, inputs, groups * outputs, samples, before, after, method)


def relative(missing: float, wanted: float) -> float:
    """Return a distance, relative to a size, of two sums of squares.

    Example:
        >>> relative(1.0, 4.0)
        0.5
    """
    return float((missing / wanted) ** 0.5) if wanted else 0.0
