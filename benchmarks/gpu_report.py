"""What bench_gpu.py prints and writes."""

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Job
from measure import Way, environment, table_of
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass
class Weights:
    """A list of tensors, views of one piece of memory."""

    size: str
    dtype: str
    flat: Tensor
    tensors: list[Tensor]

    @property
    def count(self) -> int:
        """How many weights."""
        return self.flat.numel()

    @property
    def title(self) -> str:
        """Say what is measured."""
        return f"{self.size}, {self.dtype}: {len(self.tensors)} tensors, {self.count / 1e6:,.0f}M weights"


def machine_facts(device: torch.device) -> dict[str, Any]:
    facts = environment()
    if device.type != "cuda":
        return facts | {"device": "cpu", "driver": None}
    properties = torch.cuda.get_device_properties(device)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    return facts | {
        "device": properties.name,
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


class Report:
    """What was found so far; written after every group, so that an interruption loses little."""

    def __init__(self, path: Path | None, device: torch.device, ratio: float) -> None:
        self.path = path
        self.machine = machine_facts(device)
        self.bandwidth: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.problems: list[str] = []
        self.ratio = ratio

    def add(self, weights: Weights, jobs: list[Job]) -> None:
        about = {"model": weights.size, "dtype": weights.dtype, "weights": weights.count}
        for job in jobs:
            facts = about | {"bytes_read": job.read, "bytes_written": job.written, "floor_ms": job.floor_ms}
            self.results += [way.as_dict() | facts for way in job.ways]
            for way in job.ways:
                left_out = way.problem.startswith(("does not fit", "no time", "not tried"))
                if way.problem and not left_out and way.name.startswith("pyprune"):
                    self.problems.append(f"{weights.title}, {job.name}, {way.name}: {way.problem}")

    def write(self, seconds: float) -> None:
        if self.path is not None:
            content = {"environment": self.machine, "ratio": self.ratio, "seconds": seconds}
            content |= {"bandwidth": self.bandwidth, "results": self.results}
            content |= {"left_out": self.left_out, "problems": self.problems}
            self.path.write_text(json.dumps(content, indent=1) + "\n")


def show(console: Console, title: str, jobs: list[Job]) -> None:
    """Print what was measured together, with the floors, and why ways were left out."""
    rows: list[Way] = []
    for job in jobs:
        timed = [way for way in job.ways if way.samples_ms]
        if not timed:
            continue
        floor = Way(job.name, f"floor: {(job.read + job.written) / 1e9:,.2f} GB", tuple)
        floor.samples_ms = [job.floor_ms]
        floor.floor = floor
        rows.append(floor)
        for way in timed:
            extra = f"  (+ {way.extra_bytes / 2**20:,.0f} MiB)" if way.extra_bytes >= 2**19 else ""
            rows.append(replace(way, name=way.name + extra, floor=floor))
    if rows:
        console.print(table_of(title, rows))
    for job in jobs:
        for way in job.ways:
            if way.problem:
                console.print(f"  {job.name}, {way.name}: {way.problem}", highlight=False, markup=False)
    console.print()


def summary(measured: dict[str, list[Job]], device: str) -> Table:
    """Show our time beside the floor and beside the fastest other way, job by job, list by list."""
    table = Table(
        title=f"{device}: x floor of pyprune | how many times slower the fastest other way is",
        caption="-: not measured, for memory or time; the reasons are above",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for column in measured:
        table.add_column(column, justify="right")
    for name in dict.fromkeys(job.name for jobs in measured.values() for job in jobs):
        cells = []
        for jobs in measured.values():
            job = next((job for job in jobs if job.name == name), None)
            ours, theirs = (job.fastest(True), job.fastest(False)) if job else (None, None)
            floor = f"{ours.median_ms / job.floor_ms:.2f}" if job and ours else "-"
            times = f"{theirs.median_ms / ours.median_ms:.1f}x" if ours and theirs else "-"
            cells.append(f"{floor} | {times:>6}")
        table.add_row(name, *cells)
    return table
