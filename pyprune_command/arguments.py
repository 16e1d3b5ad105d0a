"""The arguments of each command."""

import argparse
import re
from typing import Any

_DESCRIPTION = """\
Prune, measure and compress checkpoints without the code of their model.

IN is a safetensors file, a folder with one, or a folder of shards with their index. OUT is of the same kind, and must
not exist yet; configs, tokenizers and other files of a folder are copied."""
_EPILOG = """\
exit codes: 0 done, 1 wrong input (or checkpoints that differ, or are damaged), 2 wrong usage, 130 interrupted.
`pyprune COMMAND --help` says more."""
_IN = "a safetensors file, a folder with one, or a folder of shards with their index"
_OUT = "a file if IN is one, otherwise a folder; nothing may be there"
Commands = Any  # argparse keeps the type to itself
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments; ``module`` of what it returns is that of `pyprune.cli` which does the rest.

    Example:
        >>> parser().parse_args(["stats", "model.safetensors"]).module
        'stats'
    """
    whole = argparse.ArgumentParser(
        prog="pyprune", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return whole


def fraction(text: str) -> float:
    """Return a number in [0, 1).

    Example:
        >>> fraction("0.5")
        0.5
    """
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no fraction to remove; give a number in [0, 1)")
    return value


def share(text: str) -> float:
    """Return a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give a number in [0, 1]")
    return value


def size(text: str) -> int:
    """Return a number of bytes.

    Example:
        >>> size("1.5G"), size("200")
        (1610612736, 200)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no size; give bytes, as in 512M or 2G")
    return int(float(found[1]) * _UNITS[found[2]])


def count(text: str) -> int:
    """Return an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; give an integer, 1 or more")
    return value


def seconds(text: str) -> float:
    """Return a time above 0, up to an hour."""
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is no time; give seconds, as in 0.3")
    return value


def kept_of(text: str) -> tuple[int, int]:
    """Return how many are kept of how many.

    Example:
        >>> kept_of("2:4")
        (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is no KEEP:OF; give how many stay of how many, as in 2:4")
    return int(found[1]), int(found[2])


def unit(text: str) -> str | tuple[int, int]:
    """Return what goes as one: a name, or rows and columns of a block.

    Example:
        >>> unit("row"), unit("4x1")
        ('row', (4, 1))
    """
    if text in ("element", "row", "column", "kernel"):
        return text
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not int(found[1]) * int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is no unit; give element, row, column, kernel, or a block as 4x1")
    return int(found[1]), int(found[2])


def _command(commands: Commands, name: str, about: str, module: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about.split(".")[0].split(":")[0], description=about)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(module=module)
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def _stats(commands: Commands) -> None:
    parser = _command(
        commands, "stats", "Count zeros, and say which patterns hold and how small the file could be.", "stats"
    )
    parser.add_argument("input", metavar="IN", help=_IN)


def _prune(commands: Commands) -> None:
    parser = _command(
        commands,
        "prune",
        "Set the least important weights to zero. Biases, embeddings, norms and heads are left alone unless they are "
        "included. What the defaults do: all weights compete by |w| / ||W||, the norm of their tensor.",
        "prune",
    )
    parser.add_argument("input", metavar="IN", help=_IN)
    parser.add_argument("output", metavar="OUT", nargs="?", help=f"{_OUT}; left out only with --dry-run")
    how = parser.add_argument_group("what goes")
    how.add_argument(
        "-r", "--ratio", type=fraction, help="the share of the weights that goes; all groups of --n-of-m"
    )
    how.add_argument(
        "--method", choices=("magnitude", "lamp", "random", "wanda", "ria", "scores"),
        help="default magnitude; lamp: magnitude, normalised by LAMP; wanda: |w| times the norm of its input "
        "(--norms or --data); ria: relative magnitude times that norm (--data)",
    )  # fmt: skip
    how.add_argument(
        "--normalize", choices=("none", "l2", "mean", "gaussian", "lamp"),
        help="what makes weights of tensors comparable; default l2 of magnitudes that compete in the model",
    )  # fmt: skip
    how.add_argument(
        "--scope", choices=("model", "tensor", "row"), help="what competes; default model, or row for wanda"
    )
    how.add_argument("--n-of-m", type=kept_of, metavar="KEEP:OF", help="keep KEEP of each OF inputs, as in 2:4")
    how.add_argument(
        "--unit", type=unit, default="element", help="what goes as one: element, row, column, kernel, or 4x1 outputs "
        "by inputs",
    )  # fmt: skip
    how.add_argument(
        "--allocation", choices=("uniform", "erk", "er", "owl", "alpha-pruning", "progression"), default="uniform",
        help="of scope tensor or row; erk and er without --data, the last three with it",
    )  # fmt: skip
    how.add_argument("--min-ratio", type=share, default=0.0, metavar="R", help="what each tensor loses at least")
    how.add_argument("--max-ratio", type=share, default=1.0, metavar="R", help="what each tensor loses at most")
    how.add_argument(
        "--norms", metavar="FILE", help="safetensors with the norm of each input, by the names of weights"
    )
    how.add_argument(
        "--scores", metavar="FILE", help="safetensors with a score of each weight, of which the lowest go"
    )
    how.add_argument("--seed", type=int, default=0, help="of --method random, and of the samples")
    _data(parser)
    which = parser.add_argument_group(
        "which tensors", "patterns are regular expressions that match a name's beginning"
    )
    which.add_argument("--include", metavar="RE", action="append", default=[], help="only these, whatever they are")
    which.add_argument("--exclude", metavar="RE", action="append", default=[])
    which.add_argument(
        "--min-size", type=count, default=1, metavar="N", help="leave tensors alone that have fewer elements"
    )
    which.add_argument(
        "--inputs-first",
        metavar="RE",
        action="append",
        default=[],
        help="weights that are (inputs, outputs), as of GPT-2",
    )
    _packing(parser.add_argument_group("what is written"), compress=True)
    parser.add_argument("--max-memory", type=size, metavar="SIZE", help="an error if more is needed, as in 512M")
    parser.add_argument("--dry-run", action="store_true", help="find what goes and write nothing")
    parser.set_defaults(error=parser.error)


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what text says",
        "IN is a folder of transformers with its tokenizer; it is pruned block by block over the text, as "
        "pyprune.prune_checkpoint does it. By default each row, or with a solver each weight, loses its share.",
    )
    group.add_argument("--data", metavar="FILE", help="text, or JSON lines with a field of text (FILE.jsonl)")
    group.add_argument("--field", metavar="NAME", help='of JSON lines; default "text"')
    group.add_argument("--samples", type=count, metavar="N", help="of the text; default 128, or what there is")
    group.add_argument(
        "--length", type=count, metavar="N", help="tokens of a sample; default 2048, or what the model takes"
    )
    group.add_argument(
        "--solver", choices=("least-squares", "swaps", "sparsegpt", "admm"),
        help="of the weights that are kept; the last two choose what goes, too, in place of --method",
    )  # fmt: skip
    group.add_argument(
        "--reconstruct", action="store_true", help="train what a block keeps until it gives what the dense one gave"
    )
    group.add_argument(
        "--blocks", metavar="NAME", action="append", help="lists of layers, or modules; default the lists that repeat"
    )


def _packing(group: Any, *, compress: bool) -> None:
    if compress:
        group.add_argument(
            "--compress", action="store_true", help="pack tensors with zeros, as `pyprune compress` does"
        )
    group.add_argument("--codec", choices=("none", "zstd"), default="none", help="zstd: exponents and masks, too")
    group.add_argument("--layout", choices=("pyprune", "compressed-tensors"), default="pyprune")
    group.add_argument("--keep-negative-zero", action="store_true", help="store -0.0 as it is, as a value")


def _compress(commands: Commands) -> None:
    parser = _command(
        commands,
        "compress",
        "Pack tensors with zeros: one bit for each element, and the values that are kept.",
        "convert",
    )
    parser.add_argument("input", metavar="IN", help=_IN)
    parser.add_argument("output", metavar="OUT", help=_OUT)
    _packing(parser, compress=False)
    parser.set_defaults(command="compress")


def _expand(commands: Commands) -> None:
    parser = _command(commands, "expand", "Write the dense checkpoint that a packed one stands for.", "convert")
    parser.add_argument("input", metavar="IN", help=_IN)
    parser.add_argument("output", metavar="OUT", help=_OUT)
    parser.set_defaults(command="expand")


def _diff(commands: Commands) -> None:
    parser = _command(
        commands,
        "diff",
        "Compare two checkpoints: zeros gained and lost, values changed. Exit code 1 if they differ.",
        "diff",
    )
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")


def _verify(commands: Commands) -> None:
    parser = _command(
        commands,
        "verify",
        "Check every byte: headers, lengths, counts, checksums, index. Exit code 1 if any is wrong.",
        "verify",
    )
    parser.add_argument("input", metavar="IN", help=_IN)


def _bench(commands: Commands) -> None:
    parser = _command(
        commands,
        "bench",
        "Time the linear layers of a checkpoint on this machine: dense products, zeros included.",
        "bench",
    )
    parser.add_argument("input", metavar="IN", help=_IN)
    parser.add_argument("--batch", type=count, default=1, help="rows of the input; default 1")
    parser.add_argument("--threads", type=count, help="of torch; default what it chooses")
    parser.add_argument("--seconds", type=seconds, default=0.3, help="for each shape; default 0.3")


def _info(commands: Commands) -> None:
    _command(commands, "info", "Say how pyprune was built, and what it runs on.", "info")


_COMMANDS = (_stats, _prune, _compress, _expand, _diff, _verify, _bench, _info)
