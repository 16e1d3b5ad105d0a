"""A model of the zoo: how it is built, and what it is called with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        build: makes it, with random weights.
        examples: draws what it is called with: a tensor, a tuple or a dict.
        decodes: it has ``generate`` and a cache of keys and values, so tokens are compared too.
        left: the share of parameters that may be left, if this case promises one.
    """

    build: Callable[[], nn.Module]
    examples: Callable[[], Any]
    decodes: bool = False
    left: float | None = None


def images(size: int, channels: int = 3, batch: int = 2) -> Callable[[], Tensor]:
    """Return what draws a batch of square images."""
    return partial(torch.randn, batch, channels, size, size)


def draw(make: Callable[[], Any], seed: int) -> Any:
    """Draw from a generator of its own seed, and leave torch's own as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
