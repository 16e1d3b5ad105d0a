"""What `shrink` did: a table, a plan, and what stays."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyprune.console import as_html, as_text, listed
from pyprune.structured.plan import Plan


@dataclass(frozen=True)
class Removed:
    """Units of a group, before and after."""

    name: str
    what: str
    before: int
    after: int


@dataclass(frozen=True)
class Held:
    """What could not be removed: which kind of groups, how many of them, and why."""

    kind: str
    groups: int
    why: str


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` did to a model; ``str()`` is a table.

    Args:
        plan: how to make a fresh model as small (`rebuild`).
        removed: groups that lost units.
        parameters, macs, bytes: before and after; MACs of the examples' forward passes, bytes of parameters and
            buffers.
        held: groups with dead units that stay, because the model fails or computes something else without them.
        kept: dead units that stay, by what they are and why.
        difference: of outputs, relative to their largest value.
        stale: attributes that say an old size, and that no forward pass has read: [module.attribute, old, new].
        guessed: attributes that were found by their values alone.
        biases: parameters that are new, because they took over a constant; an optimizer does not know them.
        renewed: what of the optimizer's state did not fit, and begins anew.
        whole: groups that were dead as a whole, of which one unit was left.
        branches: residual blocks that put out what they are given, because their branch is dead:
            ``drop_blocks(model, examples, shrunk.branches)`` removes them.
        unknown: operations that no rule knows; what they touch stays.
        inexact: norms that cannot compute what they did, because their width was removed: the model is another one.
    """

    plan: Plan
    removed: Sequence[Removed]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    held: Sequence[Held] = ()
    kept: Sequence[str] = ()
    difference: float = 0.0
    stale: Sequence[str] = ()
    guessed: Sequence[str] = ()
    biases: Sequence[str] = ()
    renewed: Sequence[str] = field(default=())
    whole: Sequence[str] = ()
    inexact: Sequence[str] = ()
    branches: Sequence[str] = ()
    unknown: Sequence[str] = ()

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("", "before", "after", "left", box=None, pad_edge=False)
        for column in (1, 2, 3):
            table.columns[column].justify = "right"
        for what, (before, after) in (("parameters", self.parameters), ("MACs", self.macs), ("bytes", self.bytes)):
            table.add_row(what, f"{before:,}", f"{after:,}", f"{after / max(1, before):.1%}")
        for one in self.removed:
            table.add_row(
                f"{one.what} of {one.name}", str(one.before), str(one.after), f"{one.after / one.before:.1%}"
            )
        lines = [as_text(table)]
        if not self.removed:
            lines.append("nothing is dead, so nothing went")
        lines.append(f"outputs differ by {self.difference:.1e} of their largest value")
        lines += [f"{one.groups} groups of {one.kind} stay: {one.why}" for one in self.held]
        for what, names in (
            ("stays", self.kept),
            ("all units are dead, and one stays", self.whole),
            ("not known, and what they touch stays", self.unknown),
            ("does nothing, and drop_blocks can remove it", self.branches),
            ("not equal by construction, a norm over fewer", self.inexact),
            ("says an old size, and was not read", self.stale),
            ("guessed by its value", self.guessed),
            ("new bias, for a constant", self.biases),
            ("optimizer state begun anew", self.renewed),
        ):
            if names:
                lines.append(f"{what}: {listed(names)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html(str(self))
