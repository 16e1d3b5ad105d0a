"""Optimizers that follow when parameters go."""

from collections.abc import Iterable, Set

from torch import nn
from torch.optim import Optimizer

from pyprune.modules.attachments import parameters_of


def forget(model: nn.Module, optimizers: Iterable[Optimizer], gone: Set[nn.Parameter]) -> None:
    """Clear gradients, and take parameters out of the groups of optimizers, and their states; groups stay.

    Gradients of one step are of one model. It may be done twice.

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2)
        >>> weight, bias = linear.parameters()
        >>> optimizer = torch.optim.SGD([weight, bias])
        >>> forget(linear, [optimizer], {bias})
        >>> [one is weight for one in optimizer.param_groups[0]["params"]]
        [True]
    """
    for parameter in parameters_of(model):
        parameter.grad = None
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(one in gone for one in group["params"]):
                group["params"] = [one for one in group["params"] if one not in gone]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
