"""The picture of a one-shot pruning: what is lost of the outputs, block by block."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyprune.files import whole_file


def draw(
    masked: Mapping[str, Sequence[float]], solved: Mapping[str, Sequence[float]], path: str | os.PathLike[str]
) -> None:
    """Draw the errors of the weights of each block: those by the masks alone, and those that are left.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot takes matplotlib; pip install matplotlib") from error

    figure = Figure(figsize=(min(20.0, max(6.0, 2 + 0.35 * len(solved))), 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(solved))
    for errors, color, label in ((masked, "#bbbbbb", "masked"), (solved, "#c0392b", "solved")):
        means = [sum(some) / len(some) for some in errors.values()]
        axes.plot(places, means, "o-", color=color, markersize=4, label=label, zorder=3)
        for place, some in zip(places, errors.values(), strict=True):
            axes.plot([place] * len(some), some, ".", color=color, markersize=3, alpha=0.5, zorder=2)
    axes.set_xticks(places, list(solved), rotation=90 if len(solved) > 6 else 0, fontsize=8)
    axes.set(xlabel="block", ylabel="share of the output that is lost", ylim=(0, None))
    axes.set_title("Error of the weights of each block, and their mean")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(path)
    with whole_file(path if path.suffix else path.with_suffix(".png")) as unfinished:
        figure.savefig(unfinished, dpi=120)
