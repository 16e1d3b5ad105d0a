"""Run a command of which the arguments are known: what goes wrong becomes a line and an exit code."""

import argparse
import importlib
import os
import sys
import warnings

from pyprune.cli.output import Output


def run(args: argparse.Namespace) -> int:
    """Run the command of ``args.module``, and return 0, 1 for wrong input, or 130 if it was interrupted."""
    output = Output(json=args.json, quiet=args.quiet)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: output.complain("warning", str(message))
        try:
            code = int(importlib.import_module(f"pyprune.cli.{args.module}").run(args, output))
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever reads has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (OSError, ValueError, TypeError, ImportError) as error:
            output.complain("error", str(error))
            return 1
        except KeyboardInterrupt:
            output.complain("error", "interrupted; nothing was written")
            return 130
