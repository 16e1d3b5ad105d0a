"""Prune a trained model in one pass over a little data, block by block."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import check_bool
from pyprune.console import listed, tracked
from pyprune.methods.method import Method, PruneMode
from pyprune.methods.name_rules import by_name
from pyprune.methods.scope import Scope
from pyprune.modules.attachments import check_module, wrapped_name
from pyprune.modules.evaluation import check_initialized, evaluating, layers_apart, untouched
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask
from pyprune.modules.targets import Target, find_targets_and_zeros
from pyprune.modules.undo import Change
from pyprune.oneshot.find_blocks import Block, find_blocks
from pyprune.oneshot.input_grams import InputGrams
from pyprune.oneshot.one_shot_result import OneShotResult, PrunedWeight
from pyprune.oneshot.rule import Rule, rule_of
from pyprune.oneshot.solution import Solver
from pyprune.oneshot.solve_block import solve_block, write_block
from pyprune.oneshot.stored import InMemory
from pyprune.oneshot.walk import Walk
from pyprune.selection.find_prunable import Prunable, check_kind
from pyprune.selection.prune import statistics_of


@torch.inference_mode(False)
def prune_one_shot(
    model: nn.Module,
    data: Dataset | Iterable[Any],
    method: Method | Scope | PruneMode | str | None = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    solver: Solver | None = None,
    blocks: str | Sequence[str] | None = None,
    allocation: Literal["uniform"] | Mapping[str, float] = "uniform",
    propagate: bool = True,
    store: str | os.PathLike[str] = "memory",
    resume: bool = False,
    ignored_scope: IgnoredScope | None = None,
) -> OneShotResult:
    """Prune."""
    check_module(model)
    check_bool("propagate", propagate)
    rule = rule_of(method, solver, ratio, allocation)
    model = _unwrapped(model)
    check_initialized(model)
    source = batches_of(data, None, "Reading batches", names=("data", "num_batches"))
    found = find_blocks(model, blocks)
    targets, left_out = _targets_of(model, found, ignored_scope)
    ratios = _ratios_of(rule, targets, left_out)
    statistics = _statistics_of(model, rule, targets, left_out)
    batches = list(source)
    weights: list[PrunedWeight] = []
    with evaluating(model), untouched(model), layers_apart(model):
        walk = Walk(model, batches, found, InMemory(), must_be_called=blocks is not None)
        walk.check()
        for place, block in enumerate(tracked(walk.blocks, len(walk.blocks), "One-shot pruning")):
            some = [target for target in targets if _lies_in(target, block)]
            with Change(model, values=[target.parameter for target in some]):
                grams = InputGrams(some)
                with grams.watching(block.module, walk.padding) if some else nullcontext():
                    walk.run(place, keep=not (propagate and some))
                if some:
                    inputs = grams.results()
                    solved = solve_block(block.name, rule, inputs, ratios, statistics)
                    write_block(model, solved)
                    if propagate:
                        walk.run(place, keep=True)
                    weights += [one.said for one in solved.values()]
    return OneShotResult(tuple(weights))


def _unwrapped(model: nn.Module) -> nn.Module:
    while (name := wrapped_name(model)) is not None:
        model = model._modules[name]  # type: ignore[assignment]
    return model


def _targets_of(
    model: nn.Module, blocks: Sequence[Block], ignored_scope: IgnoredScope | None
) -> tuple[list[Target], tuple[str, ...]]:
    within = {module for block in blocks for module in block.module.modules()}
    targets, left_out = find_targets_and_zeros(model, ignored_scope, within=within)
    check_kind(targets, Mask)
    tied = [
        target.name
        for target in targets
        if sum(_lies_in(target, block) for block in blocks) != 1
        or any(owner.module not in within for owner in target.owners)
    ]
    if tied:
        raise ValueError(
            f"{listed(tied)} is tied to a weight of another block, or outside of all, which would change with it; "
            "name it in ignored_scope"
        )
    return targets, left_out


def _lies_in(target: Target, block: Block) -> bool:
    return any(owner.module is module for owner in target.owners for module in block.module.modules())


def _ratios_of(rule: Rule, targets: Sequence[Target], left_out: Sequence[str]) -> dict[Target, float | None]:
    ratio = rule.amount.ratio
    if ratio is None:
        return dict.fromkeys(targets)
    names = [tuple(owner.name for owner in target.owners) for target in targets]
    return dict(zip(targets, by_name(ratio, names, 0.0, left_out=left_out), strict=True))


def _statistics_of(
    model: nn.Module, rule: Rule, targets: Sequence[Target], left_out: tuple[str, ...]
) -> Mapping[Target, Tensor | None]:
    """Return the scores that an importance was given."""
    if rule.method is None or rule.method.importance.needs != "given":
        return {}
    return statistics_of(model, rule.method.importance, Prunable(list(targets), list(targets), left_out), None, None)
