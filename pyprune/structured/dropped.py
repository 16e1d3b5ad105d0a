"""What a removal of blocks or experts took away, as a table and as a plan that can be replayed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyprune.console import as_html, as_text
from pyprune.modules.attachments import parameters_of

# Of a plan.
VERSION = 1


@dataclass(frozen=True)
class Dropped:
    """What `drop_blocks` or `drop_experts` removed; ``str()`` is a table.

    Args:
        kind: "blocks" or "experts".
        names: what was removed, by its names before.
        scores: of all that could go, by their names before; empty if nothing was scored.
        stays: what could not be removed, and why.
        before: the number of parameters, tied ones once, and the bytes of these and of the buffers.
        after: the same, of what is left.
        plan: dicts, lists, strings and numbers, ready for JSON: `rebuild` does the same to a fresh dense model.
        renewed: of the states of optimizers what did not fit parameters that are smaller, and is begun anew.
    """

    kind: str
    names: tuple[str, ...]
    scores: Mapping[str, float]
    stays: Mapping[str, str]
    before: tuple[int, int]
    after: tuple[int, int]
    plan: Mapping[str, Any]
    renewed: Sequence[str] = ()

    def __str__(self) -> str:
        from rich.table import Table

        table = Table()
        table.add_column(self.kind.removesuffix("s"))
        table.add_column("score", justify="right")
        table.add_column("")
        for name in [*dict.fromkeys([*self.scores, *self.names, *self.stays])]:
            what = "dropped" if name in self.names else f"stays: {self.stays[name]}" if name in self.stays else ""
            table.add_row(name, f"{self.scores[name]:.4g}" if name in self.scores else "", what)
        left = "{:,} parameters ({:,} bytes) of {:,} ({:,}) are left".format(*self.after, *self.before)
        renewed = f"\nstates of optimizers that begin anew: {', '.join(self.renewed)}" if self.renewed else ""
        what = self.kind if len(self.names) > 1 else self.kind.removesuffix("s")
        return f"{len(self.names)} {what} dropped: {left}\n{as_text(table)}{renewed}"

    def _repr_html_(self) -> str:
        return as_html(str(self))


def sizes_of(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters of a model, and the bytes of these and of its buffers.

    Example:
        >>> sizes_of(nn.Linear(2, 2))
        (6, 24)
    """
    parameters = parameters_of(model)
    tensors = [*parameters, *dict.fromkeys(model.buffers())]
    return sum(one.numel() for one in parameters), sum(one.nbytes for one in tensors)
