"""What a benchmark measured: a table, a picture, JSON."""

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pyprune.analysis.benchmark_plot import draw
from pyprune.checks import check_count, check_number, check_path, shown
from pyprune.console import as_html, as_text
from pyprune.files import write_json
from pyprune.runtime.timing import gain

_VERSION = 1
# How the costs of a model are called in a table.
COSTS = {
    "peak_memory": "peak memory",
    "memory": "weights in memory",
    "file": "file",
    "zipped_file": "file, zipped",
    "sparse_file": "file, sparse",
    "parameters": "parameters",
    "nonzero": "not zero",
    "macs": "MACs",
    "macs_without_zeros": "MACs without zeros",
}


@dataclass(frozen=True)
class ModelBenchmark:
    """What was measured of one model; None is what could not be, or was not to be.

    Args:
        seconds: of each run, in order.
        peak_memory: bytes that the model and its runs take at most, in a process of their own.
        memory: bytes of parameters and buffers.
        file, zipped_file, sparse_file: bytes of its state in a file: as it is, zipped, and by `save_sparse`, of the
            dense model where it is accelerated, as are the counts that follow.
        parameters, nonzero: how many there are, and how many of them are not zero.
        macs, macs_without_zeros: multiply-accumulates of a run; a dense kernel does all of them.
        notes: why something could not be measured.

    Example:
        >>> ModelBenchmark((0.001, 0.003, 0.002)).milliseconds
        2.0
    """

    seconds: tuple[float, ...]
    peak_memory: int | None = None
    memory: int | None = None
    file: int | None = None
    zipped_file: int | None = None
    sparse_file: int | None = None
    parameters: int | None = None
    nonzero: int | None = None
    macs: int | None = None
    macs_without_zeros: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def milliseconds(self) -> float:
        """The median of the runs."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the runs, in milliseconds."""
        if len(self.seconds) == 1:
            return self.milliseconds, self.milliseconds
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return 1e3 * first, 1e3 * third


@dataclass(frozen=True)
class BenchmarkResult:
    """What `benchmark` measured; ``str()`` is a table.

    Args:
        model: of the model.
        dense: of the one beside it, if there was one.
        items: how many of ``unit`` a run takes: "images" or "tokens"; 0 where the inputs are neither.
        unit: what these are.
        setting: threads, device, and versions.

    Example:
        >>> result = BenchmarkResult(ModelBenchmark((0.01,)), ModelBenchmark((0.03,)), 2, "images")
        >>> round(result.speedup, 6), result.per_second
        (3.0, 200.0)
    """

    model: ModelBenchmark
    dense: ModelBenchmark | None = None
    items: int = 0
    unit: str = ""
    setting: Mapping[str, Any] | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster the model is than the dense one, the median over the rounds."""
        return None if self.dense is None else gain(self.dense.seconds, self.model.seconds)

    @property
    def per_second(self) -> float | None:
        """Images or tokens per second, at the median."""
        return self.items / (1e-3 * self.model.milliseconds) if self.items else None

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw times, memory, files and work beside the dense model, to a file whose suffix says the format.

        Raises:
            ImportError: without matplotlib.
        """
        check_path("path", path)
        models = {"model": self.model} | ({"dense": self.dense} if self.dense else {})
        times = {name: (one.milliseconds, *one.quartiles) for name, one in models.items()}
        costs = {text: {name: getattr(one, cost) for name, one in models.items()} for cost, text in COSTS.items()}
        draw(times, costs, path)

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON."""
        return {"version": _VERSION} | asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "BenchmarkResult":
        """Return the result that `to_dict` described.

        Raises:
            ValueError: if it is something else, or of another version.
        """
        version = content.get("version") if isinstance(content, Mapping) else None
        if type(version) is not int or version != _VERSION:
            raise ValueError(f"content is {shown(content)}, no benchmark result of version {_VERSION}")
        try:
            model = _model(content["model"])
            dense = None if content["dense"] is None else _model(content["dense"])
            if dense is not None and len(dense.seconds) != len(model.seconds):
                raise ValueError("the models have not as many runs")
            unit, setting = content["unit"], content["setting"]
            if not isinstance(unit, str) or not isinstance(setting, Mapping | None):
                raise TypeError(f"unit or setting is {shown(unit)}, {shown(setting)}")
            return cls(model, dense, check_count("items", content["items"]), unit, setting)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"content is no whole benchmark result: {error!r:.300}") from error

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; whoever reads it meanwhile sees the old one or the new one, whole."""
        check_path("path", path)
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "BenchmarkResult":
        """Read what `to_json` wrote.

        Raises:
            OSError, ValueError: if there is no such file, or it holds something else.
        """
        check_path("path", path)
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("", "model", box=None, pad_edge=False)
        if self.dense is not None:
            table.add_column("dense")
            table.add_column("left")
        for column in table.columns[1:]:
            column.justify = "right"
        models = [self.model] if self.dense is None else [self.model, self.dense]
        times = [one.milliseconds for one in models]
        table.add_row("ms, median", *(f"{time:,.3f}" for time in times), *self._left(times))
        table.add_row("ms, quartiles", *("{:,.3f} - {:,.3f}".format(*one.quartiles) for one in models))
        if self.items:
            table.add_row(f"{self.unit} / s", *(f"{1e3 * self.items / time:,.1f}" for time in times))
        for cost, text in COSTS.items():
            values = [getattr(one, cost) for one in models]
            if any(value is not None for value in values):
                cells = ("-" if value is None else f"{value:,}" for value in values)
                table.add_row(text, *cells, *self._left(values))
        lines = [as_text(table)]
        if self.speedup is not None:
            lines.append(f"{self.speedup:.2f} x as fast as dense")
        lines.append(", ".join(f"{name}: {value}" for name, value in (self.setting or {}).items()))
        names = ["model", "dense"]
        lines += [f"{name}: {note}" for name, one in zip(names, models, strict=False) for note in one.notes]
        return "\n".join(line for line in lines if line)

    def _left(self, values: list[Any]) -> list[str]:
        if self.dense is None:
            return []
        return [f"{values[0] / values[1]:.1%}" if None not in values and values[1] else ""]

    def _repr_html_(self) -> str:
        return as_html(str(self))


def _model(content: Mapping[str, Any]) -> ModelBenchmark:
    seconds = tuple(
        check_number("seconds", one, what="a positive number", least=0, open_ends=True) for one in content["seconds"]
    )
    notes = tuple(content["notes"])
    if not seconds or not all(isinstance(note, str) for note in notes):
        raise ValueError("there are no seconds, or notes are no text")
    costs = {cost: None if content[cost] is None else check_count(cost, content[cost]) for cost in COSTS}
    known = {one.name for one in fields(ModelBenchmark)}
    if set(content) != known:
        raise ValueError(f"the fields {shown(sorted(set(content) ^ known))} are too many or missing")
    return ModelBenchmark(seconds, notes=notes, **costs)
