"""Regular expressions that cannot run for ever: the same answers as `re`, in bounded time.

`re` tries alternatives one after the other, and some small patterns (``(\\w+\\.?)+!``) make it try more of them on
the name of a weight than a life is long. Patterns come from recipes of others, so: what has few choices `re` matches;
any other is walked through here, all alternatives at once, and no place of the pattern is visited twice at one
character. So the time is the product of both lengths, and names that begin alike share it: a step is remembered by
the places where it began and the characters there. Where a pattern looks ahead or behind it cannot be, and is
counted. What needs to remember what was matched (backreferences) is refused.
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
# Repetitions are written out: (a{50}){50} has 2,500 places and as many items.
_MOST_PLACES = 4_000
# Of one text: places that are visited where a pattern looks ahead or behind, and steps.
_MOST_VISITS = 5_000
_MOST_REMEMBERED = 5_000
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
        whole = places.whole(tree, tree.state.flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.80} is not a regular expression: {error}") from error
    except _Unbounded as error:
        raise ValueError(
            f"{pattern!r:.80} is refused, because {error} can take for ever; write it without, or several of them"
        ) from error

    def matches(text: str) -> bool:
        places.visits = 0
        try:
            return places.reach(whole, text, 0)
        except _Unbounded as error:
            raise ValueError(f"{pattern!r:.80} is refused, because {error} in {text!r:.80}; simplify it") from error

    return matches


class _Unbounded(Exception):
    """What cannot be matched in bounded time."""


@dataclass(eq=False)
class _Place:
    """A place in a pattern: what must hold there, how much it takes, and where it goes on; a fork if nothing must."""

    holds: Callable[[str, int], bool] | None = None
    width: int = 0
    is_look: bool = False
    next: "list[_Place]" = field(default_factory=list)


@dataclass(eq=False)
class _Whole:
    """What is gone through by itself, a pattern or what is looked for in it, and the steps that are remembered."""

    start: frozenset[_Place]
    end: _Place
    steps: dict[tuple[frozenset[_Place], bool, str], tuple[frozenset[_Place], bool]] = field(default_factory=dict)


class _Places:
    """Makes places of a parsed pattern, from its end to its start, and goes through them."""

    def __init__(self) -> None:
        self.visits = 0
        self._count = 0
        self._looks = False
        self._tests: dict[tuple[int, int], Callable[[str, int], bool]] = {}  # what is written out is compiled once

    def whole(self, tree: Any, flags: int) -> _Whole:
        """Return a part of a pattern to go through by itself."""
        end = _Place()
        return _Whole(frozenset([self.of(tree, flags, end)]), end)

    def reach(self, whole: _Whole, text: str, at: int, stop: int | None = None) -> bool:
        """Whether the end can be reached from a character on, at ``stop`` if it is given."""
        places = whole.start
        while places:
            self._visit(1)
            # All that a place can ask for, but for one that looks ahead or behind.
            around = (places, at == 0, text[max(0, at - 1) : at + 2])
            step = whole.steps.get(around)
            if step is None:
                ahead, seen = _step(places, text, at)
                step = ahead, whole.end in seen
                if any(place.is_look for place in seen):
                    self._visit(len(seen))
                else:
                    if len(whole.steps) >= _MOST_REMEMBERED:
                        whole.steps.clear()
                    whole.steps[around] = step
            places, is_there = step
            if is_there and stop in (None, at):
                return True
            at += 1
        return False

    def _visit(self, number: int) -> None:
        self.visits += number
        if self.visits > _MOST_VISITS:
            raise _Unbounded("it has too much to look for")

    def of(self, tree: Any, flags: int, after: _Place) -> _Place:
        """Return the place where a part of a pattern begins that goes on at another place."""
        for item in reversed(list(tree)):
            after = self._of_item(tree, item, flags, after)
        return after

    def _new(self, **what: Any) -> _Place:
        self._count_up()
        return _Place(**what)

    def _count_up(self) -> None:
        self._count += 1
        if self._count > _MOST_PLACES:
            raise _Unbounded("a pattern of so many repetitions")

    def _of_item(self, tree: Any, item: Any, flags: int, after: _Place) -> _Place:
        self._count_up()  # also what makes no place
        kind, value = str(item[0]), item[1]
        if kind in _CHARACTERS or kind == "AT":
            return self._new(holds=self._test(tree, item, flags), width=kind != "AT", next=[after])
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

    def _test(self, tree: Any, item: Any, flags: int) -> Callable[[str, int], bool]:
        known = self._tests.get((id(item), flags))
        if known is None:
            part = _compiler.compile(_parser.SubPattern(tree.state, [item]), flags & ~re.DEBUG)
            known = self._tests[id(item), flags] = lambda text, at: part.match(text, at) is not None
        return known

    def _repeated(self, value: Any, flags: int, after: _Place) -> _Place:
        least, most, inner = value
        if most == _parser.MAXREPEAT:
            again = self._new(next=[after])
            again.next.append(self.of(inner, flags, again))
            after, most = again, least
        for number in range(most, 0, -1):
            once = self.of(inner, flags, after)
            if once is after:  # nothing is repeated
                break
            after = once if number <= least else self._new(next=[once, after])
        return after

    def _looking(self, wanted: bool, value: Any, flags: int, after: _Place) -> _Place:
        direction, inner = value
        if self._looks:
            raise _Unbounded("looking ahead or behind within looking")
        back = inner.getwidth()[0] if direction < 0 else 0  # re takes nothing else there than one length
        self._looks = True
        whole = self.whole(inner, flags)
        self._looks = False

        def holds(text: str, at: int) -> bool:
            found = at >= back and self.reach(whole, text, at - back, stop=at if direction < 0 else None)
            return found is wanted

        return self._new(holds=holds, is_look=True, next=[after])


def _step(places: frozenset[_Place], text: str, at: int) -> tuple[frozenset[_Place], set[_Place]]:
    """Return the places where a character leads, and all that were visited for it."""
    seen: set[_Place] = set()
    ahead: set[_Place] = set()
    held: dict[Callable[[str, int], bool], bool] = {}
    todo = list(places)
    while todo:
        place = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        if place.holds is not None:
            holds = held.get(place.holds)
            if holds is None:
                holds = held[place.holds] = place.holds(text, at)
            if not holds:
                continue
        (ahead.update if place.width else todo.extend)(place.next)
    return frozenset(ahead), seen


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
