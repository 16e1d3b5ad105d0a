"""The command ``pyprune``: its arguments, and what it returns to the shell."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from pyprune.cli import arguments
from pyprune.cli.output import Output

_DESCRIPTION = """\
Prune, measure and compress checkpoints without the code of their model.

IN is a safetensors file, a folder with one, or a folder of shards with their index. OUT is of the same kind, and must
not exist yet; configs, tokenizers and other files of a folder are copied."""
_EPILOG = """\
exit codes: 0 done, 1 wrong input (or checkpoints that differ, or are damaged), 2 wrong usage, 130 interrupted.
`pyprune COMMAND --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Args:
        argv: the arguments after the name of the program; those of the process if None.

    Example:
        >>> main(["info", "--quiet"])
        0
    """
    args = _parser().parse_args(argv)
    output = Output(json=args.json, quiet=args.quiet)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: output.complain("warning", str(message))  # type: ignore[assignment]
        try:
            code = int(args.run(args, output))
            sys.stdout.flush()
            return code
        except (OSError, ValueError, TypeError, ImportError) as error:
            if isinstance(error, BrokenPipeError):  # whoever reads has seen enough, as `head` has
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return 0
            output.complain("error", str(error))
            return 1
        except KeyboardInterrupt:
            output.complain("error", "interrupted; nothing was written")
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyprune", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in arguments.COMMANDS:
        add(commands)
    return parser
