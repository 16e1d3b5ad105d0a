"""Torch-Pruning, where it can be imported: ``make bench-full`` installs it. Nothing stands in for it elsewhere."""

import warnings
from typing import Any

from torch import nn

try:
    import torch_pruning
except ImportError as error:
    AVAILABLE, VERSION = False, f"not installed ({error})"
else:
    AVAILABLE, VERSION = True, torch_pruning.__version__


def build_graph(net: nn.Module, example: Any) -> None:
    """Find what is coupled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_pruning.DependencyGraph().build_dependency(net, example_inputs=example, verbose=False)


def remove_half(net: nn.Module, example: Any, ignored: list[nn.Module], heads: dict[nn.Module, int]) -> None:
    """Score, choose and remove half of the channels, and of the heads; nothing is verified."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_pruning.pruner.MagnitudePruner(
            net,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
            head_pruning_ratio=0.5,
        ).step()
