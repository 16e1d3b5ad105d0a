"""Values of a YAML file that know where they stand, so that an error names file, line and field."""

import copy
import difflib
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pyprune.checks import shown

T = TypeVar("T")
# No recipe needs more; YAML of others may hold as much as it likes.
_DEEPEST = 50
_LARGEST = 10_000
_STR, _MERGE, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "null"))
_OTHERS = {"tag:yaml.org,2002:bool": "true or false", _NULL: "nothing", "tag:yaml.org,2002:timestamp": "a date"}
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
            # A copy, because merge keys are written out in place.
            found = yaml.SafeLoader("").construct_document(copy.deepcopy(self.node))
        except yaml.YAMLError as error:
            raise self.error(f"{getattr(error, 'problem', error)}; give numbers, names, lists and dicts") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # What YAML takes for a date, a number or a tag's kind, and Python does not.
            written, kind = getattr(self.node, "value", ""), self.node.tag.rpartition(":")[2]
            raise self.error(f"{written!r:.80} is no {kind}; correct it, or put it in quotes") from error
        # YAML 1.1 takes 1e-3, without a point, for a string.
        plain = self.node.id == "scalar" and self.node.style is None
        return float(found) if plain and _EXPONENT.fullmatch(str(found)) else found

    def text(self) -> str:
        """Return a name as it is written: numbers are names too, as "0" is that of the first module of a Sequential.

        What YAML reads as something else than text or a number (no, on, null, dates) wants quotes, because other
        readers of YAML differ in it.
        """
        if self.node is None or self.node.id != "scalar":
            raise self.error(f"{shown(None if self.node is None else self.value())} is no name; give one, as text")
        written, tag = self.node.value, self.node.tag
        if tag not in (_STR, _implicit_tag(self.node)):
            raise self.error(f"{written!r:.80} has the tag {tag}, and is to be a name; leave the tag out")
        if tag in _OTHERS:
            raise self.error(f"{written!r:.80} is {_OTHERS[tag]} in YAML; if it is a name, put it in quotes")
        return str(written)

    def texts(self) -> list[str]:
        """Return a list of names."""
        return [item.text() for item in self.items()]

    def number(self, what: str, *, least: float = 0.0, above: bool = False, most: float = math.inf) -> float:
        """Return a finite number, at least ``least``, or above it, and at most ``most``."""
        found = self.value()
        if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found:
            raise self.error(f"{shown(found)} is not {what}; give a number")
        if found < least or (above and found == least) or found > most or found == math.inf:
            bound = f"{'above' if above else 'from'} {least:g}{'' if most == math.inf else f' to {most:g}'}"
            raise self.error(f"{shown(found)} is not {what}; give a number {bound}")
        try:
            return float(found)
        except OverflowError as error:
            raise self.error(f"{shown(found)} is not {what}; give a number that a float can hold") from error

    def items(self) -> "list[Place]":
        """Return the places of a list."""
        if self.node is None or self.node.id != "sequence":
            found = None if self.node is None else self.value()
            raise self.error(f"{shown(found)} is no list; begin each item with a dash")
        return [
            Place(self.file, f"{self.name}[{i}]", node.start_mark.line, node)
            for i, node in enumerate(self.node.value)
        ]

    def pairs(self) -> "dict[str, Place]":
        """Return the places of a dict, by key as it is written; none if nothing is there.

        A merge key (``<<: *anchor``) brings what the dict does not have itself; of several dicts the first counts.
        """
        if self.node is None or self.node.tag == _NULL:
            return {}
        if self.node.id != "mapping":
            raise self.error(f"{shown(self.value())} is no dict; give lines of 'name: value'")
        found: dict[str, Place] = {}
        merged: list[Place] = []
        for key_node, node in self.node.value:
            line = key_node.start_mark.line
            if key_node.tag == _MERGE:
                what = Place(self.file, f"{self.name}.<<".lstrip("."), line, node)
                merged += what.items() if node.id == "sequence" else [what]
                continue
            key = Place(self.file, self.name, line, key_node).text()
            place = Place(self.file, f"{self.name}.{key:.80}".lstrip("."), line, node)
            if key in found:
                raise place.error(f"it is in line {found[key].line + 1} already; give it once")
            found[key] = place
        for one in merged:
            for key, place in one.pairs().items():
                found.setdefault(key, replace(place, name=f"{self.name}.{key:.80}".lstrip(".")))
        return found

    def fields(self, allowed: Collection[str], required: Collection[str] = ()) -> "dict[str, Place]":
        """Return the places of a dict whose keys are known."""
        found = self.pairs()
        for key, place in found.items():
            if key not in allowed:
                raise place.error(f"{key!r:.80} is unknown here; {nearest(key, allowed)}")
        missing = [key for key in required if key not in found]
        if missing:
            raise self.error(f"it lacks {' and '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}")
        return found

    def choice(self, allowed: Collection[str]) -> "tuple[str, Place]":
        """Return a name and the place of its arguments: of ``name``, or ``name: {argument: value}``."""
        if self.node.id == "scalar":
            name, arguments = self.text(), Place(self.file, self.name, self.line, None)
        else:
            pairs = self.pairs()
            if len(pairs) != 1:
                found = ", ".join(list(pairs)[:5]) or "nothing"
                raise self.error(f"it names {found}; give one name, with its arguments below it")
            ((name, arguments),) = pairs.items()
        if name not in allowed:
            raise self.error(f"{name!r:.80} is unknown; {nearest(name, allowed)}")
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
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # which does not nest itself, as composing does
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"{file}:{event.start_mark.line + 1}: lists and dicts nest deeper than {_DEEPEST}")
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise ValueError(f"{file}{line}: this is no YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        raise ValueError(f"{file}: the file is empty; a recipe has stages")
    _size(file, node, {})
    return Place(file, "", node.start_mark.line, node)


def _size(file: str, node: Any, known: dict[int, int | None]) -> int:
    """Return how many values a node has with all aliases written out; each node is looked at once.

    Raises:
        ValueError: if there are too many, as of a file of a few lines that doubles ten times what it doubled before,
            or an alias is inside of what it stands for.
    """
    if node.id == "scalar":
        return 1
    place = Place(file, "", node.start_mark.line, node)
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise place.error("an alias stands here for what it is itself a part of; write it out")
        return size
    known[id(node)] = None
    inner = [one for pair in node.value for one in pair] if node.id == "mapping" else node.value
    size = 1
    for one in inner:
        size += _size(file, one, known)
        if size > _LARGEST:
            raise place.error(f"with its aliases written out it has more than {_LARGEST:,} values; give fewer")
    known[id(node)] = size
    return size


def _implicit_tag(node: Any) -> str:
    """Return the tag that YAML gives to what is written there by itself."""
    import yaml

    plain = node.style is None
    return str(yaml.SafeLoader("").resolve(yaml.ScalarNode, node.value, (plain, not plain)))


def nearest(name: str, allowed: Collection[str]) -> str:
    """Say which allowed name is meant, probably, and which there are."""
    close = difflib.get_close_matches(name, allowed, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}Allowed: {', '.join(allowed) or 'nothing'}"
