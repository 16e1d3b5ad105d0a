"""Make a network smaller: the time to trace it, to remove half of each group, and of a forward pass of the rest."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning_peer
from architectures import ARCHITECTURES, EncoderLayer
from measure import Way, with_floor
from shapes import Case
from torch import nn

import pyprune

MODELS = tuple(ARCHITECTURES)
DTYPES = ("float32",)
TRACE, SHRINK = "find what is coupled", "remove half of each group"
LATENCY = "forward pass without half of each group, one thread"


@torch.no_grad()
def zero_half(net: nn.Module, example: Any) -> None:
    """Zero half of the units of each group, so that they are dead."""
    for group in pyprune.coupled_groups(net, example):
        if group.is_exact:
            for member in group.members:
                if isinstance(member.tensor, nn.Parameter):
                    gone = torch.from_numpy(member.indices[: group.units // 2].ravel())
                    member.tensor.index_fill_(member.dim, gone, 0)


def call_of(net: nn.Module, example: Any, threads: int | None = None) -> Callable[[], object]:
    """Return a forward pass, on as many threads as there are, or on so many."""

    def call() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with torch.no_grad():
                return net(example)
        finally:
            torch.set_num_threads(before)

    return call


def last_layers(net: nn.Module) -> list[nn.Module]:
    """Return what Torch-Pruning must be told to leave alone: what makes the outputs."""
    return [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]


def heads_of(net: nn.Module) -> dict[nn.Module, int]:
    """Return what Torch-Pruning must be told of attention: the number of heads of each projection."""
    layers = [module for module in net.modules() if isinstance(module, EncoderLayer)]
    return {
        one: one.out_features // layer.head_size for layer in layers for one in (layer.query, layer.key, layer.value)
    }


def ways(case: Case) -> list[Way]:
    torch.manual_seed(0)
    net, example = ARCHITECTURES[case.model]()
    net.eval()
    zeros = copy.deepcopy(net)
    zero_half(zeros, example)
    smaller = copy.deepcopy(zeros)
    pyprune.shrink(smaller, example)

    def fresh(of: nn.Module) -> Callable[[], tuple[nn.Module]]:
        return lambda: (copy.deepcopy(of),)

    tracing = [Way(TRACE, "pyprune", lambda: pyprune.coupled_groups(net, example))]
    removing = [Way(SHRINK, "pyprune", lambda net: pyprune.shrink(net, example), fresh(zeros))]
    if torch_pruning_peer.AVAILABLE:
        tracing.append(
            Way(TRACE, "Torch-Pruning", lambda net: torch_pruning_peer.build_graph(net, example), fresh(net))
        )
        removing.append(
            Way(
                SHRINK,
                "Torch-Pruning, not verified",
                lambda net: torch_pruning_peer.remove_half(net, example, last_layers(net), heads_of(net)),
                fresh(net),
            )
        )
    return [
        *with_floor(Way(TRACE, "floor: a forward pass", call_of(net, example)), [*tracing, *removing]),
        *with_floor(
            Way(LATENCY, "dense", call_of(net, example, threads=1)),
            [Way(LATENCY, "pyprune", call_of(smaller, example, threads=1))],
        ),
    ]
