"""Depth: residual blocks that are removed, with what counts them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pyprune.checks import check_choice, check_count, check_names
from pyprune.console import listed
from pyprune.modules.attachments import parameters_of
from pyprune.modules.undo import Before, Change, undoing
from pyprune.modules.watching import unwatch
from pyprune.structured.block_scores import given_by, influence, output_error
from pyprune.structured.blocks import Block, bypassing, find_blocks, repeated
from pyprune.structured.dropped import VERSION, Dropped, sizes_of
from pyprune.structured.layer_lists import configs, is_list, take_out
from pyprune.structured.optimizer_states import forget, optimizers_of
from pyprune.structured.passes import SAME, Outputs, all_outputs, check_examples, check_removable, difference
from pyprune.structured.reloading import unlike_its_config, warn_if_not_reloadable

# Names, with the number of items of the `Bypass` in the place of each; None where it is taken out of its list.
Removed = dict[str, int | None]


@torch.inference_mode(False)
def drop_blocks(
    model: nn.Module,
    examples: Any,
    names: Iterable[str] | None = None,
    *,
    count: int | None = None,
    importance: str | Callable[[str, nn.Module], float] = "influence",
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> Dropped:
    """Remove residual blocks, in place: the model goes on with what a block was given.

    A block is a module that returns a tensor of the shape of its first argument, alone or first in a tuple, and is
    called once in a pass. A member of a ModuleList or Sequential is taken out of it: the others move up, their
    ``layer_idx`` and the like, by which caches go, are renumbered, and so are the counts and lists in the module
    around it and in its ``config``, so that ``save_pretrained`` and a plain ``from_pretrained`` agree. Elsewhere an
    identity takes its place, and so it does where the model asks for members of a list by number. Parameters that
    stay are the same objects; masks and gates on them stay, too. Gradients are cleared.

    The model is run on the examples, in evaluation, before and after: its outputs must be those that it gives when
    the blocks are bypassed.

    Args:
        model: the model; not compiled, wrapped, sharded or quantised.
        examples: inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, a list of these, or
            a `Dataset`.
        names: of the blocks to remove.
        count: how many to remove, those with the lowest scores of all that repeat: the outermost members of lists of
            which there are several of one class. Give this or ``names``.
        importance: ``"influence"``, 1 - cos(input, output), the mean over all tokens (ShortGPT); ``"output_error"``,
            the relative change of the model's output without the block, scored anew after each removal; or a function
            that takes name and module of a block and returns a number (higher = keep).
        optimizer: forgets the parameters that go, and its state for them. Or several.

    Returns:
        What went, with scores, sizes, and a plan for `rebuild`.

    Raises:
        TypeError, ValueError: for wrong arguments; if a block is no such module, is used several times, or gives
            others something besides its output; if fewer blocks can go than ``count`` says. The model is then as it
            was.

    Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
    (arXiv 2403.03853).

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4)]
        >>> model = nn.Sequential(*layers, nn.Linear(8, 3))
        >>> dropped = drop_blocks(model, torch.randn(2, 5, 8), ["1", "2"])
        >>> len(model), model[1] is layers[3], dropped.names
        (3, True, ('1', '2'))
    """
    check_removable(model)
    inputs = check_examples(examples)
    optimizers = optimizers_of(model, optimizer)
    wanted = _wanted(names, count)
    if not callable(importance):
        check_choice("importance", importance, ("influence", "output_error"))
    dense = all_outputs(model, inputs)
    blocks, problems = find_blocks(model, inputs)
    scores: dict[str, float] = {}
    stays: dict[str, str] = {}
    if wanted is None:
        assert count is not None
        removed, scores, stays = _choose(model, inputs, dense, repeated(model, blocks), count, importance)
    else:
        removed, problems = _ways(model, inputs, _named(model, wanted, blocks, problems))
        if problems:
            name, why = next(iter(problems.items()))
            raise ValueError(f"{name} cannot be dropped: {why}. Leave it out of names")
    parameters, before = parameters_of(model), sizes_of(model)
    unlike = unlike_its_config(model)
    with Change(model, objects=configs(model)) as change:
        take_out(model, removed)
        unwatch(model)
        after = sizes_of(model)
        plan = {"version": VERSION, "blocks": removed}
        dropped = Dropped("blocks", tuple(removed), scores, stays, before, after, plan)
        warn_if_not_reloadable(model, unlike)
        change.finish(partial(forget, model, optimizers, set(parameters) - set(parameters_of(model))))
    return dropped


def _wanted(names: Iterable[str] | None, count: int | None) -> tuple[str, ...] | None:
    if (names is None) == (count is None):
        raise ValueError("give names, the blocks to drop, or count, how many; one of them")
    if names is None:
        check_count("count", count, least=1)
        return None
    wanted = check_names("names", names)
    if not wanted:
        raise ValueError("names is empty; name at least one block")
    return wanted


def _named(
    model: nn.Module, names: Iterable[str], blocks: Mapping[str, Block], problems: Mapping[str, str]
) -> list[Block]:
    chosen: dict[nn.Module, Block] = {}
    for name in names:
        if name not in blocks:
            several = listed([block.name for block in repeated(model, blocks)]) or "none"
            why = problems.get(name, f"it is no module of the model; blocks that repeat in it: {several}")
            raise ValueError(f"names has {name!r} in it, which cannot be dropped: {why}")
        block = blocks[name]
        if block.module in chosen:
            raise ValueError(f"names has {name!r} in it twice, or by two names")
        chosen[block.module] = block
    for block in chosen.values():
        for part in block.module.modules():
            if part is not block.module and part in chosen:
                inner = chosen[part].name
                raise ValueError(f"names has {inner!r} in it, which lies in {block.name!r}; name one of them")
    emptied = [name for name in _lists(model, chosen.values()) if _is_emptied(model, name, chosen.values())]
    if emptied:
        raise ValueError(f"names leaves nothing in {listed(emptied)}; at least one member must stay")
    return list(chosen.values())


# ---- how blocks can be removed ----


def _ways(model: nn.Module, inputs: Sequence[Any], chosen: Sequence[Block]) -> tuple[Removed, dict[str, str]]:
    """Return how blocks can be removed so that the outputs are those without them; and why some cannot."""
    expected = all_outputs(model, inputs, *bypassing(chosen))
    removed = {block.name: None if is_list(_around(model, block)) else block.items for block in chosen}
    if not _fault(model, inputs, removed, expected):
        return removed, {}
    problems = {}
    for block in chosen:
        alone = all_outputs(model, inputs, *bypassing([block]))
        ways = dict.fromkeys([removed[block.name], block.items])
        faults = {items: _fault(model, inputs, {block.name: items}, alone) for items in ways}
        removed[block.name] = next((items for items in ways if not faults[items]), block.items)
        if all(faults.values()):
            problems[block.name] = next(iter(faults.values()))
    if not problems and _fault(model, inputs, removed, expected):
        removed = {block.name: block.items for block in chosen}
        if fault := _fault(model, inputs, removed, expected):
            raise ValueError(f"{listed(list(removed))} can be dropped one by one, but not together: {fault}")
    return removed, problems


def _fault(model: nn.Module, inputs: Sequence[Any], removed: Removed, expected: Sequence[Outputs]) -> str:
    """Say what is wrong with a model without some blocks; it is as it was then."""
    with undoing(Before(model, objects=configs(model)).restore):
        take_out(model, removed)
        try:
            apart = difference(all_outputs(model, inputs), expected)
        except Exception as error:  # the model's own code may raise anything without them
            return f"without it the model fails ({type(error).__name__}: {error})"
    if apart <= SAME:
        return ""
    return f"other parts use more of it than its output (without that, outputs are {apart:.2g} apart)"


def _around(model: nn.Module, block: Block) -> nn.Module:
    return model.get_submodule(block.name.rpartition(".")[0])


def _lists(model: nn.Module, blocks: Iterable[Block]) -> list[str]:
    names = dict.fromkeys(block.name.rpartition(".")[0] for block in blocks)
    return [name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)]


def _is_emptied(model: nn.Module, name: str, blocks: Iterable[Block]) -> bool:
    return set(model.get_submodule(name).children()) <= {block.module for block in blocks}


# ---- which ones ----


def _choose(
    model: nn.Module,
    inputs: Sequence[Any],
    dense: Sequence[Outputs],
    pool: Sequence[Block],
    count: int,
    importance: str | Callable[[str, nn.Module], float],
) -> tuple[Removed, dict[str, float], dict[str, str]]:
    """Return how the blocks with the lowest scores are removed, all scores, and which blocks must stay, and why."""
    most = len(pool) - sum(_is_emptied(model, name, pool) for name in _lists(model, pool))
    if count > most:
        raise ValueError(
            f"count is {count}, and of {type(model).__name__} at most {most} blocks can be dropped, of those that "
            f"repeat ({listed([block.name for block in pool]) or 'none'}); others can be named"
        )
    scores: dict[str, float] = {}
    if callable(importance):
        scores = given_by(importance, pool)
    elif importance == "influence":
        scores = influence(model, inputs, pool)
    chosen: list[Block] = []
    removed: Removed = {}
    stays: dict[str, str] = {}
    while len(chosen) < count:
        left = [block for block in pool if block not in chosen and block.name not in stays]
        if importance == "output_error":
            scores |= output_error(model, inputs, left, chosen, dense)
        some = list(chosen)
        for block in sorted(left, key=lambda block: scores[block.name]):
            is_last = any(_is_emptied(model, name, [*some, block]) for name in _lists(model, [block]))
            if not is_last and len(some) < (len(chosen) + 1 if importance == "output_error" else count):
                some.append(block)
        if len(some) == len(chosen):
            reasons = "; ".join(f"{name}: {why}" for name, why in stays.items())
            raise ValueError(f"count is {count}, and at most {len(chosen)} blocks can be dropped ({reasons})")
        removed, problems = _ways(model, inputs, some)
        stays |= problems
        chosen = [block for block in some if block.name not in problems]
    return removed, scores, stays
