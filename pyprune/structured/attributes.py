"""New values for the sizes that lie in attributes of modules: found by where they were used, or guessed and named."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from pyprune.structured.compact import Kept, named_tensors, set_attribute, value_of
from pyprune.structured.coordinates import Coords
from pyprune.structured.size_uses import SizeUse
from pyprune.structured.sizes import Expression, Place, evaluate, holders, integers, places_in

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
            wanted.setdefault(use.expression, set()).add(value)
        else:
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
            # In proportion, if that fits; else whatever does, if it is only one number.
            scaled = now[place] * value // use.value if use.value else now[place]
            fits = [
                size for size in (scaled, *range(1, now[place])) if _gives(use.expression, now, place, size, value)
            ]
            if fits and (fits[0] == scaled or len(set(fits)) == 1):
                known[place] = fits[0]
                break
    return {place: value for place, value in known.items() if value != old(place)}


def _gives(expression: Expression, now: dict[Place, int], place: Place, size: int, value: int) -> bool:
    try:
        return size > 0 and evaluate(expression, {**now, place: size}.__getitem__) == value
    except ZeroDivisionError:
        return False


def settings(model: nn.Module, sizes: dict[Place, int]) -> list[Setting]:
    """Return what attributes become, tuples as a whole."""
    made: dict[tuple[str, str], Any] = {}
    for (name, attribute, index), value in sizes.items():
        if index is None:
            made[name, attribute] = value
        else:
            now = value_of(model, name, attribute)
            numbers = made.setdefault((name, attribute), dict(now) if isinstance(now, dict) else list(now))
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

    Of the tensors of a module itself, and of the layers right below it; but not what equals a size that stays, too.
    """
    found = _of_changed_sizes(model, kept)
    return [
        (name, attribute, value) for name, attribute, value, sure in found if sure and (name, attribute) not in read
    ]


def _of_changed_sizes(model: nn.Module, kept: Kept) -> Iterator[tuple[str, str, int, bool]]:
    """Attributes that equal a size of a module's tensors, what that is now, and whether no other was the same.

    Of several it is what a layer reads: modules look whether that is what they expect.
    """
    changed: dict[str, dict[int, dict[int, int]]] = {}
    for name, tensor in named_tensors(model).items():
        owner = name.rpartition(".")[0]
        for dim, size in enumerate(tensor.shape):
            positions = kept.of(tensor).get(dim)
            for module in {owner, owner.rpartition(".")[0]}:
                new = size if positions is None else len(positions)
                changed.setdefault(module, {}).setdefault(size, {}).setdefault(new, dim)
    for name, prefix, holder in holders(model):
        if type(holder).__module__.startswith("torch.nn."):
            continue
        for attribute, value in integers(holder):
            if not isinstance(value, int):
                continue
            new_sizes = changed.get(name, {}).get(value, {})
            others = sorted((new for new in new_sizes if new != value), key=lambda new: new_sizes[new] != 1)
            if others:
                yield name, prefix + attribute, others[0], len(new_sizes) == 1


def guesses(model: nn.Module, kept: Kept, changes: Iterable[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Return what could be changed by its value alone, by the class of the module and the attribute."""
    done = {(name, attribute) for name, attribute, _ in changes}
    found: dict[tuple[str, str], list[Setting]] = {}
    for name, attribute, value, _ in _of_changed_sizes(model, kept):
        if (name, attribute) not in done:
            cls = type(model.get_submodule(name)).__name__
            found.setdefault((cls, attribute), []).append((name, attribute, value))
    return found


def shown_place(name: str, attribute: str) -> str:
    """Name an attribute of a module."""
    return f"{name}.{attribute}" if name else attribute
