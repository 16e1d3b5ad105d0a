"""Sums of what weights multiply and of what comes out, seen where they are used in the passes of a calibration."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from pyprune.calibration.padding import Padding
from pyprune.calibration.sums import mean_of_outputs, norms_of_inputs
from pyprune.console import listed, warn
from pyprune.methods.importance import Importance
from pyprune.methods.layout import channels_shape
from pyprune.modules.targets import Target
from pyprune.modules.uses import Use, watching_uses


class UseSums:
    """Norms of what weights multiply, or figures of what comes out: one number for each channel.

    Args:
        rule: what the sums are for.
        targets: of which weights.
        padding: what of the batches does not count.
    """

    def __init__(self, rule: Importance, targets: list[Target], padding: Padding) -> None:
        self.rule = rule
        self.padding = padding
        self.targets = {target.parameter: target for target in targets}
        self.unseen: dict[Target, str] = {}  # why
        # By target and by outputs that had these inputs: (groups, inputs of one).
        self.squares: dict[Target, dict[range, Tensor]] = {}
        # One for each output channel, and how many values each is from.
        self.figures: dict[Target, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at what the weights of a model are multiplied with."""
        with watching_uses(model, self._take):
            yield

    def results(self, count: int) -> Mapping[Target, Tensor]:
        """Return the statistic of each weight but tables; from how many batches it is does not matter.

        Raises:
            ValueError: for a weight whose inputs or outputs cannot be seen, or that no batch reached.
        """
        for target, why in self.unseen.items():
            raise ValueError(
                f"what goes through {target.name} cannot be seen: {why}. Name it in ignored_scope, here and in prune"
            )
        of_inputs = self.rule.needs == "input norm"
        seen = self.squares if of_inputs else self.figures
        missed = [t.name for t in self.targets.values() if t not in seen and not t.layout.is_table]
        if missed:
            raise ValueError(f"no batch went through {listed(missed)}; name it in ignored_scope, here and in prune")
        self._warn_of_experts()
        self.padding.warn(self.targets.values())
        if of_inputs:
            return {target: norms_of_inputs(target, self._by_outputs(target)) for target in self.squares}
        return {target: mean_of_outputs(target, *figures) for target, figures in self.figures.items()}

    @torch.no_grad()
    def _take(self, use: Use) -> None:
        real = self.padding.rows(use)  # of other weights, too: it remembers rows
        target = self.targets.get(use.part.parameter)
        if target is None or use.layout.is_table:
            return
        problem = why_unseen(target, use) or self._problem(target, use)
        if problem:
            self.unseen.setdefault(target, problem)
        elif self.rule.needs == "input norm":
            self._take_inputs(target, use, real)
        else:
            self._take_outputs(target, use, real)

    def _problem(self, target: Target, use: Use) -> str:
        if self.rule.needs == "input norm":
            return ""
        if use.made is None:
            return "several of its dimensions are used as one"
        if any(isinstance(owner.module, (nn.RNNBase, nn.RNNCellBase)) for owner in target.owners):
            return "its layer adds the outputs of two weights"
        return "its outputs are those of experts" if is_of_experts(target) else ""

    def _take_inputs(self, target: Target, use: Use, real: Tensor | None) -> None:
        assert use.given is not None
        layout, ranges = target.layout, use.part.ranges
        assert layout.outputs is not None
        assert layout.inputs is not None
        given = use.given.detach()
        if real is not None:
            given = torch.where(real.view(*given.shape[:-1], 1), given, 0)
        wide = torch.float64 if given.dtype == torch.float64 else torch.float32
        squares = torch.linalg.vector_norm(given, dim=list(range(1, given.dim() - 1)), dtype=wide).double().square()
        groups, inputs = channels_shape(tuple(target.parameter.shape), layout, "in")
        stacked = groups > 1 and not is_of_experts(target)
        if groups == 1:
            squares = squares.sum(0, keepdim=True)
        elif not stacked:
            entries = torch.tensor(list(ranges[0]), device=given.device) if use.entries is None else use.entries
            by_group = squares.new_zeros(groups, squares.shape[1])
            squares = by_group.index_add_(0, entries, squares)
        if not stacked and len(ranges[layout.inputs]) < inputs:
            part = squares
            squares = squares.new_zeros(groups, inputs)
            squares[:, torch.tensor(list(ranges[layout.inputs]), device=given.device)] = part
        sums = self.squares.setdefault(target, {})
        outputs = ranges[layout.outputs]
        sums[outputs] = sums[outputs] + squares if outputs in sums else squares

    def _warn_of_experts(self) -> None:
        idle = {
            target.name: sum(~torch.stack(list(sums.values())).any(2).any(0))
            for target, sums in self.squares.items()
            if target.layout.groups > 1 and is_of_experts(target)
        }
        names = [f"{count} of {name}" for name, count in idle.items() if count]
        if names:
            warn(
                f"no input reached some experts ({listed(names)}), so their weights all score zero and go by their "
                "place; give more batches"
            )

    def _by_outputs(self, target: Target) -> Tensor:
        """Return the sums of a weight: (groups, outputs of one, or 1 if all have the same inputs, inputs of one)."""
        sums, layout = self.squares[target], target.layout
        assert layout.outputs is not None
        if len(sums) == 1:
            return next(iter(sums.values()))[:, None]
        groups, outputs = channels_shape(tuple(target.parameter.shape), layout, "out")
        first = next(iter(sums.values()))
        total = first.new_zeros(groups, outputs, first.shape[-1])
        for those, squares in sums.items():
            total[:, those.start : those.stop : those.step] += squares[:, None]
        return total

    def _take_outputs(self, target: Target, use: Use, real: Tensor | None) -> None:
        assert use.made is not None
        layout = target.layout
        assert layout.outputs is not None
        activation = cast(Callable[[Tensor], Tensor], self.rule.options[0])
        made = activation(use.made.detach())
        seen = (made == 0) if self.rule.needs == "zero outputs" else made
        others = list(range(1, made.dim() - 1))
        if layout.groups == 1:
            others.insert(0, 0)
        rows = made.shape[:-1].numel()
        if real is not None and len(real) != rows:  # a convolution that makes more positions of an input, or fewer
            self.padding.unknown[target.parameter] = None
            real = None
        if real is not None:
            seen = torch.where(real.view(*made.shape[:-1], 1), seen, 0)
        figures = seen.sum(others, dtype=torch.float64).flatten()
        counted = rows if real is None else int(real.sum())
        counts = torch.full_like(figures, counted * made.shape[-1] // max(1, figures.numel()))
        channels = torch.Size(channels_shape(tuple(target.parameter.shape), layout, "out")).numel()
        if len(figures) < channels:
            those = torch.tensor(list(use.part.ranges[layout.outputs]), device=made.device)
            figures, counts = (figures.new_zeros(channels).index_copy_(0, those, part) for part in (figures, counts))
        before = self.figures.get(target)
        self.figures[target] = (figures, counts) if before is None else (before[0] + figures, before[1] + counts)


def why_unseen(target: Target, use: Use) -> str:
    """Say why what a weight multiplies cannot be seen in a use of it; nothing if it can."""
    known, found = target.layout, use.layout
    if not found.is_clear or not known.is_clear:
        return found.problem or known.problem
    if (known.outputs, known.inputs, known.groups) != (found.outputs, found.inputs, found.groups):
        return "it is used with inputs in another dimension than its layer has them; give examples_inputs"
    if use.given is None:
        return "several of its dimensions are used as one"
    is_part = len(use.part.ranges[0]) < target.parameter.shape[0]
    if known.groups > 1 and not is_of_experts(target) and is_part:
        return "only some groups of it are used"
    return ""


def is_of_experts(target: Target) -> bool:
    """Whether the first dimension of a weight counts experts, and no outputs or inputs."""
    return 0 not in (target.layout.outputs, target.layout.inputs)
