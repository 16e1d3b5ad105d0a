"""``pyprune prune --data``: a model of transformers, pruned block by block over a text."""

import argparse
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune.cli.output import Output, percent
from pyprune.cli.samples import samples_of
from pyprune.methods.method import Method
from pyprune.methods.scope import Scope
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.oneshot import allocations, solvers
from pyprune.oneshot.one_shot_result import OneShotResult
from pyprune.oneshot.prune_checkpoint import prune_checkpoint
from pyprune.sparse.checkpoint import Checkpoint
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.encoding import Options
from pyprune.sparse.new_checkpoint import check_target, whole_folder

_SOLVERS: dict[str, Any] = {
    "least-squares": solvers.least_squares,
    "swaps": solvers.swaps,
    "sparsegpt": solvers.sparsegpt,
    "admm": solvers.admm,
}
_ALLOCATIONS: dict[str, Any] = {
    "owl": allocations.owl,
    "alpha-pruning": allocations.alpha_pruning,
    "progression": allocations.progression,
}


def run(args: argparse.Namespace, output: Output, method: Method | Scope | None, options: Options | None) -> int:
    """Prune, and print what went of each weight, and what it costs its output."""
    with redirect_stderr(io.StringIO()) if args.quiet else nullcontext(), _transformers() as transformers:
        with Checkpoint(args.input) as checkpoint:
            check_target(checkpoint, args.output)
            source = _plain_folder(checkpoint, args.input)
            names = list(checkpoint)
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        batches = _batches(args, transformers, config, source)
        allocation = _ALLOCATIONS.get(args.allocation)
        with _written(Path(args.output), options) as folder:
            result = prune_checkpoint(
                source,
                folder,
                batches,
                method,
                ratio=_ratio(args, method),
                solver=_SOLVERS[args.solver]() if args.solver else None,
                blocks=args.blocks,
                allocation="uniform" if allocation is None else allocation(),
                reconstruct=solvers.reconstruct() if args.reconstruct else None,
                ignored_scope=IgnoredScope(patterns=args.exclude) if args.exclude else None,
                model=None if config.architectures else _on_meta(transformers, config, names),
            )
            (folder / "progress.json").unlink()
    _report(args, result, batches, output)
    return 0


def method_with_data(args: argparse.Namespace, method: Method) -> Method | Scope | None:
    """Return what `prune_checkpoint` is to choose by: nothing, if the solver's own way is meant."""
    if args.solver not in ("sparsegpt", "admm"):
        return method
    return None if args.scope is None and args.n_of_m is None else method.scope


@contextmanager
def _transformers() -> Iterator[Any]:
    """Yield the library, which shows no bars of its own meanwhile."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            "pyprune prune --data needs transformers, to build the model and to read the text: pip install "
            "'transformers>=5'; without it, --norms takes the norms of inputs",
            name=error.name,
        ) from error
    were = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if were:
            logging.enable_progress_bar()


def _plain_folder(checkpoint: Checkpoint, given: str) -> str:
    if checkpoint.folder is None or not (checkpoint.folder / "config.json").is_file():
        raise ValueError(f"{given} has no config.json, which says what the model is; give the folder of a model")
    packed = [name for file in checkpoint.files for name, one in file.tensors.items() if one.sparse or one.codec]
    if packed:
        raise ValueError(f"{given} is packed ({packed[0]}); `pyprune expand` it before")
    return str(checkpoint.folder)


def _batches(args: argparse.Namespace, transformers: Any, config: Any, source: str) -> list[dict[str, torch.Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    samples = samples_of(
        args.data,
        tokenizer,
        field=args.field or "text",
        count=args.samples,
        length=args.length,
        most=min((int(one) for one in limits if one), default=None),
        seed=args.seed,
    )
    last = max(int(sample.max()) for sample in samples)
    if last >= text.vocab_size:
        raise ValueError(
            f"the tokenizer in {source} gives token {last}, and the model has {text.vocab_size}; give the folder "
            "with the model's own tokenizer"
        )
    names = ("input_ids", "decoder_input_ids") if config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, sample) for sample in samples]


def _on_meta(transformers: Any, config: Any, names: list[str]) -> nn.Module:
    """Return the model that files belong to whose config names none: with a head, or what is below it."""
    with torch.device("meta"):
        below: nn.Module = transformers.AutoModel.from_config(config)
        prefix = f"{below.base_model_prefix}."
        if not any(name.startswith(prefix) for name in names):
            return below
        whole: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        return whole


def _ratio(args: argparse.Namespace, method: Method | Scope | None) -> float | dict[str, float] | None:
    if not args.include:
        return args.ratio  # type: ignore[no-any-return]
    ratio = args.ratio if args.ratio is not None else 1 - args.n_of_m[0] / args.n_of_m[1]
    return dict.fromkeys(args.include, ratio)


@contextmanager
def _written(target: Path, options: Options | None) -> Iterator[Path]:
    """Yield a folder for dense files; it becomes the target, or what they are packed into does."""
    if options is None:
        with whole_folder(target) as folder:
            yield folder
        return
    beside = target.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".unfinished", dir=beside) as dense:
        yield Path(dense)
        compress_checkpoint(
            dense,
            target,
            codec=options.codec,
            layout=options.layout,
            keep_negative_zero=options.keep_negative_zero,
        )


def _report(
    args: argparse.Namespace, result: OneShotResult, batches: list[dict[str, torch.Tensor]], output: Output
) -> None:
    zeros, size = sum(one.removed for one in result.weights), sum(one.total for one in result.weights)
    how = args.solver if args.solver in ("sparsegpt", "admm") else args.method or "magnitude"
    length = batches[0]["input_ids"].shape[1]
    output.result(
        {
            "method": how,
            "solver": args.solver,
            "ratio": args.ratio,
            "samples": len(batches),
            "length": length,
            "elements": size,
            "zeros": zeros,
            "written": str(args.output),
            "zeros_by_tensor": {one.name: one.removed for one in result.weights},
            "errors_by_tensor": {one.name: one.error for one in result.weights},
            "notes": list(result.notes),
        }
    )
    output.table(
        ["tensor", "elements", "zeros", "share", "error"],
        [
            [one.name, f"{one.total:,}", f"{one.removed:,}", percent(one.removed, one.total), f"{one.error:.4f}"]
            for one in result.weights
        ],
    )
    solved = f", solved by {args.solver}" if args.solver not in (None, how) else ""
    output.line(
        f"{zeros:,} of {size:,} elements are zero ({percent(zeros, size)}): {how}{solved}, over {len(batches)} "
        f"samples of {length} tokens. What lies outside of blocks was left alone; error is the share of a layer's "
        "output that is lost."
    )
    output.line(
        f"Written packed to {args.output}; `pyprune expand` makes it dense."
        if args.compress
        else f"Written to {args.output}, as large as before; `pyprune compress` makes it smaller."
    )
