"""Prune a trained model in one pass over a little data, block by block."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import check_bool, check_count, shown
from pyprune.console import listed, tracked, warn
from pyprune.methods.method import Method, PruneMode
from pyprune.methods.scope import Scope
from pyprune.modules.attachments import check_module, unwrapped, wrapped_name
from pyprune.modules.evaluation import check_initialized, evaluating, layers_apart, untouched
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.oneshot.allocations import BlockAllocation
from pyprune.oneshot.block_by_block import OneShot
from pyprune.oneshot.digest import digest
from pyprune.oneshot.find_blocks import Block, find_blocks
from pyprune.oneshot.model_in_files import ModelInFiles
from pyprune.oneshot.one_shot_result import OneShotResult
from pyprune.oneshot.reconstruct import Reconstruction
from pyprune.oneshot.rule import rule_of
from pyprune.oneshot.run_folder import Done, RunFolder
from pyprune.oneshot.solution import Solver
from pyprune.oneshot.stored import InMemory
from pyprune.oneshot.walk import Walk
from pyprune.oneshot.weights_of_blocks import check_finite, check_masks, given, missed_in, ratios_of, targets_of

# Of so many notes a warning has the text; the result has all.
_TOLD = 5


@torch.inference_mode(False)
def prune_one_shot(
    model: nn.Module,
    data: Dataset | Iterable[Any],
    method: Method | Scope | PruneMode | str | None = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    solver: Solver | None = None,
    blocks: str | Sequence[str] | None = None,
    allocation: Literal["uniform"] | BlockAllocation = "uniform",
    propagate: bool = True,
    reconstruct: Reconstruction | None = None,
    store: str | os.PathLike[str] = "memory",
    resume: bool = False,
    ignored_scope: IgnoredScope | None = None,
    memory: int = 2**32,
) -> OneShotResult:
    """Prune a trained model block by block over a little data, in place, and repair what is left by a solver.

    The model is run on the data up to its first block, the block's weights are chosen and solved by what they
    multiply there, then the data go through the pruned block to the next one, and so on. The model is called as its
    user calls it; blocks that are done return what they gave. So any model does whose blocks take from each other
    only what these return: a pass of the first batch checks it, exactly. Each weight gets a mask, as by `prune`: its
    zeros are held, and `strip` lets go.

    What is outside of blocks (embeddings, heads) stays, unless it is named in ``blocks``.

    It is done block by block: if it fails or is interrupted, the block that it is at is as it was, and those before
    are pruned. With a folder as ``store`` it can go on from there.

    Args:
        model: the model, on the device of the data; it is run in evaluation mode, without gradients.
        data: inputs of the model: a `Dataset`, or an iterable of batches, as for `calibrate`. A few ten thousand
            tokens. Positions that are padding by the batch's ``attention_mask`` do not count.
        method: what goes. A `Method` without a solver, or with one that needs masks (`solvers.least_squares`); its
            importance is by weights and what they multiply: `importance.magnitude`, `importance.wanda`,
            `importance.ria`. For a solver that chooses (`solvers.admm`) a scope, a Method with `importance.obs`, or
            None for the solver's own scope. None or a scope for a solver that needs masks: it solves for those that
            the model has.
        ratio: fraction of each weight to remove, in [0, 1); or a dict of fractions by names or patterns, as for
            `prune`. None for N:M in all groups.
        solver: a function of `pyprune.solvers`, called; or None: weights that are kept stay as they are.
        blocks: the name of a list of layers, ``"model.layers"``, or several names of lists or modules, in any order;
            None to find the lists of layers that repeat.
        allocation: how one ratio becomes one for each block: "uniform", or what a function of `pyprune.allocations`
            returns.
        propagate: whether a block is measured on what the pruned blocks before it make of the data, which takes two
            passes of each block; otherwise on what the dense ones make.
        reconstruct: `solvers.reconstruct`, called: trains what a block keeps until its output is near that of the
            dense model's block.
        store: "memory", or a folder for what blocks give and what is done; outputs are mapped from there.
        resume: go on with the run in the folder, with the same arguments and a fresh model. What it ends with has the
            same bits as without an interruption. In an empty folder it begins.
        ignored_scope: weights to leave out.
        memory: bytes that the Gram X'X of one input may take. A larger one is cut into blocks of columns, which are
            solved by themselves; the result names those weights.

    A weight that has a mask already loses more: what is dropped stays so, and ``ratio`` is of all. Experts in one
    weight, and groups of a convolution, are solved one by one.

    Returns:
        What became of each weight; ``str`` shows a table.

    Raises:
        TypeError, ValueError: for wrong arguments or weights, before anything is changed; for a model without lists
            of layers, or whose blocks take from each other what they do not return; for data without tokens, or that
            are NaN or infinite within a block.

    Papers: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"; Sun
    et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".

    Example:
        >>> from pyprune import scope, solvers
        >>> _ = torch.manual_seed(0)
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 3))
        >>> data = [torch.randn(16, 10, 4) for _ in range(4)]
        >>> result = prune_one_shot(model, data, scope.tensor(), ratio=0.5, solver=solvers.admm())
        >>> result.ratio, [weight.error < weight.error_masked for weight in result.weights] == [True] * 8
        (0.5, True)
        >>> int((model[1][0].linear1.weight == 0).sum())
        64
    """
    check_module(model)
    _check_has_values(model)
    return prune_blocks(
        model,
        data,
        method,
        ratio=ratio,
        solver=solver,
        blocks=blocks,
        allocation=allocation,
        propagate=propagate,
        reconstruct=reconstruct,
        store=store,
        resume=resume,
        ignored_scope=ignored_scope,
        memory=memory,
    )


def prune_blocks(
    model: nn.Module,
    data: Dataset | Iterable[Any],
    method: Method | Scope | PruneMode | str | None,
    *,
    ratio: float | Mapping[str, float] | None,
    solver: Solver | None,
    blocks: str | Sequence[str] | None,
    allocation: Literal["uniform"] | BlockAllocation,
    propagate: bool,
    reconstruct: Reconstruction | None,
    store: str | os.PathLike[str],
    resume: bool,
    ignored_scope: IgnoredScope | None,
    memory: int,
    files: ModelInFiles | None = None,
) -> OneShotResult:
    """Do what `prune_one_shot` does, on a model whose weights may stay in ``files``."""
    check_bool("propagate", propagate)
    if check_bool("resume", resume) and _is_memory(store):
        raise ValueError('resume is True, and store is "memory", which keeps nothing; give the folder of the run')
    if reconstruct is not None and not isinstance(reconstruct, Reconstruction):
        raise TypeError(f"reconstruct is {shown(reconstruct)}; give pyprune.solvers.reconstruct(), or None")
    memory = check_count("memory", memory, what="bytes, an integer, at least 1", least=1)
    rule = rule_of(method, solver, ratio, allocation)
    model = unwrapped(model)
    check_initialized(model)
    found = find_blocks(model, blocks)
    targets, left_out = targets_of(model, found, ignored_scope)
    check_masks(rule, targets)
    every = [target for some in targets.values() for target in some]
    if files is None:
        check_finite(every)
    scores = given(model, rule, every, left_out)
    batches = list(batches_of(data, None, "Reading batches", names=("data", "num_batches")))
    ratios = ratios_of(model, rule, every, left_out, allocation, blocks, batches, ignored_scope)
    folder = None if _is_memory(store) else RunFolder(store, resume=resume)
    done: list[Done] = []
    with evaluating(model), untouched(model), layers_apart(model), _uncompiled(model):
        walk = Walk(
            model,
            batches,
            found,
            InMemory() if folder is None else folder.outputs,
            must_be_called=blocks is not None,
        )
        walk.check()
        run = OneShot(model, walk, targets, rule, ratios, scores, propagate, reconstruct, folder, memory, files)
        if folder is not None:
            folder.begin(
                {
                    "kind": "model" if files is None else "checkpoint",
                    "data": digest(*batches),
                    "method, ratio, solver": f"{rule} {sorted((t.name, one) for t, one in ratios.items())}",
                    "propagate": str(propagate),
                    "reconstruct": repr(reconstruct),
                    "memory": str(memory),
                    "ignored_scope": repr([target.name for target in every]),
                    "model": _digest_outside(model, walk.blocks),
                },
                {block.name: run.digest(block) for block in walk.blocks},
            )
        with _saying_what_is_done(done, len(walk.blocks), folder):
            for place in tracked(range(len(walk.blocks)), len(walk.blocks), "One-shot pruning"):
                is_done = folder is not None and place < len(folder.done)
                done.append(run.restore(place) if is_done else run.prune(place))
    if folder is not None:
        folder.end()
    notes = missed_in(model, found, every, ignored_scope)
    notes += [("not called for the first batch of data, and left as it is", name) for name in walk.idle]
    notes += [note for one in done for note in one.notes]
    weights = tuple(weight for one in done for weight in one.weights)
    fits = {one.block: one.fit for one in done if one.fit is not None}
    result = OneShotResult(weights, _by_what(notes), fits)
    _tell(result.notes)
    return result


def _check_has_values(model: nn.Module) -> None:
    """Raise if weights are elsewhere: on the meta device, where accelerate has those that it offloads."""
    lost = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lost:
        raise ValueError(
            f"{listed(lost)} of {type(model).__name__} is on the meta device: it was not loaded, or is offloaded to "
            "where only its layer finds it. Load the model into memory; or call pyprune.prune_checkpoint, which "
            "loads one block of a checkpoint at a time"
        )


def _is_memory(store: object) -> bool:
    return isinstance(store, str) and store == "memory"


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let what is compiled in a model run as it was before."""
    modules = list(model.modules())
    is_compiled = any(wrapped_name(one) == "_orig_mod" or one._compiled_call_impl is not None for one in modules)
    if not is_compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _digest_outside(model: nn.Module, blocks: Sequence[Block]) -> str:
    """Return what says which weights a model has outside of its blocks."""
    inside = {tensor for block in blocks for tensor in (*block.module.parameters(), *block.module.buffers())}
    named = [*model.named_parameters(), *model.named_buffers()]
    return digest(*((name, tensor) for name, tensor in named if tensor not in inside))


# ---- what is said ----


@contextmanager
def _saying_what_is_done(done: Sequence[Done], count: int, folder: RunFolder | None) -> Iterator[None]:
    """Let an error say how many blocks are done."""
    try:
        yield
    except BaseException as error:
        if hasattr(error, "add_note"):  # Python 3.11
            how = f"resume=True goes on in {folder.path}" if folder is not None else "the others are as they were"
            error.add_note(f"prune_one_shot: {len(done)} of {count} blocks are done; {how}")
        raise


def _by_what(notes: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    names: dict[str, list[str]] = {}
    for what, name in notes:
        names.setdefault(what, []).append(name)
    return tuple(f"{listed(some)}: {what}" for what, some in names.items())


def _tell(notes: Sequence[str]) -> None:
    if notes:
        more = f"; and {len(notes) - _TOLD} more, which are in the result's notes" if len(notes) > _TOLD else ""
        warn(f"one-shot pruning: {'; '.join(notes[:_TOLD])}{more}")
