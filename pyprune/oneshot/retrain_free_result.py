"""What retrain-free pruning has done, and its table."""

from dataclasses import dataclass

from pyprune.console import as_html, as_text, listed
from pyprune.oneshot.unit_scales import Tuned


@dataclass(frozen=True)
class UnitsLeft:
    """What is left of a group of coupled units.

    Attributes:
        name: of the weight that makes it.
        what: "heads", "channels" (neurons, too), or "groups" of a convolution.
        units: how many there were.
        kept: how many are left.
        importance: the share of the group's importance that is left.
    """

    name: str
    what: str
    units: int
    kept: int
    importance: float


@dataclass(frozen=True, repr=False)
class RetrainFree:
    """What `prune_retrain_free` has done to a model; `str` and notebooks show a table.

    Attributes:
        groups: what is left of each group, ``UnitsLeft``.
        tuned: the layers whose units were scaled. Each has a ``name``, its number of ``units``, its error ``before``
            and ``after``, relative to the dense model's outputs, and its ``least`` and ``most`` scale.
        skipped: layers that were not tuned, with the reason.
        macs_before: multiply-accumulates of the examples.
        macs_after: those after `shrink`.
    """

    groups: tuple[UnitsLeft, ...]
    tuned: tuple[Tuned, ...]
    skipped: tuple[tuple[str, str], ...]
    macs_before: int
    macs_after: int

    @property
    def ratios(self) -> dict[str, float]:
        """The share of its units that each group has lost, by the name of the weight that makes it."""
        return {one.name: 1 - one.kept / one.units for one in self.groups}

    def __str__(self) -> str:
        # Imported here: `import pyprune` must cost little.
        from rich import box
        from rich.table import Table
        from rich.text import Text

        share = self.macs_after / self.macs_before if self.macs_before else 1.0
        title = f"Retrain-free: {self.macs_after:,} of {self.macs_before:,} MACs are left ({share:.1%})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE)
        for column in ("group", "of", "units", "kept", "importance kept"):
            table.add_column(column, justify="left" if column in ("group", "of") else "right", overflow="fold")
        for one in self.groups:
            table.add_row(Text(one.name), one.what, f"{one.units:,}", f"{one.kept:,}", f"{one.importance:.1%}")
        lines = [as_text(table)]
        if self.tuned:
            tuned = Table(title="Tuned", title_justify="left", box=box.SIMPLE)
            for column in ("layer", "units", "error before", "after", "scales"):
                tuned.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
            for layer in self.tuned:
                errors = (f"{layer.before:.4f}", f"{layer.after:.4f}")
                tuned.add_row(Text(layer.name), f"{layer.units:,}", *errors, f"{layer.least:.2f} to {layer.most:.2f}")
            lines.append(as_text(tuned))
        if self.skipped:
            lines.append(f"not tuned: {listed([f'{name} ({why})' for name, why in self.skipped])}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def __repr__(self) -> str:
        return f"RetrainFree(groups=<{len(self.groups)}>, macs={self.macs_after:,} of {self.macs_before:,})"
