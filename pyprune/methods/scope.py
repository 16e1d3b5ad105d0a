"""Which units compete with each other: of the whole model, of a weight, of a row, of columns, of each M neighbours.

Each function returns the scope of a `Method`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pyprune.checks import check_choice, check_count, check_names, shown
from pyprune.methods.name_rules import all_above, check_rules, meaning


@dataclass(frozen=True)
class Scope:
    """Which units compete; made by the functions of this module."""

    name: Literal["model", "tensor", "row", "columns", "n_of_m", "group"]
    keep: int = 0
    of: int = 0
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dim: Literal["in", "out", "both"] = "in"
    among: Literal["tensor", "model"] = "tensor"
    width: int = 0

    @property
    def ratio(self) -> float | None:
        """The ratio of N to M in all groups, the most that there can be; None of other scopes."""
        return 1 - self.keep / self.of if self.name == "n_of_m" else None

    @property
    def weights_compete(self) -> bool:
        """Whether units of different weights compete with each other."""
        return self.name in ("model", "group") or (self.name == "n_of_m" and self.among == "model")


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


def columns(width: int) -> Scope:
    """Let the elements of each ``width`` neighbouring columns compete, of all rows: of the weight as a matrix.

    Columns are inputs, rows are outputs. It is how SparseGPT chooses, with 128, because it must know what goes of
    some columns before it can say what the next ones are worth. `solvers.sparsegpt` takes it, `prune` does not.

    Args:
        width: how many columns, at least 1; the last ones may be fewer.

    Raises:
        TypeError, ValueError: for other numbers.

    Example:
        >>> columns(128).width
        128
    """
    return Scope("columns", width=check_count("width", width, least=1, what="a number of columns, at least 1"))


def n_of_m(
    *,
    keep: int,
    of: int,
    dim: Literal["in", "out", "both"] = "in",
    among: Literal["tensor", "model"] = "tensor",
) -> Scope:
    """Keep ``keep`` of each ``of`` neighbours, as sparse hardware wants it: in all groups, or in a share of them.

    Neighbours are input channels of one output, in a convolution at one position of the kernel. With ``dim="out"``
    they are output channels of one input; with ``dim="both"`` a group is a square of ``of`` by ``of`` weights, and
    exactly ``keep`` stay in each of its rows and columns, so that the weight and its transpose both are N:M (forward
    and backward pass of a training). Of all such patterns it is the one that keeps the largest sum of scores, found
    by trying them all: 90 for 2 of 4.

    Where ``of`` does not divide, the last group is as if the weight went on with zeros: of what is left the last
    ``keep`` at most stay.

    Without a ratio all groups are cut. A ratio is, as everywhere, the share of the weights that goes: at most
    1 - keep / of, which is all groups, and half of that is half of them. Of n groups that lose anything
    floor(share * n + 0.5) go, those first whose masking costs the least: the sum of the scores that go. So a
    schedule turns a weight into N:M group by group. Ties are broken by the lowest index.

    Args:
        keep: how many stay, at least 1 and fewer than ``of``.
        of: how many neighbours there are, up to 64; with ``dim="both"`` up to 4.
        dim: along which channels the neighbours lie.
        among: whose groups compete where a ratio leaves some whole: those of each weight, or of the whole model.

    Raises:
        TypeError, ValueError: for other numbers or names.

    Papers: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"; Hubara et al. 2021, "Accelerated Sparse
    Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks".

    Example:
        >>> n_of_m(keep=2, of=4).ratio
        0.5
        >>> n_of_m(keep=2, of=4, dim="both").dim
        'both'
    """
    of = check_count("of", of, least=2, most=64, what="how many neighbours there are, an integer from 2 to 64")
    keep = check_count("keep", keep, least=1)
    if keep >= of:
        raise ValueError(f"keep={keep}, of={of}; keep less than of")
    check_choice("dim", dim, ("in", "out", "both"))
    if dim == "both" and of > 4:
        raise ValueError(f'of={of}; dim="both" tries all patterns of a square, so of is at most 4 there')
    check_choice("among", among, ("tensor", "model"))
    return Scope("n_of_m", keep, of, dim=dim, among=among)


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
