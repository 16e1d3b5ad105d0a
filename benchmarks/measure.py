"""Time several ways of doing one job, interleaved in one process, because absolute times drift and ratios do not."""

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
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

import pyprune

SLOW = 3  # times the seconds that a way gets


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
    moved: int = 0  # bytes read and written, of a floor
    returned: int = 0  # bytes of the result, which are not extra memory
    slow: bool = False  # takes so long that only a full run measures it
    compiles: bool = False  # in its first run
    formula: bool = False  # stands in for a library that is not installed
    left_out: str = ""  # why it is not run
    memory_mib: float | None = None  # held at most beyond what existed and what is returned

    @property
    def ours(self) -> bool:
        """Whether it is pyprune's."""
        return self.name.startswith("pyprune")

    @property
    def median_ms(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples_ms)

    @property
    def label(self) -> str:
        """The name, with what must be known about it."""
        rate = f", {self.moved / self.median_ms / 1e6:.0f} GB/s" if self.moved and self.samples_ms else ""
        return self.name + (" (formula)" if self.formula else "") + rate

    def as_dict(self) -> dict[str, Any]:
        """Return what a report keeps."""
        return {
            "group": self.group,
            "way": self.name,
            "formula": self.formula,
            "is_floor": self.floor is self,
            "floor_ms": self.floor.median_ms if self.floor and self.floor.samples_ms else None,
            "moved_bytes": self.moved,
            "memory_mib": self.memory_mib,
            "left_out": self.left_out,
            "samples_ms": [round(ms, 4) for ms in self.samples_ms],
        }


def with_floor(floor: Way, ways: list[Way]) -> list[Way]:
    """Give ways their floor, and list it first."""
    for way in (floor, *ways):
        way.floor = floor
    return [floor, *ways]


def quartiles(samples: list[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def interleave(ways: list[Way], repeats: int, seconds_per_way: float, console: Console, title: str) -> None:
    """Run all ways once to warm up, then in turns, until each has its repeats or has used up its seconds.

    Ours and floors get three runs at least, others' one, after the first; but for those so slow that the first takes
    several times the seconds, and then counts. Memory is measured in runs that are not timed otherwise.
    """
    ways = [way for way in ways if not way.left_out]
    least = {id(way): 3 if way.ours or way.floor is way else 1 for way in ways}
    spent: dict[int, float] = {}
    # Without auto_refresh: no thread that draws while something is timed.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=(repeats + 2) * len(ways))

        def announce(way: Way) -> None:
            progress.update(task, description=f"{title}: {way.name}", advance=1, refresh=True)

        for way in ways:
            announce(way)
            if way.compiles:
                way.run(*way.prepare())
            spent[id(way)], way.memory_mib = run_for_memory(way)
            if spent[id(way)] >= SLOW * seconds_per_way and least[id(way)] == 1:
                way.samples_ms.append(spent[id(way)] * 1e3)
        quick = [way for way in ways if not way.samples_ms]
        for _ in range(repeats):
            for way in quick:
                announce(way)
                if spent[id(way)] < seconds_per_way or len(way.samples_ms) < min(least[id(way)], repeats):
                    arguments = way.prepare()
                    start = time.perf_counter()
                    way.run(*arguments)
                    seconds = time.perf_counter() - start
                    spent[id(way)] += seconds
                    way.samples_ms.append(seconds * 1e3)
        for way in quick:
            announce(way)
            _, way.memory_mib = run_for_memory(way)  # without what a first run loads


def run_for_memory(way: Way) -> tuple[float, float | None]:
    """Run once; return the seconds, and the peak of resident memory without what is returned, in MiB (Linux only)."""
    arguments = way.prepare()
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    before = None
    if peak.exists():
        ctypes.CDLL(None).malloc_trim(0)
        peak.write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    start = time.perf_counter()
    result = way.run(*arguments)
    seconds = time.perf_counter() - start
    mib = None if before is None else round(max(0, resident("VmHWM") - before - way.returned) / 2**20, 2)
    del result
    return seconds, mib


def set_threads(count: int) -> None:
    """Use so many threads: in torch, in pyprune, which follows it, and in what is compiled from now on."""
    torch.set_num_threads(count)
    torch._dynamo.reset()
    torch._inductor.config.cpp.threads = count


def machine_speeds(mib: int = 256) -> dict[str, Any]:
    """Measure a sweep that only reads and a copy, through memory that no cache holds."""
    source = torch.ones(mib * 2**18)
    target = torch.empty_like(source)
    read = Way("speeds", "read", source.amax, moved=source.nbytes)
    copy = Way("speeds", "copy", lambda: target.copy_(source), moved=2 * source.nbytes)
    interleave([read, copy], 9, 1.0, Console(quiet=True), "")
    speeds = {f"{way.name}_gb_per_s": round(way.moved / way.median_ms / 1e6, 2) for way in (read, copy)}
    samples = {f"{way.name}_samples_ms": way.as_dict()["samples_ms"] for way in (read, copy)}
    return {"threads": torch.get_num_threads(), "mib": mib} | speeds | samples


def environment() -> dict[str, Any]:
    """Describe what the samples were measured on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # near 0 on a machine that does nothing else
        "torch": torch.__version__,
        "pyprune": dict(pyprune.build_info()),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table_of(title: str, ways: list[Way], weight_bytes: int | None = None) -> Table:
    """Show medians beside the floor, and beside our first way in the same part; extra memory if it was measured."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for column in ("median ms", "quartiles", "x floor", "x pyprune", "runs"):
        table.add_column(column, justify="right")
    if weight_bytes:
        table.add_column("extra MiB", justify="right")
        table.add_column("of weights", justify="right")
    for group, members in groupby(ways, key=lambda way: way.group):
        part = list(members)
        ours = next((way for way in part if way.ours and way.samples_ms), None)
        table.add_row(f"[bold]{group}")
        for way in part:
            end = way is part[-1]
            if not way.samples_ms:
                table.add_row(f"  {way.label}", "left out: " + way.left_out, end_section=end)
                continue
            first, third = quartiles(way.samples_ms)
            cells = [
                f"  {way.label}",
                f"{way.median_ms:,.2f}",
                f"{first:,.2f} - {third:,.2f}",
                f"{way.median_ms / way.floor.median_ms:,.2f}" if way.floor else "",
                f"{way.median_ms / ours.median_ms:,.2f}" if ours and way is not way.floor else "",
                str(len(way.samples_ms)),
            ]
            if weight_bytes and way.memory_mib is not None:
                cells += [f"{way.memory_mib:,.1f}", f"{way.memory_mib * 2**20 / weight_bytes:.0%}"]
            table.add_row(*cells, end_section=end)
    return table
