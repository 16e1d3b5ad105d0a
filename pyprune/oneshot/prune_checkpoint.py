"""Prune a checkpoint that may be larger than memory, from one folder into another."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyprune.calibration.batches import Dataset
from pyprune.checks import check_bool, check_path, shown
from pyprune.console import listed, warn
from pyprune.files import whole_file
from pyprune.methods.method import Method, PruneMode
from pyprune.methods.scope import Scope
from pyprune.modules.attachments import check_module
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.oneshot.allocations import BlockAllocation
from pyprune.oneshot.find_blocks import find_blocks
from pyprune.oneshot.model_in_files import ModelInFiles
from pyprune.oneshot.one_shot_result import OneShotResult
from pyprune.oneshot.prune_one_shot import prune_blocks
from pyprune.oneshot.reconstruct import Reconstruction
from pyprune.oneshot.shards import INDEX
from pyprune.oneshot.solution import Solver

# Other files of weights, which would be the dense ones.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")
_PROGRESS = "progress.json"
# What a run has in its folder before anything is done.
_EMPTY = {"outputs", "dense", "made"}


@torch.inference_mode(False)
def prune_checkpoint(
    source_folder: str | os.PathLike[str],
    destination_folder: str | os.PathLike[str],
    data: Dataset | Iterable[Any],
    method: Method | Scope | PruneMode | str | None = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    solver: Solver | None = None,
    blocks: str | Sequence[str] | None = None,
    allocation: Literal["uniform"] | BlockAllocation = "uniform",
    propagate: bool = True,
    reconstruct: Reconstruction | None = None,
    resume: bool = False,
    ignored_scope: IgnoredScope | None = None,
    memory: int = 2**32,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> OneShotResult:
    """Prune a checkpoint block by block over a little data, as `prune_one_shot` a model, without loading it whole.

    The weights stay in the files of the source; one block after the other is loaded, pruned and written, on the CPU.
    In memory are a block (twice, while it changes), the Grams of its inputs, and what lies outside of the blocks
    but for embeddings; what blocks give is kept in files of the destination. The result is that of `prune_one_shot`
    on the loaded model, bit for bit: a checkpoint like the source, with the same files, names and dtypes, and zeros
    for what is removed. It needs no pyprune to be loaded.

    If it fails or is interrupted, the blocks that are done are kept, and ``resume=True`` goes on. The files of
    weights have their names when all blocks are done.

    Args:
        source_folder: has ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names; and
            the ``config.json`` of transformers. It is only read.
        destination_folder: a new or empty folder, on a disk with room for the checkpoint and the outputs of a block.
        data, method, ratio, solver, blocks, allocation, propagate, reconstruct, ignored_scope, memory:
            as in `prune_one_shot`. A function of `pyprune.allocations` that measures reads all weights again,
            `allocations.owl` for each batch.
        resume: go on with the run in the destination, with the same arguments. In an empty one it begins.
        model: the model on the meta device, if the config names no class of transformers. Buffers that are not in
            the files are to have values.
        dtype: what the model computes in; None for what transformers takes. Files keep the dtype that they have.

    Returns:
        What became of each weight; ``str`` shows a table.

    Raises:
        ImportError: without transformers 5, unless there is a model of another kind.
        TypeError, ValueError: for wrong arguments; files that are damaged, or do not fit the model; a quantised
            checkpoint; a destination that has something in it; and as `prune_one_shot`.

    Example:
        >>> import tempfile
        >>> from pyprune import scope, solvers
        >>> from safetensors.torch import load_file, save_file
        >>> source, destination = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> def build():
        ...     return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        >>> save_file(build().state_dict(), f"{source}/model.safetensors")
        >>> with torch.device("meta"):
        ...     model = build()
        >>> how = dict(ratio=0.5, solver=solvers.sparsegpt(), blocks=["0", "1", "2"], model=model)
        >>> prune_checkpoint(source, destination, [torch.randn(64, 8)], scope.tensor(), **how).ratio
        0.5
        >>> int((load_file(f"{destination}/model.safetensors")["1.weight"] == 0).sum())
        32
    """
    check_bool("resume", resume)
    source, destination = _folders(source_folder, destination_folder, resume)
    _check_model(model, dtype)
    with _cleaned(destination):
        files = ModelInFiles(source, destination, model, dtype)
        found = find_blocks(files.model, blocks)
        files.check(found)
        files.load_outside(found)
        with files.reading(found):
            result = prune_blocks(
                files.model,
                data,
                method,
                ratio=ratio,
                solver=solver,
                blocks=blocks,
                allocation=allocation,
                propagate=propagate,
                reconstruct=reconstruct,
                store=destination,
                resume=resume,
                ignored_scope=ignored_scope,
                memory=memory,
                files=files,
            )
        files.finish()
        left = _copy_others(source, destination, files.file_names)
    notes = []
    if files.unexpected:
        notes.append(f"{listed(files.unexpected)}: in the files and not in the model, and copied as it is")
    if left:
        notes.append(f"{listed(left)}: other weights of the same folder, and not copied")
    if notes:
        warn(f"one-shot pruning: {'; '.join(notes)}")
    return replace(result, notes=(*result.notes, *notes))


def _folders(
    source_folder: str | os.PathLike[str], destination_folder: str | os.PathLike[str], resume: bool
) -> tuple[Path, Path]:
    check_path("source_folder", source_folder)
    check_path("destination_folder", destination_folder)
    source, destination = Path(os.path.realpath(source_folder)), Path(os.path.realpath(destination_folder))
    if not source.is_dir():
        raise ValueError(f"source_folder is {shown(str(source_folder))}, which is no folder")
    if destination == source or source in destination.parents or destination in source.parents:
        raise ValueError(
            f"destination_folder is {shown(str(destination_folder))}, and source_folder {shown(str(source_folder))}; "
            "give two folders that are not in each other"
        )
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"destination_folder is {shown(str(destination_folder))}, which is a file; give a folder")
    there = {path.name for path in destination.iterdir()} if destination.exists() else set()
    if _PROGRESS in there and not resume:
        raise ValueError(
            f"destination_folder is {shown(str(destination_folder))}, where a run is already; give resume=True to go "
            "on with it, or another folder"
        )
    if _PROGRESS not in there and there - _EMPTY:
        raise ValueError(
            f"destination_folder is {shown(str(destination_folder))}, which has {listed(sorted(there - _EMPTY))} in "
            "it; give a new folder, or an empty one"
        )
    return source, destination


def _check_model(model: object, dtype: object) -> None:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype is {shown(dtype)}; give a torch.dtype of floating point numbers, or None")
    if model is None:
        return
    check_module(model)
    assert isinstance(model, nn.Module)
    real = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    if real:
        raise ValueError(
            f"model has {listed(real)} with values already; build it under torch.device('meta'), or call "
            "pyprune.prune_one_shot"
        )


@contextmanager
def _cleaned(destination: Path) -> Iterator[None]:
    """Leave no folders in the destination that nobody goes on with."""
    is_new = not destination.exists()
    try:
        yield
    finally:
        shutil.rmtree(destination / "made", ignore_errors=True)
        if not (destination / _PROGRESS).exists():
            for name in _EMPTY:
                shutil.rmtree(destination / name, ignore_errors=True)
            if is_new and destination.exists() and not any(destination.iterdir()):
                destination.rmdir()


def _copy_others(source: Path, destination: Path, written: frozenset[str]) -> list[str]:
    """Copy the files of a folder but for weights, and return the names of other weights."""
    left = []
    for folder, inner, names in os.walk(source):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name).relative_to(source)
            if str(path) in written or name.startswith("."):
                continue
            if path.suffix in _WEIGHTS or (name.endswith(".index.json") and str(path) != INDEX):
                left.append(str(path))
                continue
            (destination / path.parent).mkdir(parents=True, exist_ok=True)
            with whole_file(destination / path) as copy:
                shutil.copyfile(source / path, copy)
    return left
