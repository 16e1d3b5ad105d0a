"""Which weights pruning leaves alone."""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pyprune.checks import check_bool, check_names
from pyprune.methods.name_rules import plain_rules
from pyprune.methods.patterns import matcher


@dataclass(frozen=True)
class IgnoredScope:
    """Rules for what `prune` must not touch; a weight is ignored if one rule matches it or a module it lies in.

    A tied weight is one weight: it is ignored if a rule matches any of its names. Names are those of the plain
    model, whatever wraps it (`torch.compile`, DistributedDataParallel).

    Args:
        names: names of parameters ("conv1.weight") or of modules ("encoder": all below it).
        patterns: regular expressions for such names, matched at their start, as `re.match` does, and as NNCF does:
            "conv1" matches "conv10" too, "conv1$" does not. In dicts of ratios, groups and recipes a pattern means
            the same weights; there what could be a name is one.
        types: class names of modules ("Embedding": all below such modules, subclasses too).
        validate: whether a rule that matches nothing in the model is an error.
        all_zero: leave out weights that are zero everywhere, too, such as fresh LoRA factors and zero-initialised
            heads: masked as a whole they would never train. A call without an ignored scope does so.

    Raises:
        TypeError: if a rule is not a string, a plain string was given for a list of them, or a flag is not a bool.
        ValueError: for a pattern that is not a regular expression, or one that can take for ever (backreferences).

    Example:
        >>> IgnoredScope(names=["fc"], patterns=[r".*embed"]).names
        ('fc',)
    """

    names: Sequence[str] = ()
    patterns: Sequence[str] = ()
    types: Sequence[str] = ()
    validate: bool = True
    all_zero: bool = True

    def __post_init__(self) -> None:
        for field in ("names", "patterns", "types"):
            object.__setattr__(self, field, check_names(f"IgnoredScope {field}", getattr(self, field)))
        for flag in ("validate", "all_zero"):
            object.__setattr__(self, flag, check_bool(f"IgnoredScope {flag}", getattr(self, flag)))
        for pattern in self.patterns:
            try:
                matcher(pattern)
            except ValueError as error:
                raise ValueError(f"IgnoredScope patterns: {error}") from error


def ignored_by(
    scope: IgnoredScope, parameters: Collection[str], module_types: Mapping[str, Collection[str]]
) -> Callable[[str], bool]:
    """Return a function that says of a parameter's name whether the scope ignores it.

    Args:
        scope: the rules.
        parameters: names of all parameters of the model.
        module_types: for the name of every module ("" for the model itself) the names of its class and its bases.

    Raises:
        ValueError: if the scope validates and one of its rules matches nothing; the text lists the nearest names.

    Example:
        >>> ignored = ignored_by(IgnoredScope(types=["Linear"]), ["fc.weight"], {"": ["Net"], "fc": ["Linear"]})
        >>> ignored("fc.weight")
        True
    """
    names = [*parameters, *filter(None, module_types)]
    types = sorted({name for bases in module_types.values() for name in bases})
    matched: set[str] = set()
    unmatched = []
    rules = [("name", name) for name in scope.names] + [("pattern", pattern) for pattern in scope.patterns]
    for kind, rule in rules:
        written = ((one.__eq__ if kind == "name" else matcher(one)) for one in plain_rules(rule))
        hits = next((found for matches in written if (found := list(filter(matches, names)))), [])
        matched.update(hits)
        unmatched += [] if hits else [(kind, rule, names)]
    matched.update(name for name, bases in module_types.items() if not set(scope.types).isdisjoint(bases))
    unmatched += [("type", rule, types) for rule in scope.types if rule not in types]
    if scope.validate and unmatched:
        complaints = [
            f"{kind} {rule!r} (nearest: {', '.join(difflib.get_close_matches(rule, known, n=3, cutoff=0.0))})"
            for kind, rule, known in unmatched
        ]
        of_nncf = any(kind == "name" and "/" in rule for kind, rule, _ in unmatched)
        raise ValueError(
            f"IgnoredScope rules that match nothing in the model: {'; '.join(complaints)}. "
            "Correct them, or set validate=False to allow them"
            + (". Names with / are those of operations in NNCF; here give the name of the layer" if of_nncf else "")
        )

    def ignored(parameter: str) -> bool:
        parts = parameter.split(".")
        return any(".".join(parts[:length]) in matched for length in range(len(parts) + 1))

    return ignored
