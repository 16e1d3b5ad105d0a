"""Repair what pruning did to a model: solve its layers anew by least squares, without labels and without training."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import check_choice, check_count, check_number
from pyprune.console import listed, tracked, warn
from pyprune.modules.attachments import check_module, unwrapped
from pyprune.modules.evaluation import check_initialized
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.undo import Change
from pyprune.structured.paired_layers import Reader, find_readers, kept_by
from pyprune.structured.paired_passes import evaluating_both, look_at_both
from pyprune.structured.reconstructed import Reconstructed
from pyprune.structured.solve_by_gradients import solve_by_gradients
from pyprune.structured.solve_by_sums import solve_by_sums
from pyprune.structured.solved import Solved

# A share of zeros in a weight that does not come about by itself.
_FEW_ZEROS = 0.05


@torch.inference_mode(False)
def reconstruct(
    dense: nn.Module,
    model: nn.Module,
    batches: Dataset | Iterable[Any],
    plan: Any = None,
    *,
    layers: Literal["cut", "all"] = "cut",
    damping: float | None = None,
    num_batches: int | None = None,
    ignored_scope: IgnoredScope | None = None,
    memory: int = 2**30,
) -> Reconstructed:
    """Let the layers of a pruned model make what those of the dense one make, by least squares, in place.

    Layer after layer, in the order of the forward pass, weight W and bias b become those with the least
    ``||X W + b - Y||^2 + damping * mean(diag(X'X)) * ||W - V||^2``, where X is what the layer gets in the pruned
    model, repaired up to there, Y what it makes in the dense one, and V its present weight. That needs no labels, but
    inputs like those that the model is for: a few hundred. A layer without a bias gets none. Where BatchNorm follows,
    `batch_norm_adaptation` afterwards helps if little was lost; where much was, it makes what is missing louder.

    Zeros under masks stay, and take no part. Zeros that nothing holds fill up: put `keep_sparse` on before.

    Args:
        dense: the model before pruning; it is only run.
        model: what pruning made of it: shrunk, or with masks. Both run in evaluation mode, without gradients.
        batches: a `Dataset`, or an iterable of inputs of the model, as for `batch_norm_adaptation`. They are kept,
            and go through both models once per layer.
        plan: of a model that was shrunk: which rows of the dense weights are left. What `shrink` returned, its plan,
            or a dict ``{"tensors": {name: {dim: kept positions}}}``.
        layers: "cut" solves the layers that have lost inputs: channels before them went, or weights of their own.
            "all" solves all whose inputs or weights are not those of the dense model; they fit the batches better,
            and other inputs often worse.
        damping: of the ridge towards the present weights. If None, each layer gets the one of 1e-4, 1e-3, ..., 10 by
            which the first three quarters of the batches predict the last best (1e-4 if there are fewer than four);
            conjugate gradients have 1e-4, and end when they predict these no better.
        num_batches: how many batches to use; all if None or if there are fewer.
        ignored_scope: layers to leave as they are.
        memory: bytes that the X'X of a layer may take, with what is made of it. A layer with more inputs is solved by
            conjugate gradients, with as many batches as this holds inputs and outputs of.

    Returns:
        A `Reconstructed`, which says what became of each layer; `str` shows a table.

    Raises:
        TypeError, ValueError: for wrong arguments, a plan of another model, weights that both models share, inputs or
            outputs of a layer that are NaN or infinite, or if no layer can be solved. After any error the model is as
            it was.

    Example:
        >>> import copy
        >>> import pyprune
        >>> _ = torch.manual_seed(0)
        >>> dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = pyprune.prune(copy.deepcopy(dense), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> repaired = pyprune.reconstruct(dense, model, [torch.randn(64, 8)])
        >>> [layer.after < layer.before for layer in repaired.layers]
        [True, True]
    """
    check_module(dense, "dense")
    check_module(model)
    if dense is model:
        raise ValueError("dense and model are the same; give a copy of the model that was made before it was pruned")
    check_choice("layers", layers, ("cut", "all"))
    if damping is not None:
        damping = check_number("damping", damping, what="a number, 0 or more", least=0)
    memory = check_count("memory", memory, what="bytes, an integer, 0 or more")
    if ignored_scope is not None and not isinstance(ignored_scope, IgnoredScope):
        raise TypeError(f"ignored_scope is a {type(ignored_scope).__name__}; give a pyprune.IgnoredScope")
    dense, model = unwrapped(dense), unwrapped(model)
    for one in (dense, model):
        check_initialized(one)
    source = batches_of(batches, num_batches, "Reading batches", names=("batches", "num_batches"))
    weights, skipped = find_readers(dense, model, kept_by(plan), ignored_scope)
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no layer to solve outside the ignored scope: Linear and convolutions are"
        )
    values = dict.fromkeys(tensor for readers in weights for one in readers for tensor in one.tensors())
    inputs = list(source)
    solved: list[Solved] = []
    with Change(model, values=values), evaluating_both(dense, model):
        look = look_at_both(dense, model, inputs, weights, only_cut=layers == "cut")
        _warn_of_zeros([one for job in look.jobs for leg in job.legs for one in leg])
        for job in tracked(look.jobs, len(look.jobs), "Reconstruction", shown=len(look.jobs) > 1):
            if job.bytes <= memory:
                solved += solve_by_sums(dense, model, inputs, job, damping=damping)
            else:
                solved += solve_by_gradients(dense, model, inputs, job, damping=damping, memory=memory)
    skipped |= look.problems
    if skipped:
        reasons: dict[str, list[str]] = {}
        for name, why in skipped.items():
            reasons.setdefault(why, []).append(name)
        parts = "; ".join(f"{listed(names)} ({why})" for why, names in reasons.items())
        warn(f"reconstruct leaves some weights as they are: {parts}. Name them in ignored_scope if that is meant")
    return Reconstructed(tuple(solved), skipped, look.others)


def _warn_of_zeros(readers: Iterable[Reader]) -> None:
    free = [one for one in readers if one.mask is None]
    zeros = [one.name for one in free if int((one.weight == 0).sum()) > _FEW_ZEROS * one.weight.numel()]
    if zeros:
        warn(
            f"zeros in {listed(zeros)} are held by nothing, so reconstruct fills them up; put pyprune.keep_sparse on "
            "before, or shrink the model"
        )
