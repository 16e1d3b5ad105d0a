"""``pyprune prune``: zeros in a checkpoint."""

import argparse
from collections.abc import Callable

from pyprune.cli.output import Output, percent
from pyprune.console import listed
from pyprune.methods import granularity, importance, scope
from pyprune.methods.granularity import Granularity
from pyprune.methods.importance import Importance, Normalization
from pyprune.methods.method import Method
from pyprune.methods.scope import Scope
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.encoding import Options
from pyprune.sparse.prunable import find_weights
from pyprune.sparse.prune_files import PrunedFiles, prune_files


def run(args: argparse.Namespace, output: Output) -> int:
    """Prune, and print what went of each tensor."""
    _check_usage(args)
    method = method_of(args)
    if args.data is not None:
        # Only here: the solvers, and transformers.
        from pyprune.cli import prune_by_data

        return prune_by_data.run(args, output, prune_by_data.method_with_data(args, method), _options(args))
    which = {"include": args.include, "exclude": args.exclude, "min_size": args.min_size}
    with Checkpoint(args.input) as checkpoint:
        weights = len(find_weights(checkpoint, **which).names)
    counts = {"counted": weights} if method.scope.name == "model" else {}
    with output.progress(**counts, written=weights) as advance:
        pruned = prune_files(
            args.input,
            None if args.dry_run else args.output,
            method,
            args.ratio,
            allocation=args.allocation,
            min_ratio=args.min_ratio,
            max_ratio=args.max_ratio,
            inputs_first=args.inputs_first,
            statistics=args.norms or args.scores,
            compress=_options(args),
            max_memory=args.max_memory,
            seen=lambda what, name: advance(what),
            **which,
        )
    _report(args, method, pruned, output)
    return 0


def method_of(args: argparse.Namespace) -> Method:
    """Return the method that the arguments mean."""
    return Method(_importance(args), _granularity(args), _scope(args))


def _check_usage(args: argparse.Namespace) -> None:
    more = _wrong_without_data if args.data is None else _wrong_with_data
    for message, is_wrong in {**_wrong(args), **more(args)}.items():
        if is_wrong:
            args.error(message)


def _wrong(args: argparse.Namespace) -> dict[str, bool]:
    return {
        "give --ratio, the share of the weights that goes": args.ratio is None and args.n_of_m is None,
        "give OUT, or --dry-run": args.output is None and not args.dry_run,
        "--n-of-m says what competes; leave out --scope": args.n_of_m is not None and args.scope is not None,
        "--norms is for --method wanda": args.method != "wanda" and args.norms is not None,
        "--method scores needs --scores FILE": args.method == "scores" and args.scores is None,
        "--scores is for --method scores": args.method != "scores" and args.scores is not None,
        "--method lamp normalises itself; leave out --normalize": args.method == "lamp"
        and args.normalize is not None,
        "--normalize is of magnitudes and wanda": args.method in ("random", "scores") and args.normalize is not None,
        "--codec, --layout and --keep-negative-zero say how to --compress": not args.compress
        and (args.codec != "none" or args.layout != "pyprune" or args.keep_negative_zero),
    }


def _wrong_without_data(args: argparse.Namespace) -> dict[str, bool]:
    only = {name: getattr(args, name) for name in ("field", "samples", "length", "solver", "reconstruct", "blocks")}
    return {
        "--method wanda needs --norms FILE, or --data FILE": args.method == "wanda" and args.norms is None,
        "--method ria needs --data FILE": args.method == "ria",
        f"--{next(filter(only.get, only), '')} needs --data FILE": any(only.values()),
        f"--allocation {args.allocation} needs --data FILE": args.allocation not in ("uniform", "erk", "er"),
    }


def _wrong_with_data(args: argparse.Namespace) -> dict[str, bool]:
    chooses = args.solver in ("sparsegpt", "admm")
    others = {
        "--norms": args.norms is not None,
        "--inputs-first": bool(args.inputs_first),
        "--min-ratio": args.min_ratio > 0,
        "--max-ratio": args.max_ratio < 1,
        "--min-size": args.min_size > 1,
        "--max-memory": args.max_memory is not None,
        "--dry-run": args.dry_run,
        f"--method {args.method}": args.method in ("lamp", "scores"),
        f"--allocation {args.allocation}": args.allocation in ("erk", "er"),
    }
    return {
        f"{next(filter(others.get, others), '')} is not for --data": any(others.values()),
        "--data prunes block by block, so weights of the model cannot compete; give --scope tensor or row": args.scope
        == "model",
        f"--solver {args.solver} chooses single weights itself; leave out --method, --normalize and --unit": chooses
        and (args.method is not None or args.normalize is not None or args.unit != "element"),
    }


def _importance(args: argparse.Namespace) -> Importance:
    if args.method == "random":
        return importance.random(args.seed)
    if args.method == "scores":
        return importance.given({})
    normalize: Normalization | None = "lamp" if args.method == "lamp" else args.normalize
    if args.method in ("wanda", "ria"):
        return (importance.wanda if args.method == "wanda" else importance.ria)(normalize=normalize or "none")
    if normalize is None:
        normalize = "l2" if _scope(args).name == "model" else "none"
    return importance.magnitude(normalize=normalize)


def _scope(args: argparse.Namespace) -> Scope:
    if args.n_of_m is not None:
        return scope.n_of_m(keep=args.n_of_m[0], of=args.n_of_m[1])
    name = args.scope or ("row" if args.method == "wanda" or args.data is not None else "model")
    return {"model": scope.model, "tensor": scope.tensor, "row": scope.row}[name]()


def _granularity(args: argparse.Namespace) -> Granularity:
    if isinstance(args.unit, tuple):
        return granularity.block(*args.unit)
    names: dict[str, Callable[[], Granularity]] = {
        "element": granularity.element,
        "row": granularity.channel,
        "column": lambda: granularity.channel("in"),
        "kernel": granularity.kernel,
    }
    return names[args.unit]()


def _options(args: argparse.Namespace) -> Options | None:
    if not args.compress:
        return None
    return Options(None if args.codec == "none" else args.codec, args.layout, args.keep_negative_zero)


def _report(args: argparse.Namespace, method: Method, pruned: PrunedFiles, output: Output) -> None:
    zeros, size = sum(pruned.zeros.values()), sum(pruned.sizes.values())
    said = {
        "importance": method.importance.name,
        "normalize": method.importance.normalize,
        "granularity": method.granularity.name,
        "scope": method.scope.name,
        "ratio": args.ratio,
        "elements": size,
        "zeros": zeros,
        "removed_units": pruned.removed,
        "largest_score_removed": pruned.score,
        "written": None if args.dry_run else str(args.output),
    }
    order = "files by name, larger types first, then as they lie in the file; in a tensor by the flat index"
    output.result(said | {"order_of_ties": order, "zeros_by_tensor": pruned.zeros, "left_alone": pruned.left_alone})
    output.table(
        ["tensor", "elements", "zeros", "share"],
        [
            [name, f"{pruned.sizes[name]:,}", f"{count:,}", percent(count, pruned.sizes[name])]
            for name, count in pruned.zeros.items()
        ],
    )
    normalized = "" if method.importance.normalize == "none" else f", normalised by {method.importance.normalize}"
    output.line(
        f"{zeros:,} of {size:,} elements are zero ({percent(zeros, size)}): {method.importance.name}{normalized}, of "
        f"{method.granularity.name}s, within scope {method.scope.name}."
    )
    if pruned.removed is not None:
        output.line(f"Of equal scores those went that come first: {order}.")
    for why, names in pruned.left_alone.items():
        output.line(f"Left alone, {why}: {listed(names)}.")
    if args.dry_run:
        output.line("Nothing was written (--dry-run).")
    elif args.compress:
        output.line(f"Written packed to {args.output}; `pyprune expand` makes it dense.")
    else:
        output.line(f"Written to {args.output}, as large as before; `pyprune compress` makes it smaller.")
