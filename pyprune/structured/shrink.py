"""Remove physically what is dead, and prove that the model computes what it did."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.checks import check_bool, check_choice, check_count, check_number
from pyprune.modules.undo import Change
from pyprune.structured import attributes
from pyprune.structured.attachments_off import gated_weights, put_back, take_off
from pyprune.structured.compact import cut_state, named_tensors, resizing, value_of
from pyprune.structured.coordinates import Flags
from pyprune.structured.dead_branches import dead_branches
from pyprune.structured.dropped import sizes_of
from pyprune.structured.groups import CoupledGroups, groups_of
from pyprune.structured.models import check_model, check_values, examples_of
from pyprune.structured.optimizer_states import optimizers_of
from pyprune.structured.plan import Plan
from pyprune.structured.pretrained import let_configs_say
from pyprune.structured.readers import Constants, Dead, Readers
from pyprune.structured.remembered import plan_of, remember
from pyprune.structured.removal import Removal
from pyprune.structured.shrunk import Removed, Shrunk
from pyprune.structured.sizes import places_in
from pyprune.structured.trace import trace
from pyprune.structured.tracer import NOT_REACHED


@torch.inference_mode(False)
def shrink(
    model: nn.Module,
    examples: Any,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    round_to: int = 1,
    constants: Constants = "exact",
    verify: float = 1e-4,
    width: bool = False,
    update_stale: bool = False,
) -> Shrunk:
    """Remove what is dead, in place: the small model is an ordinary, dense one, and computes what it did.

    A unit (a channel, a head, ...) is dead if what is made of it arrives nowhere: it is zero whatever the inputs are,
    or all that reads it has zeros there. It does not matter what made the zeros: masks and gates (which are folded;
    masks on what is left stay on), slimming, training. A unit that is constant, and not zero, goes into the biases of
    its readers. The `Parameter` objects stay, gradients are cleared. Whatever cannot be removed stays, and is named.

    Args:
        model: a plain model, in training or evaluation (it is looked at in evaluation).
        examples: what the model takes, as for `coupled_groups`. They say what is reached and are what the result is
            compared on; several in a list if the model takes other ways with other inputs.
        optimizer: one that trains the model, or several in a list, whose state is cut alike.
        round_to: keep a number of channels that is a multiple of this. Heads and groups of convolutions are not
            rounded.
        constants: "exact" keeps channels whose constant would have to meet zero padding, where no bias is the same,
            "drop" removes them, and reports how much outputs change.
        verify: how much outputs may differ, relative to the largest value of each. With ``math.inf`` they may as they
            like, as for a model that computes something else each time.
        width: also remove units under a norm over all of them (the width of a transformer), which must arrive there
            as zeros. An RMSNorm is given the weight and epsilon that make it compute the same. A LayerNorm cannot be:
            the model is another one by construction then, is not verified, and ``inexact`` names the norms.
        update_stale: also set attributes that no forward pass reads, and that equal a size that has changed (a number
            of heads that is only printed).

    Returns:
        A `Shrunk`: ``str()`` is a table of what went, ``plan`` says how to make a fresh model as small, ``held``
        names what could not be removed, and why.

    Raises:
        TypeError, ValueError: for wrong arguments, models that are wrapped, sharded or quantised, examples that the
            model does not take, and outputs that are NaN or differ although nothing was changed. The model is then as
            it was.

    Paper: the rules of coupling are as in Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", for axes
    instead of layers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[2:].zero_(), model[0].bias[2:].zero_()
        >>> shrunk = shrink(model, torch.ones(1, 4))
        >>> model[0], model[2].weight.shape
        (Linear(in_features=4, out_features=2, bias=True), torch.Size([2, 2]))
    """
    check_model(model, "shrink")
    round_to = check_count("round_to", round_to, least=1, most=2**31, what="a number of channels, at least 1")
    if not (isinstance(verify, float) and verify == math.inf):
        verify = check_number("verify", verify, least=0, what="a relative difference, at least 0, or math.inf")
    check_bool("width", width)
    check_bool("update_stale", update_stale)
    check_choice("constants", constants, ("exact", "drop"))
    check_values(model)
    optimizers = optimizers_of(model, optimizer)
    inputs = examples_of(examples)
    with Change(model, values=gated_weights(model)) as change:
        carried = take_off(model)
        readers = Readers()
        seen = trace(model, inputs, readers.see)
        groups = groups_of(model, seen)
        dead = readers.dead(seen, model, seen.coordinates.units(), constants)
        choice = _choose(groups, dead, round_to, width)
        removal = Removal(model, inputs, seen, groups, dead, math.inf if constants == "drop" else verify)
        found = removal.find(choice.gone)
        kept = removal.kept(found.gone)
        read = {place[:2] for use in seen.sizes for place in places_in(use.expression)}
        changed = {setting[:2] for setting in found.settings}
        old = [one for one in attributes.stale(model, kept, read) if one[:2] not in changed]
        norms, inexact = removal.norms(found.gone)
        settings = [*found.settings, *(old if update_stale else ())]
        modules = {id(module): name for name, module in model.named_modules()}
        epsilons = [(modules[id(one.module)], *pair) for one in norms for pair in one.epsilons.items()]
        changes = [[*setting, value_of(model, *setting[:2])] for setting in (*settings, *epsilons)]
        tensors = named_tensors(model)
        unreached = {one.name for one in groups.stays if one.why == NOT_REACHED}
        shapes = {id(tensor): tensor.shape for tensor in tensors.values()}
        before = sizes_of(model)
        renewed: list[str] = []
        with resizing(model, kept, change, removal.biases):
            biases = removal.settle(found.gone, settings, norms)
            stale = [
                f"{attributes.shown_place(name, attribute)} ({value}, and now {new})"
                for name, attribute, new in old
                if (value := value_of(model, name, attribute)) != new
            ]
            branches = dead_branches(model, inputs, choice.whole)
            after = sizes_of(model)
            remember(
                model,
                Plan(
                    {name: _lists(kept.of(one)) for name, one in tensors.items() if kept.of(one)},
                    {name: list(shapes[id(one)]) for name, one in tensors.items() if kept.of(one)},
                    changes,
                    biases,
                ),
            )
            let_configs_say(model, inputs)
            put_back(model, carried, kept, {id(one.module.weight) for one in norms})

            def finish() -> None:
                for one in optimizers:
                    renewed.extend(cut_state(one, kept, shapes))

            change.finish(finish)
    torch.clear_autocast_cache()  # of weights that were larger
    return Shrunk(
        plan_of(model) or Plan(model=type(model).__name__),
        [
            Removed(group.name, group.what, group.units, int((~gone).sum()))
            for group, gone in zip(groups, found.gone, strict=True)
            if gone.any()
        ],
        (before[0], after[0]),
        (groups.macs(), groups.macs([~gone for gone in found.gone])),
        (before[1], after[1]),
        found.held,
        choice.kept,
        found.difference,
        stale,
        [attributes.shown_place(name, attribute) for name, attribute, _ in found.guessed],
        biases,
        renewed,
        choice.whole,
        inexact,
        branches,
        [*seen.unknown],
        [name for name in dict(model.named_parameters()) if name in unreached],
    )


@dataclass(frozen=True)
class _Choice:
    """Which units of each group go, what is dead and stays, and groups that are dead as a whole."""

    gone: list[Flags]
    kept: list[str]
    whole: list[str]


def _choose(groups: CoupledGroups, dead: Dead, round_to: int, width: bool) -> _Choice:
    gone, whole = [], []
    reasons: Counter[str] = Counter()
    for group in groups:
        is_dead = dead.units[group.coords] | group.zero_units()
        if group.inexact and not width:
            if is_dead.any():
                reasons[f"{int(is_dead.sum())} units of {group.name}: {group.inexact}"] += 1
            is_dead[:] = False
        for label in group.coords.tolist():
            if label in dead.kept:
                reasons[dead.kept[label]] += 1
        if is_dead.all():  # something must be left
            is_dead[0] = False
            whole.append(group.name)
        if group.what == "channels":
            rest = -int((~is_dead).sum()) % round_to
            is_dead[np.flatnonzero(is_dead)[:rest]] = False
        gone.append(is_dead)
    return _Choice(gone, list(reasons), whole)


def _lists(dims: Mapping[int, Tensor]) -> dict[int, list[int]]:
    return {dim: positions.tolist() for dim, positions in dims.items()}
