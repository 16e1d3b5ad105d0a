"""New values for the sizes that lie in attributes of modules: found by where they were used, or guessed and named."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from pyprune.structured.compact import Kept, named_tensors, set_attribute, value_of
from pyprune.structured.coordinates import Coords
from pyprune.structured.sizes import Place, SizeUse, evaluate, holders, integers, places_in

# A number among the attributes of a module, or of an object that it holds.
Setting = tuple[str, str, Any]


def new_sizes(
    uses: Iterable[SizeUse], is_kept: Callable[[Coords], Any], old: Callable[[Place], int]
) -> dict[Place, int]:
    """Return the attributes that have other values now, by what they were used for.

    An attribute that would have to be two numbers at once keeps its value.
    """
    wanted: dict[Place, set[int]] = {}
    computed: list[tuple[SizeUse, int]] = []
    for use in uses:
        value = use.new_value(is_kept)
        if isinstance(use.expression, tuple) and isinstance(use.expression[1], str):
            wanted.setdefault(use.expression, set()).add(value)  # type: ignore[arg-type]
        elif value != use.value:
            computed.append((use, value))
    known = {place: values.pop() for place, values in wanted.items() if len(values) == 1}
    conflicts = {place for place, values in wanted.items() if values and place not in known}
    for use, value in computed:
        places = list(dict.fromkeys(places_in(use.expression)))
        now = {place: known.get(place, old(place)) for place in places}
        if evaluate(use.expression, now.__getitem__) == value:
            continue
        open_ = [place for place in places if place not in known and place not in conflicts]
        for place in open_:
            scaled = now[place] * value // use.value
            if evaluate(use.expression, {**now, place: scaled}.__getitem__) == value:
                known[place] = scaled
                break
    return {place: value for place, value in known.items() if value != old(place)}


def settings(model: nn.Module, sizes: dict[Place, int]) -> list[Setting]:
    """Return what attributes become, tuples as a whole."""
    made: dict[tuple[str, str], Any] = {}
    for (name, attribute, index), value in sizes.items():
        if index is None:
            made[name, attribute] = value
        else:
            numbers = made.setdefault((name, attribute), list(value_of(model, name, attribute)))
            numbers[index] = value
    return [(name, attribute, value) for (name, attribute), value in made.items()]


def old_value(model: nn.Module) -> Callable[[Place], int]:
    """Return a function that looks up what an attribute is."""

    def look_up(place: Place) -> int:
        name, attribute, index = place
        value = value_of(model, name, attribute)
        return int(value if index is None else value[index])

    return look_up


def apply(model: nn.Module, changes: Iterable[Setting]) -> None:
    """Give attributes their new values."""
    for name, attribute, value in changes:
        set_attribute(model, name, attribute, value)


def stale(model: nn.Module, kept: Kept, read: set[tuple[str, str]]) -> list[Setting]:
    """Return attributes that no forward pass of the examples has read, and that equal a size that has changed.

    Of the tensors of a module itself, and of the layers right below it.
    """
    return [
        (name, attribute, value)
        for name, attribute, value in _of_changed_sizes(model, kept)
        if (name, attribute) not in read
    ]


def _of_changed_sizes(model: nn.Module, kept: Kept) -> Iterator[Setting]:
    """Attributes that are what a size of a module's tensors was, with what that is now."""
    tensors = named_tensors(model)
    changed: dict[str, dict[int, set[int]]] = {}
    for name, tensor in tensors.items():
        for dim, positions in kept.of(tensor).items():
            owner = name.rpartition(".")[0]
            for module in {owner, owner.rpartition(".")[0]}:
                changed.setdefault(module, {}).setdefault(tensor.shape[dim], set()).add(len(positions))
    for name, prefix, holder in holders(model):
        if name not in changed or type(holder).__module__.startswith("torch.nn."):
            continue
        for attribute, value in integers(holder):
            if isinstance(value, int) and len(new := changed[name].get(value, set())) == 1:
                yield name, prefix + attribute, next(iter(new))


def guesses(model: nn.Module, kept: Kept, changes: Iterable[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Return what could be changed by its value alone, by the class of the module and the attribute."""
    done = {(name, attribute) for name, attribute, _ in changes}
    found: dict[tuple[str, str], list[Setting]] = {}
    for name, attribute, value in _of_changed_sizes(model, kept):
        if (name, attribute) not in done:
            cls = type(model.get_submodule(name)).__name__
            found.setdefault((cls, attribute), []).append((name, attribute, value))
    return found


def shown_place(name: str, attribute: str) -> str:
    """Name an attribute of a module."""
    return f"{name}.{attribute}" if name else attribute
