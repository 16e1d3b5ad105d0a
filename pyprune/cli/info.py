"""``pyprune info``: how pyprune was built, and what it runs on."""

import argparse

from pyprune.cli.output import Output
from pyprune.ops.build_info import build_info


def run(args: argparse.Namespace, output: Output) -> int:
    """Print what a report of a fault should say."""
    found = build_info()
    output.result(dict(found))
    output.line(str(found))
    return 0
