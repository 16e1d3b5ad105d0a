"""Prune heads and neurons of a trained transformer to a budget in one pass, without training (Kwon et al. 2022)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.calibration.padding import Padding
from pyprune.checks import check_bool, check_choice, check_count, check_number, shown
from pyprune.console import listed, warn
from pyprune.methods import granularity, importance, scope
from pyprune.methods.allocation import Amount
from pyprune.methods.coupled import Flags, Numbers
from pyprune.methods.method import Method
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_initialized, evaluating, forward, layers_apart, untouched
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import NewMask, attach_masks
from pyprune.modules.undo import Change
from pyprune.oneshot.retrain_free_result import RetrainFree, UnitsLeft
from pyprune.oneshot.unit_gradients import (
    Likelihood,
    Losses,
    drawn_losses,
    kept_positions,
    unit_gradients,
    values_of,
)
from pyprune.oneshot.unit_scales import Reading, look_at_inputs, readings_of, tune_units
from pyprune.oneshot.unit_search import exchanged, units_within
from pyprune.selection.choose_coupled import unit_masks
from pyprune.selection.coupled import CoupledUnits, UnitsOfGroup, find_coupled
from pyprune.selection.find_prunable import Prunable, tell_missed

LossFunction = Callable[[nn.Module, Any], Tensor]
_METHOD = Method(importance.magnitude(p=2), granularity.coupled(), scope.model())


@torch.inference_mode(False)
def prune_retrain_free(
    model: nn.Module,
    data: Dataset | Iterable[Any],
    *,
    target_macs: float,
    loss_fn: LossFunction | None = None,
    likelihood: Likelihood | None = None,
    draws: int = 8,
    rearrange: bool = True,
    tune: bool = True,
    num_batches: int | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    memory: int = 2**30,
) -> RetrainFree:
    """Mask whole heads and neurons of a trained model, in place, so that a share of its MACs is left: no retraining.

    1. A mask of ones is thought on each unit: a head (with grouped queries, those that share a key and value), a
       neuron of an MLP, a channel of a convolution. Its importance is its diagonal Fisher information, the sum over
       batches of the squared gradient of the loss with respect to its mask.
    2. The units of the greatest sum of importances are kept that the budget allows: every number of heads is tried,
       with as many neurons as the rest allows. Each group keeps one unit.
    3. In each group units are exchanged for others, so that ``||sum of gradients of what goes||^2``, the Fisher
       information with the terms of pairs, is less.
    4. Each unit that is kept gets a scale by least squares, so that the layer that reads it makes of inputs as in the
       dense model what it made, each output relative to its standard deviation. The scales are multiplied into that
       layer's weight, and its bias takes over the mean of what is missing. Layer after layer, in the order of the
       forward pass, that stays only if the model is nearer to the dense one (with a ``loss_fn``: has less loss) on
       the last quarter of the batches.

    What goes has masks, as by `prune` with ``granularity.coupled()``; `shrink` removes it. `reconstruct` may repair
    more: there each weight is free, and not only a scale of each unit.

    Args:
        model: a model without masks and gates.
        data: a `Dataset`, or an iterable of batches: inputs of the model, or what ``loss_fn`` takes. They are kept. A
            few hundred inputs, in batches of a few, are enough: each batch gives one gradient, or ``draws`` of them.
        target_macs: the share of the model's multiply-accumulates that is to be left at most, in (0, 1].
        loss_fn: takes the model and a batch, and returns the loss, a tensor with one element. Without it no labels
            are needed: outputs are drawn from the model's own distribution, and the loss is the negative logarithm
            of their likelihood. Padding counts for nothing where a batch says by its ``attention_mask`` and the
            like which positions are.
        likelihood: without a ``loss_fn``, what the output is: "categorical", logits along the last dimension, of
            which labels are drawn; or "normal", values with noise of variance 1. None is "categorical" for outputs
            with ``logits`` of two classes or more, and "normal" for the first tensor of others.
        draws: without a ``loss_fn``, how many outputs are drawn for each batch; each takes a backward pass.
        rearrange: whether to do 3.
        tune: whether to do 4.
        num_batches: how many batches to use; all if None or if there are fewer.
        ignored_scope: weights to leave out, with the groups of units that lie in them.
        examples_inputs: inputs by which units are found and MACs are counted, as in `prune`; the first batch if None,
            which with a ``loss_fn`` must be a dict or tensor that the model takes.
        memory: bytes that sums may take in 4. Layers are looked at in as many passes over the data as that asks for;
            one that would take more by itself is not tuned.

    Returns:
        A `RetrainFree`: units left by group, scales and errors by layer, MACs before and after; `str` shows tables.

    Raises:
        TypeError, ValueError: for wrong arguments, a model that has masks or gates on what would go or has no units
            that could, a budget that cannot be reached, and a loss or gradients that are not finite. After any error
            the model is as it was.

    Paper: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers".

    Example:
        >>> import pyprune
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [torch.randn(16, 8) for _ in range(8)]
        >>> result = pyprune.prune_retrain_free(model, batches, target_macs=0.5)
        >>> result.ratios, result.macs_after / result.macs_before
        ({'0.weight': 0.5}, 0.5)
        >>> _ = pyprune.shrink(model, batches[0])
        >>> model[0].out_features
        16
    """
    check_module(model)
    check_initialized(model)
    what = "the fraction of the model that is to be left, a number in (0, 1]"
    target_macs = check_number("target_macs", target_macs, what=what, least=2.0**-53, most=1)
    losses = _losses(loss_fn, likelihood, draws)
    check_bool("rearrange", rearrange)
    check_bool("tune", tune)
    memory = check_count("memory", memory, what="bytes, an integer, 0 or more")
    source = batches_of(data, num_batches, "Reading batches", checked=loss_fn is None, names=("data", "num_batches"))
    batches = list(source)
    if examples_inputs is None:
        examples_inputs = batches[0]
        if loss_fn is not None and not isinstance(examples_inputs, (Tensor, Mapping)):
            raise ValueError(
                "the batches are what loss_fn takes, and examples_inputs is None; give inputs of the model, by which "
                "units are found"
            )
    with Change(model):
        units = _units(model, ignored_scope, examples_inputs)
        with untouched(model), evaluating(model):
            found = unit_gradients(model, units.chosen, batches, losses)
        gradients = [one.numpy() for one in found]
        _check_gradients(units.chosen, gradients)
        kept = _kept(units, gradients, target_macs, rearrange=rearrange)
    everything = [np.ones(len(group), bool) for group in units.found]
    flags = _of_all(units, kept)
    before, after = units.found.macs(everything), units.found.macs(flags)
    left = tuple(
        UnitsLeft(one.name, one.group.what, len(one), int(own.sum()), _share(rows, own))
        for one, rows, own in zip(units.chosen, gradients, kept, strict=True)
    )
    masks = [
        NewMask(target.owners, mask, on_target=target.parameter.dim() > 1)
        for target, mask in unit_masks(units, Amount(), kept).items()
    ]
    readings, skipped = readings_of(units.chosen, kept) if tune else ([], {})
    with Change(model, values=_written(readings)), untouched(model), evaluating(model), layers_apart(model):
        judge = _judge(model, batches[-max(1, len(batches) // 4) :], loss_fn) if readings else float
        if readings:
            skipped |= look_at_inputs(readings, partial(_run, model, loss_fn), batches, Padding(model), memory)
        attach_masks(model, masks)
        tuning = tune_units([one for one in readings if one.name not in skipped], judge)
    skipped |= dict(tuning.skipped)
    if skipped:
        warn(f"not tuned: {listed([f'{name} ({why})' for name, why in skipped.items()])}")
    return RetrainFree(left, tuning.tuned, tuple(skipped.items()), before, after)


def _losses(loss_fn: object, likelihood: object, draws: object) -> Losses:
    draws = check_count(
        "draws", draws, least=1, what="how many outputs are drawn for a batch, an integer, at least 1"
    )
    if loss_fn is None:
        if likelihood is not None:
            check_choice("likelihood", likelihood, ("categorical", "normal"))
        return drawn_losses(likelihood, draws)  # type: ignore[arg-type]
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is {shown(loss_fn)}; give a function of the model and a batch, or None")
    if likelihood is not None:
        raise ValueError(f"likelihood is {shown(likelihood)}, and loss_fn says what the loss is; give one of them")
    return lambda model, batch: [loss_fn(model, batch)]


def _units(model: nn.Module, ignored_scope: IgnoredScope | None, examples: Any) -> CoupledUnits:
    """Return the units that can go: those that a weight reads."""
    units = find_coupled(model, _METHOD, ignored_scope, examples)
    tell_missed(
        model, _METHOD, ignored_scope, Prunable(units.targets, units.targets, (), units), None, has_inputs=True
    )
    carried = [target.name for target in units.targets if target.attachment is not None]
    if carried:
        raise ValueError(
            f"{listed(carried)} carry masks or gates already; pyprune.strip takes them off (what is zero then goes "
            "first), or name them in ignored_scope"
        )
    unread = [one for one in units.chosen if not any(part.reads for part in one.weights)]
    if unread:
        warn(
            f"coupled units of these groups are left alone: {listed([one.name for one in unread])} (no weight reads "
            "them)"
        )
    chosen = tuple(one for one in units.chosen if one not in unread)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no units that a weight reads; there is nothing to prune")
    return replace(units, chosen=chosen, others=(*units.others, *unread))


def _check_gradients(groups: Sequence[UnitsOfGroup], gradients: Sequence[Numbers]) -> None:
    bad = [one.name for one, rows in zip(groups, gradients, strict=True) if not np.isfinite(rows).all()]
    if bad:
        raise ValueError(
            f"gradients of {listed(bad)} are NaN or infinite; check the batches, the loss and the weights"
        )
    without = [one.name for one, rows in zip(groups, gradients, strict=True) if not rows.any()]
    if len(without) == len(groups):
        raise ValueError(
            "no unit has a gradient: the loss does not depend on any of them; check loss_fn and the data"
        )
    if without:
        warn(f"the loss does not depend on the units of {listed(without)}, which so go first")


def _kept(units: CoupledUnits, gradients: Sequence[Numbers], share: float, *, rearrange: bool) -> list[Flags]:
    allowed = round(share * units.found.macs(), 6)
    kept = units_within(
        [np.square(rows).sum(0) for rows in gradients],
        [one.group.macs for one in units.chosen],
        lambda flags: units.found.macs(_of_all(units, flags)),
        allowed,
    )
    return [exchanged(*one) for one in zip(gradients, kept, strict=True)] if rearrange else kept


def _of_all(units: CoupledUnits, kept: Sequence[Flags]) -> list[Flags]:
    """Return which units of all groups of the model are kept."""
    flags = [np.ones(len(group), bool) for group in units.found]
    for one, own in zip(units.chosen, kept, strict=True):
        flags[one.number] = own
    return flags


def _share(gradients: Numbers, kept: Flags) -> float:
    importances = np.square(gradients).sum(0)
    return float(importances[kept].sum() / importances.sum()) if importances.any() else 1.0


def _written(readings: Sequence[Reading]) -> list[Tensor]:
    """Return the weights and biases of layers: what tuning may write."""
    tensors = (getattr(one.layer, name) for one in readings for name in ("weight", "bias"))
    return [tensor for tensor in tensors if tensor is not None]


def _run(model: nn.Module, loss_fn: LossFunction | None, batch: Any) -> Any:
    return forward(model, batch, "a batch of data") if loss_fn is None else loss_fn(model, batch)


def _judge(model: nn.Module, batches: Sequence[Any], loss_fn: LossFunction | None) -> Callable[[], float]:
    """Return what says how bad a model has become: its loss, or how far its outputs are from what they are now."""
    if loss_fn is not None:
        return lambda: sum(float(loss_fn(model, batch)) for batch in batches)

    padding = Padding(model)

    def outputs(batch: Any) -> Tensor:
        values = values_of(_run(model, None, batch), with_gradient=False)
        padding.begin(batch)
        kept = kept_positions(padding, values)
        return values if kept is None else values[kept]

    dense = [outputs(batch).clone() for batch in batches]
    return lambda: sum(
        float((outputs(batch) - wanted).double().square().sum()) for batch, wanted in zip(batches, dense, strict=True)
    )
