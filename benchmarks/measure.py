"""Time several ways of doing one job, interleaved in one process, because absolute times drift and ratios do not."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shapes import DTYPES, MODELS

import pyprune


@dataclass
class Way:
    """One way of doing a job: what is timed, and what is done before each run without being timed.

    Its floor is a way that only moves the bytes that the job must move.
    """

    group: str
    name: str
    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    floor: "Way | None" = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples_ms)

    def as_dict(self) -> dict[str, Any]:
        """Return what a report keeps."""
        return {"group": self.group, "way": self.name, "samples_ms": self.samples_ms}


def with_floor(floor: Way, ways: list[Way]) -> list[Way]:
    """Give ways their floor, and list it first."""
    for way in (floor, *ways):
        way.floor = floor
    return [floor, *ways]


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS), help="shapes (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="(default: all)")
    parser.add_argument("--threads", type=int, help="of torch and of pyprune (default: torch's own)")
    parser.add_argument("--repeats", type=int, default=15, help="of each way (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="a way gets at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the samples and the environment here")
    parser.add_argument("--quick", action="store_true", help="ResNet-50 in float32, 3 repeats, half a second per way")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the command line."""
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.dtype, arguments.repeats, arguments.seconds = ["resnet50"], ["float32"], 3, 0.5
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; it must be at least 1")
    return arguments


@contextmanager
def measured(
    arguments: argparse.Namespace, console: Console, results: list[dict[str, Any]], notes: str, facts: dict[str, Any]
) -> Iterator[None]:
    """Say what is measured on before, and what the tables mean after; then write the results that were gathered."""
    start = time.perf_counter()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    machine = environment()
    kernels = f"pyprune {machine['pyprune']['pyprune']} ({machine['pyprune']['cpu_capability']})"
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {kernels}\n"
        f"load average at the start {machine['load_average']:.1f} (neighbours spoil figures)\n",
        highlight=False,
    )
    yield
    console.print(notes, highlight=False)
    console.print(f"Took {time.perf_counter() - start:.0f} s.")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"environment": machine} | facts | {"results": results}, indent=1) + "\n"
        )


def interleave(ways: list[Way], repeats: int, seconds_per_way: float, console: Console, title: str) -> None:
    """Run all ways once to warm up, then in turns, until each has its repeats or has used up its seconds.

    A way so slow that its first run uses up the seconds gets this one run.
    """
    spent = dict.fromkeys(range(len(ways)), 0.0)
    # Without auto_refresh: no thread that draws while something is timed.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=(repeats + 1) * len(ways))
        for turn in range(repeats + 1):
            for index, way in enumerate(ways):
                progress.update(task, description=f"{title}: {way.name}", refresh=True)
                if spent[index] < seconds_per_way:
                    arguments = way.prepare()
                    start = time.perf_counter()
                    way.run(*arguments)
                    seconds = time.perf_counter() - start
                    spent[index] += seconds
                    if turn > 0 or seconds >= seconds_per_way:
                        way.samples_ms.append(seconds * 1e3)
                progress.advance(task)


def environment() -> dict[str, Any]:
    """Describe what the samples were measured on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # near 0 on a machine that does nothing else
        "torch": torch.__version__,
        "pyprune": dict(pyprune.build_info()),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table_of(title: str, ways: list[Way]) -> Table:
    """Show medians beside the floor, and beside our first way in the same part."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for column in ("median ms", "x floor", "x pyprune", "runs"):
        table.add_column(column, justify="right")
    for group, members in groupby(ways, key=lambda way: way.group):
        part = list(members)
        ours = next((way for way in part if way.name.startswith("pyprune")), None)
        table.add_row(f"[bold]{group}")
        for way in part:
            table.add_row(
                f"  {way.name}",
                f"{way.median_ms:,.2f}",
                f"{way.median_ms / way.floor.median_ms:,.2f}" if way.floor else "",
                f"{way.median_ms / ours.median_ms:,.2f}" if ours and way is not way.floor else "",
                str(len(way.samples_ms)),
                end_section=way is part[-1],
            )
    return table
