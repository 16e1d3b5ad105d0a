"""Prune a trained model by solvers that look at a loss: gradients of samples in, masks and new weights out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.calibration.calibrate import BatchGradients
from pyprune.checks import check_count, shown
from pyprune.console import listed, tracked, warn
from pyprune.methods import importance
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method, check_amount
from pyprune.methods.scope import Scope
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_callable, check_initialized, evaluating, untouched
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask, attach_masks, changing_masks, masks_in
from pyprune.modules.targets import Target, find_targets
from pyprune.modules.undo import Change
from pyprune.oneshot.block_fisher import BlockFisher
from pyprune.oneshot.m_fac import MFac
from pyprune.oneshot.system import unrounded
from pyprune.selection.choose_masks import choose_masks
from pyprune.selection.coupled import check_no_coupled
from pyprune.selection.find_prunable import check_kind

_M = TypeVar("_M", bound=nn.Module)


@torch.inference_mode(False)
def prune_with_gradients(
    model: _M,
    dataset: Dataset | Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    solver: BlockFisher | MFac,
    *,
    ratio: float | None = None,
    scope: Scope | None = None,
    num_batches: int | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    memory: int = 2**32,
) -> _M:
    """Mask the weights that a loss needs least, and solve for the others, in place; return the model.

    Each batch gives one sample of the gradient, so batches of one sample are the empirical Fisher matrix, and larger
    ones are cheaper: a few dozen to a few hundred. Biases and norms stay as they are. Masks that are there stay, and
    count; what was dropped keeps its raw value, and `strip` ends it all, as after `prune`. All modules run in
    evaluation mode.

    Args:
        model: a trained model, on the device of the data.
        dataset: a `Dataset`, or an iterable of batches. They are kept while it runs.
        loss_fn: as for `calibrate`.
        solver: `pyprune.solvers.block_fisher` or `pyprune.solvers.m_fac`.
        ratio: fraction of the weights to remove, in [0, 1); None for N:M in all groups.
        scope: what competes: all weights of the model if None, as in oBERT, or any other of `pyprune.scope`.
        num_batches: how many batches to use; all if None or if there are fewer.
        ignored_scope, examples_inputs: as for `prune`.
        memory: bytes that gradients may take: 4 (8 in float64) times samples times elements. If those of all weights
            are more, the batches go through the model again for each part of the weights, first for scores and then
            for the update. Besides, the new weights take as much as the model.

    Raises:
        TypeError, ValueError: for wrong arguments, weights that cannot be pruned, a loss or gradients that are not
            finite, and if the gradients of one weight alone are more than ``memory``. The model is then as it was.

    Example:
        >>> import pyprune
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> batches = [(torch.randn(1, 8), torch.randint(4, (1,))) for _ in range(32)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> _ = pyprune.prune_with_gradients(model, batches, loss_fn, pyprune.solvers.block_fisher(), ratio=0.5)
        >>> int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        96
    """
    check_module(model)
    check_callable("loss_fn", loss_fn)
    if not isinstance(solver, (BlockFisher, MFac)):
        raise TypeError(f"solver is {shown(solver)}; give pyprune.solvers.block_fisher() or m_fac()")
    scope = Scope("model") if scope is None else scope
    if not isinstance(scope, Scope):
        raise TypeError(f"scope is {shown(scope)}; give one of pyprune.scope")
    method = Method(importance.magnitude(), scope=scope)
    amount = check_amount(method, Amount(ratio, dropped_stay=True))
    memory = check_count("memory", memory, what="bytes, an integer, 0 or more")
    check_initialized(model)
    batches = list(batches_of(dataset, num_batches, "Reading batches", checked=False))
    targets = find_targets(model, ignored_scope, examples_inputs)
    check_kind(targets, Mask)
    check_no_coupled(model, method, stay=True)
    parts = _parts(targets, len(batches), memory)

    def gradients(part: list[Target]) -> dict[Target, Tensor]:
        rows = _Rows(part, len(batches))
        gathered = BatchGradients(rows, part)
        with untouched(model), evaluating(model), gathered.watching(model):
            for batch in tracked(batches, len(batches), "Gradients", shown=len(batches) > 1):
                gathered.run(loss_fn, model, batch)
        return rows.gradients

    with Change(model, values=[target.parameter for target in targets]), torch.no_grad():
        bases = {target: _mask_of(target) for target in targets}
        scores: dict[Target, Tensor] = {}
        without: list[str] = []
        for part in parts:
            found = gradients(part)
            for target in part:
                scores[target] = _named(target, solver.scores, found[target], bases[target])
                if not bool(found[target].any()):
                    without.append(target.name)
        by_scores = Method(importance.given({target.name: score for target, score in scores.items()}), scope=scope)
        choice = choose_masks(by_scores, amount, targets, scores)
        choice.check()
        choice.tell(model, ())
        solved: dict[Target, Tensor] = {}
        for part in parts:
            found = found if len(parts) == 1 else gradients(part)
            for target in part:
                solved[target] = _named(target, solver.update, found[target], choice.masks[target].mask)
        with changing_masks(masks_in(model)):
            for target, weight in solved.items():
                mask, raw = choice.masks[target].mask, target.parameter
                if not bool(mask.all()):
                    raw.copy_(torch.where(mask, weight.to(raw.dtype), raw))
            attach_masks(model, list(choice.masks.values()))
    if without:
        warn(f"the loss has no gradient at {listed(without)}: they are pruned by magnitude, before all others")
    return model


def _mask_of(target: Target) -> Tensor | None:
    carried = target.attachment
    return carried.mask if isinstance(carried, Mask) else None


def _named(
    target: Target, solve: Callable[[Tensor, Tensor, Any], tuple[Tensor, float]], gradients: Tensor, mask: Any
) -> Tensor:
    """Return what a solver finds; what it raises says of which weight."""
    try:
        with unrounded(target.parameter.device):
            return solve(target.parameter.detach(), gradients, mask)[0]
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from error


def _parts(targets: Sequence[Target], samples: int, memory: int) -> list[list[Target]]:
    """Cut a list of weights into parts whose gradients fit into memory."""
    parts: list[list[Target]] = []
    left = -1
    for target in targets:
        size = samples * target.parameter.numel() * max(4, target.parameter.itemsize)
        if size > memory:
            raise ValueError(
                f"the gradients of {target.name} by {samples} batches are {size} bytes, and memory is {memory}; give "
                "fewer batches (num_batches), more memory, or name it in ignored_scope"
            )
        if size > left:
            parts.append([])
            left = memory
        parts[-1].append(target)
        left -= size
    return parts


class _Rows:
    """The gradients of some weights, a row for each batch: what `BatchGradients` tells."""

    def __init__(self, targets: Sequence[Target], samples: int) -> None:
        self.gradients = {
            target: torch.zeros(
                samples,
                target.parameter.numel(),
                dtype=torch.promote_types(target.parameter.dtype, torch.float32),
                device=target.parameter.device,
            )
            for target in targets
        }
        self._rows: dict[Target, Iterator[Tensor]] = {
            target: iter(rows.unbind()) for target, rows in self.gradients.items()
        }

    def add(self, target: Target, gradient: Tensor) -> None:
        """Take in the gradient of the weight that a batch used."""
        next(self._rows[target]).copy_(gradient.detach().flatten())

    def add_nothing(self, target: Target) -> None:
        """Take in that a batch did not use the weight."""
        next(self._rows[target])
