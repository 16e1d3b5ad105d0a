"""Experts that are removed from mixtures, with the rows of the router that chose them."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pyprune.checks import check_choice, check_count, check_names, check_number
from pyprune.console import listed, warn
from pyprune.modules.attachments import dense_parameters
from pyprune.modules.undo import Change
from pyprune.modules.watching import unwatch
from pyprune.structured.cuts import apply_cuts
from pyprune.structured.dropped import VERSION, Dropped, sizes_of
from pyprune.structured.expert_removal import put_back, take_out_experts
from pyprune.structured.expert_scores import given_by, use_and_output
from pyprune.structured.experts import Mixture, mixtures_of
from pyprune.structured.layer_lists import configs
from pyprune.structured.optimizer_states import forget, optimizers_of
from pyprune.structured.passes import SAME, Outputs, all_outputs, check_examples, check_removable, difference
from pyprune.structured.reloading import unlike_its_config, warn_if_not_reloadable
from pyprune.structured.routing import outputs_with_masked_routers

Gone = dict[Mixture, list[int]]


@torch.inference_mode(False)
def drop_experts(
    model: nn.Module,
    examples: Any,
    names: Iterable[str] | None = None,
    *,
    count: int | None = None,
    ratio: float | None = None,
    importance: str | Callable[[str, nn.Module, int], float] = "output",
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> Dropped:
    """Remove whole experts from mixtures of experts, in place.

    Experts are modules in a list, or entries of an axis of parameters (transformers' ``gate_up_proj`` and
    ``down_proj``); the router is what has a weight with as many outputs beside them. Its rows, biases and corrections
    go with them, and numbers of experts in modules are set; in the ``config``, too, if all mixtures agree, so that a
    plain ``from_pretrained`` loads what ``save_pretrained`` saves. Parameters stay the same objects, with their
    masks; their gradients are cleared.

    The outputs are those of the model with the logits of the experts that go at minus infinity, which is verified
    on the examples: a token that would have gone to one of them goes to its next best.

    Args:
        model: the model; not compiled, wrapped, sharded or quantised.
        examples: inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, a list of these, or
            a `Dataset`.
        names: of the experts to remove, such as ``"model.layers.0.mlp.experts.3"``.
        count: how many to remove of each mixture: those with the lowest scores; with a router that first chooses
            among groups of experts, as many of each group.
        ratio: which share of each mixture to remove, in [0, 1). Give one of names, count and ratio.
        importance: ``"output"``, the mean norm of what the expert adds to the tokens that are routed to it, its
            output times its weight (REAP); ``"use"``, the share of tokens that are; or a function that takes the name
            of an expert, the module that it is in and its number there, and returns a number (higher = keep).
        optimizer: its states are cut, too, and what belonged to modules that go is forgotten. Or several.

    Returns:
        What went, with scores, sizes, and a plan for `rebuild`.

    Raises:
        TypeError, ValueError: for wrong arguments; if there is no mixture of experts; if fewer would stay than a
            token is routed to; if the outputs are others than they must be. The model is then as it was.

    Paper: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression"
    (arXiv 2510.13999).

    Example:
        >>> class MoE(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(4, 3)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...
        ...     def forward(self, x):
        ...         weights = self.gate(x).softmax(-1)
        ...         return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        >>> model = MoE()
        >>> drop_experts(model, torch.randn(5, 4), ["experts.1"]).names
        ('experts.1',)
        >>> len(model.experts), model.gate.weight.shape
        (2, torch.Size([2, 4]))
    """
    check_removable(model)
    inputs = check_examples(examples)
    optimizers = optimizers_of(model, optimizer)
    given = {key: value for key, value in (("names", names), ("count", count), ("ratio", ratio)) if value is not None}
    if len(given) != 1:
        raise ValueError("give names, the experts to drop, or count or ratio, how many of each mixture; one of them")
    if not callable(importance):
        check_choice("importance", importance, ("use", "output"))
    wanted = None if names is None else check_names("names", names)
    if count is not None:
        check_count("count", count, least=1)
    if ratio is not None:
        check_number("ratio", ratio, what="a number in [0, 1)", least=0, most=math.nextafter(1, 0))
    mixtures = mixtures_of(model)
    all_outputs(model, inputs)  # they fit, and are numbers
    scores: dict[str, float] = {}
    stays: dict[str, str] = {}
    if wanted is not None:
        gone = _named(wanted, mixtures)
    else:
        scores = given_by(importance, mixtures) if callable(importance) else {}
        if not callable(importance):
            use, output = use_and_output(model, inputs, mixtures)
            scores = use if importance == "use" else output
        stays = {one.name: "the examples do not call it" for one in mixtures if one.experts[0] not in scores}
        if len(stays) == len(mixtures):
            raise ValueError(f"the examples do not call {listed(list(stays))}, so there are no scores; give names")
        gone = {one: _lowest(one, scores, _number(one, count, ratio)) for one in mixtures if one.name not in stays}
    gone = {one: places for one, places in gone.items() if places}
    for one, places in gone.items():
        _check_enough(one, places, next(iter(given)))
    before = sizes_of(model)
    dropped = [one.experts[place] for one, places in gone.items() for place in places]
    plan = {"version": VERSION, "experts": {one.name: places for one, places in gone.items()}}
    expected, reached = outputs_with_masked_routers(model, inputs, gone)
    known = [parameter for _, parameter in dense_parameters(model)]
    unlike = unlike_its_config(model)
    with Change(model, objects=configs(model)) as change:
        cuts = take_out_experts(model, gone)
        after = sizes_of(model)
        _check_outputs(model, inputs, expected, reached, gone)
        warn_if_not_reloadable(model, unlike)
        put_back(cuts)
        unwatch(model)
        lost = set(known) - {parameter for _, parameter in dense_parameters(model)}
        renewed: list[str] = []

        def finish() -> None:
            renewed.extend(apply_cuts([cut for _, cut in cuts], optimizers))
            forget(model, optimizers, lost)

        change.finish(finish)
    return Dropped("experts", tuple(dropped), scores, stays, before, after, plan, renewed)


def _check_outputs(
    model: nn.Module, inputs: Sequence[Any], expected: Sequence[Outputs], reached: Collection[Mixture], gone: Gone
) -> None:
    """Raise if the outputs are not those that they must be, and warn if nothing tells what they must be."""
    try:
        found = all_outputs(model, inputs)
    except Exception as error:  # the model's own code may raise anything without them
        raise ValueError(
            f"without experts of {listed([one.name for one in gone])} the model fails ({type(error).__name__}: "
            f"{error}): it is not known how these experts are used"
        ) from error
    if unseen := [one.name for one in gone if one not in reached]:
        warn(
            f"whether the outputs are right without experts of {listed(unseen)} could not be verified: the weight of "
            "the router is in no product that is known"
        )
        return
    tensors = [tensor for outputs in expected for entry in outputs.values() for tensor in entry]
    # In half precision other sizes of a product round differently, and scores that are nearly equal change places.
    tolerance = SAME if all(torch.finfo(tensor.dtype).eps < SAME for tensor in tensors) else 0.05
    apart = difference(found, expected)
    if apart > tolerance:
        raise ValueError(
            f"without experts of {listed([one.name for one in gone])} the outputs are {apart:.2g} apart from those "
            "of the model whose router never chooses them: it is not known how these experts are used"
        )


# ---- which ones ----


def _named(names: Sequence[str], mixtures: Sequence[Mixture]) -> Gone:
    places = {name: (one, place) for one in mixtures for place, name in enumerate(one.experts)}
    # Members of a list with names of their own may be called by their numbers, too.
    places |= {f"{one.name}.{place}".lstrip("."): (one, place) for one in mixtures for place in range(one.count)}
    gone: Gone = {}
    for name in names:
        if name not in places:
            raise ValueError(
                f"names has {name!r} in it, which is no expert; there are "
                f"{listed([f'{one.name}.0 to .{one.count - 1}' for one in mixtures])}"
            )
        mixture, place = places[name]
        if place in gone.setdefault(mixture, []):
            raise ValueError(f"names has {name!r} in it twice")
        gone[mixture].append(place)
    if not gone:
        raise ValueError("names is empty; name at least one expert")
    return {one: sorted(found) for one, found in gone.items()}


def _number(one: Mixture, count: int | None, ratio: float | None) -> int:
    """Return how many experts of a mixture go."""
    groups = _groups(one)
    if count is not None:
        if count % groups:
            raise ValueError(
                f"count is {count}, and the router of {one.name} chooses among {groups} groups of experts, which "
                f"must lose equally many; give a multiple of {groups}"
            )
        return count
    assert ratio is not None
    number = min(math.floor(ratio * one.count + 0.5), one.count - 1)
    return number - number % groups


def _groups(one: Mixture) -> int:
    groups = one.groups[0] if one.groups else 1
    return groups if groups > 1 and one.count % groups == 0 else 1


def _lowest(one: Mixture, scores: Mapping[str, float], number: int) -> list[int]:
    """Return the experts with the lowest scores, of each group equally many; the first of those that are equal."""
    groups = _groups(one)
    size = one.count // groups
    lowest: list[int] = []
    for start in range(0, one.count, size):
        group = sorted(range(start, start + size), key=lambda place: scores[one.experts[place]])
        lowest += group[: number // groups]
    return sorted(lowest)


def _check_enough(one: Mixture, gone: Sequence[int], given: str) -> None:
    """Raise if a router could not choose as many experts as it does, or its groups would be of several sizes."""
    place = one.name or "the model"
    groups = _groups(one)
    size = one.count // groups
    losses = Counter(place // size for place in gone)
    if groups > 1 and len({losses[group] for group in range(groups)}) > 1:
        raise ValueError(
            f"{given}: the router of {place} chooses among {groups} groups of {size} experts, which must lose "
            f"equally many; these lose {[losses[group] for group in range(groups)]}"
        )
    least = one.top_k
    if one.groups:
        # The best two of each group speak for it; the experts are of the groups that are chosen.
        least = groups * max(2, math.ceil(one.top_k / (one.groups[1] if groups > 1 else 1)))
    if one.count - len(gone) < least:
        raise ValueError(
            f"{given}: {len(gone)} experts of {place} would go, and at most {max(0, one.count - least)} of its "
            f"{one.count} can: its router needs {least} to choose {one.top_k} for each token"
        )
