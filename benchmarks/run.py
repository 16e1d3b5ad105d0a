"""Time pyprune's kernels beside other libraries and beside the speed of the memory.

All ways of a job run in one process, in turns; medians are compared. Without options it takes about ten minutes and
7 GB of memory on two cores; --full over an hour and 17 GB.
"""

import argparse
import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf_peer
import torch
import torch_pruning_peer
from goals import Verdict, verdicts
from measure import Way, environment, interleave, machine_speeds, set_threads, table_of
from plan import BENCH, FULL, JOBS, PEERS, QUICK, Slice
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import DISTRIBUTIONS, DTYPES, MODELS, Case

NOTES = """\
x floor         medians, beside a way that only moves the bytes that the job must move; in training, the dense step
x pyprune       medians, beside our first way in the same part
quartiles       of the samples that the median is of
extra MiB       resident memory at its peak, without what existed and what is returned (masks: a byte per weight)
(formula)       stands in for a library that is not installed, or for what that does not offer
remaining       half of the masks' zeros are there before; caps: no weight may lose more than 75 %, which half of
                them would, because every other weight is three times as large
masks           floor: ops.threshold with nothing to remove, which finds no threshold; new masks pay for fresh memory
N:M             along the input channels, which channels_last has next to each other; where torch's default layout is
                measured beside it, they are not
whole call      also puts the masks on layers, and NNCF traces a call of the model to find them. Elsewhere NNCF
                chooses masks anew, into those that are there
torch_prune     memory: of the state too, which is twice the weights
gates           floor: reads weight and logit, writes; reads these and a gradient, writes two. One tensor: as many
                gates as the model has weights; our outputs exist, unless it says fresh
compiled        under torch.compile; the time to compile is left out
SparseGPT       floor: as many multiplications as the Cholesky factor and the updates take, in products of matrices;
                torch's rate. Gram: of half of the product
smaller         half of each group goes; x floor is beside a forward pass on as many threads, and of the result beside
                the dense network, both on one thread. Torch-Pruning was told what it does not find: the last layer
                and the heads"""


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)} (default: all)")
    parser.add_argument("--model", choices=MODELS, nargs="+", help=f"one or more of {', '.join(MODELS)}", metavar="M")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="of the weights")
    parser.add_argument("--ratio", type=float, nargs="+", help="fractions to remove (default: 0.7)")
    parser.add_argument("--weights", choices=DISTRIBUTIONS, nargs="+", help="their distribution (default: normal)")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="of torch and of pyprune (default: torch's own number)"
    )
    parser.add_argument("--peers", choices=PEERS, help="other ways to run (default: quick, those of a few seconds)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile takes part in")
    parser.add_argument("--repeats", type=int, default=9, help="of each way, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="a way gets at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples and the environment here")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="ResNet-50 in float32, 3 repeats, half a second per way")
    size.add_argument("--full", action="store_true", help="everything, slice by slice (see plan.py)")
    arguments = parser.parse_args(words)
    unknown = [job for job in arguments.jobs if job not in JOBS]
    if unknown:
        parser.error(f"there is no job {', '.join(unknown)}; choose from {', '.join(JOBS)}")
    if any(not 0 < ratio < 1 for ratio in arguments.ratio or ()):
        parser.error(f"--ratio is {arguments.ratio}; every ratio must be above 0 and below 1")
    if any(threads < 1 for threads in arguments.threads or ()):
        parser.error(f"--threads is {arguments.threads}; every number must be at least 1")
    if arguments.repeats < 1 or arguments.seconds <= 0:
        parser.error(f"--repeats is {arguments.repeats}, --seconds {arguments.seconds}; both must be above 0")
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        parser.error(f"--json is {arguments.json}; make its directory first")
    if arguments.quick:
        arguments.repeats, arguments.seconds = 3, 0.5
    return arguments


def slices_of(arguments: argparse.Namespace) -> list[Slice]:
    """Return the plan, narrowed to the jobs and with the axes that the command line names."""
    plan = FULL if arguments.full else QUICK if arguments.quick else BENCH
    axes = {
        "models": arguments.model,
        "dtypes": arguments.dtype,
        "ratios": arguments.ratio,
        "weights": arguments.weights,
        "threads": arguments.threads,
    }
    given = {name: tuple(values) for name, values in axes.items() if values}
    given |= {"peers": arguments.peers} if arguments.peers else {}
    chosen = []
    for part in plan:
        jobs = tuple(job for job in part.jobs if not arguments.jobs or job in arguments.jobs)
        if jobs:
            chosen.append(replace(part, jobs=jobs, **given))
    return chosen


def chosen_ways(job: str, case: Case, peers: str, compiles: bool) -> list[Way]:
    """Build the ways of a job; keep our own and the floor, and the peers that are wanted."""
    torch.manual_seed(0)
    ways: list[Way] = JOBS[job].ways(case)
    return [
        way
        for way in ways
        if (compiles or not way.compiles)
        and (way.ours or way.floor is way or peers == "all" or (peers == "quick" and not way.slow))
    ]


def table_of_goals(judged: list[Verdict]) -> Table:
    table = Table(title="Goals", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("", "wanted", "on", "measured", ""):
        table.add_column(column)
    for verdict in judged:
        outcome = "reached" if verdict.reached else "[red]missed"
        table.add_row(
            f"{verdict.group}: {verdict.against}",
            verdict.wanted,
            f"{verdict.model}, {verdict.dtype}",
            verdict.text,
            outcome,
        )
    return table


def write(path: Path, report: dict[str, Any]) -> None:
    """Write JSON with one way per line."""
    head = json.dumps({key: value for key, value in report.items() if key != "results"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in report["results"])
    path.write_text(f'{head[:-2]},\n "results": [\n{rows}\n]\n}}\n')


def measure(
    job: str, case: Case, peers: str, arguments: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Measure a job on one case, show it, and return what a report keeps."""
    gc.collect()  # cycles of the last case may hold gigabytes
    facts, title = case.facts(), f"{job}: {case.title}"
    ways = chosen_ways(job, case, peers, not arguments.no_compile)
    interleave(ways, arguments.repeats, arguments.seconds, console, title)
    console.print(table_of(title, ways, facts["weight_bytes"]))
    return [{"job": job} | facts | way.as_dict() for way in ways]


def show_machine(machine: dict[str, Any], console: Console) -> None:
    kernels = f"pyprune {machine['pyprune']['pyprune']} ({machine['pyprune']['cpu_capability']})"
    console.print(
        f"{machine['cpu']}, torch {machine['torch']}, {kernels}, NNCF: {machine['nncf']}\n"
        f"load average at the start {machine['load_average']:.1f} (neighbours spoil figures)",
        highlight=False,
    )


def show_speeds(speeds: dict[str, Any], console: Console) -> None:
    read, copied = speeds["read_gb_per_s"], speeds["copy_gb_per_s"]
    text = f"{speeds['threads']} threads: read {read:.1f} GB/s, copy {copied:.1f} GB/s (bytes read and written)\n"
    console.print(text, highlight=False)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    start = time.perf_counter()
    console = Console() if Console().is_terminal else Console(width=150)
    machine = environment() | {"nncf": nncf_peer.VERSION, "torch_pruning": torch_pruning_peer.VERSION}
    show_machine(machine, console)
    report: dict[str, Any] = {"environment": machine, "speeds": [], "results": []}
    cases: dict[tuple[str, Case], str] = {}
    for part in slices_of(arguments):
        for job_and_case in part.cases(machine["threads"]):
            cases.setdefault(job_and_case, part.peers)
    if not cases:
        raise SystemExit("none of these jobs can be measured on such a model and dtype: see MODELS in its file")
    for (job, case), peers in cases.items():
        set_threads(case.threads)
        if case.threads not in [speeds["threads"] for speeds in report["speeds"]]:
            report["speeds"].append(machine_speeds())
            show_speeds(report["speeds"][-1], console)
        report["results"] += measure(job, case, peers, arguments, console)
        report["seconds"] = round(time.perf_counter() - start)
        if arguments.json is not None:
            write(arguments.json, report)  # so that an interruption loses little
    console.print(NOTES, highlight=False, markup=False)
    judged = verdicts(report["results"])
    if judged:
        console.print()
        console.print(table_of_goals(judged))
    console.print(f"Took {report['seconds']} s.")


if __name__ == "__main__":
    main()
