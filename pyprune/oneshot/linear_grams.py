"""Grams of the inputs of linear layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.modules.targets import Target
from pyprune.modules.undo import undoing

Padding = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class WeightInput:
    """What went into a weight: Grams (groups, columns, columns), and how many tokens each is of."""

    gram: Tensor
    tokens: Tensor


class InputGrams:
    """Sums X^T X of what went into weights of linear layers."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.layers: dict[nn.Module, Target] = {
            t.owners[0].module: t for t in targets if isinstance(t.owners[0].module, nn.Linear)
        }
        self.found: dict[Target, WeightInput] = {}

    @contextmanager
    def watching(self, model: nn.Module, padding: Padding | None = None) -> Iterator[None]:
        """Look at what goes into the layers."""
        hooks: list[Any] = []

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        def see(module: nn.Module, args: Any) -> None:
            given = args[0].detach()
            mask = None if padding is None else padding(given)
            rows = given.flatten(0, -2) if mask is None else given[mask]
            rows = rows if rows.dtype == torch.float64 else rows.float()
            target, n = self.layers[module], rows.shape[-1]
            if target not in self.found:
                self.found[target] = WeightInput(rows.new_zeros(1, n, n), torch.zeros(1, dtype=torch.int64))
            self.found[target].gram[0].addmm_(rows.mT, rows)
            self.found[target].tokens.add_(len(rows))

        with undoing(undo):
            for module in self.layers:
                hooks.append(module.register_forward_pre_hook(see))
            yield

    def results(self) -> dict[Target, WeightInput]:
        """Return what was seen."""
        return self.found


def as_matrices(target: Target, tensor: Tensor) -> Tensor:
    """Return a tensor shaped like a weight as matrices (groups, outputs, columns)."""
    return tensor[None]


def as_weight(target: Target, matrices: Tensor) -> Tensor:
    """Return matrices as a tensor shaped like a weight."""
    return matrices[0]
