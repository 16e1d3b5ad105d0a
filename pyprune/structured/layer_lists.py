"""Members taken out of a list of layers, and what counts layers: their numbers, those of the model and its config."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from pyprune.structured.blocks import Bypass

# Where a layer says which one it is: caches of keys and values go by it.
_NUMBER = re.compile(r"((layer|block)_?)?(idx|index|id|number|num)|layer|i", re.IGNORECASE)
# Where a model says how many layers it has, or something of each; and what looks like it and is something else.
_COUNT = re.compile(r"(.*_)?(layers?|blocks?|depth)")
_OF_EACH = re.compile(r".*(layer|block)s?(_.*)?")
_OF_EACH_IN_CONFIG = re.compile(r".*(window|heads|intermediate_size|sparsity|multiplier|experts|top_?k)")
_OTHER = re.compile(r".*(shared|predict|nextn|mtp|sparse|window|dense)")
# A config's first so many layers are of one kind.
_FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")


def is_list(module: nn.Module) -> bool:
    """Whether members of a module can be taken out, and the others move up."""
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def take_out(model: nn.Module, removed: Mapping[str, int | None]) -> None:
    """Remove blocks; call it within a `Change` of the model and its `configs`.

    Args:
        removed: names, with the number of items of the `Bypass` that takes the place of each; None takes it out of
            its list.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2))
        >>> take_out(model, {"0": None})
        >>> model[0].out_features
        2
    """
    lists: dict[str, list[str]] = {}
    for name, items in removed.items():
        path, _, key = name.rpartition(".")
        if items is None:
            lists.setdefault(path, []).append(key)
        else:
            model.get_submodule(path)._modules[key] = Bypass(items).train(model.get_submodule(name).training)
    # Inner lists first: names of outer members change.
    for path in sorted(lists, key=lambda path: -path.count(".") if path else 1):
        _shorten(model, path, lists[path])


def configs(model: nn.Module) -> list[Any]:
    """Return the objects that modules have as their ``config``, each once, and those within them."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for one in _with_parts(vars(module).get("config")):
            found[id(one)] = one
    return list(found.values())


def _with_parts(config: Any) -> Iterator[Any]:
    if hasattr(config, "__dict__") and not isinstance(config, type):
        yield config
        for part in vars(config).values():
            if hasattr(part, "to_dict"):
                yield from _with_parts(part)


def _shorten(model: nn.Module, path: str, keys: Iterable[str]) -> None:
    """Take members out of the list at a path."""
    layers = model.get_submodule(path)
    members = [(key, child) for key, child in layers._modules.items() if child is not None]
    gone = set(keys)
    kept = [place for place, (key, _) in enumerate(members) if key not in gone]
    are_numbered = [key for key, _ in members] == [str(place) for place in range(len(members))]
    left = {str(new) if are_numbered else members[old][0]: members[old][1] for new, old in enumerate(kept)}
    layers._modules.clear()
    layers._modules.update(left)
    _renumber([child for _, child in members], kept)
    # The module that has the list, and those around it as far as they have the same config.
    around = [model.get_submodule(one) for one in _around(path)]
    _count(vars(around[0]), len(members), kept, lambda key: True)
    found = [config for module in around if (config := vars(module).get("config")) is not None]
    for config in {id(config): config for config in found}.values():
        if type(config) is type(found[0]) and hasattr(config, "__dict__"):
            _count_config(config, len(members), kept, path)


def _around(path: str) -> list[str]:
    """Return the names of what is around a list, from inside out; the list itself if there is nothing."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)] or [""]


def _renumber(members: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Let those that stay know their new numbers, where all know their old ones."""
    said: dict[tuple[str, str], dict[int, nn.Module]] = {}
    for place, member in enumerate(members):
        for name, module in member.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int and _NUMBER.fullmatch(attribute):
                    said.setdefault((name, attribute), {})[place] = module
    for (_, attribute), modules in said.items():
        starts = {vars(module)[attribute] - place for place, module in modules.items()}
        if len(starts) == 1:
            (start,) = starts
            for new, old in enumerate(kept):
                if old in modules:
                    setattr(modules[old], attribute, new + start)


def _count_config(config: Any, count: int, kept: Sequence[int], path: str) -> None:
    """Let a config say how many layers there are, and of which kinds."""
    is_both = bool(getattr(config, "is_encoder_decoder", False))

    values = vars(config)
    stages, depths = re.findall(r"\d+", path), values.get("depths")
    if stages and isinstance(depths, list):  # its other lists are of stages
        if depths[int(stages[-1]) :][:1] == [count]:
            depths[int(stages[-1])] = len(kept)
        return

    def is_meant(key: str) -> bool:
        # Where a config is of two stacks, what does not name the decoder is the encoder's.
        return ("decoder" in key) == ("decoder" in path) if is_both else True

    _count(values, count, kept, is_meant)
    for key, value in values.items():
        if type(value) is list and len(value) == count and _OF_EACH_IN_CONFIG.match(key):
            values[key] = [value[place] for place in kept]
    _name_stages(values, count, kept)
    for key in _FIRST:
        if type(values.get(key)) is int and values[key] <= count:
            values[key] = sum(place < values[key] for place in kept)


def _name_stages(values: dict[str, Any], count: int, kept: Sequence[int]) -> None:
    """Let a backbone name its layers, "stem" and "stage1" to the last, and those that it returns."""
    names, returned = values.get("stage_names"), values.get("_out_indices")
    if isinstance(names, list) and isinstance(returned, (list, tuple)) and len(names) == count + 1:
        values["stage_names"] = names[: len(kept) + 1]
        left = [sum(place < one for place in kept) for one in (one % len(names) for one in returned)]
        values["_out_indices"] = type(returned)(left)
        values["_out_features"] = [names[one] for one in left]


def _count(values: dict[str, Any], count: int, kept: Sequence[int], is_meant: Any) -> None:
    for key, value in list(values.items()):
        if not is_meant(key) or _OTHER.match(key):
            continue
        if type(value) is int and value == count and _COUNT.fullmatch(key):
            values[key] = len(kept)
        elif type(value) in (list, tuple) and _OF_EACH.fullmatch(key):
            values[key] = type(value)(_of_each(value, count, kept))


def _of_each(value: Sequence[Any], count: int, kept: Sequence[int]) -> list[Any]:
    """Return what is left of a list with an entry for each layer, or of a list of numbers of layers."""
    if len(value) == count:
        return [value[place] for place in kept]
    are_places = all(type(one) is int and 0 <= one < count for one in value) and list(value) == sorted(set(value))
    return [kept.index(one) for one in value if one in kept] if are_places else list(value)
