"""The Grams of what the weights of a block multiply, summed over passes; weights that multiply the same share one.

What the same is, values say: a linear layer may get a view, or a copy of its own (a cast, or of what is not
contiguous). Inputs of a pass are kept until it is known who shares them; then their Gram is added to the sum of those
who did. If the passes do not agree on that, a weight has several sums, and its Gram is theirs together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyprune.calibration.padding import Padding
from pyprune.calibration.use_sums import is_of_experts, why_unseen
from pyprune.methods.layout import channels_shape
from pyprune.modules.products import Window
from pyprune.modules.targets import Target
from pyprune.modules.uses import Use, watching_uses
from pyprune.oneshot.grams import add_gram
from pyprune.oneshot.weight_input import InputSum, WeightInput, cut_columns, weight_inputs
from pyprune.oneshot.windows import real_windows, windows_of

# Bytes that the Grams of one input may take.
_MEMORY = 2**32
# Bytes of inputs that wait for others to share them, and of those that are widened at a time.
_WAITING = 2**30
_PIECE = 2**27

_Member = tuple[Target, range]  # a weight, and which of its outputs


@dataclass(eq=False)
class _Input:
    """What one product multiplied, a copy: rows, or of a convolution the whole; and which weights did."""

    given: Tensor
    entries: Tensor | None  # to which group each row belongs; None for one group, or stacked ones
    window: Window | None
    real: Tensor | None  # of a convolution: which windows count
    columns: range  # of the weight
    shape: tuple[int, int, int]  # groups, columns and channels of the weight
    members: set[_Member] = field(default_factory=set)

    def is_same(self, other: "_Input") -> bool:
        """Whether another has the same values, and means the same."""
        mine, others = (
            (one.window, one.columns, one.shape, one.given.shape, one.given.dtype, one.given.device)
            for one in (self, other)
        )
        pairs = ((self.entries, other.entries), (self.real, other.real))
        return mine == others and all(_equal(*pair) for pair in pairs) and _equal(self.given, other.given)


class InputGrams:
    """Sums X^T X of what weights multiply, and counts of tokens.

    Args:
        targets: the weights, those of one block, say.
        memory: bytes that the Grams of one input may take at most; 4 GiB if None. Larger ones are cut into blocks of
            columns.
        dtype: of the Grams; float32 if None, or float64 for weights of that.
        experts: of weights that have experts along their first dimension, look only at these.

    Raises:
        ValueError: while passes run, if not even Grams of few columns fit into ``memory``.

    Example:
        >>> from pyprune.modules.targets import find_targets
        >>> linear = nn.Linear(2, 3)
        >>> (target,) = find_targets(linear)
        >>> grams = InputGrams([target])
        >>> with grams.watching(linear), torch.no_grad():
        ...     _ = linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> grams.results()[target].gram.tolist()
        [[[10.0, 14.0], [14.0, 20.0]]]
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        memory: int | None = None,
        dtype: torch.dtype | None = None,
        experts: range | None = None,
    ) -> None:
        self.targets = {target.parameter: target for target in targets}
        self.memory = _MEMORY if memory is None else memory
        self.dtype = dtype
        self.experts = experts
        self._padding: Padding | None = None
        self._unseen: dict[Target, str] = {}
        self._waiting: list[_Input] = []
        self._sums: dict[tuple[frozenset[_Member], range], InputSum] = {}

    @contextmanager
    def watching(self, model: nn.Module, padding: Padding | None = None) -> Iterator[None]:
        """Look at what the weights are multiplied with while passes of a model run, one or many.

        Args:
            model: the model, or any part of it that has all of the weights.
            padding: what of the batches does not count; its `begin` wants each batch before its pass.
        """
        self._padding = padding
        with watching_uses(model, self._take):
            yield
            self._settle(self._waiting)

    def unseen(self) -> dict[Target, str]:
        """Return the weights that have no Gram, and why."""
        seen = {target for members, _ in self._sums for target, _ in members}
        seen |= {target for one in self._waiting for target, _ in one.members}
        reasons = {
            target: "its rows are only looked up" if target.layout.is_table else "no batch went through it"
            for target in self.targets.values()
            if target not in seen
        }
        return {**reasons, **self._unseen}

    @torch.no_grad()
    def results(self) -> dict[Target, WeightInput]:
        """Return the inputs of all weights but the `unseen`, and forget them.

        Of an expert that got t tokens, fewer than a tenth of its n inputs, the Gram H is filled up with average
        tokens of all experts, H + (n / 10 - t) * (sum of H) / (sum of t); that of one that got none is zero.
        """
        self._settle(self._waiting)
        if self._padding is not None:
            self._padding.warn(self.targets.values())
        unseen = self.unseen()
        sums, self._sums = self._sums, {}
        found = {
            target: [(one, outputs) for (members, _), one in sums.items() for t, outputs in members if t is target]
            for target in self.targets.values()
            if target not in unseen
        }
        del sums
        return weight_inputs(found)

    @torch.no_grad()
    def _take(self, use: Use) -> None:
        real = None if self._padding is None else self._padding.rows(use)  # of other weights, too: it remembers rows
        target = self.targets.get(use.part.parameter)
        if target is None or use.layout.is_table:
            return
        problem = why_unseen(target, use)
        if problem:
            self._unseen.setdefault(target, problem)
            return
        one = self._input(target, use, real)
        member = target, _outputs(target, use)
        same = next((other for other in reversed(self._waiting) if other.is_same(one)), None)
        if same is None or member in same.members:
            # A member has nothing else that waits: this is the next pass, or the weight is used again.
            self._settle([other for other in self._waiting if member in other.members])
            one.given = one.given.clone()  # it may be changed in place before it is summed
            self._waiting.append(one)
            same = one
        same.members.add(member)
        if sum(other.given.nbytes for other in self._waiting) > _WAITING:
            self._settle(self._waiting)

    def _input(self, target: Target, use: Use, real: Tensor | None) -> _Input:
        assert use.given is not None
        given, shape = use.given.detach(), tuple(target.parameter.shape)
        if len(shape) < 2:
            return _Input(_rows(given, real), None, None, None, range(shape[0]), (1, shape[0], shape[0]))
        layout, ranges = target.layout, use.part.ranges
        assert layout.inputs is not None
        groups, channels = channels_shape(shape, layout, "in")
        # Only where there are no groups along it may a part of the first dimension be used.
        columns = ranges[layout.inputs] if layout.inputs or groups == 1 else range(channels)
        if use.window is not None:
            if real is not None:
                assert self._padding is not None
                examples = given.shape[1:3]
                real = real_windows(given, use.window, real.view(-1, *examples)[0])
                if real is None:
                    self._padding.unknown[target.parameter] = None
            size = torch.Size(use.window.kernel).numel() * channels
            return _Input(given, None, use.window, real, columns, (groups, size, channels))
        entries = None
        if groups > 1:
            there = torch.tensor(list(ranges[0]), device=given.device) if use.entries is None else use.entries
            if not is_of_experts(target):
                there = torch.arange(len(given), device=given.device)
            entries = there.repeat_interleave(given.shape[1:-1].numel())
            if self.experts is not None and is_of_experts(target):
                inside = (entries >= self.experts.start) & (entries < self.experts.stop)
                real = inside if real is None else real & inside
            entries = _rows(entries[:, None], real)[:, 0]
        return _Input(_rows(given, real), entries, None, None, columns, (groups, channels, channels))

    def _settle(self, inputs: list[_Input]) -> None:
        """Add the Grams of inputs that waited to the sums of those who shared them."""
        for one in list(inputs):
            key = frozenset(one.members), one.columns
            if key not in self._sums:
                self._sums[key] = self._new_sum(one)
            self._waiting.remove(one)
            _add(self._sums[key], one, self.experts)

    def _new_sum(self, one: _Input) -> InputSum:
        groups, size, channels = one.shape
        if self.experts is not None and one.entries is not None:
            groups = len(self.experts)
        dtype = self.dtype or (torch.float64 if one.given.dtype == torch.float64 else torch.float32)
        device, used = one.given.device, len(one.columns)
        columns = None
        if used < channels:
            places = torch.arange(size, device=device).view(-1, channels)
            columns = places[:, one.columns.start : one.columns.stop : one.columns.step].flatten()
            size = size // channels * used
        blocks = cut_columns(size, groups, dtype.itemsize, self.memory, channels=used)
        grams = [torch.zeros(groups, len(block), len(block), dtype=dtype, device=device) for block in blocks]
        tokens = torch.zeros(groups, dtype=torch.int64, device=device)
        return InputSum(None if len(blocks) == 1 else [one.to(device) for one in blocks], columns, grams, tokens)


def _rows(given: Tensor, real: Tensor | None) -> Tensor:
    rows = given.flatten(0, -2)
    return rows if real is None else rows[real]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # Nearly all that differ do so at the beginning.
    return one.shape == other.shape and torch.equal(one[:1], other[:1]) and torch.equal(one, other)


def _outputs(target: Target, use: Use) -> range:
    """Return which outputs of each group of a weight a use has."""
    layout, shape = target.layout, tuple(target.parameter.shape)
    if len(shape) < 2:
        return range(1)
    assert layout.outputs is not None
    if layout.outputs == 0 and layout.groups > 1:
        return range(shape[0] // layout.groups)
    return use.part.ranges[layout.outputs]


def _add(total: InputSum, one: _Input, experts: range | None) -> None:
    """Add the Gram of an input to a sum."""
    if one.window is not None:
        for piece in windows_of(one.given, one.window, one.real):
            total.tokens += piece.shape[1]
            for gram, x in _blocks(total, piece):
                if len(gram) == 1:
                    add_gram(gram[0], x[0])
                else:
                    gram.baddbmm_(x.mT.to(gram.dtype), x.to(gram.dtype))
        return
    if one.entries is None:
        by_group = {0: one.given}
    else:
        order = one.entries.argsort(stable=True)
        counts = one.entries.bincount().tolist()
        by_group = dict(enumerate(torch.split(one.given[order], counts)))
    first = 0 if experts is None or one.entries is None else experts.start
    for group, rows in by_group.items():
        if len(rows):
            total.tokens[group - first] += len(rows)
            step = max(1, _PIECE // (8 * rows.shape[1]))
            for piece in torch.split(rows, step):
                for gram, x in _blocks(total, piece):
                    add_gram(gram[group - first], x)


def _blocks(total: InputSum, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if total.blocks is None:
        yield total.grams[0], inputs
    else:
        for block, gram in zip(total.blocks, total.grams, strict=True):
            yield gram, inputs[..., block]
