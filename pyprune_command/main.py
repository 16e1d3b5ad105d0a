"""From arguments to an exit code."""

from collections.abc import Sequence

from pyprune_command.arguments import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Args:
        argv: the arguments after the name of the program; those of the process if None.

    Example:
        >>> main(["info", "--quiet"])
        0
    """
    args = parser().parse_args(argv)
    from pyprune.cli.run import run  # torch, too

    return run(args)
