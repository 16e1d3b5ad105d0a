"""Forward passes that look at a model and leave it as it was."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call the model: a mapping gives keyword arguments, a tuple positional ones, anything else is the one argument.

    Example:
        >>> forward(nn.Identity(), (torch.ones(1),)).tolist()
        [1.0]
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


@contextmanager
def evaluating(model: nn.Module, *, training: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Switch gradients off and all modules but ``training`` to evaluation; give every flag back, whatever happens.

    The flags are set one by one, not by ``train()``, which some models override with side effects.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        for module in training:
            module.training = True
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give buffers and torch's random numbers back as they were, whatever happens."""
    buffers = [
        (module._buffers, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for home, name, buffer, version, value in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
            home[name] = buffer
