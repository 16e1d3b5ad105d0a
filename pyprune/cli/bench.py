"""``pyprune bench``: what the linear layers of a checkpoint run at on this machine."""

import argparse
import statistics
from collections import Counter
from functools import partial
from typing import Any

import torch

from pyprune import ops
from pyprune.cli.output import Output, percent
from pyprune.runtime.timing import in_turns
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.prunable import find_weights


def run(args: argparse.Namespace, output: Output) -> int:
    """Time one layer of each shape: the median of as many products as fit into the time."""
    before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        with Checkpoint(args.input) as checkpoint:
            names = [name for name in find_weights(checkpoint).names if len(checkpoint.shape(name)) == 2]
            kinds = Counter((checkpoint.shape(name), checkpoint.dtype(name)) for name in names)
            first = {(checkpoint.shape(name), checkpoint.dtype(name)): name for name in reversed(names)}
            if not kinds:
                raise ValueError(f"{checkpoint.path} has no matrix that could be a linear layer")
            rows = []
            with output.progress(shapes=len(kinds)) as advance:
                for kind, layers in kinds.items():
                    rows.append(_measured(checkpoint.view(first[kind]), first[kind], layers, args))
                    advance("shapes")
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    total = sum(row["milliseconds"] * row["layers"] for row in rows)
    output.result({"batch": args.batch, "threads": threads, "milliseconds": total, "by_shape": rows})
    output.table(
        ["layer", "shape", "dtype", "layers", "zeros", "ms", "GFLOP/s", "GB/s of weights"],
        [
            [
                row["name"], "x".join(map(str, row["shape"])), row["dtype"], row["layers"],
                percent(row["sparsity"], 1), f"{row['milliseconds']:.3f}", f"{row['gflops']:.1f}",
                f"{row['gigabytes_per_second']:.1f}",
            ]
            for row in rows
        ],
    )  # fmt: skip
    output.line(
        f"{total:.2f} ms for {sum(kinds.values())} linear layers at batch {args.batch}, {threads} threads: dense "
        "products of torch, which take as long for zeros."
    )
    return 0


def _measured(weight: torch.Tensor, name: str, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    weight = weight.clone()
    inputs = torch.randn(args.batch, weight.shape[1]).to(weight.dtype)
    times = in_turns({name: partial(torch.nn.functional.linear, inputs, weight)}, seconds=args.seconds)[name]
    seconds = statistics.median(times)
    return {
        "name": name,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "layers": layers,
        "sparsity": int(ops.count_zeros([weight])) / weight.numel() if weight.numel() else 0.0,
        "milliseconds": 1000 * seconds,
        "gflops": 2e-9 * args.batch * weight.numel() / seconds,
        "gigabytes_per_second": 1e-9 * weight.nbytes / seconds,
        "repeats": len(times),
    }
