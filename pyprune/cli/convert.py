"""``pyprune compress`` and ``pyprune expand``: the same checkpoint, smaller or dense."""

import argparse
from pathlib import Path

from pyprune.cli.output import Output, bytes_text
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.convert import compress_checkpoint, expand_checkpoint


def run(args: argparse.Namespace, output: Output) -> int:
    """Write the other form, and print both sizes."""
    with Checkpoint(args.input) as checkpoint:
        tensors = len(checkpoint.places)
    negative_zeros: dict[str, int] = {}
    with output.progress(tensors=tensors) as advance:
        if args.command == "compress":
            written = compress_checkpoint(
                args.input,
                args.output,
                codec=None if args.codec == "none" else args.codec,
                layout=args.layout,
                keep_negative_zero=args.keep_negative_zero,
                seen=lambda name: advance("tensors"),
            )
            for one in written:
                negative_zeros |= one.negative_zeros
        else:
            expand_checkpoint(args.input, args.output, seen=lambda name: advance("tensors"))
    before, after = size_of(args.input), size_of(args.output)
    output.result(
        {
            "bytes_before": before,
            "bytes_after": after,
            "negative_zeros": negative_zeros,
            "written": str(args.output),
        }
    )
    output.line(f"{bytes_text(before)} became {bytes_text(after)} ({after / before:.3f} of it): {args.output}")
    if negative_zeros:
        output.line(
            f"{sum(negative_zeros.values()):,} elements that were -0.0 are 0.0 now (--keep-negative-zero keeps them)."
        )
    return 0


def size_of(path: str | Path) -> int:
    """Return the bytes of the safetensors files of a checkpoint."""
    with Checkpoint(path) as checkpoint:
        return sum(file.path.stat().st_size for file in checkpoint.files)
