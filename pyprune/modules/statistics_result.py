"""What a count of pruned weights has found, and its table."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyprune.console import as_html, as_text

# With title and sums it is to fit on a screen.
_ROWS = 32
# So few blocks say too little.
_FEW = 4


@dataclass(frozen=True)
class TensorPruningStatistic:
    """How much of one weight is pruned; units are what was removed as one, down to single elements."""

    tensor_name: str
    shape: tuple[int, ...]
    pruned_ratio: float
    units: int
    pruned_units: int
    macs: int | None = None
    macs_without_zeros: int | None = None


@dataclass(frozen=True, repr=False)
class ModelPruningStatistic:
    """How much of a model is pruned: of the weights that are listed, and of all parameters.

    `str` and notebooks show a table, by block where there are more than 32 weights. What has nothing left is marked.
    """

    pruning_ratio: float
    global_pruning_ratio: float
    pruned_tensors: tuple[TensorPruningStatistic, ...]
    macs: int | None = None
    macs_without_zeros: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON."""
        tensors = [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.pruned_tensors]
        return asdict(self) | {"pruned_tensors": tensors}

    def to_text(self, *, shortened: bool = True) -> str:
        """Return the table: of blocks where there are more than 32 weights, or of every weight.

        Example:
            >>> "weight" in ModelPruningStatistic(0.0, 0.0, ()).to_text(shortened=False)
            True
        """
        if not isinstance(shortened, bool):
            raise TypeError(f"shortened is {shortened!r}; give True or False")
        return _table(self, shortened)

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def __repr__(self) -> str:
        macs = "" if self.macs is None else f", macs={self.macs}, macs_without_zeros={self.macs_without_zeros}"
        ratios = f"pruning_ratio={self.pruning_ratio:.4g}, global_pruning_ratio={self.global_pruning_ratio:.4g}"
        return f"ModelPruningStatistic({ratios}, pruned_tensors=<{len(self.pruned_tensors)}>{macs})"


def _table(statistic: ModelPruningStatistic, shortened: bool) -> str:
    """Return the table: a row for each weight, or for each block of the model if there are many weights."""
    # Imported here: `import pyprune` must cost little.
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tensors, title = statistic.pruned_tensors, "Pruning statistics"
    parts = [(tensor.tensor_name, [tensor]) for tensor in tensors]
    by_block = shortened and len(tensors) > _ROWS
    if by_block:
        parts = _blocks(tensors)
        title += f" by block; to_text(shortened=False) lists all {len(tensors)} weights"
    left_out = len(parts) - _ROWS if by_block and len(parts) > _ROWS else 0
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_footer=True)
    footer = "the weights above\nall parameters of the model, biases and norms too"
    table.add_column("block" if by_block else "weight", footer, overflow="fold")
    table.add_column("" if by_block else "shape", justify="right")
    ratios = f"{statistic.pruning_ratio:.2%}\n{statistic.global_pruning_ratio:.2%}"
    table.add_column("pruned", ratios, justify="right")
    table.add_column("units pruned", _of(tensors), justify="right")
    if statistic.macs is not None:
        table.add_column(
            "MACs without zeros", f"{statistic.macs_without_zeros:,}\nof {statistic.macs:,} dense", justify="right"
        )
    table.add_column("")
    for i, (name, some) in enumerate(parts):
        if left_out and i == _ROWS // 2:
            table.add_row(f"... and {left_out} more")
        if left_out and _ROWS // 2 <= i < _ROWS // 2 + left_out:
            continue
        shape = f"{len(some)} weight{'s' * (len(some) > 1)}" if by_block else " x ".join(map(str, some[0].shape))
        macs = [] if statistic.macs is None else [f"{sum(tensor.macs_without_zeros or 0 for tensor in some):,}"]
        # Text, because a name with brackets in it is no markup.
        table.add_row(Text(name), shape, f"{_ratio(some):.2%}", _of(some), *macs, _mark(some))
    return as_text(table)


def _blocks(tensors: Sequence[TensorPruningStatistic]) -> list[tuple[str, list[TensorPruningStatistic]]]:
    """Group weights by the block of the model that they lie in: up to the first number in their names that tells."""
    for depth in (1, 2, 3):
        blocks: dict[str, list[TensorPruningStatistic]] = {}
        for tensor in tensors:
            numbered = re.match(rf"(?:(?:\w+\.)*?\d+(?=\.)\.?){{1,{depth}}}", tensor.tensor_name)
            name = numbered.group().rstrip(".") if numbered else tensor.tensor_name
            blocks.setdefault(name, []).append(tensor)
        if len(blocks) >= _FEW:
            break
    return list(blocks.items())


def _of(tensors: Sequence[TensorPruningStatistic]) -> str:
    return f"{sum(one.pruned_units for one in tensors):,} of {sum(one.units for one in tensors):,}"


def _ratio(tensors: Sequence[TensorPruningStatistic]) -> float:
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    zeros = sum(tensor.pruned_ratio * size for tensor, size in zip(tensors, sizes, strict=True))
    return zeros / sum(sizes) if sum(sizes) else 0.0


def _mark(tensors: Sequence[TensorPruningStatistic]) -> str:
    empty = sum(tensor.pruned_ratio == 1 for tensor in tensors)
    if not empty:
        return ""
    return "nothing left" if len(tensors) == 1 else f"nothing left of {empty}"
