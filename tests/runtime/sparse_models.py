"""Models with zeros, the same each time."""

import torch
from torch import nn

from pyprune.modules.targets import all_parameters


def sparse(model, zeros=0.75):
    """Return a model in evaluation, the same each time, with zeros in all weights that are matrices, by magnitude."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for target in all_parameters(model):
            weight = target.parameter
            weight.copy_(torch.randn(weight.shape, generator=random))
            if weight.dim() >= 2 and zeros:
                weight[weight.abs() <= weight.abs().flatten().kthvalue(int(weight.numel() * zeros)).values] = 0
    return model.eval()


def mlp():
    return sparse(nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64, bias=False), nn.Linear(64, 3)))
