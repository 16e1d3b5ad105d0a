"""A removal of blocks or experts, done again to a fresh model of the same architecture."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from pyprune.checks import check_names, shown
from pyprune.modules.attachments import check_module
from pyprune.modules.undo import Change
from pyprune.modules.watching import unwatch
from pyprune.structured.cuts import apply_cuts
from pyprune.structured.dropped import VERSION
from pyprune.structured.expert_removal import put_back, take_out_experts
from pyprune.structured.experts import find_mixtures
from pyprune.structured.layer_lists import configs, is_list, take_out

_M = TypeVar("_M", bound=nn.Module)


@torch.inference_mode(False)
def replay(model: _M, plan: Mapping[str, Any] | Iterable[str]) -> _M:
    """Remove from a model what `drop_blocks` or `drop_experts` removed from another of its architecture, in place.

    It is not run, and may be on the meta device; then ``load_state_dict`` with what the other one saved.

    Args:
        model: as the other was before.
        plan: `Dropped.plan`, or what JSON made of it; or the names of blocks, of which those in lists are taken out,
            and others replaced by an identity that returns a tensor.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: if it is no such plan, of another version, or of another architecture. The model is
            then as it was.

    Example:
        >>> from pyprune.structured.drop_blocks import drop_blocks
        >>> def make():
        ...     layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4)]
        ...     return nn.Sequential(*layers, nn.Linear(8, 3))
        >>> small = make()
        >>> dropped = drop_blocks(small, torch.randn(2, 5, 8), count=2)
        >>> replay(make(), dropped.plan).load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    check_module(model)
    if not isinstance(plan, Mapping):
        names = check_names("plan", plan)
        plan = {"version": VERSION, "blocks": {name: None if _is_in_list(model, name) else 0 for name in names}}
    if plan.get("version") != VERSION or len(plan) != 2:
        raise ValueError(f"plan is {shown(plan)}, which is no plan of version {VERSION}; give Dropped.plan")
    with Change(model, objects=configs(model)) as change:
        if isinstance(blocks := plan.get("blocks"), Mapping):
            _check_blocks(model, blocks)
            take_out(model, blocks)
            unwatch(model)
        elif isinstance(experts := plan.get("experts"), Mapping):
            mixtures = {one.name: one for one in find_mixtures(model)}
            for name, places in experts.items():
                count = mixtures[name].count if name in mixtures else 0
                if not count or not all(type(one) is int and 0 <= one < count for one in places):
                    raise ValueError(f"plan drops experts {shown(places)} of {name}, and the model has {count} there")
            cuts = take_out_experts(model, {mixtures[name]: places for name, places in experts.items()})
            put_back(cuts)
            unwatch(model)
            change.finish(partial(apply_cuts, [cut for _, cut in cuts], []))
        else:
            raise ValueError(f"plan is {shown(plan)}, which has neither blocks nor experts; give Dropped.plan")
    return model


def _check_blocks(model: nn.Module, blocks: Mapping[Any, Any]) -> None:
    modules = dict(model.named_modules())
    for name, items in blocks.items():
        if not isinstance(name, str) or not name or name not in modules:
            raise ValueError(f"plan drops {shown(name)}, which is no module in {type(model).__name__}")
        if items is None and not _is_in_list(model, name):
            raise ValueError(f"plan takes {name} out of its list, and it is in none")
        if items is not None and (type(items) is not int or items < 0):
            raise ValueError(f"plan has {shown(items)} for {name}; give a number of items, or None")


def _is_in_list(model: nn.Module, name: str) -> bool:
    modules = dict(model.named_modules())
    return is_list(modules.get(name.rpartition(".")[0], model)) and name in modules
