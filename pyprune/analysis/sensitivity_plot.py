"""The picture of a sensitivity analysis: a heat map and curves."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyprune.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By target and ratio.
Drops = Mapping[str, Mapping[float, float]]

# So many curves can be told apart by their colours, and so many cells hold a readable number.
_NAMED_CURVES = 8
_NUMBERED_CELLS = 240
_LONGEST_NAME = 40


def draw(drops: Drops, baseline: float, path: str | os.PathLike[str]) -> None:
    """Draw the drops of each target and ratio from a baseline.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot takes matplotlib; pip install matplotlib") from error

    figure = Figure(figsize=(15, min(40.0, max(4.5, 1.6 + 0.24 * len(drops)))), layout="constrained")
    heat, curves = figure.subplots(1, 2, width_ratios=(1.1, 1))
    figure.suptitle(f"Drop of the score with one target pruned (from {baseline:.4g})")
    image = _draw_heat(heat, drops)
    figure.colorbar(image, ax=heat, label="drop", shrink=min(1.0, 6 / figure.get_figheight()))
    _draw_curves(curves, drops)
    path = Path(path)
    with whole_file(path if path.suffix else path.with_suffix(".png")) as unfinished:
        figure.savefig(unfinished, dpi=120)


def _draw_heat(axes: "Axes", drops: Drops) -> Any:
    ratios = _ratios(drops)
    worst = _worst(drops)
    # A gain is no shade of its own; what is infinite is as dark as it gets, and what was not measured stays grey.
    shades = [
        [min(max(0.0, of.get(ratio, math.nan)), worst) if ratio in of else math.nan for ratio in ratios]
        for of in drops.values()
    ]
    axes.set_facecolor("#dddddd")
    image = axes.imshow(shades, cmap="YlOrRd", vmin=0, vmax=worst, aspect="auto")
    axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axes.set_yticks(range(len(drops)), [_short(name) for name in drops], fontsize=9)
    axes.set_xlabel("ratio removed")
    axes.set_xticks([x + 0.5 for x in range(len(ratios) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(drops) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    if len(ratios) * len(drops) <= _NUMBERED_CELLS:
        digits = max(0, 1 - math.floor(math.log10(worst)))  # two of the largest
        for y, of in enumerate(drops.values()):
            for x, ratio in enumerate(ratios):
                if ratio in of:
                    color = "white" if shades[y][x] > 0.6 * worst else "#333333"
                    axes.text(x, y, f"{of[ratio]:.{digits}f}", ha="center", va="center", fontsize=8, color=color)
    return image


def _draw_curves(axes: "Axes", drops: Drops) -> None:
    from matplotlib import colormaps

    # The first to drop get colours and names; where there are many, the others show how much less they matter.
    order = sorted(drops, key=lambda name: -sum(min(drop, _worst(drops)) for drop in drops[name].values()))
    named = order if len(order) <= _NAMED_CURVES + 2 else order[:_NAMED_CURVES]
    rest = [name for name in order if name not in named]
    for i, name in enumerate(rest):
        label = f"{len(rest)} others" if i == 0 else None
        axes.plot(*_line(drops[name]), color="#bbbbbb", linewidth=0.8, label=label, zorder=1)
    for i, name in enumerate(named):
        color = colormaps["plasma"](0.9 * i / max(1, len(named) - 1))
        axes.plot(*_line(drops[name]), "o-", color=color, markersize=4, label=_short(name), zorder=3)
    axes.axhline(0, color="#888888", linewidth=0.8, zorder=2)
    axes.set(xlabel="ratio removed", ylabel="drop", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # The most sensitive first, the others last.
    handles, labels = axes.get_legend_handles_labels()
    first = 1 if rest else 0
    axes.legend(handles[first:] + handles[:first], labels[first:] + labels[:first], frameon=False, fontsize=9)


def _line(drops: Mapping[float, float]) -> tuple[list[float], list[float]]:
    """Return a curve from nothing removed on; what is infinite is not drawn."""
    points = {0.0: 0.0, **drops}
    ratios = [ratio for ratio, drop in sorted(points.items()) if drop < math.inf]
    return ratios, [points[ratio] for ratio in ratios]


def _ratios(drops: Drops) -> list[float]:
    return sorted({ratio for of in drops.values() for ratio in of})


def _worst(drops: Drops) -> float:
    """Return the largest finite drop; where nothing drops any number will do."""
    return max((drop for of in drops.values() for drop in of.values() if 0 < drop < math.inf), default=1.0)


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2 - 1
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}..{name[-half:]}"
