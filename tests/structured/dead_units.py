"""Units of a model that are made dead, and models of transformers that are small."""

import re

import numpy as np
import torch

from pyprune import coupled_groups

STATISTICS = ("running_mean", "running_var")


def shake(model, seed=0):
    """Move all weights away from zero and from each other."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in dict.fromkeys(model.parameters()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=draw).to(tensor))
    return model.eval()


def kill(model, examples, *, uneven=False, only=None):
    """Write zeros into half of the units of each group, the first ones; if ``uneven``, one less in one of a kind.

    Returns the kinds of groups that there were.
    """
    found = set()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in coupled_groups(model, examples):
        names = [member.name for member in group.members]
        if not group.is_exact or group.units < 2 or (only and not re.search(only, " ".join(names))):
            continue
        count = group.units // 2 - (1 if uneven and group.kind not in found and group.units > 3 else 0)
        found.add(group.kind)
        with torch.no_grad():
            for member in group.members:
                if member.name.rpartition(".")[2] not in STATISTICS and count:
                    positions = np.unique(np.asarray(member.indices)[:count])
                    tensors[member.name].index_fill_(member.dim, torch.from_numpy(positions), 0)
    return found
