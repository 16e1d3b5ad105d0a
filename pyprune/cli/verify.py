"""``pyprune verify``: whether every byte of a checkpoint is as it was written."""

import argparse

from pyprune.cli.output import Output
from pyprune.sparse.checkpoint import Checkpoint


def run(args: argparse.Namespace, output: Output) -> int:
    """Print what is damaged, and return 1 if anything is. A damaged header or index is an error of its own."""
    problems: dict[str, str] = {}
    checked = 0
    with Checkpoint(args.input) as checkpoint, output.progress(tensors=len(checkpoint.places)) as advance:
        for file in checkpoint.files:
            for name, stored in file.tensors.items():
                try:
                    file.read(name)  # dense ones of other writers have nothing to check but their lengths
                except ValueError as error:
                    problems[name] = str(error)
                checked += bool(stored.crc32)
                advance("tensors")
        tensors = sum(len(file.tensors) for file in checkpoint.files)
        files = len(checkpoint.files)
    output.result({"files": files, "tensors": tensors, "with_checksums": checked, "problems": problems})
    for problem in problems.values():
        output.complain("error", problem)
    if not problems:
        output.line(
            f"{files} file{'s' * (files != 1)}, {tensors} tensors: all lengths fit"
            + (f", and the checksums of {checked}." if checked else "; there are no checksums in it.")
        )
    return 1 if problems else 0
