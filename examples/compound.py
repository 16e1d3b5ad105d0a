"""Prune and quantise a trained transformer without training: which is worth its bytes, zeros or fewer bits?

The models and texts are those of one_shot.py, and so is how they are judged. All matrices of the blocks are pruned
by SparseGPT (`prune_one_shot`), and their weights become float32, bfloat16 or integers of 8, 4 or 3 bits, a scale
for each row or (g128) for each 128 columns of it. They are rounded in one of two ways: "after" pruning, to the next
point of the grid of the dense weight, and "jointly", by ``solvers.sparsegpt(quantize=...)``, where the columns that
follow make up for what was rounded, too.

Bits are those of a weight of these matrices, with scales of 16 bits: "packed", all values or a bit for each weight
and the values that are not zero, whichever is less, and "entropy", what coding integers one by one takes at least.
"Not dominated" is what no other row has in fewer packed bits with a better judgement.

Run it with ``make compound`` (eight minutes on one core), and ``make compound MODEL=smollm2`` (over an hour; half of
that with ``ARGS="--patterns dense '50 %' '70 %'"``). ``--json PATH`` writes the table, ``--plot PATH`` draws it as in
the documentation.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from one_shot import Case, console, minilm, smollm2
from one_shot_texts import load_texts
from rich import box
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import scope, solvers

# Of each pattern how much goes, and what competes.
PATTERNS = {
    "dense": (0.0, scope.tensor()),
    "30 %": (0.3, scope.tensor()),
    "50 %": (0.5, scope.tensor()),
    "2:4": (None, scope.n_of_m(keep=2, of=4)),
    "70 %": (0.7, scope.tensor()),
    "80 %": (0.8, scope.tensor()),
}
# A float type, or the grid of integers with a scale for each row, or for each group of columns.
TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": solvers.grid(bits=8),
    "int4-g32": solvers.grid(bits=4, group=32),
    "int4-g128": solvers.grid(bits=4, group=128),
    "int3-g128": solvers.grid(bits=3, group=128),
}
AFTER, JOINTLY = "after", "jointly"
SCALE_BITS = 16


@dataclass(frozen=True)
class Row:
    """What became of a model: how bad it is, the zeros of its matrices, and the bits of one of their weights.

    Args:
        pattern, type, way: of pruning, of the weights, and of rounding them.
        judged: what the judge of the case says; less is better.
        sparsity: the fraction of zeros, those of rounding too.
        packed, entropy: bits per weight; the entropy of integers only.
        megabytes: of the matrices, packed.
    """

    pattern: str
    type: str
    way: str
    judged: float
    sparsity: float
    packed: float
    entropy: float | None
    megabytes: float


def measure(case: Case, pattern: str, types: Sequence[str]) -> Iterator[Row]:
    """Prune copies of the model by a pattern, and judge them with weights of these types."""
    pruned, names = prune(case, pattern, None)
    dense = {name: case.model.get_parameter(name).detach() for name in names}
    for one in types:
        is_type = isinstance(TYPES[one], torch.dtype)
        yield judged(case, pattern, one, "" if is_type else AFTER, rounded(pruned, dense, TYPES[one]), dense)
        if not is_type:
            yield judged(case, pattern, one, JOINTLY, prune(case, pattern, TYPES[one])[0], dense)


def prune(case: Case, pattern: str, grid: Any) -> tuple[nn.Module, list[str]]:
    """Return a pruned copy of the model, on a grid if there is one, and the names of the weights."""
    ratio, competing = PATTERNS[pattern]
    model = copy.deepcopy(case.model)
    result = pyprune.prune_one_shot(
        model, case.batches, competing, ratio=ratio, solver=solvers.sparsegpt(quantize=grid)
    )
    return pyprune.strip(model), [weight.name for weight in result.weights]


@torch.no_grad()
def rounded(pruned: nn.Module, dense: dict[str, Tensor], kind: Any) -> nn.Module:
    """Return a copy whose weights are rounded to a type, or to the grid of the dense weight, with its zeros."""
    model = copy.deepcopy(pruned)
    for name, weight in dense.items():
        values = model.get_parameter(name)
        is_type = isinstance(kind, torch.dtype)
        values.copy_(values.to(kind) if is_type else kind.round(values, *kind.steps(weight)))
    return model


@torch.no_grad()
def judged(case: Case, pattern: str, one: str, way: str, model: nn.Module, dense: dict[str, Tensor]) -> Row:
    """Judge a model, and count the bits of its matrices."""
    kind = TYPES[one]
    is_type = isinstance(kind, torch.dtype)
    bits = kind.itemsize * 8 if is_type else kind.bits
    total = zeros = scales = 0
    entropy = 0.0
    for name, weight in dense.items():
        values = model.get_parameter(name)
        total += values.numel()
        zeros += values.numel() - int(values.count_nonzero())
        if not is_type:
            scale, _ = kind.steps(weight)
            scales += SCALE_BITS * scale.numel()
            entropy += entropy_of(values, scale, kind.group)
    packed = (min(bits * total, total + bits * (total - zeros)) + scales) / total
    coded = None if is_type else (entropy + scales) / total
    return Row(pattern, one, way, case.judge(model), zeros / total, packed, coded, packed * total / 8e6)


def entropy_of(values: Tensor, scale: Tensor, group: int | None) -> float:
    """Return how many bits the integers of a weight take together, by their frequencies in it."""
    by_column = scale.repeat_interleave(group, 1)[:, : values.shape[1]] if group else scale
    counts = (values / by_column).round().unique(return_counts=True)[1].double()
    return float((counts * (values.numel() / counts).log2()).sum())


# ---- what is shown ----


def not_dominated(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other beats in packed bits and judgement at once, by bits."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.packed, row.judged)):
        if not found or row.judged < found[-1].judged:
            found.append(row)
    return found


def show(case: Case, rows: Sequence[Row], what: str) -> None:
    title = f"{case.name}, pruned and quantised over {what}, nothing trained"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("pattern", "weights", "rounded"):
        table.add_column(column)
    for column in (case.judged_by, "zeros", "bits\npacked", "bits,\nentropy", "MB", "not\ndominated"):
        table.add_column(column, justify="right")
    best = not_dominated(rows)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row.pattern,
            row.type,
            row.way,
            f"{row.judged:.4f}" if row.judged < 10 else f"{row.judged:.1f}",
            f"{row.sparsity:.1%}",
            f"{row.packed:.2f}",
            "" if row.entropy is None else f"{row.entropy:.2f}",
            f"{row.megabytes:.1f}",
            "*" if row in best else "",
            end_section=following is None or following.pattern != row.pattern,
        )
    console.print(table)


def plot(case: Case, rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    shades = ("#333333", "#E69F00", "#0072B2", "#009E73", "#CC3311", "#882255")
    shapes = ("P", "X", "o", "^", "s", "v")
    colors, markers = dict(zip(PATTERNS, shades, strict=True)), dict(zip(TYPES, shapes, strict=True))
    best = [row for row in rows if row.way != AFTER]
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for row in best:
        hollow = {"markerfacecolor": "white"} if row.pattern != "dense" else {}
        axes.plot(row.packed, row.judged, markers[row.type], color=colors[row.pattern], markersize=8, **hollow)
    front = [row for row in not_dominated(best) if row.judged > 0]  # the scale is logarithmic
    line = {"color": "#8A97A3", "linewidth": 1.2, "zorder": 0}
    axes.plot([row.packed for row in front], [row.judged for row in front], **line)
    axes.set(xlabel="bits of a weight, packed", xscale="log", yscale="log")
    axes.set_ylabel(f"{case.judged_by} (less is better)")
    # Perplexities lie within a decade or two, distances do not.
    by_decades = case.judged_by != "perplexity"
    axes.yaxis.set_major_locator(LogLocator() if by_decades else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_locator(FixedLocator([2, 3, 4, 6, 8, 12, 16, 32]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    of_types = [
        axes.plot([], [], shape, color="#555555", label=one)[0]
        for one, shape in markers.items()
        if any(row.type == one for row in best)
    ]
    of_patterns = [
        axes.plot([], [], "-", color=color, linewidth=4, label=pattern)[0]
        for pattern, color in colors.items()
        if any(row.pattern == pattern for row in best)
    ]
    figure.legend(handles=[*of_patterns, *of_types], loc="outside right center", frameon=False, fontsize=9)
    title = f"{case.name}, pruned and quantised without training"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=110)


def main() -> None:
    models = {"minilm": minilm, "smollm2": smollm2}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(models), default="minilm")
    parser.add_argument(
        "--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), help="(default: all)"
    )
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES), help="(default: all)")
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help="where Debian's books are")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw quality against bits here")
    arguments = parser.parse_args()

    calibration, held_out, what = load_texts(arguments.texts)
    console.print(f"Texts: {what}", highlight=False)
    case = models[arguments.model](calibration, held_out)
    rows: list[Row] = []
    for pattern in arguments.patterns:
        for row in measure(case, pattern, arguments.types):
            rows.append(row)
            console.print(f"{pattern}, {row.type} {row.way}: {case.judged_by} {row.judged:.4f}", highlight=False)
    show(case, rows, what)
    if arguments.json is not None:
        content = {"model": case.name, "judged_by": case.judged_by, "texts": what, "rows": [*map(asdict, rows)]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot(case, rows, arguments.plot)


if __name__ == "__main__":
    main()
