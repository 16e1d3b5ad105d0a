"""``pyprune diff``: what differs between two checkpoints."""

import argparse
from dataclasses import asdict

from pyprune.cli.output import Output
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.compare import compare


def run(args: argparse.Namespace, output: Output) -> int:
    """Print what is not equal, and return 1 if anything is not."""
    with Checkpoint(args.first) as first, Checkpoint(args.second) as second:
        total = len({*first, *second})
        with output.progress(tensors=total) as advance:
            found = list(compare(first, second, lambda name: advance("tensors")))
    differing = [one for one in found if one.status != "equal"]
    output.result({"tensors": total, "equal": total - len(differing), "by_tensor": [asdict(one) for one in found]})
    output.table(
        ["tensor", "", "zeros gained", "zeros lost", "changed", "largest", "cosine"],
        [
            [
                one.name,
                one.status + (f" ({one.detail})" if one.detail else ""),
                *(
                    [f"{one.zeros_gained:,}", f"{one.zeros_lost:,}", f"{one.changed:,}", f"{one.largest:.4g}"]
                    if one.status == "changed"
                    else [None] * 4
                ),
                None if one.cosine is None else f"{one.cosine:.6f}",
            ]
            for one in differing
        ],
    )
    output.line(f"{total - len(differing)} of {total} tensors are equal, bit for bit.")
    return 1 if differing else 0
