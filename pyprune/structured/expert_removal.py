"""Experts taken out of mixtures: slices of parameters, members of lists, and what counts them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyprune.console import listed
from pyprune.modules.attachments import dense_parameters
from pyprune.structured.cuts import Cut, cut_of
from pyprune.structured.experts import Mixture, Part, find_mixtures, is_count
from pyprune.structured.layer_lists import configs


def take_out_experts(model: nn.Module, gone: Mapping[Mixture, Sequence[int]]) -> list[tuple[Part, Cut]]:
    """Remove experts; call it within a `Change` of the model and its `configs`.

    Returns:
        Parameters that were cut, and what stays of them; others are in their places until `put_back`.

    Raises:
        ValueError: if one carries a gate, or is used elsewhere, too.
    """
    cuts: list[tuple[Part, Cut]] = []
    for one, places in gone.items():
        kept = [place for place in range(one.count) if place not in places]
        for part in (*one.fused, *one.router):
            rows = [place * part.rows + row for place in kept for row in range(part.rows)]
            tensor = part.tensor
            if isinstance(tensor, nn.Parameter):
                _check_alone(model, part, tensor)
                cut = cut_of(tensor, part.dim, rows)
                cuts.append((part, cut))
                part.put(cut.small)
            else:
                part.put(tensor.index_select(part.dim, torch.tensor(rows, device=tensor.device)))
        if one.members:
            _shorten(one, kept)
        for _, module in one.modules:
            _count(vars(module), one.count, len(kept))
        for part in one.router:
            if isinstance(part.module, nn.Linear):
                part.module.out_features = len(kept)
    _count_around(model, gone)
    return cuts


def _check_alone(model: nn.Module, part: Part, parameter: nn.Parameter) -> None:
    owners = [owner for owner, other in dense_parameters(model) if other is parameter]
    places = {(owner.module, owner.attribute) for owner in owners}
    if len(places) > 1:
        raise ValueError(f"{part.name} is tied ({listed([owner.name for owner in owners])}); experts in it cannot go")
    if any(isinstance(owner.attachment, nn.Module) for owner in owners):
        raise ValueError(f"{part.name} carries a gate, which cannot lose experts; call pyprune.strip first")


def _shorten(one: Mixture, kept: Sequence[int]) -> None:
    """Take modules out of the list of experts; the others move up, and have the first names."""
    moved = {one.members[place]: one.members[new] for new, place in enumerate(kept)}
    left = {
        moved.get(key, key): child
        for key, child in one.module._modules.items()
        if key in moved or key not in one.members
    }
    one.module._modules.clear()
    one.module._modules.update(left)


def _count(values: dict[str, Any], count: int, left: int) -> None:
    for key, value in values.items():
        if not is_count(key):
            continue
        if type(value) is int and value == count:
            values[key] = left
        elif type(value) is list and value and all(type(one) is int and one == count for one in value):
            values[key] = [left] * len(value)


def _count_around(model: nn.Module, gone: Mapping[Mixture, Sequence[int]]) -> None:
    """Let configs, and modules around the blocks, say how many experts there are, where all mixtures agree."""
    counts: dict[int, set[int]] = {}
    for one in find_mixtures(model):
        lost = next((len(places) for other, places in gone.items() if other.module is one.module), 0)
        counts.setdefault(one.count + lost, set()).add(one.count)
    blocks = [one.block_name for one in gone]
    around = [
        module
        for name, module in model.named_modules()
        if not name or any(f"{one}.".startswith(f"{name}.") for one in blocks)
    ]
    for count, left in counts.items():
        if len(left) == 1 and left != {count}:
            for thing in (*around, *configs(model)):
                _count(vars(thing), count, *left)


def put_back(cuts: Iterable[tuple[Part, Cut]]) -> None:
    """Let parameters be in their places again, to be cut."""
    for part, cut in cuts:
        part.module._parameters[part.attribute] = cut.parameter
