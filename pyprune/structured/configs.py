"""What the config of a transformers model must say so that the plain class makes the small model.

Which entries these are is found by trying: those that are, or divide, a size that has changed are changed alike, and
the plain class makes a model without values of it. What has all the small shapes, and computes the same, is right.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.modules.evaluation import evaluating, forward, untouched
from pyprune.structured.models import tensors_within
from pyprune.structured.remembered import plan_of
from pyprune.structured.trace import without_cache

# An entry of a config, and of one in it, with its value.
Entries = dict[tuple[str, ...], Any]
Shapes = Mapping[str, torch.Size]

# More would take longer than anybody waits; what a config can say is found long before.
_MOST = 80
_SAME = {torch.float16: 2e-2, torch.bfloat16: 2e-2}


def pretrained_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what has a config, and can be saved with it: models of transformers, that are not in one another."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(not one or name.startswith(f"{one}.") for one in found):
            continue
        is_saved_so = hasattr(type(module), "from_pretrained") and hasattr(type(module), "save_pretrained")
        if is_saved_so and hasattr(vars(module).get("config"), "to_dict"):
            found.append(name)
            yield name, module


def says_all(part: nn.Module) -> bool:
    """Whether the plain class makes a model of all the same shapes of its config."""
    return shapes_by_config(part) == shapes_of(part)


def shapes_by_config(part: nn.Module, entries: Entries | None = None) -> Shapes | None:
    """Shapes of what the plain class makes of its config, with other entries perhaps; None if it fails."""
    with torch.device("meta"):
        made = _make(part, entries or {})
    return None if made is None else shapes_of(made)


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of what is in a state_dict."""
    return {name: one.shape for name, one in model.state_dict().items() if isinstance(one, Tensor)}


def find_entries(part: nn.Module, agrees: Callable[[nn.Module], bool]) -> Entries | None:
    """Return what a config must say instead so that the plain class makes the same model.

    Args:
        part: a model of transformers that was made smaller.
        agrees: whether another model, of all the same shapes and with the same values, computes the same.

    Returns:
        Entries with their new values, none if all is right as it is; None if it cannot be said.
    """
    entries = _entries(_config(part).to_dict())
    search = _Search(part, agrees)
    numbers = search.numbers()
    found = search.find(entries, numbers)
    if found is None and not search.is_hopeless:
        # Sizes that are computed if they are not said: of a head, of the width and the number of heads.
        said: Entries = {}
        for name, value in _sizes_of_modules(part).items():
            if entries.get((name,)) is None and search.shapes({**entries, **said, (name,): value}) == search.dense:
                said[name,] = value
        found = search.find(entries, said | numbers) if said else None
        for path in said:
            if found and path in found:
                without = {one: value for one, value in found.items() if one != path}
                if search.is_right({**entries, **without}):
                    found = without
    return found


class _Search:
    def __init__(self, part: nn.Module, agrees: Callable[[nn.Module], bool]) -> None:
        self.part = part
        self.agrees = agrees
        self.wanted = shapes_of(part)
        self.settings = plan.attributes if (plan := plan_of(part)) is not None else []
        self.made = 0
        entries = _entries(_config(part).to_dict())
        self.dense = self.shapes(entries)
        self.is_hopeless = self.dense is None or set(self.dense) != set(self.wanted) or self._layers_differ()

    def shapes(self, entries: Entries) -> Shapes | None:
        """Shapes of what the plain class makes; None if it fails."""
        self.made += 1
        return shapes_by_config(self.part, entries)

    def is_right(self, entries: Entries) -> bool:
        """Whether the plain model of a config is the same, in shapes and in what it computes."""
        if self.shapes(entries) != self.wanted:
            return False
        fresh = _without_values(self.part, entries)
        return fresh is not None and self._has_same_numbers(fresh) and self.agrees(fresh)

    def numbers(self) -> Entries:
        """Entries that are a number which changed (the epsilon of norms), with what it is now."""
        changed: dict[float, set[float]] = {}
        for _, _, new, *old in self.settings:
            if old and isinstance(old[0], float):
                changed.setdefault(old[0], set()).add(new)
        return {
            (name,): next(iter(changed[value]))
            for name, value in _config(self.part).to_dict().items()
            if isinstance(value, float) and len(changed.get(value, ())) == 1
        }

    def _has_same_numbers(self, fresh: nn.Module) -> bool:
        # A difference of epsilons does not show in outputs until values are small.
        names = {setting[1] for setting in self.settings if isinstance(setting[2], float)}
        others = dict(fresh.named_modules())
        return all(
            vars(module).get(name) == vars(others[path]).get(name)
            for path, module in self.part.named_modules()
            for name in names
        )

    def find(self, entries: Entries, said: Entries) -> Entries | None:
        """Entries besides ``said`` with which all is right."""
        if self.is_hopeless:
            return None
        assert self.dense is not None
        wrong = self._wrong(self.dense)
        if not wrong:
            return said if self.is_right({**entries, **said}) else None
        scales = {(self.dense[name][dim], self.wanted[name][dim]) for name, dim in wrong}
        candidates: list[tuple[tuple[str, ...], int, set[tuple[str, int]]]] = []
        for path, value in {**entries, **said}.items():
            for new in dict.fromkeys(_scaled(path, value, scales)):
                shapes = self.shapes({**entries, **said, path: new})
                if shapes is None:  # perhaps it is right together with another one
                    candidates.append((path, new, wrong))
                elif set(shapes) == set(self.wanted) and self._wrong(shapes) <= wrong:
                    changed = {place for place in wrong if shapes[place[0]] != self.dense[place[0]]}
                    if changed:
                        candidates.append((path, new, changed))
        limit = self.made + _MOST
        for count in range(1, 5):
            for chosen in itertools.combinations(candidates, count):
                if len({path for path, _, _ in chosen}) < count or set().union(*(one for *_, one in chosen)) != wrong:
                    continue
                if self.made > limit:
                    return None
                found = {**said, **{path: new for path, new, _ in chosen}}
                if self.is_right({**entries, **found}):
                    return found
        return None

    def _wrong(self, shapes: Shapes) -> set[tuple[str, int]]:
        return {
            (name, dim)
            for name, shape in self.wanted.items()
            for dim, size in enumerate(shape)
            if len(shapes[name]) != len(shape) or shapes[name][dim] != size
        }

    def _layers_differ(self) -> bool:
        """Whether layers that were alike are not: no entry says that."""
        assert self.dense is not None
        seen: dict[tuple[str, torch.Size], torch.Size] = {}
        for name, shape in self.wanted.items():
            kind = ".".join("#" if one.isdigit() else one for one in name.split("."))
            if seen.setdefault((kind, self.dense[name]), shape) != shape:
                return True
        return False


def computes_the_same(model: nn.Module, inputs: Sequence[Any], part: str) -> Callable[[nn.Module], bool]:
    """Return a function that tells whether a model computes the same with another part in the place of this one.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> agrees = computes_the_same(model, [torch.ones(1, 2)], "0")
        >>> agrees(model[0]), agrees(nn.Linear(2, 2))
        (True, False)
    """

    def outputs(model: nn.Module) -> list[Tensor]:
        with evaluating(model), untouched(model), without_cache(model):
            return [one for given in inputs for one in tensors_within(forward(model, given, "examples"))]

    expected: list[Tensor] = []

    def agrees(fresh: nn.Module) -> bool:
        if not part:
            other = fresh
        else:
            other = copy.copy(model)  # with modules of its own, down to the part
            other._modules = dict(model._modules)
            path, inner = part.split("."), other
            for name in path[:-1]:
                inner._modules[name] = copy.copy(inner._modules[name])
                inner = inner._modules[name]  # type: ignore[assignment]
                inner._modules = dict(inner._modules)
            inner._modules[path[-1]] = fresh
        try:
            expected[:] = expected or [one.clone() for one in outputs(model)]
            made = outputs(other)
        except Exception:  # whatever a stranger's forward does with sizes that do not fit
            return False
        return len(made) == len(expected) and all(map(_are_close, made, expected))

    return agrees


def _are_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    most = torch.where(other.isfinite(), other.abs(), 0).max()
    return bool(((one == other) | ((one - other).abs() <= _SAME.get(one.dtype, 1e-5) * most)).all())


# ---- entries of a config ----


def set_entries(config: Any, entries: Mapping[tuple[str, ...], Any]) -> None:
    """Let a config say something else."""
    for path, value in entries.items():
        holder = config
        for name in path[:-1]:
            holder = getattr(holder, name)
        setattr(holder, path[-1], value)


def _entries(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Entries:
    """Integers and None in a config, and in those within it."""
    found: Entries = {}
    for name, value in values.items():
        place = (*path, name)
        if isinstance(value, Mapping):
            found.update(_entries(value, place))
        elif value is None or type(value) is int:
            found[place] = value
    return found


def _scaled(path: tuple[str, ...], value: int | None, scales: set[tuple[int, int]]) -> Iterator[int]:
    if path[-1].startswith("_") or path[-1].endswith(("_id", "_ids")) or "token" in path[-1]:
        return
    for old, new in sorted(scales):
        if value is None:
            yield new
        elif value > 1 and value * new % old == 0 and value * new >= old:
            yield value * new // old


def _sizes_of_modules(part: nn.Module) -> dict[str, int]:
    """Integers among the attributes of modules that have one value wherever they are."""
    found: dict[str, set[int]] = {}
    for module in part.modules():
        if not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                if type(value) is int and value > 1 and name.endswith(("_dim", "_size")):
                    found.setdefault(name, set()).add(value)
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1}


# ---- plain models ----


def _config(part: nn.Module) -> Any:
    return part.config


def plain_class(part: nn.Module) -> type[nn.Module]:
    """The class of a model without gates, and without a plan that it follows when it is made."""
    return next(
        cls
        for cls in type(part).__mro__
        if not cls.__module__.startswith("pyprune.") and "_pyprune_plan" not in vars(cls)
    )


def _make(part: nn.Module, entries: Entries) -> nn.Module | None:
    """What the plain class makes of a config with other entries; None if it fails."""
    old = _config(part)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            values = copy.deepcopy(old.to_dict())
            for path, value in entries.items():
                inner = values
                for name in path[:-1]:
                    inner = inner[name]
                inner[path[-1]] = value
            config = type(old).from_dict(values)
            with suppress(AttributeError):
                config._attn_implementation = old._attn_implementation
            return plain_class(part)(config)
    except Exception:  # a config's own checks, and whatever a constructor does with it
        return None


class _Unfilled(TorchFunctionMode):
    """Parameters get memory, and no values: none that is not used is touched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "__")
        is_filled = name.endswith("_") and not name.startswith("__") and name not in ("requires_grad_", "detach_")
        if is_filled and args and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _without_values(part: nn.Module, entries: Entries) -> nn.Module | None:
    """What the plain class makes, with buffers that are not saved as it makes them, and the tensors of the model."""
    device = next((one.device for one in part.parameters()), torch.device("cpu"))
    with _Unfilled(), device:
        fresh = _make(part, entries)
    if fresh is None:
        return None
    try:
        fresh.load_state_dict(part.state_dict(), assign=True)
    except RuntimeError:
        return None
    buffers = dict(part.named_buffers())
    for name, buffer in fresh.named_buffers():  # those that are not saved, as `part.bfloat16()` made them
        if name in buffers and buffers[name].dtype != buffer.dtype:
            buffer.data = buffer.to(buffers[name].dtype)
    return fresh
