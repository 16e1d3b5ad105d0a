"""What a reconstruction has done, and its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyprune.console import as_html, as_text, listed
from pyprune.structured.solved import Solved


@dataclass(frozen=True, repr=False)
class Reconstructed:
    """What `reconstruct` has done to the layers of a model; `str` and notebooks show a table.

    Attributes:
        layers: those that were solved, in that order. Each has a ``name``, its numbers of ``inputs``, ``outputs`` and
            ``samples``, its error ``before`` and ``after``, relative to what it is to make, and the ``method``.
        skipped: weights that were left as they are, and why.
        others: layers that have lost no inputs, or, with ``layers="all"``, are as in the dense model.
    """

    layers: tuple[Solved, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        # Imported here: `import pyprune` must cost little.
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Reconstruction, layer by layer", title_justify="left", box=box.SIMPLE)
        for column in ("layer", "inputs", "outputs", "samples", "error before", "after", ""):
            table.add_column(column, justify="left" if column in ("layer", "") else "right", overflow="fold")
        for one in self.layers:
            sizes = (f"{one.inputs:,}", f"{one.outputs:,}", f"{one.samples:,}")
            table.add_row(Text(one.name), *sizes, f"{one.before:.4f}", f"{one.after:.4f}", one.method)
        for name, why in self.skipped.items():
            table.add_row(Text(name), "", "", "", "", "", Text(f"left as it is: {why}"))
        lines = [as_text(table)]
        if self.others:
            lines.append(f"not touched, because they have lost nothing: {listed(self.others)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def __repr__(self) -> str:
        return f"Reconstructed(layers=<{len(self.layers)}>, skipped=<{len(self.skipped)}>)"
