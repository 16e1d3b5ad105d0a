"""What arrives at the readers of a model: entries that count for nothing, and constants that a bias can take.

A reader is a product: an entry of one side is multiplied with one of a weight, and summed. The entry is dead if one
of the two is zero, whatever the inputs are. If what arrives is another constant, the same at all positions and in all
examples, a bias takes over, unless zeros are put around it.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.structured.coordinates import NONE, Coords, Flags
from pyprune.structured.rules.call import Contraction
from pyprune.structured.seen import Reading, Trace, Traced

Constants = Literal["exact", "drop"]


@dataclass(eq=False)
class _Seen:
    """One product, without its tensors."""

    coords: Coords
    weight_coords: Coords | None
    module: str
    free: Flags
    fixed: Flags
    values: np.ndarray[tuple[int], np.dtype[np.float64]]
    padded: bool
    name: str


@dataclass(frozen=True, eq=False)
class Fold:
    """A constant that arrives at inputs of a module, and goes into its bias."""

    module: str
    dim: int
    entries: Coords
    labels: Coords
    values: np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(eq=False)
class Readers:
    """Sees what is read during a trace."""

    seen: list[_Seen] = field(default_factory=list)

    def see(self, reading: Reading) -> None:
        """Take down what is needed of a product while its tensors are there."""
        one = reading.contraction
        left_zero = _zero(one.one, one.one_axis) & one.fixed[0] if _may_be_zero(one, 0) else None
        right_zero = _zero(one.other, one.other_axis) & one.fixed[1] if _may_be_zero(one, 1) else None
        free = np.zeros(len(one.coords[0]), bool)
        for zero in (left_zero, right_zero):
            if zero is not None:
                free |= zero
        # The other side is the weight; a sum has a number there.
        given = 1 if one.sources[1] == "inputs" or one.sources[0] == "number" else 0
        weight = 1 - given
        is_read = one.sources[weight] == "parameters"
        fixed = one.fixed[given] & is_read & ~free
        values = np.zeros(len(free))
        if fixed.any():
            tensor, axis = (one.one, one.one_axis) if given == 0 else (one.other, one.other_axis)
            low, high = _extent(tensor, axis, fixed)
            is_same = high - low <= 1e-6 * np.maximum(1, np.abs(high))
            values[fixed] = (low + high) / 2
            fixed[fixed] = is_same
        weight_coords = one.coords[weight] if is_read else None
        self.seen.append(
            _Seen(one.coords[0], weight_coords, reading.module, free, fixed, values, one.padded, one.name)
        )

    def dead(self, seen: Trace, model: nn.Module, units: Coords, constants: Constants) -> "Dead":
        """Say which units can go, what becomes of constants, and what stays for their sake."""
        modules = dict(model.named_modules())
        own = {id(one.tensor): one for one in seen.tensors}
        is_read = np.zeros(len(units), bool)
        blocked = np.zeros(len(units), bool)
        why: dict[int, str] = {}
        for one in self.seen:
            labels = units[one.coords]
            is_read[labels] = True
            module = modules.get(one.module)
            foldable = one.fixed.any() and _dim_of(module, one.weight_coords, own) is not None
            passes = one.free | (one.fixed & foldable & (not one.padded))
            meets = one.fixed & ~one.free
            for entry in np.flatnonzero(meets & ~passes):
                place = f"{one.module}.weight" if one.module else one.name
                problem = "meets zero padding" if one.padded else "is read where no bias can take it"
                why.setdefault(int(labels[entry]), f"{place}: constant {one.values[entry]:.4g} {problem}")
            if constants == "drop":
                passes = passes | one.fixed
            blocked[labels[~passes]] = True
        # What a module reads must be the same in all of its calls.
        folds: dict[str, Fold] = {}
        for one in self.seen:
            labels = units[one.coords]
            use = one.fixed & ~one.free & ~blocked[labels] & (not one.padded)
            if not use.any():
                continue
            known = folds.get(one.module)
            if known is not None:
                values = dict(zip(known.entries.tolist(), known.values.tolist(), strict=True))
                for entry in np.flatnonzero(use).tolist():
                    was = values.get(entry)
                    if was is None or abs(was - one.values[entry]) > 1e-6 * max(1, abs(was)):
                        blocked[labels[entry]] = True
                        why[int(labels[entry])] = f"{one.module}.weight: other constants in other calls"
                continue
            entries = np.flatnonzero(use)
            dim = _dim_of(modules.get(one.module), one.weight_coords, own)
            assert dim is not None
            folds[one.module] = Fold(one.module, dim, entries, labels[entries], one.values[entries])
        gone = is_read & ~blocked
        gone[NONE] = False
        return Dead(gone, folds, {label: text for label, text in why.items() if constants == "exact"})


@dataclass(frozen=True, eq=False)
class Dead:
    """What a trace says of units, by their labels.

    Args:
        units: which can go.
        folds: constants that readers get, by module.
        kept: why others stay.
    """

    units: Flags
    folds: dict[str, Fold]
    kept: dict[int, str]


def _may_be_zero(one: Contraction, side: int) -> bool:
    return bool(one.fixed[side].any()) and one.sources[side] != "number"


def _zero(tensor: Tensor, axis: int) -> Flags:
    used = tensor.detach() != 0
    if rest := tuple(dim for dim in range(tensor.dim()) if dim != axis):
        used = used.any(rest)
    return np.asarray(~used.cpu().numpy())


def _extent(tensor: Tensor, axis: int, chosen: Flags) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], ...]:
    index = torch.from_numpy(np.flatnonzero(chosen)).to(tensor.device)
    rows = tensor.detach().index_select(axis, index).movedim(axis, 0).double()
    rows = rows.reshape(len(rows), -1)
    return rows.amin(1).cpu().numpy(), rows.amax(1).cpu().numpy()


def _dim_of(module: nn.Module | None, weight_coords: Coords | None, own: dict[int, Traced]) -> int | None:
    """Which dimension of a layer's own weight reads, if its bias can take a constant."""
    if module is None or weight_coords is None or not hasattr(module, "bias"):
        return None
    traced = own.get(id(getattr(module, "weight", None)))
    if traced is None:
        return None
    for dim, coords in enumerate(traced.coords):
        if coords is not None and np.array_equal(coords, weight_coords):
            return dim
    return None
