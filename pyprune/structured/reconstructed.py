"""What a reconstruction has done, and its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyprune.console import as_html, as_text
from pyprune.structured.layer_solvers import Solved


@dataclass(frozen=True, repr=False)
class Reconstructed:
    """What `reconstruct` has done to the layers of a model; `str` and notebooks show a table.

    Attributes:
        layers: those that were solved, in the order in which that was done.
        skipped: weights that were left as they are, and why.
        unchanged: layers that get and make what they do in the dense model.
    """

    layers: tuple[Solved, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()

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
        for name in self.unchanged:
            table.add_row(Text(name), "", "", "", "", "", "as in the dense model")
        for name, why in self.skipped.items():
            table.add_row(Text(name), "", "", "", "", "", Text(f"left as it is: {why}"))
        return as_text(table)

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def __repr__(self) -> str:
        return f"Reconstructed(layers=<{len(self.layers)}>, skipped=<{len(self.skipped)}>)"
