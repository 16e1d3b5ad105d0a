"""Regular expressions that cannot run for ever: the same answers as `re`, in bounded time.

`re` tries alternatives one after the other, and some small patterns (``(\\w+\\.?)+!``) make it try more of them on
the name of a weight than a life is long. Patterns come from recipes of others, so: what has few choices `re` matches;
any other is walked through here, all alternatives at once, and no place of the pattern is visited twice at one
character. So the time is the product of both lengths. What needs to remember what was matched (backreferences) is
refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

try:
    from re import _compiler, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_parse as _parser

# Of so many choices in a row `re` tries at most the cube of the length of a name.
_FEW = 3
# Repetitions are written out: (a{50}){50} has 2,500 places.
_MOST_PLACES = 10_000
_CHARACTERS = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}


@lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that says whether a text begins with a match, as `re.match` does.

    Raises:
        ValueError: if it is no regular expression, or one whose time cannot be bounded.

    Example:
        >>> matcher(r"layers\\.\\d")("layers.12.weight"), matcher(r"(\\w+\\.?)+!")("layers.12.weight" * 9)
        (True, False)
    """
    try:
        compiled = re.compile(pattern)
        tree = _parser.parse(pattern)
        if _choices(tree) <= _FEW:
            return lambda text: compiled.match(text) is not None
        places = _Places()
        end = _Place()
        start = places.of(tree, tree.state.flags, end)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.80} is not a regular expression: {error}") from error
    except _Unbounded as error:
        raise ValueError(
            f"{pattern!r:.80} is refused, because {error} can take for ever; write it without, or several of them"
        ) from error
    return lambda text: _reaches(start, end, text, 0)


class _Unbounded(Exception):
    """What cannot be matched in bounded time."""


@dataclass(eq=False)
class _Place:
    """A place in a pattern: what must hold there, how much it takes, and where it goes on; a fork if nothing must."""

    holds: Callable[[str, int], bool] | None = None
    width: int = 0
    next: "list[_Place]" = field(default_factory=list)


class _Places:
    """Makes places of a parsed pattern, from its end to its start."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, tree: Any, flags: int, after: _Place) -> _Place:
        """Return the place where a part of a pattern begins that goes on at another place."""
        for item in reversed(list(tree)):
            after = self._of_item(tree, item, flags, after)
        return after

    def _new(self, **what: Any) -> _Place:
        self._count += 1
        if self._count > _MOST_PLACES:
            raise _Unbounded("a pattern of so many repetitions")
        return _Place(**what)

    def _of_item(self, tree: Any, item: Any, flags: int, after: _Place) -> _Place:
        kind, value = str(item[0]), item[1]
        if kind in _CHARACTERS or kind == "AT":
            part = _compiler.compile(_parser.SubPattern(tree.state, [item]), flags & ~re.DEBUG)
            return self._new(
                holds=lambda text, at: part.match(text, at) is not None, width=kind != "AT", next=[after]
            )
        if kind == "SUBPATTERN":
            _, added, removed, inner = value
            return self.of(inner, (flags | added) & ~removed, after)
        if kind == "BRANCH":
            return self._new(next=[self.of(one, flags, after) for one in value[1]])
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(value, flags, after)
        if kind in ("ASSERT", "ASSERT_NOT"):
            return self._looking(kind == "ASSERT", value, flags, after)
        raise _Unbounded("a backreference, a condition or an atomic group")

    def _repeated(self, value: Any, flags: int, after: _Place) -> _Place:
        least, most, inner = value
        if most == _parser.MAXREPEAT:
            again = self._new(next=[after])
            again.next.append(self.of(inner, flags, again))
            after, most = again, least
        for number in range(most, 0, -1):
            once = self.of(inner, flags, after)
            after = once if number <= least else self._new(next=[once, after])
        return after

    def _looking(self, wanted: bool, value: Any, flags: int, after: _Place) -> _Place:
        direction, inner = value
        back = inner.getwidth()[0] if direction < 0 else 0  # re takes nothing else there than one length
        end = _Place()
        start = self.of(inner, flags, end)

        # Looks within looks would ask the same again and again.
        @lru_cache(maxsize=4096)
        def holds(text: str, at: int) -> bool:
            found = at >= back and _reaches(start, end, text, at - back, stop=at if direction < 0 else None)
            return found is wanted

        return self._new(holds=holds, next=[after])


def _reaches(start: _Place, end: _Place, text: str, at: int, stop: int | None = None) -> bool:
    """Whether the end of a pattern can be reached, at ``stop`` if it is given."""
    places = {start}
    while places:
        seen: set[_Place] = set()
        ahead: set[_Place] = set()
        todo = list(places)
        while todo:
            place = todo.pop()
            if place in seen:
                continue
            seen.add(place)
            if place.holds is not None and not place.holds(text, at):
                continue
            if place.width:
                ahead.update(place.next)
            else:
                todo.extend(place.next)
        if end in seen and stop in (None, at):
            return True
        places, at = ahead, at + 1
    return False


def _choices(tree: Any) -> int:
    """Count the choices of a pattern; many if something is repeated that is more than a character."""
    return sum(_of_one(str(kind), value) for kind, value in tree)


def _of_one(kind: str, value: Any) -> int:
    if kind in _CHARACTERS or kind == "AT":
        return 0
    if kind == "SUBPATTERN":
        return _choices(value[3])
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _choices(value[1])
    if kind == "BRANCH":
        return 1 + sum(_choices(one) for one in value[1])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        (inner,) = value[2] if len(value[2]) == 1 else (None,)
        is_character = inner is not None and str(inner[0]) in _CHARACTERS
        return 1 if is_character else _FEW + 1
    return _FEW + 1
