"""What a weight multiplies, as sums over tokens: its Gram, or Grams of parts of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.calibration.use_sums import is_of_experts
from pyprune.console import listed
from pyprune.methods.layout import channels_shape
from pyprune.modules.targets import Target
from pyprune.oneshot.grams import symmetric

# Neighbours in N:M and in blocks of columns stay together.
_WIDE, _NARROW = 128, 16
# An expert with fewer tokens than this share of its inputs is filled up.
_FEW = 0.1


@dataclass(frozen=True, eq=False)
class InputPart:
    """The Gram of some rows and columns of a weight, as `matrices` gives it.

    Args:
        rows, columns: their indices, int64; None for all.
        gram: (groups, columns, columns), symmetric, float32 or float64. Weights that multiply the same have one
            tensor together: leave it as it is.
        tokens: of how many tokens it is, (groups,), int64; positions of the output of a convolution.
    """

    rows: Tensor | None
    columns: Tensor | None
    gram: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class WeightInput:
    """What one weight multiplied in the passes that were watched.

    Args:
        parts: each row and column that multiplied anything is in one of them. There is one of all, unless rows of the
            weight have inputs of their own (queries and keys of attention that are one weight), or the Gram would be
            too large; what columns of two parts have in common is then left out.
        note: what is to be known of it: that it was cut, which experts got too few tokens; or nothing.
    """

    parts: tuple[InputPart, ...]
    note: str = ""

    @property
    def gram(self) -> Tensor:
        """The Gram, if it is one for the whole weight.

        Raises:
            ValueError: if it is in parts.
        """
        (first, *others) = self.parts
        if others or first.rows is not None or first.columns is not None:
            raise ValueError(
                f"the Gram is in {len(self.parts)} parts: {self.note or 'rows have inputs of their own'}"
            )
        return first.gram

    @property
    def tokens(self) -> Tensor:
        """From how many tokens it is, (groups,); of several parts the fewest."""
        return torch.stack([part.tokens for part in self.parts]).amin(0)


def cut_columns(
    columns: int, groups: int, itemsize: int, memory: int, *, channels: int | None = None
) -> list[Tensor]:
    """Return which columns have Grams of their own, so that all together fit; one of all if that does.

    Args:
        columns: how many there are.
        groups: how many Grams of this size.
        itemsize: bytes of a number.
        memory: bytes that they may take.
        channels: of a convolution, whose columns are positions of the kernel by channels: it is cut by channels.

    Raises:
        ValueError: if even narrow ones would not fit.

    Example:
        >>> [len(part) for part in cut_columns(40, 1, 4, memory=40 * 4 * 32)]
        [32, 8]
    """
    channels = columns if channels is None else channels
    kernel = columns // channels
    if groups * columns**2 * itemsize <= memory:
        return [torch.arange(columns)]
    width = memory // (groups * columns * itemsize * kernel)  # in channels
    width -= width % (_WIDE if width >= _WIDE else _NARROW)
    if not width:
        need = groups * columns * itemsize * kernel * min(_NARROW, channels)
        raise ValueError(
            f"a Gram of {columns} inputs{f' for each of {groups} groups' if groups > 1 else ''} takes "
            f"{groups * columns**2 * itemsize:,} bytes, and memory={memory:,} is not enough for parts of it either; "
            f"give at least {need:,}" + (", or fewer experts at a time" if groups > 1 else "")
        )
    places = torch.arange(columns).view(kernel, channels)
    return [places[:, start : start + width].flatten() for start in range(0, channels, width)]


@dataclass(eq=False)
class InputSum:
    """The Grams of what the same weights multiplied, a block of columns each.

    Args:
        blocks: which of the inputs are in each; None for all.
        columns: which columns of the weight these inputs are; None for all.
        grams: (groups, columns, columns) each, of which the upper triangles mean something.
        tokens: (groups,).
    """

    blocks: list[Tensor] | None
    columns: Tensor | None
    grams: list[Tensor]
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class _Gram:
    columns: Tensor | None
    gram: Tensor
    tokens: Tensor


def weight_inputs(found: Mapping[Target, Sequence[tuple[InputSum, range]]]) -> dict[Target, WeightInput]:
    """Put the sums that weights have part in together; the sums are used up.

    Args:
        found: of each weight the sums, and which outputs of each group had these inputs.
    """
    for one in {one: None for sums in found.values() for one, _ in sums}:
        for gram in one.grams:
            for matrix in gram:
                symmetric(matrix)
    known: dict[tuple[InputSum, ...], list[_Gram]] = {}
    by_rows = {target: _by_rows(target, sums) for target, sums in found.items()}
    for target, sums in by_rows.items():
        for those in sums:
            if those not in known:
                known[those] = _together(those, target)
    filled: set[int] = set()
    result = {}
    for target, sums in by_rows.items():
        grams = [(rows, one) for those, rows in sums.items() for one in known[those]]
        notes = []
        if any(one.blocks is not None for those in sums for one in those):
            notes.append(f"cut into {len(grams)} blocks of columns, what they have in common is left out")
        if is_of_experts(target) and target.layout.groups > 1:
            notes += _few(grams[0][1])
            for _, part in grams:
                if id(part.gram) not in filled:
                    filled.add(id(part.gram))
                    _fill(part)
        parts = tuple(InputPart(rows, part.columns, part.gram, part.tokens) for rows, part in grams)
        result[target] = WeightInput(parts, "; ".join(notes))
    return result


def _by_rows(target: Target, sums: Sequence[tuple[InputSum, range]]) -> dict[tuple[InputSum, ...], Tensor | None]:
    """Return which rows of a weight have which sums; None if all have the same."""
    shape = tuple(target.parameter.shape)
    count = 1 if len(shape) < 2 else channels_shape(shape, target.layout, "out")[1]
    if all(len(outputs) == count for _, outputs in sums):
        return {tuple(one for one, _ in sums): None}
    rows: dict[tuple[InputSum, ...], list[int]] = {}
    for row in range(count):
        those = tuple(one for one, outputs in sums if row in outputs)
        if those:
            rows.setdefault(those, []).append(row)
    device = sums[0][0].tokens.device
    return {those: torch.tensor(some, device=device) for those, some in rows.items()}


def _together(sums: tuple[InputSum, ...], target: Target) -> list[_Gram]:
    """Return the Grams of several sums of the same rows together, one for each block of columns."""
    first, *others = sums
    tokens = torch.stack([one.tokens for one in sums]).sum(0)
    if not others or all(_are_alike(first, one) for one in others):
        grams = [sum(others, first) for first, *others in zip(*(one.grams for one in sums), strict=True)]
        return [_Gram(columns, gram, tokens) for columns, gram in zip(_columns(first), grams, strict=True)]
    # Parts of the columns were used by themselves.
    layout, shape = target.layout, tuple(target.parameter.shape)
    size = target.parameter.numel() // torch.Size(channels_shape(shape, layout, "out")).numel()
    whole = first.grams[0].new_zeros(len(tokens), size, size)
    for one in sums:
        for places, gram in zip(_columns(one), one.grams, strict=True):
            there = torch.arange(size, device=gram.device) if places is None else places
            whole[:, there[:, None], there] += gram
    return [_Gram(None, whole, tokens)]


def _columns(one: InputSum) -> list[Tensor | None]:
    """Return which columns of the weight each block of a sum is."""
    if one.blocks is None:
        return [one.columns]
    return [block if one.columns is None else one.columns[block] for block in one.blocks]


def _are_alike(one: InputSum, other: InputSum) -> bool:
    pairs = list(zip(_columns(one), _columns(other), strict=False))
    return len(one.grams) == len(other.grams) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs
    )


def _few(one: _Gram) -> list[str]:
    """Say which experts got too few tokens."""
    tokens, least = one.tokens.tolist(), _FEW * one.gram.shape[-1]
    none = [str(i) for i, count in enumerate(tokens) if not count]
    few = [str(i) for i, count in enumerate(tokens) if 0 < count < least]
    notes = [f"no token came to the experts {listed(none)}"] if none else []
    return notes + ([f"few tokens came to the experts {listed(few)}, filled up with average ones"] if few else [])


def _fill(one: _Gram) -> None:
    """Fill the Grams of experts with few tokens up, in place, with what an average token adds."""
    missing = (_FEW * one.gram.shape[-1] - one.tokens).clamp(min=0)
    missing = torch.where(one.tokens > 0, missing, 0).to(one.gram.dtype)
    if bool(missing.any()):
        average = one.gram.sum(0) / one.tokens.sum()
        for share, gram in zip(missing.tolist(), one.gram, strict=True):
            if share:
                gram.add_(average, alpha=share)
