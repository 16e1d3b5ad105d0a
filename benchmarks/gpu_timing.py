"""The clock of bench_gpu.py: jobs, ways of doing them, and runs in turns until time is up."""

import gc
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Way
from rich.console import Console

COPY_BYTES = 2**30
CYCLES_PER_MS = 2_000_000  # of torch.cuda._sleep, roughly


@dataclass
class GpuWay(Way):
    """A way with what else is known of its runs."""

    compiles: bool = False  # in its first run
    most: int = sys.maxsize  # weights that it can take
    host_ms: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    problem: str = ""  # why there are no samples

    def as_dict(self) -> dict[str, Any]:
        """Return what a report keeps."""
        facts = {"host_ms": self.host_ms, "extra_bytes": self.extra_bytes, "problem": self.problem}
        return super().as_dict() | facts


@dataclass
class Job:
    """What must be done, how many bytes that moves at least, and ways to do it."""

    name: str
    read: int
    written: int
    ways: list[GpuWay]
    floor_ms: float = 0.0

    def fastest(self, ours: bool) -> GpuWay | None:
        """Return our first way that was timed, or the fastest of the others."""
        timed = [way for way in self.ways if way.samples_ms and way.name.startswith("pyprune") == ours]
        return min(timed, key=lambda way: 0 if ours else way.median_ms, default=None)


class Bandwidth:
    """What the device moves: a copy, and a sweep that only reads, over memory that exists all the time."""

    def __init__(self, device: torch.device) -> None:
        source = torch.ones((COPY_BYTES if device.type == "cuda" else 2**20) // 4, device=device)
        target = torch.empty_like(source)
        for _ in range(50):  # clocks up
            target.copy_(source)
        self.bytes = source.nbytes
        self.runs = {"copy on the device": lambda: target.copy_(source), "torch.sum": lambda: source.sum()}

    def job(self) -> Job:
        return Job("bandwidth", 0, 0, [GpuWay("bandwidth", name, run) for name, run in self.runs.items()])

    def bytes_per_ms(self, job: Job) -> tuple[float, float]:
        """Return the speed of the copy and of the sweep."""
        copy, sweep = job.ways
        return 2 * self.bytes / copy.median_ms, self.bytes / sweep.median_ms


@dataclass
class Turns:
    """Runs ways in turns; remembers what they take per weight, to leave out what is too slow for larger lists."""

    cuda: bool
    repeats: int
    console: Console
    ms_per_weight: dict[tuple[str, str, str], float] = field(default_factory=dict)
    seconds_to_compile: float = 0.0

    def measure(self, jobs: list[Job], dtype: str, weights: int, seconds: float) -> None:
        """Time all ways of the jobs: each at least once, if it can be done, and then until its time is used up."""
        end = time.perf_counter() + seconds
        ways = [way for job in jobs for way in job.ways]
        spent = {id(way): 0.0 for way in ways}
        for way in ways:
            expected = self.ms_per_weight.get((dtype, way.group, way.name), 0.0) * weights / 1e3
            expected += self.seconds_to_compile if way.compiles else 0.0
            left = end - time.perf_counter()
            if weights > way.most:
                way.problem = f"not tried: torch selects among at most {way.most:,} elements"
            elif left < 0 or expected > left:
                way.problem = f"no time: would take about {expected:.1f} s" if expected else "no time left"
            else:
                spent[id(way)] = self._warm_up(way, seconds / len(ways))
        for _ in range(self.repeats):
            for way in ways:
                if not way.problem and spent[id(way)] <= seconds / len(ways):
                    start = time.perf_counter()
                    self._run(way, min(20.0, 0.3 + 1.5 * way.host_ms[-1]))
                    spent[id(way)] += time.perf_counter() - start
        for way in ways:
            if way.samples_ms and way.group != "bandwidth":
                self.ms_per_weight[dtype, way.group, way.name] = way.median_ms / weights

    def _warm_up(self, way: GpuWay, share: float) -> float:
        """Run a way; return the seconds it took. One that takes all of its share is timed by this run."""
        try:
            start = time.perf_counter()
            if way.compiles:
                way.run(*way.prepare())
                self.seconds_to_compile = time.perf_counter() - start
                start = time.perf_counter()
            self._run(way, 0.0)
            seconds = time.perf_counter() - start
            if seconds < share:
                way.samples_ms.clear()
            return seconds
        except Exception as error:
            way.problem = why(error)
        self.recover()
        return 0.0

    def _run(self, way: GpuWay, head_start_ms: float) -> None:
        """Take one sample: on a GPU between two events, after a pause in which the host gets ahead."""
        arguments = way.prepare()
        if not self.cuda:
            start = time.perf_counter()
            way.run(*arguments)
            way.samples_ms.append((time.perf_counter() - start) * 1e3)
            way.host_ms.append(way.samples_ms[-1])
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda._sleep(int(head_start_ms * CYCLES_PER_MS))
        begin.record()
        start = time.perf_counter()
        result = way.run(*arguments)
        way.host_ms.append((time.perf_counter() - start) * 1e3)
        end.record()
        end.synchronize()
        way.extra_bytes = torch.cuda.max_memory_allocated() - before
        del result
        way.samples_ms.append(begin.elapsed_time(end))

    def recover(self) -> None:
        """Give memory back after an error; raise if the device is lost."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def why(error: BaseException) -> str:
    """Say in one line why something was not measured."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "does not fit in memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
