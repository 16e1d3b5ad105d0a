"""What a one-shot pruning has done, as a table, a picture and a file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyprune.checks import check_path, shown
from pyprune.console import as_html, as_text
from pyprune.files import write_json
from pyprune.oneshot.one_shot_plot import draw

_VERSION = 1


@dataclass(frozen=True)
class PrunedWeight:
    """What became of one weight.

    Args:
        block, name: of the block, and of the weight in the model.
        removed, total: how many of its elements are gone, of how many.
        error_masked: the share of its output that is lost by the mask alone, ``tr((V-W) H (V-W)^T) / tr(W H W^T)``
            where H is the Gram of its inputs, and V the weight with zeros where the mask drops.
        error: the same for the weight as it is now, in its own dtype; without a solver it is ``error_masked``.
        damping: what the solver added to the diagonal of H, as a share of its mean; None without a solver.
        tokens: how many inputs it was measured on: one number, or one for each expert or group.
        seconds: that choosing and solving took.
    """

    block: str
    name: str
    removed: int
    total: int
    error_masked: float
    error: float
    damping: float | None
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, repr=False)
class OneShotResult:
    """What `prune_one_shot` has done; `str` and notebooks show a table.

    Attributes:
        weights: those that were pruned, in the order of the pass, each a `PrunedWeight`.
        notes: what was not done, or not as asked for: weights that stay dense, experts without tokens.
        fits: by block: the error of its output before a reconstruction and after, if there was one.

    Example:
        >>> weight = PrunedWeight("0", "0.fc.weight", 8, 16, 0.25, 0.125, 0.01, (64,), 0.1)
        >>> result = OneShotResult((weight,))
        >>> result.ratio, result.errors
        (0.5, {'0': 0.125})
    """

    weights: tuple[PrunedWeight, ...]
    notes: tuple[str, ...] = ()
    fits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The fraction of all elements of these weights that is gone."""
        total = sum(one.total for one in self.weights)
        return sum(one.removed for one in self.weights) / total if total else 0.0

    @property
    def errors(self) -> dict[str, float]:
        """The mean error of the weights of each block."""
        return {block: sum(some) / len(some) for block, some in self._by_block("error").items()}

    def _by_block(self, field: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for one in self.weights:
            found.setdefault(one.block, []).append(getattr(one, field))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON."""
        return {
            "version": _VERSION,
            "weights": [asdict(one) for one in self.weights],
            "notes": list(self.notes),
            "fits": {block: list(fit) for block, fit in self.fits.items()},
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; whoever reads it meanwhile sees the old one or the new one, whole."""
        check_path("path", path)
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "OneShotResult":
        """Read what `to_json` wrote.

        Raises:
            OSError, ValueError: if there is no such file, or it holds something else.
        """
        check_path("path", path)
        try:
            content = json.loads(Path(path).read_text())
            if not isinstance(content, dict) or content.get("version") != _VERSION:
                raise ValueError(f"{shown(content)} is no result of version {_VERSION}")
            fits = {block: (before, after) for block, (before, after) in content["fits"].items()}
            return cls(weights_of(content["weights"]), tuple(content["notes"]), fits)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a result of one-shot pruning: {error!s:.200}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the errors by block to a file whose suffix says the format, such as ``.png``.

        Raises:
            ImportError: without matplotlib.
        """
        check_path("path", path)
        draw(self._by_block("error_masked"), self._by_block("error"), path)

    def __str__(self) -> str:
        # Imported here: `import pyprune` must cost little.
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title="One-shot pruning, block by block", title_justify="left", box=box.SIMPLE)
        for column in ("weight", "removed", "of", "error, masked", "error", "damping", "tokens", "seconds"):
            table.add_column(column, justify="left" if column == "weight" else "right", overflow="fold")
        for one in self.weights:
            few, many = min(one.tokens, default=0), max(one.tokens, default=0)
            table.add_row(
                Text(one.name),
                f"{one.removed:,}",
                f"{one.total:,}",
                f"{one.error_masked:.4f}",
                f"{one.error:.4f}",
                "" if one.damping is None else f"{one.damping:g}",
                f"{few:,}" if few == many else f"{few:,} to {many:,}",
                f"{one.seconds:.2f}",
            )
        fits = [
            f"output of {name}: {before:.4f}, reconstructed {after:.4f}"
            for name, (before, after) in self.fits.items()
        ]
        return "\n".join([as_text(table), f"removed in all: {self.ratio:.2%}", *fits, *self.notes])

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def __repr__(self) -> str:
        return f"OneShotResult(weights=<{len(self.weights)}>, ratio={self.ratio:.4g}, notes=<{len(self.notes)}>)"


def weights_of(rows: Sequence[Mapping[str, Any]]) -> tuple[PrunedWeight, ...]:
    """Return what JSON made of weights as what they were.

    Raises:
        KeyError, TypeError: if it is something else.
    """
    return tuple(PrunedWeight(**{**row, "tokens": tuple(row["tokens"])}) for row in rows)
