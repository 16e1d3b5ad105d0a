"""Which inputs of layers least squares can do without: greedy elimination, in pure tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.structured.least_squares import System


@dataclass(frozen=True, eq=False)
class Reading:
    """What one layer makes of units.

    Args:
        system: its equations; it has one group.
        weight: its weight, (1, inputs, outputs).
        units: int, (units, entries): the inputs that are those of each unit. Each input is in one unit at most; what
            is in none stays, and makes up for others.
    """

    system: System
    weight: Tensor
    units: Tensor


def eliminate(readings: Sequence[Reading], *, damping: float) -> Tensor:
    """Say what units are worth: take the one away that costs least, solve for those that are left, and so on.

    The cost of unit u, if the others make up for it, is ``tr(W_u' ((A^-1)_uu)^-1 W_u)``, the sum of squares by which
    outputs change, as in Optimal Brain Surgeon (Hassibi & Stork 1993), here of whole units. W and A^-1 follow by a
    Schur complement. Costs of several layers that read the same units are added.

    Args:
        readings: the layers that read them.
        damping: of the ridge, as in `System.solve`; at least 1e-10, so that A^-1 is finite.

    Returns:
        float64, (units,): the sum of the costs up to this unit. What is kept last is worth most, so whatever is kept
        by these scores was chosen by elimination.

    Example:
        >>> system = System(torch.eye(2).double()[None], torch.tensor([[[3.0], [4.0]]]).double())
        >>> reading = Reading(system, torch.tensor([[[3.0], [4.0]]]), torch.tensor([[0], [1]]))
        >>> eliminate([reading], damping=0).round().tolist()
        [9.0, 25.0]
    """
    states = [_State(reading, max(damping, 1e-10)) for reading in readings]
    left = torch.arange(len(readings[0].units), device=readings[0].units.device)
    worth = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    lost = worth.new_zeros(())
    while len(left):
        costs = torch.stack([state.costs(left) for state in states]).sum(0).clamp(min=0)
        which = int(costs.argmin())
        lost = lost + costs[which]
        worth[left[which]] = lost
        for state in states:
            state.remove(int(left[which]))
        left = torch.cat([left[:which], left[which + 1 :]])
    return worth


class _State:
    """Inverse and solution of one layer, while its units go."""

    def __init__(self, reading: Reading, damping: float) -> None:
        gram, weight = reading.system.gram[0].clone(), reading.weight[0].double()
        right = reading.system.cross[0] - gram @ weight
        ridge = damping * gram.diagonal().mean()
        gram.diagonal().add_(torch.where(ridge > 0, ridge, 1))
        self.inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.weight = weight + self.inverse @ right
        self.places = reading.units

    def costs(self, units: Tensor) -> Tensor:
        places = self.places[units]
        blocks = self.inverse[places[:, :, None], places[:, None, :]]
        rows = self.weight[places]
        if blocks.shape[1] == 1:  # as below, without a factorisation
            return rows.square().sum((1, 2)) / blocks[:, 0, 0]
        solved: Tensor = torch.linalg.solve(blocks, rows)
        return (rows * solved).sum((1, 2))

    def remove(self, unit: int) -> None:
        there = self.places[unit]
        factor = torch.linalg.solve(self.inverse[there][:, there], self.inverse[there]).T
        for tensor in (self.weight, self.inverse):
            tensor.addmm_(factor, tensor[there], alpha=-1)
