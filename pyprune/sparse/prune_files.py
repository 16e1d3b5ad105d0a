"""Checkpoints pruned file by file, without the code of the model and in memory that does not grow with it."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method, check_amount
from pyprune.sparse.checkpoint import Checkpoint, in_order
from pyprune.sparse.codec import zstd
from pyprune.sparse.convert import dense, others
from pyprune.sparse.dense_file import write_dense
from pyprune.sparse.encoding import Options
from pyprune.sparse.new_checkpoint import check_target, write_like
from pyprune.sparse.out_of_core import Choice, StoredWeight
from pyprune.sparse.pieces import LARGE, Pieces, pieces_of
from pyprune.sparse.prunable import Found, find_weights, layout_of
from pyprune.sparse.reading import SparseFile
from pyprune.sparse.writing import Source, write_sparse

Seen = Callable[[str, str], object]  # is told what was done with which weight: "counted" or "written"
# Bytes that are needed beside the weight, per element: masks, scores and what is sorted on the way.
_WHOLE, _SORTED = 14, 40
_IN_PIECES = 48 << 20
_BITS = 8 << 20  # that wait for the end of a packed file


@dataclass(frozen=True)
class PrunedFiles:
    """What `prune_files` did.

    Attributes:
        zeros: how many zeros each pruned tensor has, by its name, in the order in which ties went.
        sizes: how many elements each has.
        left_alone: other tensors, by the reason.
        removed: how many units went in all, where all compete; otherwise None.
        score: the largest score that went, where all compete.
    """

    zeros: dict[str, int]
    sizes: dict[str, int]
    left_alone: dict[str, list[str]] = field(default_factory=dict)
    removed: int | None = None
    score: float | None = None


def prune_files(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    method: Method,
    ratio: float | Mapping[str, float] | None,
    *,
    allocation: str = "uniform",
    min_ratio: float = 0.0,
    max_ratio: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    inputs_first: Sequence[str] = (),
    min_size: int = 0,
    statistics: str | os.PathLike[str] | None = None,
    compress: Options | None = None,
    max_memory: int | None = None,
    seen: Seen = lambda what, name: None,
) -> PrunedFiles:
    """Prune a checkpoint of safetensors into another: the weights that `pyprune.prune` would mask are zeros.

    A weight is in memory at a time; where single elements compete by magnitude, only pieces of one. Of equal scores
    those go first that come first: in the order of the names of files, in a file larger types first and then as they
    lie in it, in a weight by the flat index. Weights that are tied are stored once, and stay so.

    Args:
        source: a safetensors file, a folder with one, or of shards with their index.
        target: where nothing is: a file if source is one, otherwise a folder. None: only find what goes.
        method: how, within scope model, tensor, row or n_of_m.
        ratio, allocation, min_ratio, max_ratio: as in `pyprune.prune`.
        include, exclude: patterns of names, as of the command: only these are pruned, and these are not.
        min_size: tensors with fewer elements are left alone.
        inputs_first: patterns of names of weights that are inputs by outputs, as those of GPT-2 are.
        statistics: a safetensors file of what the importance needs, by the names of weights: norms of inputs
            (`importance.wanda`) or scores (`importance.given`).
        compress: how tensors are packed; None writes dense ones.
        max_memory: bytes that may be taken beside what is mapped; more is an error before anything is read.
        seen: is told "counted" or "written", and the weight.

    Raises:
        TypeError, ValueError, FileExistsError, FileNotFoundError: if it cannot be done; then nothing is written.

    Example:
        >>> import tempfile
        >>> import pyprune
        >>> from pyprune import importance
        >>> path = Path(tempfile.mkdtemp(), "dense.safetensors")
        >>> _ = pyprune.save_sparse({"up.weight": torch.randn(64, 64)}, path)
        >>> pruned = prune_files(path, path.with_name("sparse.safetensors"), Method(importance.magnitude()), 0.9)
        >>> pruned.zeros
        {'up.weight': 3686}
    """
    if compress is not None and compress.codec is not None:
        zstd()
    amount = check_amount(method, Amount(ratio, allocation, min_ratio, max_ratio))  # type: ignore[arg-type]
    with Checkpoint(source) as checkpoint:
        if target is not None:
            check_target(checkpoint, target)
        found = find_weights(checkpoint, include=include, exclude=exclude, min_size=min_size)
        if not found.names:
            raise ValueError(f"{checkpoint.path} has no weight that would be pruned; name some with include")
        if max_memory is not None:
            _check_memory(checkpoint, found, method, amount, compress, max_memory)
        with Statistics(statistics, method) as known:
            weights = [_stored(checkpoint, name, inputs_first, known) for name in found.names]
            # Of coded files the order depends on sizes, too.
            ordered = compress is None or compress.codec is None
            choice = Choice(method, amount, weights, lambda name: seen("counted", name), ordered=ordered)
            zeros: dict[str, int] = {}
            pruned = _Pruned(choice, zeros, seen)
            if target is None:
                for name in found.names:
                    for _ in pruned.pieces(name):
                        pass
            else:
                write_like(checkpoint, target, lambda file, path: _write(file, path, pruned, compress))
    sizes = {weight.name: prod(weight.shape) for weight in weights}
    return PrunedFiles(
        {name: zeros[name] for name in found.names}, sizes, found.left_alone, choice.removed, choice.score
    )


class Statistics:
    """What an importance needs of each weight, in a safetensors file by the names of weights."""

    def __init__(self, path: str | os.PathLike[str] | None, method: Method) -> None:
        self.needs = method.importance.needs
        if (path is None) != (self.needs == "none"):
            raise ValueError(
                f"importance {method.importance.name} needs {self.needs}; give its file"
                if path is None
                else f"importance {method.importance.name} needs no file; leave it out"
            )
        if self.needs not in ("none", "input norm", "given"):
            raise ValueError(
                f"importance {method.importance.name} needs {self.needs}, which no file has; load the model and call "
                "pyprune.calibrate"
            )
        self.file = None if path is None else SparseFile(path)

    def __enter__(self) -> "Statistics":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def of(self, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor] | None:
        """Return how to get what there is for a weight."""
        if self.file is None:
            return None
        key = next((one for one in (name, name.removesuffix(".weight")) if one in self.file.names), None)
        if key is None:
            raise ValueError(f"{self.file.path} has nothing for {name}; name it in exclude, or add it")
        found, file = self.file.shape(key), self.file
        if self.needs == "input norm":
            if prod(found) != shape[1]:
                raise ValueError(f"{file.path}: {key} has shape {found}, and {name} has {shape[1]} inputs")
            return lambda: file.view(key).float().view(1, -1, *(1,) * (len(shape) - 2))
        return lambda: file.view(key).float()


def _stored(checkpoint: Checkpoint, name: str, inputs_first: Sequence[str], known: Statistics) -> StoredWeight:
    shape = checkpoint.shape(name)
    layout = layout_of(name, shape, inputs_first)
    return StoredWeight(
        name, checkpoint.dtype(name), shape, lambda: checkpoint.view(name), layout, known.of(name, shape)
    )


@dataclass(frozen=True)
class _Pruned:
    choice: Choice
    zeros: dict[str, int]
    seen: Seen

    def pieces(self, name: str) -> Iterator[Tensor]:
        is_first = name not in self.zeros
        self.zeros[name] = 0
        for piece in self.choice.pieces(name):
            self.zeros[name] += int(ops.count_zeros([piece]))
            yield piece
        if is_first:
            self.seen("written", name)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        pieces = list(self.pieces(name))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(shape)


def _write(file: SparseFile, path: Path, pruned: _Pruned, compress: Options | None) -> None:
    chosen = pruned.choice.by_name

    def untouched(name: str) -> Iterator[Tensor]:
        return pieces_of(file.view(name))

    if compress is None:
        tensors = [
            dense(file, name, partial(pruned.pieces if name in chosen else untouched, name))
            for name in in_order(file)
        ]
        write_dense(path, tensors, others(file))
        return

    def read(name: str) -> Tensor:
        return pruned.whole(name, file.shape(name)) if name in chosen else file.view(name)

    def pieces(name: str) -> Pieces | None:
        if name in chosen:
            return partial(pruned.pieces, name) if pruned.choice.is_cut else None
        return partial(untouched, name) if file.is_view(name) else None

    sources = [
        Source(name, file.dtype(name), file.shape(name), partial(read, name), pieces(name)) for name in in_order(file)
    ]
    write_sparse(path, sources, compress, tied=file.tied, metadata=others(file))


def _check_memory(
    checkpoint: Checkpoint, found: Found, method: Method, amount: Amount, compress: Options | None, most: int
) -> None:
    """Raise if more is needed than may be: for pieces, or for the largest weight as a whole."""
    pieces = method.scope.name == "model" and method.importance.power is not None and not amount.is_capped
    pieces = pieces and method.granularity.name == "element" and method.importance.normalize in ("none", "l2", "mean")
    whole = _SORTED if method.importance.normalize in ("lamp", "gaussian") else _WHOLE
    for name in checkpoint:
        count, size = prod(checkpoint.shape(name)), checkpoint.dtype(name).itemsize
        needed = _IN_PIECES
        if name in found.names and not pieces:
            needed += count * (whole + size)
        if compress is not None:
            plain = compress.codec is None and compress.layout == "pyprune"
            in_pieces = plain and (pieces or name not in found.names)
            needed += 6 * (min(count * size, LARGE) if in_pieces else count * size) + count // 4 + _BITS
        if needed > most:
            raise ValueError(
                f"{name} of {count} elements needs about {needed >> 20} MiB, and {most >> 20} MiB may be taken; "
                "allow more" + ("" if pieces else ", or let single weights of the model compete, which takes pieces")
            )
