"""Time several ways of doing one job, interleaved in one process, because absolute times drift and ratios do not."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

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
