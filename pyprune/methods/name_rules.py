"""What a rule about weights means: a name of one, of a module above it, or a pattern. The same everywhere."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set

from pyprune.checks import shown
from pyprune.methods.patterns import matcher

# What can be a name, and says nothing as a pattern that a name does not.
_NAME = re.compile(r"[\w.-]*")
# What wrappers (torch.compile, DistributedDataParallel, FSDP) put into the names that users see.
_WRAPPING = re.compile(
    r"(?<!\w)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\\?\.|^module\\?\."
)


def above(name: str) -> list[str]:
    """Return a name and those of the modules above it, the longest first.

    Example:
        >>> above("net.fc.weight")
        ['net.fc.weight', 'net.fc', 'net']
    """
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def all_above(names: Iterable[str]) -> set[str]:
    """Return all names, and those of the modules above them.

    Example:
        >>> sorted(all_above(["net.fc.weight"]))
        ['net', 'net.fc', 'net.fc.weight']
    """
    return {prefix for name in names for prefix in above(name)}


def plain_rules(rule: str) -> Iterator[str]:
    """Yield a rule as it is written, and then with one more word of a wrapper left out each time.

    A module of the plain model may be called as a wrapper is, so the first that means something is the one meant.

    Example:
        >>> list(plain_rules("module._orig_mod.fc")), list(plain_rules(r"_orig_mod\\.layers\\.\\d"))[-1]
        (['module._orig_mod.fc', '_orig_mod.fc', 'fc'], 'layers\\\\.\\\\d')
    """
    yield rule
    while (plain := _WRAPPING.sub("", rule, count=1)) != rule:
        yield plain
        rule = plain


def check_rules(what: str, rules: Collection[object]) -> None:
    """Raise unless each rule is a string, and a name or a pattern.

    Raises:
        TypeError: if one is no string.
        ValueError: if one is neither a name nor a pattern that can be matched in bounded time.
    """
    for rule in rules:
        if not isinstance(rule, str):
            raise TypeError(f"{what} has {shown(rule)} for a name; names and patterns of weights are strings")
        if not _NAME.fullmatch(rule):
            _pattern(what, rule)


def meaning(rule: str, known: Set[str], what: str = "the rule") -> Callable[[str], bool] | None:
    """Return a function that says whether a rule means a weight; None if it means none.

    Args:
        rule: the name of a weight, or of a module above it, means just that. Anything else is a regular expression,
            which matches such a name at its start, as `re.match` does; ``$`` ends it. What could be a name, but is
            none in this model, means nothing.
        known: what there is, from `all_above`.
        what: the rule is, for messages.

    Raises:
        ValueError: if it is neither a name nor a regular expression.

    Example:
        >>> names = ["layers.1.weight", "layers.10.weight"]
        >>> known = all_above(names)
        >>> [list(filter(meaning(rule, known), names)) for rule in ("layers.1", r"layers\\.1")]
        [['layers.1.weight'], ['layers.1.weight', 'layers.10.weight']]
        >>> meaning("layer", known) is None
        True
    """
    for written in plain_rules(rule):
        if written in known:  # before it is taken for a pattern: some names are strange
            return _is_below(written)
        if not _NAME.fullmatch(written):
            matches = _pattern(what, written)
            if any(map(matches, known)):
                return lambda name, matches=matches: any(map(matches, above(name)))  # type: ignore[misc]
    return None


def _is_below(rule: str) -> Callable[[str], bool]:
    return lambda name: name == rule or name.startswith(f"{rule}.")


def by_name(
    values: float | Mapping[str, float],
    names: Sequence[str | tuple[str, ...]],
    otherwise: float,
    what: str = "ratio",
    *,
    left_out: Sequence[str] = (),
) -> list[float]:
    """Return one value for each name: the same for all, or that of the rule that means it.

    Args:
        values: a number, or numbers by rules (see `meaning`). A name goes before a pattern, the longest first; of
            patterns the first in the dict counts.
        names: what the rules are about; several of what is tied.
        otherwise: the value of what no rule means.
        what: the values are, for messages.
        left_out: names that rules may mean, too, and then do nothing.

    Raises:
        ValueError: if a rule matches nothing.

    Example:
        >>> by_name({"fc": 0.9, r"conv\\d": 0.5}, ["conv1.weight", "fc.weight", "head.weight"], 0.0)
        [0.5, 0.9, 0.0]
    """
    if not isinstance(values, Mapping):
        return [values] * len(names)
    every = [(name,) if isinstance(name, str) else name for name in names]
    meanings = meanings_of(what, values, [*every, left_out])
    return [next((values[rule] for name in some for rule in _in_order(name, meanings)), otherwise) for some in every]


def meanings_of(
    what: str, rules: Collection[str], names: Sequence[Sequence[str]]
) -> dict[str, Callable[[str], bool]]:
    """Return what each rule means.

    Raises:
        ValueError: if one means none of the weights.
    """
    every = [name for some in names for name in some]
    known = all_above(every)
    found: dict[str, Callable[[str], bool]] = {}
    for rule in rules:
        means = meaning(rule, known, what)
        if means is None:
            raise ValueError(f"{rule!r:.80} matches no weight that is pruned {nearest_to(rule, every)} in {what}")
        found[rule] = means
    return found


def nearest_to(rule: str, known: Collection[str]) -> str:
    """Say in a message which names are near to a rule that means nothing."""
    near = ", ".join(difflib.get_close_matches(rule, known, n=3, cutoff=0.0))
    begun = _NAME.fullmatch(rule) and rule and any(part.startswith(rule) for name in known for part in above(name))
    advice = f"for all whose names begin so, give {rule + '.*'!r}; " if begun else ""
    return f"(nearest: {near}); {advice}correct it"


def _in_order(name: str, meanings: Mapping[str, Callable[[str], bool]]) -> Iterator[str]:
    """Yield the rules that mean a weight, those first that count first."""
    exact = [prefix for prefix in above(name) if prefix in meanings]
    return (rule for rule in (*exact, *meanings) if meanings[rule](name))


def _pattern(what: str, rule: str) -> Callable[[str], bool]:
    try:
        return matcher(rule)
    except ValueError as error:
        raise ValueError(f"{what}: {rule!r:.80} is neither a name of a weight nor a pattern: {error}") from error
