"""Block reconstruction: the weights that a block keeps are trained so that its output stays what it was."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyprune.checks import check_count, check_number
from pyprune.modules.undo import undoing

# Returns which positions of an output of a block, (batch, positions), are no padding; None if all count.
Padding = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Fit:
    """What came of the reconstruction of a block.

    Args:
        before, after: error of the block's output, ||y - dense||^2 / ||dense||^2 over all batches.
        diverged: whether the training came to NaN or infinity, so that the block is as it was.
    """

    before: float
    after: float
    diverged: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed; made by `reconstruct`."""

    steps: int
    lr: float
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"reconstruct(steps={self.steps})"

    def fit(
        self,
        run: Callable[[int], Any],
        dense: Callable[[int], Any],
        count: int,
        parameters: Iterable[nn.Parameter],
        masks: Mapping[nn.Parameter, Tensor],
        *,
        padding: Padding | None = None,
    ) -> Fit:
        """Train a block by its outputs; it ends as it was if these get no better, or if it fails or is interrupted.

        Only the parameters that are given change; their ``grad`` and ``requires_grad`` are as before, and torch's
        random numbers too. Half-precision ones are trained by float32 copies. Of an output that is not one tensor
        the first floating-point tensor in it counts.

        Args:
            run: gives the output of the block for a batch, by its number. It is called with gradients on for steps
                and off for errors.
            dense: gives the output that the block should have; on any device.
            count: how many batches there are.
            parameters: weights, biases and norms of the block that are trained, frozen ones too.
            masks: bool tensors, of those of them that are pruned; where they are False zeros stay.
            padding: which positions of an output count; called right after ``run``.
        """
        trained = [one for one in dict.fromkeys(parameters) if one.is_floating_point()]
        block = _Block(run, dense, trained, masks, padding)
        devices = {one.device for one in trained if one.is_cuda}
        with block.open(), torch.random.fork_rng(devices=list(devices)):
            before = block.error(count)
            if not before or not trained or not math.isfinite(before):  # nothing is pruned, or nothing can be said
                return Fit(before, before, not math.isfinite(before))
            optimizer = torch.optim.Adam(block.masters, lr=self.lr)
            numbers = _order(count, self.seed)
            for _ in range(self.steps):
                if not block.step(numbers, self.batch, optimizer):
                    return Fit(before, before, True)
            after = block.error(count)
            if after < before:
                block.keep()
                return Fit(before, after)
            return Fit(before, before, not math.isfinite(after))


def reconstruct(steps: int = 60, lr: float = 3e-4, *, batch: int = 8, seed: int = 0) -> Reconstruction:
    """Train what a block keeps by Adam on ||y - dense||^2 / ||dense||^2, the error of its output, masks held.

    It is what `prune_one_shot` takes as ``reconstruct``: after the layers of a block are solved, its weights, biases
    and norms make up together for what the layers could not. It repairs any mask, at the cost of ``steps`` passes
    forward and backward of the block. What does not get better stays as it was.

    Args:
        steps: how many steps, for each block.
        lr: the learning rate.
        batch: how many samples (along the first dimension of a block's output) a step sees at least. Batches of the
            data are taken whole.
        seed: of the order of the batches.

    Raises:
        TypeError, ValueError: for a number that is out of range.

    Example:
        >>> reconstruct(steps=20).name
        'reconstruct(steps=20)'
    """
    return Reconstruction(
        check_count("steps", steps, least=1),
        check_number("lr", lr, what="a positive number", least=0, open_ends=True),
        check_count("batch", batch, least=1),
        check_count("seed", seed),
    )


class _Block:
    """The parameters of a block while they are trained, in float32 or wider, and the batches they are trained by."""

    def __init__(
        self,
        run: Callable[[int], Any],
        dense: Callable[[int], Any],
        trained: Sequence[nn.Parameter],
        masks: Mapping[nn.Parameter, Tensor],
        padding: Padding | None,
    ) -> None:
        self.run, self.dense, self.padding = run, dense, padding
        self.trained, self.masks = trained, [masks.get(one) for one in trained]
        self.before = [one.detach().clone() for one in trained]
        self.masters = [one.to(torch.promote_types(one.dtype, torch.float32), copy=True) for one in self.before]
        # Of each batch the square of the norm of the dense output, and the samples.
        self.scales: dict[int, float] = {}
        self.samples: dict[int, int] = {}
        self.is_better = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let the parameters have gradients; in the end they are as they were, unless the block got better."""
        flags = [one.requires_grad for one in self.trained]

        @torch.no_grad()
        def undo() -> None:
            for one, flag, before in zip(self.trained, flags, self.before, strict=True):
                one.requires_grad_(flag)
                if not self.is_better:
                    one.copy_(before)

        with undoing(undo):
            for one in self.trained:
                one.requires_grad_(True)
            yield

    def keep(self) -> None:
        """Say that the block got better."""
        self.is_better = True

    def error(self, count: int) -> float:
        """Return the error over all batches."""
        missing = 0.0
        with torch.no_grad():
            for number in range(count):
                made, wanted = self._outputs(number)
                self.scales[number] = float(wanted.square().sum(dtype=torch.float64))
                self.samples[number] = len(wanted)
                missing += float((made - wanted).square().sum(dtype=torch.float64))
        return missing / (math.fsum(self.scales.values()) or 1.0)

    def step(self, numbers: Iterator[int], samples: int, optimizer: torch.optim.Optimizer) -> bool:
        """Take one step by the next batches that have as many samples; return whether all was finite."""
        chosen = [next(numbers)]
        while sum(self.samples[number] for number in chosen) < samples and len(chosen) < len(self.samples):
            chosen.append(next(numbers))
        scale = math.fsum(self.scales[number] for number in chosen) or 1.0
        total = [torch.zeros_like(master) for master in self.masters]
        for number in chosen:
            with torch.enable_grad():
                made, wanted = self._outputs(number)
                error = (made - wanted).square().sum() / scale
                if not bool(error.isfinite()):
                    return False
                found = torch.autograd.grad(error, self.trained, allow_unused=True)
            for one, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    one += gradient
        with torch.no_grad():
            for master, gradient, mask in zip(self.masters, total, self.masks, strict=True):
                # Zeros without gradients stay zero under Adam.
                master.grad = gradient if mask is None else torch.where(mask, gradient, 0)
            optimizer.step()
            for one, master in zip(self.trained, self.masters, strict=True):
                one.copy_(master)
        return True

    def _outputs(self, number: int) -> tuple[Tensor, Tensor]:
        """Return what the block gives for a batch and what it should give, without padding."""
        made = _first_tensor(self.run(number))
        keep = None if self.padding is None else self.padding(made)
        wanted = _first_tensor(self.dense(number)).detach().to(made.device)
        if keep is not None:
            keep = keep.to(made.device)
            made, wanted = made[keep], wanted[keep]
        wide = torch.promote_types(made.dtype, torch.float32)
        return made.to(wide), wanted.to(wide)


def _first_tensor(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _order(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers of batches without end, all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
