"""Time every operator on one GPU beside torch's own ways, as multiples of the time that its bytes take to move.

Lists of weights in the shapes of Llama-like models are measured until ``--seconds`` are over; what does not fit in
memory or time is left out, and said so. A summary comes last. See ``--help`` for the options; ``benchmarks/gpu.sh``
builds, tests and then runs this.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from bench_gates import forward_backward
from bench_masks import l2_normalised
from gpu_report import Report, Weights, show, summary
from gpu_timing import Bandwidth, GpuWay, Job, Turns, why
from peers import (
    BETA,
    EPSILON,
    GAMMA,
    TARGET,
    ZETA,
    P,
    cat_kthvalue,
    cat_sort,
    cat_topk,
    eager_hard_concrete,
    kthvalue_per_tensor,
    nncf_formula,
    nncf_gate,
    nncf_rb_loss,
)
from rich.console import Console
from shapes import DTYPES
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import removed_count

NOTES = f"""\
floor           the bytes of the job, each read or written once, at the speed of a copy on the device, timed in turns
                with it; if the job only reads, of a sweep that only reads, should that be faster
times           of the device, between two events, with the launches queued beforehand. host_ms in the JSON file is
                what issuing them took: a call on an idle device takes at least that
(+ MiB)         held at most beyond what existed before the run, new outputs included
one tensor      as many gates as the list has weights, logits in float32; outputs exist, unless it says fresh
NNCF's formula  masks: torch.cat of |w| / ||w||_2, and kthvalue. Gates: w * (sigmoid(m + logit(u)) > 1/2), u clamped
                to {EPSILON} from 0 and 1"""
LARGEST_SELECTION = 2**31 - 1


def llama(hidden: int, inner: int, layers: int, kv: int, vocab: int) -> list[tuple[int, ...]]:
    """List the matrices of a Llama-like model: embedding, attention and gated layers, output."""
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layer = [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]
    return [(vocab, hidden), *layer * layers, (vocab, hidden)]


SIZES = {
    "tiny": llama(64, 128, 2, 32, 512),  # to try this file out
    "100M": llama(640, 1728, 12, 640, 32000),
    "1B": llama(2048, 5632, 22, 256, 32000),  # of TinyLlama
    "8B": llama(4096, 14336, 32, 1024, 128256),  # of Llama 3
}


def views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    ends = list(accumulate(prod(shape) for shape in shapes))
    return [flat[end - prod(shape) : end].view(shape) for end, shape in zip(ends, shapes, strict=True)]


def make_weights(size: str, dtype: str, device: torch.device) -> Weights:
    shapes = SIZES[size]
    flat = torch.empty(sum(map(prod, shapes)), dtype=DTYPES[dtype], device=device)
    tensors = views(flat, shapes)
    torch.manual_seed(0)
    for tensor in tensors:
        tensor.normal_(0, 1 / sqrt(tensor.shape[1]))
    return Weights(size, dtype, flat, tensors)


# --- the jobs -----------------------------------------------------------------------------------------------------


def nncf_formula_sorted(weights: list[Tensor], ratio: float) -> list[Tensor]:
    scores = torch.cat([(weight.abs() / weight.norm(2)).flatten() for weight in weights])
    bound = scores.sort().values[int((scores.numel() - 1) * ratio)]
    return [weight.abs() / weight.norm(2) > bound for weight in weights]


def sort_per_tensor(weights: list[Tensor], removed: list[int]) -> list[Tensor]:
    scores = [weight.abs() for weight in weights]
    bounds = [score.flatten().sort().values[count - 1] for score, count in zip(scores, removed, strict=True)]
    return [score > bound for score, bound in zip(scores, bounds, strict=True)]


def job_of(name: str, read: int, written: int, ways: dict[str, Callable[[], Any]], most: int = sys.maxsize) -> Job:
    """Build a job; `most` weights are what torch's ways can take."""
    limits = {way: sys.maxsize if way.startswith("pyprune") else most for way in ways}
    return Job(name, read, written, [GpuWay(name, way, run, most=limits[way]) for way, run in ways.items()])


def mask_jobs(weights: Weights, ratio: float) -> list[Job]:
    tensors, read, written = weights.tensors, weights.flat.nbytes, weights.count
    masks = [torch.ones_like(tensor, dtype=torch.bool) for tensor in tensors]
    removed = removed_count(weights.count, ratio)
    each = [removed_count(tensor.numel(), ratio) for tensor in tensors]
    raw: dict[str, Callable[[], Any]] = {
        "pyprune": lambda: ops.threshold(tensors, removed, masks=masks),
        "pyprune, new masks": lambda: ops.threshold(tensors, removed),
        "torch.cat + topk": lambda: cat_topk(tensors, removed),
        "torch.cat + sort": lambda: cat_sort(tensors, removed),
        "torch.cat + kthvalue": lambda: cat_kthvalue(tensors, removed),
    }
    normalised: dict[str, Callable[[], Any]] = {
        "pyprune": lambda: l2_normalised(tensors, removed, masks),
        "NNCF's formula, sort": lambda: nncf_formula_sorted(tensors, ratio),
        "NNCF's formula (kthvalue)": lambda: nncf_formula(tensors, ratio),
    }
    local: dict[str, Callable[[], Any]] = {
        "pyprune": lambda: ops.threshold(tensors, each, masks=masks),
        "sort per tensor": lambda: sort_per_tensor(tensors, each),
        "kthvalue per tensor": lambda: kthvalue_per_tensor(tensors, each),
    }
    return [
        job_of("global masks, |w|", read, written, raw, LARGEST_SELECTION),
        job_of("global masks, L2-normalised", read, written, normalised, LARGEST_SELECTION),
        job_of("local masks", read, written, local),
    ]


def sweep_jobs(weights: Weights, ratio: float) -> list[Job]:
    """Build what goes over the list once. Folding comes last: it changes the weights."""
    tensors, count, size = weights.tensors, weights.count, weights.flat.nbytes
    removed = removed_count(count, ratio)
    masks, _ = ops.threshold(tensors, removed)
    gone = count - sum(int(mask.count_nonzero()) for mask in masks)
    if gone != removed:
        raise RuntimeError(f"pyprune removed {gone} weights instead of {removed}")
    norms = {"pyprune": lambda: ops.norms(tensors), "torch._foreach_norm": lambda: torch._foreach_norm(tensors)}
    counts = {
        "pyprune": lambda: ops.count_zeros(masks),
        "torch.count_nonzero": lambda: [torch.count_nonzero(mask) for mask in masks],
        "(mask == 0).sum()": lambda: [(mask == 0).sum() for mask in masks],
    }
    folds = {
        "pyprune": lambda: ops.fold(tensors, masks),
        "torch._foreach_mul_, bool masks": lambda: torch._foreach_mul_(tensors, masks),
    }
    return [
        job_of("norms", size, 0, norms),
        job_of("count zeros of masks", count, 0, counts),
        job_of("fold", size + count, size, folds),
    ]


# In the order of their rules, 0 and 1.
GATES = {
    "Bernoulli": (ops.bernoulli_gate, nncf_gate, "NNCF's formula"),
    "hard concrete": (ops.hard_concrete_gate, eager_hard_concrete, "torch"),
}


def gate_jobs(name: str, weights: Weights, ratio: float) -> list[Job]:
    ours, theirs, label = GATES[name]
    torch._dynamo.reset()  # or its limit of recompilations would leave later sizes uncompiled
    shapes = [tuple(tensor.shape) for tensor in weights.tensors]
    weight = weights.flat.detach().requires_grad_()
    seed = torch.tensor(5, device=weight.device)
    logits = torch.empty_like(weight, dtype=torch.float32).normal_(2, 2).requires_grad_()
    grad = torch.empty_like(weight, requires_grad=False).normal_()
    outputs = [torch.empty_like(one, requires_grad=False) for one in (weight, weight, logits)]
    inputs = (weight.detach(), logits.detach(), seed, 0, list(GATES).index(name), BETA, GAMMA, ZETA)
    lists = [[one.detach().requires_grad_() for one in views(flat, shapes)] for flat in (weight, logits)]
    grads = views(grad, shapes)

    def both() -> None:
        torch.ops.pyprune.gate_out(*inputs, outputs[0])
        torch.ops.pyprune.gate_backward_out(grad, *inputs, *outputs[1:])

    def sampled(weight: Tensor, logits: Tensor) -> Tensor:
        return ours(weight, logits, torch.randint(-(2**63), 2**63 - 1, (), device=weight.device))

    def whole(gate: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: forward_backward(gate, [weight], [logits], [grad])

    def listed(gate: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: forward_backward(gate, *lists, grads)

    w, g = grad.nbytes, logits.nbytes
    read, written = w + g + 2 * w + g, w + w + g
    one, autograd = f"{name} gate, one tensor", f"{name} gate, list, autograd"
    compiled = torch.compile(theirs, dynamic=False)
    ways = [
        GpuWay(one, "pyprune", both),
        GpuWay(one, "pyprune, fresh outputs, autograd", whole(sampled)),
        GpuWay(one, f"{label}, compiled", whole(compiled), compiles=True),
        GpuWay(one, f"{label}, eager", whole(theirs)),
    ]
    return [
        Job(one, read, written, ways),
        job_of(autograd, read, written, {"pyprune": listed(sampled), f"{label}, eager": listed(theirs)}),
    ]


def penalty_jobs(weights: Weights, ratio: float) -> list[Job]:
    torch._dynamo.reset()
    shapes = [tuple(tensor.shape) for tensor in weights.tensors]
    whole = torch.empty_like(weights.flat).normal_(2, 2).requires_grad_()
    logits = [one.detach().requires_grad_() for one in views(whole, shapes)]

    def loss() -> Tensor:
        return ((ops.gate_penalty(logits, hard=True).sum() / weights.count - (1 - TARGET)) / P) ** 2

    def run(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Any:
        return torch.autograd.grad(loss(), parameters)

    compiled = torch.compile(lambda: nncf_rb_loss([whole]), dynamic=False)
    name = "RB loss (gate_penalty)"
    ways = [
        GpuWay(name, "pyprune", lambda: run(loss, logits)),
        GpuWay(name, "NNCF's formula, compiled, one tensor", lambda: run(compiled, [whole]), compiles=True),
        GpuWay(name, "NNCF's formula, eager", lambda: run(lambda: nncf_rb_loss(logits), logits)),
    ]
    return [Job(name, 2 * whole.nbytes, whole.nbytes, ways)]


# What is measured together, and how much of the time it gets.
GROUPS: list[tuple[str, float, Callable[[Weights, float], list[Job]]]] = [
    ("masks", 4, mask_jobs),
    ("Bernoulli gates", 2, partial(gate_jobs, "Bernoulli")),
    ("hard-concrete gates", 2, partial(gate_jobs, "hard concrete")),
    ("RB loss", 1, penalty_jobs),
    ("norms, count, fold", 1, sweep_jobs),
]


# --- the measurement ----------------------------------------------------------------------------------------------


def measure_group(
    title: str, weights: Weights, jobs: list[Job], seconds: float, turns: Turns, bandwidth: Bandwidth, report: Report
) -> None:
    speed = bandwidth.job()
    turns.measure([speed, *jobs], weights.dtype, weights.count, seconds)
    copy, sweep = bandwidth.bytes_per_ms(speed)
    for job in jobs:
        job.floor_ms = (job.read + job.written) / (copy if job.written else max(copy, sweep))
    report.bandwidth.append({"title": title, "copy_gb_per_s": copy / 1e6, "read_gb_per_s": sweep / 1e6})
    turns.console.print(f"copy {copy / 1e6:,.0f} GB/s, read {sweep / 1e6:,.0f} GB/s", highlight=False)
    show(turns.console, title, jobs)
    report.add(weights, jobs)
    for job in jobs:  # lets go of the tensors that they hold
        for way in job.ways:
            way.run = way.prepare = tuple


def measure_all(
    arguments: argparse.Namespace, console: Console, report: Report, measured: dict[str, list[Job]]
) -> None:
    """Share the time among the groups of all lists; add the jobs of each list to `measured` as they are done."""
    start = time.perf_counter()
    device = torch.device(arguments.device)
    turns = Turns(device.type == "cuda", arguments.repeats, console)
    bandwidth = Bandwidth(device)
    shares_left = sum(share for _, share, _ in GROUPS) * len(arguments.sizes) * len(arguments.dtype)
    for size in arguments.sizes:
        for dtype in arguments.dtype:
            done = measured.setdefault(f"{size} {'bf16' if dtype == 'bfloat16' else 'fp32'}", [])
            weights = None
            for group, share, make in GROUPS:
                seconds = (arguments.seconds - time.perf_counter() + start) * share / shares_left
                shares_left -= share
                title = f"{size}, {dtype}: {group}"
                problem = "no time left" if seconds <= 0 else ""
                try:
                    if not problem:
                        weights = weights or make_weights(size, dtype, device)
                        title = f"{weights.title}: {group}"
                        jobs = make(weights, arguments.ratio)
                        measure_group(title, weights, jobs, seconds, turns, bandwidth, report)
                        done += jobs
                except Exception as error:
                    problem = why(error)
                    if not isinstance(error, torch.OutOfMemoryError):
                        report.problems.append(f"{title}: {problem}")
                if problem:
                    report.left_out.append(f"{title}: {problem}")
                    console.print(f"{title}: {problem}\n", highlight=False)
                jobs = []
                turns.recover()
                report.write(time.perf_counter() - start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="for everything (default: %(default)s)")
    parser.add_argument("--sizes", choices=SIZES, nargs="+", help="of the lists (default: 100M 1B 8B)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="(default: all)")
    parser.add_argument("--ratio", type=float, default=0.7, help="fraction to remove (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="of each way, at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write samples and environment here")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to try this file out
    arguments = parser.parse_args()
    if not 0 < arguments.ratio < 1:
        parser.error(f"--ratio is {arguments.ratio}; it must be above 0 and below 1")
    if arguments.repeats < 1 or arguments.seconds <= 0:
        parser.error("--repeats and --seconds must be above 0")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    if arguments.device == "cuda" and not ops.CUDA_KERNELS_LOADED:
        parser.error(f"the CUDA kernels of pyprune are not loaded: {ops.CUDA_PROBLEM}")
    arguments.sizes = arguments.sizes or (["tiny"] if arguments.device == "cpu" else ["100M", "1B", "8B"])
    return arguments


def main() -> int:
    arguments = parse_arguments()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    report = Report(arguments.json, torch.device(arguments.device), arguments.ratio)
    machine = report.machine
    console.print(
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}\n{machine['pyprune']}\n",
        highlight=False,
    )
    measured: dict[str, list[Job]] = {}
    try:
        measure_all(arguments, console, report, measured)
    except KeyboardInterrupt:
        report.problems.append("interrupted")
    except Exception as error:  # the device is lost, say: what was measured before still counts
        report.problems.append(f"stopped: {why(error)}")
    console.print(NOTES, highlight=False, markup=False)
    console.print()
    console.print(summary(measured, machine["device"]))
    for problem in report.problems:
        console.print(f"PROBLEM: {problem}", highlight=False, markup=False)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
