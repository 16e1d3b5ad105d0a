"""Choose half of the units of every group at random, and write zeros where they are."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


def choose_half(groups: Any, *, seed: int = 0) -> list[tuple[Any, np.ndarray[Any, Any]]]:
    """Return half of the units, rounded down, of each group that is exact; so never all."""
    draw = np.random.default_rng(seed)
    exact = [group for group in groups if group.is_exact and len(group) > 1]
    return [(group, np.sort(draw.permutation(len(group))[: len(group) // 2])) for group in exact]


def mask_units(model: nn.Module, chosen: list[tuple[Any, np.ndarray[Any, Any]]]) -> None:
    """Write zeros into all slices of the units, of parameters and buffers; running statistics stay."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for group, units in chosen:
            for member in group.members:
                if member.name.rpartition(".")[2] not in _STATISTICS:
                    positions = torch.from_numpy(np.unique(np.asarray(member.indices)[units]))
                    tensors[member.name].index_fill_(member.dim, positions, 0)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def expected_sizes(model: nn.Module, chosen: list[tuple[Any, np.ndarray[Any, Any]]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that tensors have, by their first names, once all these units are gone."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group, units in chosen:
        for member in group.members:
            positions = np.asarray(member.indices)[units].ravel().tolist()
            gone.setdefault((member.name, member.dim), set()).update(positions)
    shapes = {name: list(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for (name, dim), positions in gone.items():
        shapes[name][dim] -= len(positions)
    return {name: tuple(shape) for name, shape in shapes.items()}
