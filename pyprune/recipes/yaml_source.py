"""Values of a YAML file that know where they stand, so that an error names file, line and field."""

import difflib
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


@dataclass(frozen=True)
class Place:
    """A node of a YAML file, its line, counted from 0, and its name, as "stages[1].prune.end".

    Example:
        >>> root = read("epochs: ten", "recipe.yaml")
        >>> str(root.fields({"epochs"})["epochs"].error("'ten' is no number"))
        "recipe.yaml:1: epochs: 'ten' is no number"
    """

    file: str
    name: str
    line: int
    node: Any

    def __str__(self) -> str:
        return f"{self.file}:{self.line + 1}{f': {self.name}' if self.name else ''}"

    def error(self, message: str) -> ValueError:
        """Return an error that says where it is."""
        return ValueError(f"{self}: {message}")

    def checked(self, function: Callable[..., T], *args: object, **keywords: object) -> T:
        """Call a function; what it finds wrong with its arguments is wrong here."""
        try:
            return function(*args, **keywords)
        except (TypeError, ValueError) as error:
            raise self.error(str(error)) from error

    def value(self) -> Any:
        """Return it as number, string, bool, None, list or dict."""
        import yaml

        try:
            found = yaml.SafeLoader("").construct_document(self.node)
        except yaml.YAMLError as error:
            raise self.error(f"{getattr(error, 'problem', error)}; give numbers, names, lists and dicts") from error
        # YAML 1.1 takes 1e-3, without a point, for a string.
        plain = self.node.id == "scalar" and self.node.style is None
        return float(found) if plain and _EXPONENT.fullmatch(str(found)) else found

    def number(self, what: str, *, least: float = 0.0, above: bool = False) -> float:
        """Return a finite number, at least ``least``, or above it."""
        found = self.value()
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise self.error(f"{found!r:.80} is not {what}; give a number")
        if found < least or (above and found == least):
            raise self.error(f"{found} is not {what}; give a number {'above' if above else 'from'} {least:g}")
        return float(found)

    def items(self) -> "list[Place]":
        """Return the places of a list."""
        if self.node.id != "sequence":
            raise self.error(f"{self.value()!r:.80} is no list; begin each item with a dash")
        return [
            Place(self.file, f"{self.name}[{i}]", node.start_mark.line, node)
            for i, node in enumerate(self.node.value)
        ]

    def pairs(self) -> "dict[Any, Place]":
        """Return the places of a dict, by key; none if nothing is there."""
        if self.node is None or self.node.tag == "tag:yaml.org,2002:null":
            return {}
        if self.node.id != "mapping":
            raise self.error(f"{self.value()!r:.80} is no dict; give lines of 'name: value'")
        found: dict[Any, Place] = {}
        for key_node, node in self.node.value:
            line = key_node.start_mark.line
            key = Place(self.file, self.name, line, key_node).value()
            place = Place(self.file, f"{self.name}.{key}" if self.name else f"{key}", line, node)
            if isinstance(key, (list, dict)):
                raise place.error("a list or dict cannot be a name")
            if key in found:
                raise place.error(f"it is in line {found[key].line + 1} already; give it once")
            found[key] = place
        return found

    def fields(self, allowed: Collection[str], required: Collection[str] = ()) -> "dict[str, Place]":
        """Return the places of a dict whose keys are known."""
        found = self.pairs()
        for key, place in found.items():
            if key not in allowed:
                raise place.error(f"{key!r} is unknown here; {nearest(str(key), allowed)}")
        missing = [key for key in required if key not in found]
        if missing:
            raise self.error(f"it lacks {' and '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}")
        return found

    def choice(self, allowed: Collection[str]) -> "tuple[str, Place]":
        """Return a name and the place of its arguments: of ``name``, or ``name: {argument: value}``."""
        if self.node.id == "scalar":
            name, arguments = self.value(), Place(self.file, self.name, self.line, None)
        else:
            pairs = self.pairs()
            if len(pairs) != 1:
                found = ", ".join(map(str, pairs)) or "nothing"
                raise self.error(f"it names {found}; give one name, with its arguments below it")
            ((name, arguments),) = pairs.items()
        if name not in allowed:
            raise self.error(f"{name!r:.80} is unknown; {nearest(str(name), allowed)}")
        return name, arguments


def read(text: str, file: str) -> Place:
    """Return the top of a YAML document.

    Raises:
        ModuleNotFoundError: without PyYAML.
        ValueError: if the text is no YAML, or has more than one document, or none.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "recipes are YAML, which PyYAML reads: pip install 'pyprune[recipes]'", name="yaml"
        ) from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise ValueError(f"{file}{line}: this is no YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        raise ValueError(f"{file}: the file is empty; a recipe has stages")
    return Place(file, "", node.start_mark.line, node)


def nearest(name: str, allowed: Collection[str]) -> str:
    """Say which allowed name is meant, probably, and which there are."""
    close = difflib.get_close_matches(name, allowed, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}Allowed: {', '.join(allowed) or 'nothing'}"
