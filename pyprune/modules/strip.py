"""Fold masks and gates into the weights and leave a plain model."""

import copy
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.checks import check_bool, shown
from pyprune.console import listed, warn
from pyprune.modules.attachments import Attachment, check_module, detach
from pyprune.modules.forward_pass import unshare_samples
from pyprune.modules.gates import HardConcreteGate, StochasticGate, check_gates, gates_of
from pyprune.modules.masks import Mask
from pyprune.modules.targets import Target, attachments_of, check_prunable
from pyprune.modules.undo import Change
from pyprune.modules.unit_gates import UnitGates
from pyprune.modules.watching import unwatch
from pyprune.modules.zeros import check_places, fold_all

_M = TypeVar("_M", bound=nn.Module)

# How PEFT calls a layer that it has put an adapter on.
_ADAPTED = ".base_layer."


class StripFormat(str, Enum):
    """What `strip` leaves behind, under the names NNCF gives it.

    * ``IN_PLACE``: zeros in the weights, and nothing else.
    * ``NATIVE``: in NNCF, another form of its quantizers, with masks left on. pyprune has no quantizers.
    """

    IN_PLACE = "in_place"
    NATIVE = "native"


@torch.inference_mode(False)  # a copy made under inference_mode could not be trained
def strip(
    model: _M,
    *,
    do_copy: bool = False,
    strip_format: StripFormat | str = StripFormat.IN_PLACE,
    expected_count: bool = False,
) -> _M:
    """Write into the weights what masks and gates make of them in evaluation, and remove every trace of pruning.

    Classes of modules, names and order of parameters, the `Parameter` objects and their ``requires_grad`` are
    those of the dense model again: an optimizer goes on holding them, and a plain model loads the state_dict. The
    outputs in evaluation do not change. A model without masks and gates is returned as it is. After this, nothing
    keeps the zeros at zero in further training.

    Args:
        model: a model with masks or gates.
        do_copy: work on a deep copy, and leave ``model`` as it is.
        strip_format: `StripFormat.IN_PLACE` or its value.
        expected_count: of the n values of each hard-concrete gate, zero exactly ``round(n - E)``, where E is how many
            training expects not to be zero: those with the smallest ``soft = sigma(0.8 * logits / beta)``, and of
            equals the first. The others become their soft value (1 if the gate is straight-through), which changes
            the outputs. Without this, fewer gates are zero in evaluation than in training.

    Returns:
        ``model``, or its copy.

    Raises:
        TypeError, ValueError: for another format, ``expected_count`` without a hard-concrete gate, or a weight that
            cannot be written to (one that was sharded, or got a second parametrization), or NaN in the logits of a
            gate. The model is then as it was.

    Paper: Wang, Wohlwend, Lei 2020, "Structured Pruning of Large Language Models" (for ``expected_count``).

    Example:
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(4, 4), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> int(strip(linear).weight.count_nonzero()), type(linear).__name__
        (4, 'Linear')
    """
    check_module(model)
    below = [target.name for target in attachments_of(model) if _ADAPTED in f".{target.name}"]
    if below:
        warn(
            f"there are adapters on {listed(below)}; merged from now on, they fill the zeros of these weights. Merge "
            "them while masks are on, and strip then, or use keep_sparse(...).reapply(merged)"
        )
    return let_go(model, do_copy=do_copy, strip_format=strip_format, expected_count=expected_count)


@torch.inference_mode(False)
def let_go(
    model: _M,
    *,
    do_copy: bool = False,
    strip_format: StripFormat | str = StripFormat.IN_PLACE,
    expected_count: bool = False,
) -> _M:
    """Do what `strip` says, without a word."""
    check_bool("do_copy", do_copy)
    check_bool("expected_count", expected_count)
    if isinstance(strip_format, str) and strip_format == StripFormat.NATIVE:
        raise ValueError(
            "strip_format NATIVE converts NNCF's quantizers and would leave the masks on; pyprune has no "
            "quantizers. Use StripFormat.IN_PLACE, which folds the masks into the weights"
        )
    if not isinstance(strip_format, str) or strip_format != StripFormat.IN_PLACE:
        raise ValueError(f"strip_format is {shown(strip_format)}; allowed is StripFormat.IN_PLACE")
    check_gates(model)
    check_places(model)
    attachments = attachments_of(model)
    if expected_count and not any(isinstance(found, HardConcreteGate) for found in attachments.values()):
        raise ValueError(
            "expected_count is for hard-concrete gates on elements or blocks, and this model has none; masks and "
            "Bernoulli gates say themselves what is zero"
        )
    check_foldable(attachments)
    if do_copy:
        model = copy.deepcopy(model)
    attachments = attachments_of(model)
    masks = {target.parameter: found.mask for target, found in attachments.items() if isinstance(found, Mask)}
    gates = {
        target.parameter: found
        for target, found in attachments.items()
        if isinstance(found, (StochasticGate, UnitGates))
    }
    gated = {weight: _gated(weight, gate, expected_count) for weight, gate in gates.items()}
    with Change(model) as change:
        # The last comes off first, so that attaching again keeps the order. Weights change when all else is done.
        for target in reversed(attachments):
            detach(target.owners[::-1])
        unshare_samples(model)
        unwatch(model)
        change.finish(partial(_write, masks, gated, [one for gate in gates.values() for one in gates_of(gate)]))
    return model


def check_foldable(attachments: Mapping[Target, Attachment]) -> None:
    """Raise unless all that these make of their weights can be written into them."""
    for target in attachments:
        check_prunable(target)
    undecided = [
        target.name
        for target, found in attachments.items()
        if isinstance(found, (StochasticGate, UnitGates))
        and any(gate.logits.isnan().any() for gate in gates_of(found))
    ]
    if undecided:
        raise ValueError(
            f"the gates of {', '.join(undecided)} have NaN logits, which are neither open nor closed: the training "
            "diverged. Load an earlier checkpoint"
        )


@torch.no_grad()
def _write(
    masks: Mapping[nn.Parameter, Tensor], gated: Mapping[nn.Parameter, Tensor], gates: Iterable[StochasticGate]
) -> None:
    fold_all(masks.items())
    for weight, value in gated.items():
        weight.copy_(value)
    for gate in gates:
        gate.folded = True


@torch.no_grad()
def _gated(weight: Tensor, gate: StochasticGate | UnitGates, expected_count: bool) -> Tensor:
    """Return what a gate makes of its weight in evaluation."""
    if not (expected_count and isinstance(gate, HardConcreteGate)):
        return gate.deterministic(weight)
    kept = ops.gate_penalty([gate.logits], shift=gate.shift).item()
    soft = torch.sigmoid(0.8 * gate.logits.float() / gate.beta)
    (mask,), _ = ops.threshold([soft], math.floor(soft.numel() - kept + 0.5))
    values = torch.where(mask, 1.0 if gate.straight_through else soft, 0.0)
    for dim, size in enumerate(weight.shape):
        values = values.repeat_interleave(size // max(1, values.shape[dim]), dim)
    # A product would make NaN of infinity.
    return torch.where(values != 0, weight * values.to(weight.dtype), 0)
