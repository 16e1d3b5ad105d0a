"""Turn the JSON of the benchmarks into the README's tables and a bar chart.

``python benchmarks/report.py benchmarks/results/*-2-threads.json --plot speed.png`` prints the tables as Markdown. In
every part our first way is in bold, with its median; below it the others, as multiples of it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# (group, way) -> (model, dtype) -> median in ms, in the order of the file.
Medians = dict[tuple[str, str], dict[tuple[str, str], float]]
NAMES = {"resnet50": "ResNet-50", "bert": "BERT-base", "float32": "fp32", "bfloat16": "bf16"}


def medians_of(report: dict[str, Any]) -> Medians:
    medians: Medians = {}
    for result in report["results"]:
        if "samples_ms" in result:
            cells = medians.setdefault((result["group"], result["way"]), {})
            cells[result["model"], result["dtype"]] = statistics.median(result["samples_ms"])
    return medians


def our_way(group: str, medians: Medians) -> str | None:
    return next((way for part, way in medians if part == group and way.startswith("pyprune")), None)


def multiple(times: float) -> str:
    return f"{times:.1f} x" if times < 9.95 else f"{times:,.0f} x"


def markdown(report: dict[str, Any]) -> str:
    medians = medians_of(report)
    columns = list(dict.fromkeys(column for cells in medians.values() for column in cells))
    lines = [
        "| | " + " | ".join(f"{NAMES[model]} {NAMES[dtype]}" for model, dtype in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for (group, way), cells in medians.items():
        ours = our_way(group, medians)
        is_base = ours is None or way == ours
        label = f"**{group}** ({way})" if way == ours else f"{group}, {way}" if ours is None else way
        row = [
            f"{cells[column]:.1f} ms" if is_base else multiple(cells[column] / medians[group, ours][column])
            for column in columns
            if column in cells
        ]
        label = label.replace("|", r"\|")
        lines.append(f"| {label} | " + " | ".join(f"**{cell}**" if way == ours else cell for cell in row) + " |")
    environment = report["environment"]
    facts = f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}, "
    return "\n".join([*lines, "", f"{facts}{environment['date']}"])


def plot(reports: list[dict[str, Any]], path: Path) -> None:
    """Draw how many times longer than our way each peer takes, for the first model and dtype of every report."""
    bars: list[tuple[str, str, float]] = []
    for report in reports:
        medians = medians_of(report)
        for (group, way), cells in medians.items():
            ours = our_way(group, medians)
            column = next(iter(cells))
            if ours is not None and not way.lstrip().startswith(("pyprune", "floor", "forward", "backward")):
                bars.append((group, way, cells[column] / medians[group, ours][column]))
    figure = Figure(figsize=(9, 0.36 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    positions = range(len(bars))
    drawn = axes.barh(positions, [times for _, _, times in bars], color="#0072B2", height=0.65)
    axes.bar_label(drawn, [multiple(times) for _, _, times in bars], padding=3)
    axes.set_yticks(positions, [f"{group}: {way}" for group, way, _ in bars])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 2.5 * max(times for _, _, times in bars))
    axes.set_xlabel("time, as a multiple of pyprune's (logarithmic)")
    model, dtype = next(iter(next(iter(medians_of(reports[0]).values()))))
    environment = reports[0]["environment"]
    axes.set_title(
        f"{NAMES[model]} {NAMES[dtype]}, {environment['cpu']}, {environment['threads']} threads", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+", help="written by a benchmark with --json")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the multiples as a bar chart here")
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in arguments.json]
    for path, report in zip(arguments.json, reports, strict=True):
        print(f"{path.name}\n\n{markdown(report)}\n")
    if arguments.plot is not None:
        plot(reports, arguments.plot)


if __name__ == "__main__":
    main()
