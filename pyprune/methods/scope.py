"""Which units compete with each other: of the whole model, of a weight, of a row, of each M neighbours.

Each function returns the scope of a `Method`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pyprune.checks import check_count, check_names, shown
from pyprune.methods.name_rules import all_above, check_rules, meaning


@dataclass(frozen=True)
class Scope:
    """Which units compete; made by the functions of this module."""

    name: Literal["model", "tensor", "row", "n_of_m", "group"]
    keep: int = 0
    of: int = 0
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def ratio(self) -> float | None:
        """The ratio that N to M has of its own; None of other scopes."""
        return 1 - self.keep / self.of if self.name == "n_of_m" else None


def model() -> Scope:
    """Let all units of the model compete: one threshold for all.

    Example:
        >>> model().name
        'model'
    """
    return Scope("model")


def tensor() -> Scope:
    """Let the units of each weight compete among themselves.

    Example:
        >>> tensor().name
        'tensor'
    """
    return Scope("tensor")


def row() -> Scope:
    """Let the units of each output channel compete among themselves, so that each output keeps equally many inputs.

    Example:
        >>> row().name
        'row'
    """
    return Scope("row")


def n_of_m(*, keep: int, of: int) -> Scope:
    """Keep exactly ``keep`` of each ``of`` neighbours along the input channels, as sparse hardware wants it.

    At the end of a row that ``of`` does not divide, the last ``keep`` at most stay of what is left, as if the row
    went on with zeros. In a convolution the neighbours are input channels at one position of the kernel. The
    ratio is 1 - keep / of, and `prune` takes no other.

    Args:
        keep: how many stay, at least 1 and fewer than ``of``.
        of: how many neighbours there are, up to 64.

    Raises:
        TypeError, ValueError: for other numbers.

    Paper: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks".

    Example:
        >>> n_of_m(keep=2, of=4).keep
        2
    """
    of = check_count("of", of, least=2, most=64, what="how many neighbours there are, an integer from 2 to 64")
    keep = check_count("keep", keep, least=1)
    if keep >= of:
        raise ValueError(f"keep={keep}, of={of}; keep less than of")
    return Scope("n_of_m", keep, of)


def group(groups: Mapping[str, Sequence[str]]) -> Scope:
    """Let the units of each named group of weights compete; weights in no group are left alone.

    Args:
        groups: for each group the names of weights or of modules above them, or regular expressions that match such a
            name at its start, as in `IgnoredScope` (end one with ``$`` to match all of it).

    Raises:
        TypeError, ValueError: if it is no such dict. `prune` raises if a rule matches nothing, or a weight is in two.

    Example:
        >>> group({"mlp": [r".*mlp.*"], "attention": [r".*attn.*"]}).groups[0]
        ('mlp', ('.*mlp.*',))
    """
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups is {shown(groups)}; give a dict of group names to lists of weight names or patterns")
    if not groups:
        raise ValueError("groups is empty; give a dict of group names to lists of weight names or patterns")
    for name, rules in groups.items():
        if not isinstance(name, str):
            raise TypeError(f"groups has {shown(name)} for the name of a group; give a string")
        check_rules(f"groups[{name!r}]", check_names(f"groups[{name!r}]", rules))
    return Scope("group", groups=tuple((name, tuple(rules)) for name, rules in groups.items()))


def group_of(scope: Scope, names: Sequence[str]) -> str | None:
    """Return the group of a weight with these names, or None.

    Raises:
        ValueError: if it is in two.

    Example:
        >>> group_of(group({"heads": ["fc"]}), ["fc.weight"])
        'heads'
    """
    known = all_above(names)
    found = [group_name for group_name, rules in scope.groups if any(meaning(rule, known) for rule in rules)]
    if len(found) > 1:
        raise ValueError(f"{names[0]} is in the groups {' and '.join(found)}; a weight competes in one")
    return found[0] if found else None
