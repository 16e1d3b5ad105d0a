"""Zero units of groups, as a mask would."""

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def shake(model, seed=0):
    """Give a model values of which none is zero, also as statistics, so that whatever is removed shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        elif buffer.is_floating_point():
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5)
    return model.eval()


@torch.no_grad()
def zero_half(groups, seed=0, *, only=None):
    """Zero half of the units of each exact group, at random, in all parameters; returns how many of each are left."""
    rng = np.random.default_rng(seed)
    left = []
    for group in groups:
        if not group.is_exact or (only is not None and not only(group)):
            left.append(group.units)
            continue
        gone = rng.permutation(group.units)[: group.units // 2]
        for member in group.members:
            if isinstance(member.tensor, nn.Parameter):
                member.tensor.index_fill_(member.dim, torch.from_numpy(member.indices[gone].ravel()), 0)
        left.append(group.units - len(gone))
    return left
