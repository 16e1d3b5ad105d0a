"""The picture of a benchmark: times with their quartiles, and what is left of memory, files and work."""

import os
from collections.abc import Mapping
from pathlib import Path

from pyprune.files import whole_file

_COLORS = {"model": "#c0392b", "dense": "#bbbbbb"}


def draw(
    times: Mapping[str, tuple[float, float, float]],
    costs: Mapping[str, Mapping[str, int | None]],
    path: str | os.PathLike[str],
) -> None:
    """Draw the times of one model or two, and the costs of one beside the other.

    Args:
        times: by model, the median and the quartiles, in milliseconds.
        costs: by what they are, those of each model.
        path: of the file.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot takes matplotlib; pip install matplotlib") from error

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    for place, (name, (median, first, third)) in enumerate(times.items()):
        left.bar(place, median, color=_COLORS[name], yerr=[[median - first], [third - median]], capsize=6)
        left.text(place, 0, f"{median:,.3g}", ha="center", va="bottom")
    left.set_xticks(range(len(times)), list(times))
    left.set_title("milliseconds, median and quartiles")
    known = {text: of for text, of in costs.items() if all(of.values())}
    for place, of in enumerate(known.values()):
        # Alone, a model is all there is.
        share = (of["model"] or 0) / (of.get("dense") or of["model"] or 1)
        right.barh(place, share, color=_COLORS["model"])
        right.text(share, place, f" {share:.0%}  ({of['model']:,})", va="center", fontsize=9)
    right.set_yticks(range(len(known)), list(known))
    right.invert_yaxis()
    right.set_xlim(0, 1.35)
    right.set_title("left of the dense model" if "dense" in times else "costs")
    if "dense" in times:
        right.axvline(1, color=_COLORS["dense"], zorder=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    with whole_file(path if path.suffix else path.with_suffix(".png")) as unfinished:
        figure.savefig(unfinished, dpi=120)
