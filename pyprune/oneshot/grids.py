"""Grids of numbers that quantised weights lie on, in pure tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.checks import check_bool, check_count
from pyprune.oneshot.system import check_matrix


@dataclass(frozen=True)
class Grid:
    """What `grid` returns."""

    bits: int
    symmetric: bool
    group: int | None

    @torch.no_grad()
    def steps(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point) of each row and group of columns of a weight, which is dense.

        Args:
            weight: (rows, columns), of a float dtype, finite.

        Returns:
            Two tensors of shape (rows, groups), float32, or float64 if the weight is that; zero points are integers,
            0 of a symmetric grid. A row of zeros has scale 1.
        """
        check_matrix("weight", weight)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        parts = torch.split(wide, self.group or wide.shape[1], dim=1)
        # Zero lies on every grid, so the range of an asymmetric one includes it.
        low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
        high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
        if self.symmetric:
            low, high = torch.zeros_like(low), torch.maximum(-low, high)
        # Divided before they are subtracted: the sum of both may be too large for the dtype.
        scale = high / self._most - low / self._most
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, (-low / scale).round()

    @torch.no_grad()
    def round(self, values: Tensor, scale: Tensor, zero_point: Tensor, *, start: int = 0) -> Tensor:
        """Return the points of the grid that are nearest to values, ``scale * (q - zero_point)``; zero is +0.

        Args:
            values: (rows, columns), the columns of a weight from ``start`` on.
            scale, zero_point: (rows, groups), as `steps` returns them for the weight.
            start: the first column.
        """
        columns = torch.arange(start, start + values.shape[1], device=values.device)
        group = columns // self.group if self.group else torch.zeros_like(columns)
        scale, zero_point = (one.to(values.dtype)[:, group] for one in (scale, zero_point))
        points = (values / scale).round() + zero_point
        least = -self._most if self.symmetric else 0
        return (points.clamp_(least, self._most) - zero_point) * scale + 0.0  # -0.0 + 0.0 is 0.0

    @property
    def _most(self) -> int:
        return int(2 ** (self.bits - 1)) - 1 if self.symmetric else int(2**self.bits) - 1


def grid(*, bits: int, symmetric: bool = True, group: int | None = None) -> Grid:
    """A grid of evenly spaced numbers for each row of a weight, with zero on it: what integers of few bits can say.

    Symmetric: scale * q with |q| up to 2^(bits-1) - 1 and the scale by which the largest |w| is the last.
    Asymmetric: scale * (q - zero_point) with q from 0 to 2^bits - 1 and an integer zero point, from the smallest w to
    the largest. It is that of the dense weight.

    Args:
        bits: of each weight, 2 to 8.
        symmetric: whether the grid is the same on both sides of zero.
        group: how many columns have a scale of their own; None for all of a row.

    Raises:
        TypeError, ValueError: for other values.

    Example:
        >>> weight = torch.tensor([[3.0, -0.6, 1.4]])
        >>> of_three_bits = grid(bits=3)
        >>> of_three_bits.round(weight, *of_three_bits.steps(weight)).tolist()
        [[3.0, -1.0, 1.0]]
    """
    bits = check_count("bits", bits, least=2, most=8, what="a number of bits, from 2 to 8")
    if group is not None:
        group = check_count("group", group, least=1, what="a number of columns, at least 1, or None")
    return Grid(bits, check_bool("symmetric", symmetric), group)
