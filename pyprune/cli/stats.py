"""``pyprune stats``: what is in a checkpoint."""

import argparse
from dataclasses import asdict

from pyprune.cli.output import Output, bytes_text, percent
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.describe import TensorStats, describe


def run(args: argparse.Namespace, output: Output) -> int:
    """Print a line for each tensor, and the sums."""
    with Checkpoint(args.input) as checkpoint, output.progress(tensors=len(checkpoint.places)) as advance:
        tensors = list(describe(checkpoint, lambda name: advance("tensors")))
        files = sum(file.path.stat().st_size for file in checkpoint.files)
    zeros, size = sum(one.zeros for one in tensors), sum(one.size for one in tensors)
    totals = {
        "tensors": len(tensors),
        "elements": size,
        "zeros": zeros,
        "negative_zeros": sum(one.negative_zeros for one in tensors),
        "nonfinite": sum(one.nonfinite for one in tensors),
        "file_bytes": files,
        "stored_bytes": sum(one.stored_bytes for one in tensors),
        "dense_bytes": sum(one.dense_bytes for one in tensors),
        "bitmask_bytes": sum(min(one.bitmask_bytes or one.dense_bytes, one.dense_bytes) for one in tensors),
        "bound_bytes": sum(one.dense_bytes if one.bound_bytes is None else one.bound_bytes for one in tensors),
    }
    output.result(totals | {"by_tensor": [asdict(one) for one in tensors]})
    output.table(
        ["tensor", "dtype", "shape", "zeros", "-0.0", "NaN, inf", "pattern", "stored", "bitmask", "bound"],
        [_row(one) for one in tensors],
    )
    output.line(
        f"{percent(zeros, size)} of {size:,} elements are zero. Tensors take {bytes_text(totals['stored_bytes'])} "
        f"now, {bytes_text(totals['bitmask_bytes'])} with bits and values (pyprune compress), and "
        f"{bytes_text(totals['bound_bytes'])} at least (near --codec zstd)."
    )
    if totals["negative_zeros"]:
        output.line(f"{totals['negative_zeros']:,} zeros are -0.0, which compress stores as 0.0.")
    return 0


def _row(one: TensorStats) -> list[object]:
    pattern = [*one.n_of_m]
    pattern += [f"{one.zero_rows} zero rows"] if one.zero_rows else []
    pattern += [f"{one.zero_columns} zero columns"] if one.zero_columns else []
    return [
        one.name, one.dtype, "x".join(map(str, one.shape)), percent(one.zeros, one.size), one.negative_zeros or None,
        one.nonfinite or None, ", ".join(pattern), bytes_text(one.stored_bytes), bytes_text(one.bitmask_bytes),
        bytes_text(one.bound_bytes),
    ]  # fmt: skip
