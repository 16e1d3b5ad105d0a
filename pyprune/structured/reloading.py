"""Whether the config of a transformers model says all that makes it what it has become."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.console import listed, warn

_PLAIN = (bool, int, float, str, type(None))
# What passes leave behind, or only training sees (rates of stochastic depth grow with the number of layers).
_RUNTIME = re.compile(r"_|training$|.*drop")


def warn_if_not_reloadable(model: nn.Module) -> None:
    """Warn if a plain ``from_pretrained`` would make another model of this one's config, and name what differs."""
    for name, part in model.named_modules():
        if hasattr(type(part), "from_pretrained") and hasattr(vars(part).get("config"), "to_dict"):
            different = _unlike_fresh(part)
            if different:
                warn(
                    f"the config cannot say what {name or type(part).__name__} has become ({listed(different)}): a "
                    "plain from_pretrained makes another model. Keep the plan with it, and replay it on a dense one"
                )
            return


def _unlike_fresh(model: nn.Module) -> list[str]:
    """Return what is different in a model that is made anew of this one's config."""
    config: Any = model.config
    cls = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("pyprune."))
    try:
        with torch.device("meta"):
            fresh = cls(type(config).from_dict(copy.deepcopy(config.to_dict())))
    except Exception as error:  # a config's own checks, and whatever a constructor does with it
        return [f"{type(error).__name__}: {error}"]
    return list(_differences(model, fresh))


def _differences(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in one.state_dict().items() if isinstance(tensor, Tensor)}
        for one in (model, fresh)
    )
    for name in {**shapes, **expected}:
        if shapes.get(name) != expected.get(name):
            yield f"{name} {shapes.get(name, 'is gone')}, not {expected.get(name, 'there')}"
    for name, module in model.named_modules():
        try:
            other = vars(fresh.get_submodule(name))
        except AttributeError:
            yield f"{name} is not there"
            continue
        for attribute, value in vars(module).items():
            if _RUNTIME.match(attribute) or type(value) not in _PLAIN:
                continue
            if type(other.get(attribute, value)) in _PLAIN and other.get(attribute, value) != value:
                yield f"{name}.{attribute} is {value}, not {other[attribute]}"
