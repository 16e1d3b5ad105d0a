"""What a sensitivity analysis has found, as a table and in files."""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyprune.analysis.sensitivity_plot import draw
from pyprune.checks import check_bool, check_count, check_number, check_path, shown
from pyprune.console import as_html, as_text
from pyprune.files import whole_file, write_json
from pyprune.methods.allocation import check_ratio
from pyprune.methods.tolerance import worsening

_VERSION = 1
_COLUMNS = ("target", "weights", "units", "ratio", "score", "drop", "better")


@dataclass(frozen=True)
class SensitivityTarget:
    """What was pruned by itself: a weight, or the heads of one attention layer, which lie in four.

    Args:
        weights: how many weights it has.
        units: into how many units they are cut, down to single elements.
        scores: the score at each ratio, in rising order of the ratios.
    """

    weights: int
    units: int
    scores: Mapping[float, float]


@dataclass(frozen=True)
class SensitivityResult:
    """The score of a model with one target pruned, for each target and ratio: what `sensitivity` returns.

    ``str()`` is a table of the scores.

    Args:
        baseline: the score of the model as it was.
        targets: by name.
        higher_is_better: False if the score is a loss or an error.
        setting: what the analysis depends on besides the score; a file is resumed only if it is the same.

    Example:
        >>> result = SensitivityResult(0.9, {"fc.weight": SensitivityTarget(40, 40, {0.5: 0.8, 0.9: 0.3})})
        >>> round(result.drop("fc.weight", 0.9), 6)
        0.6
    """

    baseline: float
    targets: Mapping[str, SensitivityTarget]
    higher_is_better: bool = True
    setting: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def scores(self) -> dict[str, dict[float, float]]:
        """The score at each ratio, by target."""
        return {name: dict(target.scores) for name, target in self.targets.items()}

    @property
    def ratios(self) -> list[float]:
        """All ratios that some target was pruned to, in rising order."""
        return sorted({ratio for target in self.targets.values() for ratio in target.scores})

    def drop(self, target: str, ratio: float) -> float:
        """Return by how much the score got worse, in its own units; infinity where the score is NaN."""
        return worsening(self.baseline, self.targets[target].scores[ratio], self.higher_is_better)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a heat map and the curves of the drops to a file whose suffix says the format, such as ``.png``.

        Raises:
            ImportError: without matplotlib.
        """
        drops = {
            name: {ratio: self.drop(name, ratio) for ratio in target.scores} for name, target in self.targets.items()
        }
        draw(drops, self.baseline, path)

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON."""
        targets = [
            {"name": name, "weights": target.weights, "units": target.units, "scores": list(target.scores.items())}
            for name, target in self.targets.items()
        ]
        return {
            "version": _VERSION,
            "baseline": self.baseline,
            "higher_is_better": self.higher_is_better,
            "setting": dict(self.setting),
            "targets": targets,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SensitivityResult":
        """Return the result that `to_dict` described.

        Raises:
            ValueError: if it is something else, or of another version.
        """
        version = content.get("version") if isinstance(content, Mapping) else None
        if type(version) is not int or version != _VERSION:
            raise ValueError(f"{shown(content)} is not a sensitivity result of version {_VERSION}")
        try:
            targets: dict[str, SensitivityTarget] = {}
            for entry in _list(content["targets"]):
                name, scores = entry["name"], _list(entry["scores"])
                if not isinstance(name, str) or name in targets:
                    raise ValueError(f"the target {shown(name)} is no name, or there twice")
                measured = {check_ratio(ratio): _score(score) for ratio, score in scores}
                if len(measured) != len(scores):
                    raise ValueError(f"{name} has two scores at one ratio")
                weights, units = (check_count(part, entry[part]) for part in ("weights", "units"))
                targets[name] = SensitivityTarget(weights, units, dict(sorted(measured.items())))
            baseline = check_number("baseline", content["baseline"], what="a finite number")
            better = check_bool("higher_is_better", content["higher_is_better"])
            setting = content["setting"]
            if not isinstance(setting, Mapping):
                raise ValueError(f"setting is {shown(setting)}, no dict")
            return cls(baseline, targets, better, setting)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a whole sensitivity result: {error!r:.300}") from error

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; whoever reads it meanwhile sees the old one or the new one, whole."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "SensitivityResult":
        """Read what `to_json` wrote.

        Raises:
            OSError, ValueError: if there is no such file, or it holds something else.
        """
        check_path("path", path)
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each score, and one without a target for the baseline. The setting is left out.

        As with `to_json`, an interruption leaves the old file as it was.
        """
        better = "higher" if self.higher_is_better else "lower"
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        writer.writerow(("", "", "", "", self.baseline, "", better))
        for name, target in self.targets.items():
            for ratio, score in target.scores.items():
                drop = self.drop(name, ratio)
                writer.writerow((name, target.weights, target.units, ratio, score, drop, better))
        with whole_file(path) as unfinished:
            unfinished.write_text(text.getvalue(), newline="")

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> "SensitivityResult":
        """Read what `to_csv` wrote.

        Raises:
            OSError, ValueError: if there is no such file, or it holds something else.
        """
        check_path("path", path)
        with open(path, newline="") as file:
            try:
                rows = list(csv.reader(file))
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: not a sensitivity result: {error}") from error
        if len(rows) < 2 or len(rows[1]) != len(_COLUMNS) or tuple(rows[0]) != _COLUMNS or rows[1][:4] != [""] * 4:
            raise ValueError(f"{path}: not a sensitivity result; its first line is {','.join(_COLUMNS)}")
        targets: dict[str, SensitivityTarget] = {}
        try:
            for name, weights, units, written, score, _, _ in rows[2:]:
                sizes = check_count("weights", int(weights)), check_count("units", int(units))
                target = targets.setdefault(name, SensitivityTarget(*sizes, {}))
                ratio = check_ratio(float(written))
                if (target.weights, target.units) != sizes or ratio in target.scores:
                    raise ValueError(f"{name} has two scores at {ratio:g}, or two sizes")
                targets[name] = with_score(target, ratio, float(score))
            baseline = check_number("baseline", float(rows[1][4]), what="a finite number")
            if rows[1][6] not in ("higher", "lower"):
                raise ValueError(f'better is {shown(rows[1][6])}; it is "higher" or "lower"')
            return cls(baseline, targets, rows[1][6] == "higher")
        except ValueError as error:
            raise ValueError(f"{path}: not a whole sensitivity result: {error}") from error

    def __str__(self) -> str:
        # Imported here: `import pyprune` must cost little.
        from rich import box
        from rich.table import Table
        from rich.text import Text

        better = "higher" if self.higher_is_better else "lower"
        title = f"Score with one target pruned\n({better} is better)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_footer=True)
        table.add_column("target", f"with none pruned: {self.baseline:.4g}", overflow="fold")
        table.add_column("weights", justify="right")
        for ratio in self.ratios:
            table.add_column(f"{ratio:g}", justify="right")
        for name, target in self.targets.items():
            scores = (f"{target.scores[ratio]:.4g}" if ratio in target.scores else "-" for ratio in self.ratios)
            # Text, because a name with brackets in it is no markup.
            table.add_row(Text(name), f"{target.weights:,}", *scores)
        return as_text(table)

    def _repr_html_(self) -> str:
        return as_html(str(self))


def _list(value: object) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{shown(value)} is no list")
    return list(value)


def _score(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a score is {shown(value)}, and no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"a score is {shown(value)}, which no float can hold") from None


def with_score(target: SensitivityTarget, ratio: float, score: float) -> SensitivityTarget:
    """Return a target with one more score.

    Example:
        >>> with_score(SensitivityTarget(4, 4, {0.5: 0.8}), 0.25, 0.9).scores
        {0.25: 0.9, 0.5: 0.8}
    """
    return SensitivityTarget(target.weights, target.units, dict(sorted({**target.scores, ratio: score}.items())))
