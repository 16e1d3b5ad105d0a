"""Whether the config of a transformers model says all that makes it what it has become."""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.console import listed, warn

_PLAIN = (bool, int, float, str, type(None))
# What passes leave behind, or only training sees (rates of stochastic depth grow with the number of layers).
_RUNTIME = re.compile(r"_|training$|.*drop")


def unlike_its_config(model: nn.Module) -> list[tuple[str, str]]:
    """Return what is different in a transformers model that is made anew of the config of this one, and how.

    That is nothing for other models.
    """
    for name, part in model.named_modules():
        if hasattr(type(part), "from_pretrained") and hasattr(vars(part).get("config"), "to_dict"):
            return [(f"{name}.{place}".lstrip("."), how) for place, how in _unlike_fresh(part)]
    return []


def warn_if_not_reloadable(model: nn.Module, before: Iterable[tuple[str, str]]) -> None:
    """Warn if a plain ``from_pretrained`` would make another model of this one's config, and name what differs.

    Args:
        before: what was different before, as what passes leave behind in modules; it is not named.
    """
    known = {place.rpartition(".")[2] for place, _ in before}
    different = [f"{place} {how}" for place, how in unlike_its_config(model) if place.rpartition(".")[2] not in known]
    if different:
        warn(
            f"the config cannot say what the model has become ({listed(different)}): a plain from_pretrained makes "
            "another one. Keep the plan with it, and give it to pyprune.rebuild with a dense model"
        )


def _unlike_fresh(model: nn.Module) -> list[tuple[str, str]]:
    config: Any = model.config
    cls = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("pyprune."))
    try:
        with torch.device("meta"):
            fresh = cls(type(config).from_dict(copy.deepcopy(config.to_dict())))
    except Exception as error:  # a config's own checks, and whatever a constructor does with it
        return [("config", f"is refused ({type(error).__name__}: {error})")]
    return list(_differences(model, fresh))


def _differences(model: nn.Module, fresh: nn.Module) -> Iterator[tuple[str, str]]:
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in one.state_dict().items() if isinstance(tensor, Tensor)}
        for one in (model, fresh)
    )
    for name in {**shapes, **expected}:
        if shapes.get(name) != expected.get(name):
            yield name, f"is {shapes.get(name, 'gone')}, not {expected.get(name, 'there')}"
    for name, module in model.named_modules():
        try:
            other = vars(fresh.get_submodule(name))
        except AttributeError:
            yield name, "is there"
            continue
        for attribute, value in vars(module).items():
            if _RUNTIME.match(attribute) or type(value) not in _PLAIN:
                continue
            if type(other.get(attribute, value)) in _PLAIN and other.get(attribute, value) != value:
                yield f"{name}.{attribute}", f"is {value}, not {other[attribute]}"
