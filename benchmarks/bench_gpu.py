"""Time every operator on one GPU beside torch's own ways, as multiples of the time that its bytes take to move.

First the CUDA kernels are compared with the CPU kernels. Then lists of weights in the shapes of Llama-like models are
measured until ``--seconds`` are over; what does not fit in memory or time is left out, and said so. A summary comes
last. See ``--help`` for the options; ``benchmarks/gpu.sh`` builds, tests and then runs this.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from bench_gates import forward_backward
from bench_masks import l2_normalised
from measure import Way, environment, table_of
from peers import (
    BETA,
    EPSILON,
    GAMMA,
    TARGET,
    ZETA,
    P,
    cat_kthvalue,
    eager_hard_concrete,
    kthvalue_per_tensor,
    nncf_formula,
    nncf_gate,
    nncf_rb_loss,
)
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import DTYPES
from torch import Tensor

from pyprune import ops
from pyprune.methods import removed_count

NOTES = f"""\
floor           the bytes of the job, each read or written once, at the speed of a copy on the device, timed in turns
                with it; if the job only reads, of a sweep that only reads, should that be faster
times           of the device, between two events, with the launches queued beforehand. host_ms in the JSON file is
                what issuing them took: a call on an idle device takes at least that
(+ MiB)         held at most beyond what existed before the run, new outputs included
one tensor      as many gates as the list has weights, logits in float32; outputs exist, unless it says fresh
NNCF's formula  masks: torch.cat of |w| / ||w||_2, and kthvalue. Gates: w * (sigmoid(m + logit(u)) > 1/2), u clamped
                to {EPSILON} from 0 and 1"""
COPY_BYTES = 2**30
BANDWIDTH = "bandwidth"
LARGEST_SELECTION = 2**31 - 1
CYCLES_PER_MS = 2_000_000  # of torch.cuda._sleep, roughly


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


# --- the clock ----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One run: its time on device and host, the memory it took, and whether the allocator had to ask for more."""

    ms: float
    host_ms: float
    extra_bytes: int
    allocated: bool


class CpuClock:
    """For trying this file out."""

    def run(self, call: Callable[..., Any], arguments: tuple[Any, ...], head_start_ms: float) -> Sample:
        start = time.perf_counter()
        call(*arguments)
        ms = (time.perf_counter() - start) * 1e3
        return Sample(ms, ms, 0, False)

    def recover(self) -> None:
        gc.collect()


class CudaClock:
    """Times between two events, after a pause of the device in which the host gets ahead."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(self, call: Callable[..., Any], arguments: tuple[Any, ...], head_start_ms: float) -> Sample:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        allocations = self._allocations()
        torch.cuda._sleep(int(head_start_ms * CYCLES_PER_MS))
        self.start.record()
        host = time.perf_counter()
        result = call(*arguments)
        host = time.perf_counter() - host
        self.end.record()
        self.end.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del result
        return Sample(self.start.elapsed_time(self.end), host * 1e3, extra, self._allocations() > allocations)

    def recover(self) -> None:
        """Give memory back after an error; raise if the device is lost."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _allocations(self) -> int:
        return int(torch.cuda.memory_stats().get("num_device_alloc", 0))


Clock = CpuClock | CudaClock


@dataclass
class Turns:
    """Runs ways in turns; remembers what they take per weight, to leave out what is too slow for larger lists."""

    clock: Clock
    repeats: int
    console: Console
    ms_per_weight: dict[tuple[str, ...], float] = field(default_factory=dict)
    seconds_to_compile: float = 0.0

    def measure(self, jobs: list[Job], weights: Weights, seconds: float) -> None:
        """Time all ways of the jobs: each at least once, if it can be done, and then until its time is used up."""
        begin = time.perf_counter()
        ways = [way for job in jobs for way in job.ways]
        share = seconds / len(ways)
        spent = {id(way): self._warm_up(way, weights, begin + seconds, share) for way in ways}
        for _ in range(self.repeats):
            for way in ways:
                if way.problem or spent[id(way)] > share:
                    continue
                start = time.perf_counter()
                self._take(way)
                spent[id(way)] += time.perf_counter() - start
        for way in ways:
            if way.samples_ms and way.group != BANDWIDTH:
                self.ms_per_weight[self._key(way, weights)] = way.median_ms / weights.count

    def _key(self, way: GpuWay, weights: Weights) -> tuple[str, ...]:
        return weights.dtype, way.group, way.name

    def _warm_up(self, way: GpuWay, weights: Weights, deadline: float, share: float) -> float:
        """Run a way untimed; return the seconds it took. A way that takes all of its share gets this one run."""
        expected = self.ms_per_weight.get(self._key(way, weights), 0.0) * weights.count / 1e3
        expected += self.seconds_to_compile if way.compiles else 0.0
        left = deadline - time.perf_counter()
        if weights.count > way.most:
            way.problem = f"not tried: torch selects among at most {way.most:,} elements"
        elif left < 0 or expected > left:
            way.problem = f"no time: would take about {expected:.1f} s" if expected else "no time left"
        if way.problem:
            return 0.0
        try:
            if way.compiles:
                start = time.perf_counter()
                way.run(*way.prepare())
                self.seconds_to_compile = time.perf_counter() - start
            start = time.perf_counter()
            sample = self.clock.run(way.run, way.prepare(), 0.0)
            seconds = time.perf_counter() - start
            if seconds >= share:
                self._keep(way, sample)
            else:
                way.host_ms = [sample.host_ms]
            return seconds
        except Exception as error:
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            way.problem = "does not fit in memory" if memory else f"{type(error).__name__}: {first_line(error)}"
        self.clock.recover()
        return 0.0

    def _take(self, way: GpuWay) -> None:
        head_start = min(20.0, 0.3 + 1.5 * way.host_ms[-1])
        if not way.samples_ms:
            way.host_ms.clear()  # of the warm-up
        sample = self.clock.run(way.run, way.prepare(), head_start)
        if sample.allocated:  # another way took the memory that this one had warmed up
            sample = self.clock.run(way.run, way.prepare(), head_start)
        self._keep(way, sample)

    def _keep(self, way: GpuWay, sample: Sample) -> None:
        way.samples_ms.append(sample.ms)
        way.host_ms.append(sample.host_ms)
        way.extra_bytes = sample.extra_bytes


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


class Bandwidth:
    """What the device moves: a copy, and a sweep that only reads, over memory that exists all the time."""

    def __init__(self, device: torch.device) -> None:
        elements = (COPY_BYTES if device.type == "cuda" else 2**20) // 4
        self.source = torch.ones(elements, device=device)
        self.target = torch.empty_like(self.source)
        for _ in range(50):  # clocks up
            self.target.copy_(self.source)

    def job(self) -> Job:
        return Job(
            BANDWIDTH,
            self.source.nbytes,
            self.target.nbytes,
            [
                GpuWay(BANDWIDTH, "copy on the device", lambda: self.target.copy_(self.source)),
                GpuWay(BANDWIDTH, "sweep that only reads (torch.sum)", lambda: self.source.sum()),
            ],
        )

    def bytes_per_ms(self, job: Job) -> tuple[float, float]:
        """Return the speed of the copy and of the sweep."""
        copy, sweep = job.ways
        return 2 * self.source.nbytes / copy.median_ms, self.source.nbytes / sweep.median_ms


# --- the jobs -----------------------------------------------------------------------------------------------------


def masks_from(weights: list[Tensor], bound: Tensor) -> list[Tensor]:
    return [weight.abs() > bound for weight in weights]


def cat_topk(weights: list[Tensor], removed: int) -> list[Tensor]:
    """Take the fewer: those that go, or those that stay."""
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    kept = scores.numel() - removed
    if removed < kept:
        return masks_from(weights, scores.topk(removed, largest=False, sorted=False).values.max())
    bound = scores.topk(kept, sorted=False).values.min()
    return [weight.abs() >= bound for weight in weights]


def cat_sort(weights: list[Tensor], removed: int) -> list[Tensor]:
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    return masks_from(weights, scores.sort().values[removed - 1])


def nncf_formula_sorted(weights: list[Tensor], ratio: float) -> list[Tensor]:
    scores = torch.cat([(weight.abs() / weight.norm(2)).flatten() for weight in weights])
    bound = scores.sort().values[int((scores.numel() - 1) * ratio)]
    return [weight.abs() / weight.norm(2) > bound for weight in weights]


def sort_per_tensor(weights: list[Tensor], removed: list[int]) -> list[Tensor]:
    scores = [weight.abs() for weight in weights]
    bounds = [score.flatten().sort().values[count - 1] for score, count in zip(scores, removed, strict=True)]
    return [score > bound for score, bound in zip(scores, bounds, strict=True)]


def mask_jobs(weights: Weights, ratio: float) -> list[Job]:
    tensors = weights.tensors
    masks = [torch.ones_like(tensor, dtype=torch.bool) for tensor in tensors]
    removed = removed_count(weights.count, ratio)
    each = [removed_count(tensor.numel(), ratio) for tensor in tensors]

    def job(name: str, ours: dict[str, Callable[[], Any]], theirs: dict[str, Callable[[], Any]], most: int) -> Job:
        ways = [GpuWay(name, way, run) for way, run in ours.items()]
        ways += [GpuWay(name, way, run, most=most) for way, run in theirs.items()]
        return Job(name, weights.flat.nbytes, weights.count, ways)

    return [
        job(
            "global masks, |w|",
            {
                "pyprune": lambda: ops.threshold(tensors, removed, masks=masks),
                "pyprune, new masks": lambda: ops.threshold(tensors, removed),
            },
            {
                "torch.cat + topk": lambda: cat_topk(tensors, removed),
                "torch.cat + sort": lambda: cat_sort(tensors, removed),
                "torch.cat + kthvalue": lambda: cat_kthvalue(tensors, removed),
            },
            LARGEST_SELECTION,
        ),
        job(
            "global masks, L2-normalised",
            {"pyprune": lambda: l2_normalised(tensors, removed, masks)},
            {
                "NNCF's formula, sort": lambda: nncf_formula_sorted(tensors, ratio),
                "NNCF's formula (kthvalue)": lambda: nncf_formula(tensors, ratio),
            },
            LARGEST_SELECTION,
        ),
        job(
            "local masks",
            {"pyprune": lambda: ops.threshold(tensors, each, masks=masks)},
            {
                "sort per tensor": lambda: sort_per_tensor(tensors, each),
                "kthvalue per tensor": lambda: kthvalue_per_tensor(tensors, each),
            },
            sys.maxsize,
        ),
    ]


def sweep_jobs(weights: Weights, ratio: float) -> list[Job]:
    """Build what goes over the list once. Folding comes last: it changes the weights."""
    tensors, count, size = weights.tensors, weights.count, weights.flat.nbytes
    removed = removed_count(count, ratio)
    masks, _ = ops.threshold(tensors, removed)
    gone = count - sum(int(mask.count_nonzero()) for mask in masks)
    if gone != removed:
        raise RuntimeError(f"pyprune removed {gone} weights instead of {removed}")
    norms = [
        GpuWay("norms", "pyprune", lambda: ops.norms(tensors)),
        GpuWay("norms", "torch._foreach_norm", lambda: torch._foreach_norm(tensors)),
    ]
    counts = [
        GpuWay("count zeros of masks", "pyprune", lambda: ops.count_zeros(masks)),
        GpuWay("count zeros of masks", "torch.count_nonzero", lambda: [torch.count_nonzero(mask) for mask in masks]),
        GpuWay("count zeros of masks", "(mask == 0).sum()", lambda: [(mask == 0).sum() for mask in masks]),
    ]
    folds = [
        GpuWay("fold", "pyprune", lambda: ops.fold(tensors, masks)),
        GpuWay("fold", "torch._foreach_mul_, bool masks", lambda: torch._foreach_mul_(tensors, masks)),
    ]
    return [
        Job("norms", size, 0, norms),
        Job("count zeros of masks", count, 0, counts),
        Job("fold", size + count, size, folds),
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

    def forward() -> None:
        torch.ops.pyprune.gate_out(*inputs, outputs[0])

    def backward() -> None:
        torch.ops.pyprune.gate_backward_out(grad, *inputs, *outputs[1:])

    def both() -> None:
        forward()
        backward()

    def sampled(weight: Tensor, logits: Tensor) -> Tensor:
        return ours(weight, logits, torch.randint(-(2**63), 2**63 - 1, (), device=weight.device))

    def whole(gate: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: forward_backward(gate, [weight], [logits], [grad])

    def listed(gate: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: forward_backward(gate, *lists, grads)

    w, g = grad.nbytes, logits.nbytes
    one, autograd = f"{name} gate, one tensor", f"{name} gate, list, autograd"
    compiled = torch.compile(theirs, dynamic=False)
    return [
        Job(
            one,
            w + g + 2 * w + g,
            w + w + g,
            [
                GpuWay(one, "pyprune", both),
                GpuWay(one, "pyprune, fresh outputs, autograd", whole(sampled)),
                GpuWay(one, f"{label}, compiled", whole(compiled), compiles=True),
                GpuWay(one, f"{label}, eager", whole(theirs)),
            ],
        ),
        Job(f"{name} gate, forward", w + g, w, [GpuWay(f"{name} gate, forward", "pyprune", forward)]),
        Job(f"{name} gate, backward", 2 * w + g, w + g, [GpuWay(f"{name} gate, backward", "pyprune", backward)]),
        Job(
            autograd,
            w + g + 2 * w + g,
            w + w + g,
            [GpuWay(autograd, "pyprune", listed(sampled)), GpuWay(autograd, f"{label}, eager", listed(theirs))],
        ),
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


# --- equality with the CPU ----------------------------------------------------------------------------------------


def same_bits(one: Tensor, other: Tensor) -> bool:
    a, b = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


def close(one: Tensor, other: Tensor) -> bool:
    tolerance = max(1e-6, 4 * torch.finfo(one.dtype).eps)
    return torch.allclose(one.detach().cpu().double(), other.detach().double(), rtol=tolerance, atol=1e-6)


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copy to the device, in the same layout; leaves if they were."""
    return [
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        .copy_(tensor.detach())
        .requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def check_lists(weights: list[Tensor], device: torch.device) -> Iterator[tuple[str, bool]]:
    """Compare the operators on lists."""
    theirs = on(device, *weights)
    total = sum(weight.numel() for weight in weights)
    norms, device_norms = ops.norms(weights), ops.norms(theirs)
    yield "norms", same_bits(device_norms, norms)
    for name, removed, scaled in (
        ("threshold, global", total * 7 // 10, False),
        ("threshold, L2-normalised", total * 7 // 10, True),
        ("threshold, local", [weight.numel() // 2 for weight in weights], False),
        ("threshold, nothing and everything", [i % 2 * weight.numel() for i, weight in enumerate(weights)], True),
    ):
        scales = (norms.reciprocal(), device_norms.reciprocal()) if scaled else (None, None)
        masks, nonfinite = ops.threshold(weights, removed, scales=scales[0])
        found, found_nonfinite = ops.threshold(theirs, removed, scales=scales[1])
        equal = all(map(same_bits, [*found, found_nonfinite], [*masks, nonfinite]))
        yield name, equal
    yield "count_zeros of masks", same_bits(ops.count_zeros(found), ops.count_zeros(masks))
    masks, found = masks[:-1], found[:-1]  # lists may differ in length from call to call
    folded, device_folded = on(torch.device("cpu"), *weights[:-1]), on(device, *weights[:-1])
    ops.fold(folded, masks)
    ops.fold(device_folded, found)
    yield "fold", all(map(same_bits, device_folded, folded))
    yield "count_zeros of weights", same_bits(ops.count_zeros(device_folded), ops.count_zeros(folded))
    leaves, device_leaves = ([one.detach().requires_grad_() for one in some] for some in (weights, theirs))
    hard, device_hard = (ops.gate_penalty(some, hard=True) for some in (leaves, device_leaves))
    yield "gate_penalty, hard", same_bits(device_hard, hard)
    soft, device_soft = (ops.gate_penalty(some, shift=0.5) for some in (leaves, device_leaves))
    yield "gate_penalty", close(device_soft, soft)
    grads = torch.autograd.grad(soft.sum(), leaves)
    device_grads = torch.autograd.grad(device_soft.sum(), device_leaves)
    yield "gate_penalty, backward", all(map(close, device_grads, grads))


def check_gates(dtype: torch.dtype, device: torch.device, few: bool) -> Iterator[tuple[str, bool]]:
    """Compare gates and their gradients: one gate per weight, of channels, of columns, of blocks, one for all."""
    generator = torch.Generator().manual_seed(3)
    cases = [
        ("one per weight", (203, 305), (203, 305)),
        ("channels", (64, 30, 3, 3), (64, 1, 1, 1)),
        ("columns", (1001, 12), (1, 12)),
        ("blocks", (64, 96), (16, 24)),
        ("one for all", (101, 99), (1, 1)),
    ]
    rules: dict[str, Callable[..., Tensor]] = {
        "bernoulli": ops.bernoulli_gate,
        "hard concrete": ops.hard_concrete_gate,
        "hard concrete, beta 0.5": partial(ops.hard_concrete_gate, beta=0.5),
        "straight through": partial(ops.hard_concrete_gate, straight_through=True),
    }
    seeds = {"sampled": torch.tensor(-(2**61) + 7), "deterministic": None}
    if few:
        rules = {name: rules[name] for name in ("bernoulli", "hard concrete")}
        del seeds["deterministic"]
    for case, shape, gate_shape in cases:
        for logit_dtype in dict.fromkeys((torch.float32, dtype)):
            weight, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            logits = (2 * torch.randn(gate_shape, generator=generator)).to(logit_dtype)
            weight, logits = weight.requires_grad_(), logits.requires_grad_()
            for layout in ("", ", transposed"):
                for rule, gate in rules.items():
                    for kind, seed in seeds.items():
                        out = gate(weight, logits, seed)
                        want = [out, *torch.autograd.grad(out, (weight, logits), grad)]
                        theirs = on(device, weight, logits, grad)
                        out = gate(*theirs[:2], None if seed is None else seed.to(device))
                        got = [out, *torch.autograd.grad(out, theirs[:2], theirs[2])]
                        # Sums over the weights of a gate are made in another order on a GPU.
                        compare = same_bits if shape == gate_shape else close
                        equal = same_bits(got[0], want[0]) and same_bits(got[1], want[1]) and compare(got[2], want[2])
                        yield f"gate, {rule}, {kind}, {case}, {logit_dtype} logits{layout}", equal
                weight, grad = (one.detach().transpose(0, 1).contiguous().transpose(0, 1) for one in (weight, grad))
                weight = weight.requires_grad_()


def check_all(device: torch.device, few: bool) -> Iterator[tuple[str, bool]]:
    """Compare every operator on the device with the CPU, for every dtype; few: less of what runs the same code."""
    seed = torch.tensor(2**62 + 3)
    for shape in ((1001,), (64, 30, 3, 3)):
        noise, device_noise = (ops.gate_noise(shape, one, stream=9) for one in (seed, seed.to(device)))
        yield "gate_noise", same_bits(device_noise, noise)
    for dtype in ops.WEIGHT_DTYPES:
        generator = torch.Generator().manual_seed(1)
        shapes = [(300, 200), (70_001,), (64, 30, 3, 3), (3,), (4096,), (0, 5), (1,)]
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        weights.append((3 * torch.randn(5000, generator=generator)).round().to(dtype))  # many ties
        weights.append(torch.randn(90, 70, generator=generator).to(dtype).t())
        for name, equal in [*check_lists(weights, device), *check_gates(dtype, device, few)]:
            yield f"{name}, {dtype}", equal


# --- the report ---------------------------------------------------------------------------------------------------


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "cpu", "driver": None}
    properties = torch.cuda.get_device_properties(device)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    return {
        "device": properties.name,
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def show(console: Console, title: str, jobs: list[Job]) -> None:
    """Print what was measured together, with the floors, and why ways were left out."""
    rows: list[Way] = []
    for job in jobs:
        timed = [way for way in job.ways if way.samples_ms]
        if not timed:
            continue
        floor = None
        if job.floor_ms:
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
    names: dict[str, None] = {}
    for title, jobs in measured.items():
        table.add_column(title, justify="right")
        names |= dict.fromkeys(job.name for job in jobs if job.floor_ms)
    for name in names:
        cells = []
        for jobs in measured.values():
            job = next((job for job in jobs if job.name == name and job.floor_ms), None)
            ours, theirs = (job.fastest(True), job.fastest(False)) if job else (None, None)
            floor = f"{ours.median_ms / job.floor_ms:.2f}" if job and ours else "-"
            times = f"{theirs.median_ms / ours.median_ms:.1f}x" if ours and theirs else "-"
            cells.append(f"{floor} | {times:>6}")
        table.add_row(name, *cells)
    return table


class Report:
    """What was found so far; written after every group, so that an interruption loses little."""

    def __init__(self, path: Path | None, machine: dict[str, Any], ratio: float) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "environment": machine, "ratio": ratio, "checks": {}, "bandwidth": [], "results": [], "left_out": [],
            "problems": [],
        }  # fmt: skip

    def add(self, weights: Weights, jobs: list[Job]) -> None:
        about = {"size": weights.size, "dtype": weights.dtype, "weights": weights.count}
        for job in jobs:
            facts = about | {"bytes_read": job.read, "bytes_written": job.written, "floor_ms": job.floor_ms}
            self.content["results"] += [way.as_dict() | facts for way in job.ways]
            for way in job.ways:
                left_out = way.problem.startswith(("does not fit", "no time", "not tried"))
                if way.problem and not left_out and way.name.startswith("pyprune"):
                    self.content["problems"].append(f"{weights.title}, {job.name}, {way.name}: {way.problem}")

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def check(device: torch.device, few: bool, console: Console, report: Report) -> None:
    start = time.perf_counter()
    found: list[tuple[str, bool]] = []
    try:
        found.extend(check_all(device, few))
    except Exception as error:
        after = found[-1][0] if found else "nothing"
        problem = f"checks stopped after {after} by {type(error).__name__}: {first_line(error)}"
        report.content["problems"].append(problem)
    wrong = [name for name, equal in found if not equal]
    report.content["checks"] = {"made": len(found), "different": wrong}
    report.content["problems"] += [f"differs from the CPU: {name}" for name in wrong]
    console.print(
        f"Equality with the CPU kernels: {len(found) - len(wrong)} of {len(found)} comparisons "
        f"({time.perf_counter() - start:.0f} s)",
        highlight=False,
    )
    for name in wrong:
        console.print(f"  differs: {name}", highlight=False, markup=False)


def measure_list(
    weights: Weights,
    arguments: argparse.Namespace,
    turns: Turns,
    bandwidth: Bandwidth,
    report: Report,
    seconds_for: Callable[[float], float],
) -> list[Job]:
    """Measure all groups of jobs on one list."""
    done: list[Job] = []
    for group, weight, make in GROUPS:
        title = f"{weights.title}: {group}"
        seconds = seconds_for(weight)
        problem = "no time left" if seconds <= 0 else ""
        jobs: list[Job] = []
        if not problem:
            try:
                jobs = make(weights, arguments.ratio)
            except torch.OutOfMemoryError:
                problem = "does not fit in memory"
            except Exception as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
                report.content["problems"].append(f"{title}: {problem}")
        if problem:
            turns.clock.recover()
            report.content["left_out"].append(f"{title}: {problem}")
            turns.console.print(f"{title}: {problem}\n", highlight=False)
            continue
        speed = bandwidth.job()
        turns.measure([speed, *jobs], weights, seconds)
        copy, sweep = bandwidth.bytes_per_ms(speed)
        for job in jobs:
            job.floor_ms = (job.read + job.written) / (copy if job.written else max(copy, sweep))
        speeds = {"title": title, "copy_gb_per_s": copy / 1e6, "read_gb_per_s": sweep / 1e6}
        report.content["bandwidth"].append(speeds)
        turns.console.print(f"copy {copy / 1e6:,.0f} GB/s, read {sweep / 1e6:,.0f} GB/s", highlight=False)
        show(turns.console, title, jobs)
        report.add(weights, jobs)
        report.write()
        done += jobs
        for job in jobs:  # lets go of the tensors that they hold
            for way in job.ways:
                way.run = way.prepare = tuple
        turns.clock.recover()
    return done


def measure_all(
    arguments: argparse.Namespace, device: torch.device, console: Console, report: Report, deadline: float
) -> dict[str, list[Job]]:
    turns = Turns(CudaClock() if device.type == "cuda" else CpuClock(), arguments.repeats, console)
    measured: dict[str, list[Job]] = {}
    weight_left = sum(weight for _, weight, _ in GROUPS) * len(arguments.sizes) * len(arguments.dtype)

    def seconds_for(weight: float) -> float:
        nonlocal weight_left
        seconds = (deadline - time.perf_counter()) * weight / weight_left
        weight_left -= weight
        return seconds

    try:
        bandwidth = Bandwidth(device)
        for size in arguments.sizes:
            for dtype in arguments.dtype:
                problem = "no time left" if time.perf_counter() > deadline else ""
                try:
                    weights = None if problem else make_weights(size, dtype, device)
                except torch.OutOfMemoryError:
                    problem = "the weights do not fit in memory"
                if problem:
                    turns.clock.recover()
                    seconds_for(sum(weight for _, weight, _ in GROUPS))
                    report.content["left_out"].append(f"{size}, {dtype}: {problem}")
                    console.print(f"{size}, {dtype}: {problem}\n", highlight=False)
                    continue
                column = f"{size} {'bf16' if dtype == 'bfloat16' else 'fp32'}"
                measured[column] = measure_list(weights, arguments, turns, bandwidth, report, seconds_for)
                weights = None
                turns.clock.recover()
    except KeyboardInterrupt:
        report.content["problems"].append("interrupted")
    except Exception as error:  # the device is lost, say: what was measured before still counts
        report.content["problems"].append(f"stopped by {type(error).__name__}: {first_line(error)}")
    return measured


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="for everything (default: %(default)s)")
    parser.add_argument("--sizes", choices=SIZES, nargs="+", help="of the lists (default: 100M 1B 8B)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="(default: all)")
    parser.add_argument("--ratio", type=float, default=0.7, help="fraction to remove (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="of each way, at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write samples, checks and environment here")
    parser.add_argument("--check", action="store_true", help="only compare a few with the CPU; for sanitizers")
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
    deadline = time.perf_counter() + arguments.seconds
    device = torch.device(arguments.device)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    machine = environment() | device_facts(device)
    console.print(
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}\n{machine['pyprune']}\n",
        highlight=False,
    )
    report = Report(arguments.json, machine, arguments.ratio)
    check(device, arguments.check, console, report)
    if not arguments.check:
        report.write()
        console.print()
        measured = measure_all(arguments, device, console, report, deadline)
        report.content["seconds"] = arguments.seconds - deadline + time.perf_counter()
        console.print(NOTES, highlight=False, markup=False)
        console.print()
        console.print(summary(measured, machine["device"]))
    report.write()
    for problem in report.content["problems"]:
        console.print(f"PROBLEM: {problem}", highlight=False, markup=False)
    return 1 if report.content["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
