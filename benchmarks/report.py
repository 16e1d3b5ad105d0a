"""Turn the JSON of run.py into Markdown tables, into pictures, and into the figures of README and documentation.

``python benchmarks/report.py --readme README.md --page docs/performance.md --plot benchmarks/results`` rewrites what
both say between two comments, and draws speed.png and growth.png. Without options it prints every table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench_growth import GROWTH
from bench_training import STEP
from goals import Row, Verdict, beside_floor, median, usual, verdicts
from matplotlib.figure import Figure
from measure import quartiles

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures: written by benchmarks/report.py, do not edit -->", "<!-- figures: end -->"
NAMES = {
    "resnet50": "ResNet-50",
    "bert": "BERT-base",
    "llama": "Llama-like",
    "resnet18": "ResNet-18",
    "mobilenet_v2": "MobileNetV2",
    "minilm": "MiniLM's shape",
    "float32": "fp32",
    "bfloat16": "bf16",
}
OURS, THEIRS, FLOOR = "#0072B2", "#B8C4CE", "#D55E00"
LEARNED = ("gates", "rb_loss")
TRAINING, SMALLER = "training", "shrink"
FRESH = ("pyprune, fresh outputs", "floor in fresh memory")
# What rows of the tables say.
LABELS = {
    FRESH[0]: "ours into fresh memory",
    FRESH[1]: "its floor into fresh memory",
    "floor": "beside its floor",
    "worst weights": "on the worst weights",
    "extra memory": "memory it takes",
    "memory of torch.nn.utils.prune": "memory, beside theirs",
}
Column = tuple[str, str]  # model and dtype


def name_of(column: Column) -> str:
    return " ".join(NAMES.get(part, part) for part in column)


def columns_of(rows: list[Row]) -> list[Column]:
    return list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))


def multiple(times: float) -> str:
    return f"{times:.2f} x" if times < 1.995 else f"{times:.1f} x" if times < 9.95 else f"{times:,.0f} x"


def milliseconds(ms: float) -> str:
    return f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms" if ms < 99.5 else f"{ms:,.0f} ms"


def label(row: Row) -> str:
    return row["way"] + (" (formula)" if row["formula"] else "")


def find(rows: list[Row], **facts: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in facts.items())), None)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in [header, *lines]]
    rows = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join([rows[0], "|---" * len(header) + "|", *rows[1:]])


# --- tables -------------------------------------------------------------------------------------------------------


def machine(report: dict[str, Any]) -> str:
    facts = report["environment"]
    kernels = f"pyprune {facts['pyprune']['pyprune']} ({facts['pyprune']['cpu_capability']})"
    speeds = max(report["speeds"], key=lambda speeds: speeds["threads"])
    return (
        f"{facts['cpu']}, {speeds['threads']} threads, torch {facts['torch']}, {kernels}, NNCF {facts['nncf']}. "
        f"In the same run, memory was read at {speeds['read_gb_per_s']:.0f} GB/s and copied at "
        f"{speeds['copy_gb_per_s']:.0f} GB/s (bytes read and written). {facts['date'][:10]}."
    )


def goals_tables(report: dict[str, Any]) -> str:
    """Show what was wanted and what was measured: of what works on masks, what learns them, what makes smaller."""
    judged = verdicts(report["results"])
    learned = [row for row in usual(report["results"]) if row["job"] in LEARNED]
    smaller = [row for row in usual(report["results"]) if row["job"] == SMALLER]
    chosen = [row for row in usual(report["results"]) if row["job"] not in (*LEARNED, TRAINING, SMALLER)]
    return "\n\n".join(goals_table(rows, judged) for rows in (chosen, learned, smaller) if rows)


def goals_table(rows: list[Row], judged: list[Verdict]) -> str:
    """Show our time per job, and below it each peer and the floor beside it, with what was wanted."""
    judged = [verdict for verdict in judged if find(rows, group=verdict.group)]
    columns = columns_of([row for row in rows if row["group"] in {verdict.group for verdict in judged}])
    lines = []
    for group in dict.fromkeys(verdict.group for verdict in judged):
        ours = [find(rows, group=group, way="pyprune", model=model, dtype=dtype) for model, dtype in columns]
        lines.append([f"**{group}**", *(f"**{milliseconds(median(row))}**" if row else "" for row in ours)])
        goals = [verdict.against for verdict in judged if verdict.group == group]
        also = [way for way in (*FRESH, "floor") if any(measured(rows, row, way) for row in ours)]
        for against in dict.fromkeys([*goals, *also]):
            found = {
                (verdict.model, verdict.dtype): verdict
                for verdict in judged
                if (verdict.group, verdict.against) == (group, against)
            }
            without_goal = [measured(rows, row, against) for row in ours]
            cells = [
                judged_cell(found[column]) if column in found else text
                for column, text in zip(columns, without_goal, strict=True)
            ]
            lines.append([LABELS.get(against, f"`{against}`" if "." in against else against), *cells])
    return markdown(["", *map(name_of, columns)], lines)


def judged_cell(verdict: Verdict) -> str:
    measured = multiple(verdict.measured) if verdict.unit == "x" else f"{verdict.measured:.1f} {verdict.unit}"
    text = f"{measured} ({'≥' if verdict.at_least else '≤'} {verdict.limit:.3g})"
    return text if verdict.reached else f"**{text} ✗**"


def measured(rows: list[Row], ours: Row | None, against: str) -> str:
    """Return the multiple of a peer or of the floor where nothing was wanted."""
    if ours is None:
        return ""
    if against == "floor":
        return multiple(beside_floor(ours)) if ours["floor_ms"] else ""
    peer = find(rows, group=ours["group"], way=against, model=ours["model"], dtype=ours["dtype"])
    return multiple(median(peer) / median(ours)) if peer else ""


def training_table(rows: list[Row]) -> str:
    """Show what a training step costs, as multiples of the dense one."""
    judged = {(verdict.group, verdict.model): verdict for verdict in verdicts(rows) if verdict.against == "floor"}
    rows = [row for row in rows if row["group"].startswith(STEP)]
    columns = columns_of(rows)
    lines = []
    for group, way in dict.fromkeys((row["group"], row["way"]) for row in rows):
        cells = [find(rows, group=group, way=way, model=model, dtype=dtype) for model, dtype in columns]
        lines.append([f"{group}: {way}", *(step_cell(row, judged) for row in cells)])
    return markdown(["", *map(name_of, columns)], lines)


def step_cell(row: Row | None, judged: dict[tuple[str, str], Verdict]) -> str:
    """Return a step's multiple of the dense one; of ours with what was wanted."""
    if row is None:
        return ""
    if row["is_floor"]:
        return milliseconds(median(row))
    verdict = judged.get((row["group"], row["model"])) if row["way"] == "pyprune" else None
    return judged_cell(verdict) if verdict else multiple(beside_floor(row))


def every_way(rows: list[Row]) -> str:
    """Show all that was measured in one case."""
    lines = []
    for row in rows:
        if not row["samples_ms"]:
            lines.append([row["group"], label(row), f"left out: {row['left_out']}"])
            continue
        ours = next((one for one in rows if one["group"] == row["group"] and one["way"].startswith("pyprune")), None)
        first, third = quartiles(row["samples_ms"])
        memory = row["memory_mib"]
        lines.append(
            [
                row["group"],
                label(row),
                f"{median(row):,.2f}",
                f"{first:,.2f} - {third:,.2f}",
                f"{beside_floor(row):,.2f}" if row["floor_ms"] else "",
                f"{median(row) / median(ours):,.2f}" if ours and not row["is_floor"] else "",
                str(len(row["samples_ms"])),
                "" if memory is None else f"{memory:,.1f}",
                "" if memory is None else f"{memory * 2**20 / row['weight_bytes']:.0%}",
            ]
        )
    header = ["", "", "median ms", "quartiles", "x floor", "x pyprune", "runs", "extra MiB", "of weights"]
    return markdown(header, [line + [""] * (len(header) - len(line)) for line in lines])


def every_table(report: dict[str, Any]) -> str:
    """Show everything: what the page shows, and each case in full."""
    parts = [machine(report), goals_tables(report)]
    cases: dict[str, list[Row]] = {}
    for row in report["results"]:
        facts = f"ratio {row['ratio']}, {row['weights']} weights, {row['threads']} threads"
        size = f"{row['tensors']} tensors, {row['count'] / 1e6:,.1f}M weights"
        cases.setdefault(f"{name_of((row['model'], row['dtype']))} ({size}), {facts}", []).append(row)
    parts += [f"## {title}\n\n{every_way(rows)}" for title, rows in cases.items()]
    return "\n\n".join(["# All that was measured", *parts]) + "\n"


def page_section(report: dict[str, Any]) -> str:
    """Return what docs/performance.md shows: all that has a goal, the training steps, the pictures."""
    training = training_table(usual(report["results"]))
    return "\n\n".join(
        [
            BEGIN,
            machine(report),
            goals_tables(report),
            "A training step, eager and under `torch.compile`, as a multiple of the dense one:",
            training,
            "![How many times longer other ways take](../benchmarks/results/speed.png)",
            "![Cost of global masks against the number of weights](../benchmarks/results/growth.png)",
            END,
        ]
    )


def readme_section(report: dict[str, Any]) -> str:
    """Return five figures, for those who read no further."""
    rows = usual(report["results"])

    def ours(group: str, model: str) -> Row:
        row = find(rows, group=group, way="pyprune", model=model, dtype="float32")
        if row is None:
            raise ValueError(f"the results lack {group!r} of {model}; measure it with run.py --full")
        return row

    def times(group: str, model: str, peer: str) -> str:
        return measured(rows, ours(group, model), peer)

    threshold, drop_in = "global masks, |w|", "torch_prune.global_unstructured"
    step, gates = f"{STEP}, masked", "Bernoulli gates, one tensor"
    small = ours(threshold, "resnet50")
    memory = small["memory_mib"] / (small["weight_bytes"] / 2**20)
    lines = [
        [
            f"masks of a ResNet-50 ({small['count'] / 1e6:.1f}M weights), one threshold for all; the kernels alone",
            milliseconds(median(small)),
            f"`torch.nn.utils.prune` takes {times(threshold, 'resnet50', 'torch.nn.utils.prune')} as long, "
            f"`torch.cat` and `kthvalue` {times(threshold, 'resnet50', 'torch.cat + kthvalue')}, "
            f"moving the bytes and nothing else {1 / beside_floor(small):.2f} x",
        ],
        [
            "memory for that, beyond weights and masks",
            f"{small['memory_mib']:.1f} MiB",
            f"{memory:.0%} of the weights",
        ],
        [
            "the drop-in `torch_prune.global_unstructured`, a whole call on a ResNet-50",
            milliseconds(median(ours(drop_in, "resnet50"))),
            f"torch's own takes {times(drop_in, 'resnet50', 'torch.nn.utils.prune')} as long",
        ],
        [
            "a training step of a ResNet-18 with masks on, batch 32",
            multiple(beside_floor(ours(step, "resnet18"))),
            "of the dense step",
        ],
        [
            "learned gates of a ResNet-50, forward and backward",
            milliseconds(median(ours(gates, "resnet50"))),
            f"NNCF's formula takes {times(gates, 'resnet50', 'NNCF, eager')} as long, "
            f"compiled {times(gates, 'resnet50', 'NNCF, compiled')}",
        ],
    ]
    return "\n\n".join([BEGIN, machine(report), markdown(["", "pyprune", ""], lines), END])


def with_section(text: str, section: str) -> str:
    """Return a file with what stands between the two comments replaced."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(
            f"the file lacks the lines {BEGIN!r} and {END!r}, in this order; write them where figures go"
        )
    return before + section + after


# --- pictures -----------------------------------------------------------------------------------------------------


def is_peer(row: Row) -> bool:
    return not row["is_floor"] and not row["way"].startswith(("pyprune", "floor")) and bool(row["samples_ms"])


def draw_speed(report: dict[str, Any], path: Path) -> None:
    """Draw how many times longer than ours each peer takes, and where the floor is."""
    rows = [row for row in usual(report["results"]) if row["job"] not in (TRAINING, SMALLER, "growth")]
    model, dtype = columns_of(rows)[0]
    rows = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
    beside = {row["group"] for row in rows if is_peer(row)}
    ours = {row["group"]: row for row in rows if row["way"] == "pyprune" and row["group"] in beside}
    peers = {group: [row for row in rows if row["group"] == group and is_peer(row)] for group in ours}
    order = sorted(ours, key=lambda group: find(rows, group=group)["job"] in LEARNED)
    heights = [len(peers[group]) + 1.6 for group in order]
    cut = min(range(1, len(order) + 1), key=lambda place: max(sum(heights[:place]), sum(heights[place:])))
    panels = [panel for panel in (order[:cut], order[cut:]) if panel]
    height = max(sum(heights[:cut]), sum(heights[cut:]))
    marks = {group: row["floor_ms"] / median(row) for group, row in ours.items() if row["floor_ms"]}
    longest = max(median(row) / median(ours[group]) for group, some in peers.items() for row in some)
    limits = (min(0.5, 0.8 * min(marks.values(), default=1)), 4 * longest)

    figure = Figure(figsize=(7.2 * len(panels), 0.29 * height + 1.5), layout="constrained")
    axes_of_panels = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"wspace": 0.1})[0]
    for axes, panel in zip(axes_of_panels, panels, strict=True):
        y = 0.0
        for group in panel:
            across = axes.get_yaxis_transform()  # x from 0 to 1, y as in the data
            axes.text(0, y, group, transform=across, fontweight="bold", va="center")
            time = milliseconds(median(ours[group]))
            axes.text(1, y, time, transform=across, va="center", ha="right", color=OURS, fontweight="bold")
            top = y + 0.5
            for row in peers[group]:
                y += 1
                times = median(row) / median(ours[group])
                axes.barh(y, times - 1, left=1, color=THEIRS, height=0.7)
                axes.text(max(times, 1) * 1.08, y, multiple(times), va="center", fontsize=9)
                axes.text(-0.01, y, label(row), transform=across, va="center", ha="right", fontsize=9)
            axes.vlines(1, top, y + 0.5, color=OURS, linewidth=2.5)
            if group in marks:
                axes.vlines(marks[group], top, y + 0.5, color=FLOOR, linewidth=2.5)
            y += 1.6
        axes.set(xscale="log", xlim=limits, ylim=(height - 0.6, -0.6), yticks=[])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} x")
        axes.spines[["top", "right", "left"]].set_visible(False)
    facts = report["environment"]
    threads = max(row["threads"] for row in rows)
    on = f"{name_of((model, dtype))}, {facts['cpu']}, {threads} threads, torch {facts['torch']}"
    figure.suptitle(f"How many times longer than pyprune\n{on}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes_of_panels[-1].plot([], [], color=OURS, linewidth=2.5, label="pyprune, 1 x (its time on the right)")
    axes_of_panels[-1].plot([], [], color=FLOOR, linewidth=2.5, label="floor: only moves the bytes")
    figure.legend(loc="upper right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_growth(report: dict[str, Any], path: Path) -> None:
    """Draw the cost of global masks against the number of weights, beside a straight line."""
    rows = [row for row in usual(report["results"]) if row["group"] == GROWTH and row["samples_ms"]]
    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = {
        "pyprune": {"color": OURS, "linewidth": 2.2, "zorder": 3},
        "floor: read weights, write masks": {"color": FLOOR, "linewidth": 1.3},
        "torch.cat + kthvalue": {"color": "#6B7A88", "linewidth": 1.6},
    }
    for way, style in styles.items():
        for dtype, line in (("float32", "-"), ("bfloat16", "--")):
            points = sorted(
                (row["count"], median(row)) for row in rows if row["way"] == way and row["dtype"] == dtype
            )
            if points:
                name = f"{way.partition(':')[0]}, {NAMES[dtype]}"
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, label=name, **style)
    ours = sorted(
        (row["count"], median(row)) for row in rows if row["way"] == "pyprune" and row["dtype"] == "float32"
    )
    last_count, last_ms = ours[-1]
    counts = [ours[0][0], last_count]
    line = [last_ms * count / last_count for count in counts]
    axes.plot(counts, line, color="black", linewidth=0.9, linestyle=":", label="proportional", zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="weights", ylabel="ms")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    facts = report["environment"]
    threads = max(row["threads"] for row in rows)
    axes.set_title(f"Global masks: {facts['cpu']}, {threads} threads", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def load(paths: list[Path]) -> dict[str, Any]:
    """Join the results of several runs; the machine is that of the first."""
    reports = [json.loads(path.read_text()) for path in paths]
    return reports[0] | {"results": [row for report in reports for row in report["results"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = RESULTS / "cpu.json"
    parser.add_argument("json", type=Path, nargs="*", default=[default], help="of run.py (default: results/cpu.json)")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="put the main figures into this file")
    parser.add_argument("--page", type=Path, metavar="PATH", help="put all figures into this file")
    parser.add_argument("--plot", type=Path, metavar="DIRECTORY", help="draw speed.png and growth.png here")
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.json if not path.is_file()]
    if missing:
        parser.error(f"there is no file {', '.join(missing)}; write one with run.py --json")
    report = load(arguments.json)
    for path, section in ((arguments.readme, readme_section), (arguments.page, page_section)):
        if path is not None:
            path.write_text(with_section(path.read_text(), section(report)))
    if arguments.plot is not None:
        draw_speed(report, arguments.plot / "speed.png")
        draw_growth(report, arguments.plot / "growth.png")
    if arguments.readme is arguments.page is arguments.plot is None:
        print(every_table(report), end="")


if __name__ == "__main__":
    main()
