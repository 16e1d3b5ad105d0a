"""What `accelerate` did: a table, and JSON."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from pyprune.checks import check_path
from pyprune.console import as_html, as_text
from pyprune.files import write_json

_VERSION = 1


@dataclass(frozen=True)
class AcceleratedLayer:
    """A weight with zeros, or one that could have them.

    Args:
        name: of the layer, or of the weight where that is no layer that can be replaced.
        zeros: the share of zeros in its weight.
        layout: of the weight now; "dense" where it was left.
        gain: how many times faster its products are, or would be: the best that was measured; None if nothing was.
        dense_bytes, bytes: of the weight, before and now.
        reason: why it is dense.
    """

    name: str
    zeros: float
    layout: str
    gain: float | None
    dense_bytes: int
    bytes: int
    reason: str = ""


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did to a model; ``str()`` is a table.

    Args:
        layers: in the order of the model.
        speedup: how many times faster the model is, 1.0 if nothing was replaced.
        milliseconds: of a run, dense and replaced; None if no layer was faster.
        difference: of outputs, relative to their norm.
        threads: of torch, for which all was measured.
        reason: why nothing was replaced, though layers were faster.
    """

    layers: tuple[AcceleratedLayer, ...]
    speedup: float = 1.0
    milliseconds: tuple[float, float] | None = None
    difference: float = 0.0
    threads: int = 1
    reason: str = ""

    @property
    def replaced(self) -> list[str]:
        """The names of the layers that are no longer dense."""
        return [layer.name for layer in self.layers if layer.layout != "dense"]

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON."""
        return {"version": _VERSION} | asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; whoever reads it meanwhile sees the old one or the new one, whole."""
        check_path("path", path)
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        from rich.table import Table
        from rich.text import Text

        table = Table("layer", "zeros", "layout", "gain", "bytes", "dense", "reason", box=None, pad_edge=False)
        for column in (1, 3, 4, 5):
            table.columns[column].justify = "right"
        shown = [layer for layer in self.layers if layer.zeros]
        for layer in shown:
            table.add_row(
                Text(layer.name), f"{layer.zeros:.1%}", layer.layout, f"{layer.gain:.2f} x" if layer.gain else "",
                f"{layer.bytes:,}", f"{layer.dense_bytes:,}", Text(layer.reason),
            )  # fmt: skip
        lines = [as_text(table)] if shown else []
        if len(shown) < len(self.layers):
            lines.append(f"{len(self.layers) - len(shown)} weights without zeros stay dense")
        if self.milliseconds is None:
            lines.append("nothing was replaced")
        else:
            before, now = self.milliseconds
            if self.replaced:
                lines.append(
                    f"{len(self.replaced)} of {len(self.layers)} weights replaced: {before:,.3f} ms before, "
                    f"{now:,.3f} ms now, {self.speedup:.2f} x as fast with {self.threads} threads; outputs differ by "
                    f"{self.difference:.1e} of their norm"
                )
            else:
                lines.append(f"{self.reason}: {before:,.3f} ms dense, {now:,.3f} ms with layers replaced")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html(str(self))
