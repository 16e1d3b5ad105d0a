"""Gates of coupled units: one logit for each unit, which all parameters that the unit lies in share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pyprune.modules.attachments import Attachment
from pyprune.modules.gated_classes import put_gate, take_gate
from pyprune.modules.gates import StochasticGate
from pyprune.modules.undo import undoing


@dataclass(frozen=True, eq=False)
class UnitsAlong:
    """The gates of units along a dimension of a parameter.

    Args:
        gate: of the group of units; all parameters that they lie in have the same one.
        dim: the dimension.
        units: which of the units each entry along it belongs to; their number for an entry that is in none.
    """

    gate: StochasticGate
    dim: int
    units: Tensor


class UnitGates(nn.Module, Attachment):
    """What lets a parameter feel the gates of the coupled units that lie in it.

    It has no logits of its own: ``gates`` has those of the groups, each a module that all parameters of a group
    share. So in one pass a unit is open in all of them or in none, and the gradient of its logit is the sum over all.

    Args:
        shape: of the parameter.
        parts: the groups of units that lie in it.
        on_target: False for a bias or norm parameter, which goes along.
    """

    def __init__(self, shape: Sequence[int], parts: Sequence[UnitsAlong], *, on_target: bool = True) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.on_target = on_target
        self.is_open = False
        self.gates = nn.ModuleList([part.gate for part in parts])
        self.dims = [part.dim for part in parts]
        for index, part in enumerate(parts):
            self.register_buffer(f"units{index}", part.units, persistent=False)

    def put_on(self, module: nn.Module, attribute: str) -> None:
        """Let ``module.attribute`` be what the gates make of the parameter, which stays where it is."""
        put_gate(module, attribute, self)

    def take_off(self, module: nn.Module, attribute: str) -> None:
        """Let ``module.attribute`` be the parameter again."""
        take_gate(module, attribute)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the parameter times the sample of its units' gates, or, in evaluation, times their `values`."""
        if self.is_open:
            return weight
        if not self.training:
            return self.deterministic(weight)
        for index, gate in enumerate(self._gates):
            # A product: the gradient goes straight through a closed gate.
            weight = weight * self._along(index, gate(weight.new_ones(gate.shape)))
        return weight

    def deterministic(self, weight: Tensor) -> Tensor:
        """Return what the gates make of the parameter in evaluation."""
        for index, gate in enumerate(self._gates):
            values = self._along(index, gate.deterministic(weight.new_ones(gate.shape)))
            weight = torch.where(values == 0, 0, weight * values)  # a product would make NaN of infinity
        return weight

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return what each element of the parameter is multiplied by in evaluation."""
        return self.deterministic(torch.ones(self.shape, device=self._gates[0].logits.device))

    @property
    def _gates(self) -> list[StochasticGate]:
        return cast(list[StochasticGate], list(self.gates))

    def _along(self, index: int, opened: Tensor) -> Tensor:
        """Spread the values of gates over the entries of a dimension; 1 where there is no unit."""
        values = torch.cat([opened, opened.new_ones(1)])[self.get_buffer(f"units{index}")]
        sizes = [1] * len(self.shape)
        sizes[self.dims[index]] = -1
        return values.view(sizes)

    def extra_repr(self) -> str:
        """Say what it is for."""
        return f"shape={self.shape}, dims={self.dims}"


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Let gates of coupled units pass all on, so that the model can be looked at as if they were not there."""
    gates = [module for module in model.modules() if isinstance(module, UnitGates)]

    def close() -> None:
        for gate in gates:
            gate.is_open = False

    with undoing(close):
        for gate in gates:
            gate.is_open = True
        yield
