"""What was removed from a model, as data: positions that are kept, and attributes with their new values."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyprune.checks import check_path, shown
from pyprune.files import whole_file

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """How to make the dense model as small as the shrunk one is (`rebuild`).

    Args:
        tensors: by the name of a parameter or buffer, and by dimension, the positions that are kept. What is tied has
            all of its names.
        shapes: of these tensors in the dense model.
        attributes: [name of a module, attribute, new value, value in the dense model, None if there is none].
        biases: parameters that the dense model does not have: they took over constants.
        model: the class of the model.
    """

    tensors: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: list[list[Any]] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    model: str = ""

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"pyprune_plan": _VERSION, **vars(self)})

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Make it of JSON.

        Raises:
            TypeError: if ``text`` is no string.
            ValueError: if that is no plan, a damaged one, or one of a newer version.

        Example:
            >>> Plan.from_json(Plan({"weight": {0: [1]}}, {"weight": [2, 3]}).to_json()).tensors
            {'weight': {0: [1]}}
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {shown(text)}; give the string that Plan.to_json() returned")
        try:
            values = json.loads(text, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"text is no plan of pyprune: {error}") from error
        if not isinstance(values, dict) or "pyprune_plan" not in values:
            raise ValueError("text is no plan of pyprune; give what Plan.to_json() returned, or Plan.save() wrote")
        version = values.pop("pyprune_plan")
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"the plan has version {shown(version)}, and this pyprune reads {_VERSION}; update pyprune"
            )
        unknown = set(values) - set(vars(Plan()))
        if unknown:
            raise ValueError(f"the plan is damaged, or of another pyprune: it has {shown(sorted(unknown)[0])}")
        tensors = values.get("tensors", {})
        if isinstance(tensors, dict):
            values["tensors"] = {
                name: {_dimension(dim): kept for dim, kept in dims.items()} if isinstance(dims, dict) else dims
                for name, dims in tensors.items()
            }
        plan = Plan(**values)
        check_plan(plan)
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as a whole or not at all."""
        check_path("path", path)
        with whole_file(path) as temporary:
            Path(temporary).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Read what `save` wrote.

        Raises:
            OSError: if there is no such file.
            ValueError: if it has no plan in it, as for `from_json`.
        """
        check_path("path", path)
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def then(self, other: "Plan") -> "Plan":
        """Return the plan that does this one, and then another one, of the model as this one leaves it.

        Raises:
            ValueError: if the other one is of a model with other sizes.

        Example:
            >>> first = Plan({"weight": {0: [1, 2, 5]}}, {"weight": [6, 3]})
            >>> first.then(Plan({"weight": {0: [0, 2], 1: [0]}}, {"weight": [3, 3]})).tensors
            {'weight': {0: [1, 5], 1: [0]}}
        """
        tensors = {name: dict(dims) for name, dims in self.tensors.items()}
        shapes = dict(self.shapes)
        for name, dims in other.tensors.items():
            if name in self.biases:  # it is made as large as its layer
                continue
            mine = tensors.setdefault(name, {})
            shape = [len(mine.get(dim, range(size))) for dim, size in enumerate(shapes.get(name, other.shapes[name]))]
            if shape != list(other.shapes[name]):
                there = tuple(other.shapes[name])
                raise ValueError(
                    f"other is of another model: {name} has shape {there} there, and {tuple(shape)} here"
                )
            shapes.setdefault(name, list(shape))
            for dim, kept in dims.items():
                before = mine.get(dim)
                mine[dim] = list(kept) if before is None else [before[place] for place in kept]
        attributes = {(one[0], one[1]): list(one) for one in self.attributes}
        for name, attribute, *values in other.attributes:
            known = attributes.get((name, attribute))
            attributes[name, attribute] = [name, attribute, values[0], *(known[3:] if known else values[1:])]
        return Plan(
            tensors,
            shapes,
            list(attributes.values()),
            list(dict.fromkeys([*self.biases, *other.biases])),
            self.model or other.model,
        )


def check_plan(plan: Plan) -> None:
    """Raise ValueError if a plan cannot be one of any model."""
    for name, kind, what in (
        ("tensors", dict, "a dict by names of tensors"),
        ("shapes", dict, "a dict by names of tensors"),
        ("attributes", list, "a list"),
        ("biases", list, "a list of names"),
        ("model", str, "the name of a class"),
    ):
        if not isinstance(getattr(plan, name), kind):
            raise _damaged(f"{name} is {shown(getattr(plan, name))}, not {what}")
    if set(plan.tensors) != set(plan.shapes):
        odd = set(plan.tensors) ^ set(plan.shapes)
        raise _damaged(f"{shown(min(odd, key=str))} is in only one of tensors and shapes")
    for name, shape in plan.shapes.items():
        if not isinstance(name, str) or not _are_counts(shape):
            raise _damaged(f"the shape of {shown(name)} is {shown(shape)}")
        _check_dimensions(name, plan.tensors[name], shape)
    for setting in plan.attributes:
        is_right = (
            isinstance(setting, (list, tuple))
            and len(setting) in (3, 4)
            and all(isinstance(one, str) for one in setting[:2])
            and kind_of(setting[2]) is not None
            and all(one is None or kind_of(one) == kind_of(setting[2]) for one in setting[3:])
        )
        if not is_right:
            raise _damaged(f"an attribute is {shown(setting)}, not [module, name, new value, old value]")
    for name in plan.biases:
        if not isinstance(name, str) or name.rpartition(".")[2] != "bias":
            raise _damaged(f"a new bias is {shown(name)}")


def _check_dimensions(name: str, dims: object, shape: list[int]) -> None:
    if not isinstance(dims, dict):
        raise _damaged(f"positions of {name} are {shown(dims)}")
    for dim, kept in dims.items():
        if type(dim) is not int or not 0 <= dim < len(shape):
            raise _damaged(f"{name} has shape {tuple(shape)}, and no dimension {shown(dim)}")
        if not _are_counts(kept) or not kept or max(kept) >= shape[dim] or sorted(set(kept)) != list(kept):
            raise _damaged(f"positions of {name} along {dim} are {shown(kept)}, of 0 to {shape[dim] - 1}")


def kind_of(value: object) -> str | None:
    """What kind of attribute a value is, among those that change: sizes, several of them, and an epsilon.

    Example:
        >>> kind_of(4), kind_of((2, -1)), kind_of({"h": 2}), kind_of(1e-6), kind_of(True)
        ('size', 'sizes', 'sizes by name', 'number', None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (list, tuple)):
        return "sizes" if all(kind_of(one) == "size" for one in value) else None
    if isinstance(value, dict):
        are_sizes = all(isinstance(key, str) and kind_of(one) == "size" for key, one in value.items())
        return "sizes by name" if are_sizes else None
    if isinstance(value, float):
        return "number" if math.isfinite(value) else None
    return "size" if isinstance(value, int) else None


def is_same(one: Any, other: Any) -> bool:
    """Whether two attributes are equal; JSON makes lists of tuples."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return kind_of(one) == kind_of(other) and bool(one == other)


def _are_counts(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(type(one) is int and one >= 0 for one in values)


def _damaged(problem: str) -> ValueError:
    return ValueError(f"the plan is damaged: {problem}")


def _dimension(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else text


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"it has {shown(key)} twice")
        made[key] = value
    return made
