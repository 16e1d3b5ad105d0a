"""Gradients of a loss with respect to masks of ones on coupled units: what their Fisher information is made of.

A mask multiplies a unit where weights read it, so its gradient is the sum of weight times gradient over all that the
unit has in these weights. So no mask has to be put into anyone's model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from pyprune.calibration.padding import Padding
from pyprune.checks import shown
from pyprune.modules.evaluation import forward, layers_apart
from pyprune.modules.undo import undoing
from pyprune.selection.coupled import UnitsOfGroup

Losses = Callable[[nn.Module, Any], Iterable[Tensor]]
Likelihood = Literal["categorical", "normal"]


def unit_gradients(
    model: nn.Module, groups: Sequence[UnitsOfGroup], batches: Iterable[Any], losses: Losses
) -> list[Tensor]:
    """Return the gradients of losses with respect to the masks of units: of each group (losses, units), float64.

    Args:
        model: in evaluation; its parameters and their ``grad`` are as they were then.
        groups: whose units; all are read by a weight.
        batches: what ``losses`` takes.
        losses: of a batch; gradients are of one after the other.

    Raises:
        ValueError: for a loss that has no gradient, and gradients that are not finite.
    """
    parts = [[part for part in one.weights if part.reads] for one in groups]
    weights = list(dict.fromkeys(part.target.parameter for several in parts for part in several))
    found: list[list[Tensor]] = [[] for _ in groups]

    def see(index: int, batch: Any) -> None:  # a function, so that no graph outlives its batch
        for loss in losses(model, batch):
            gradients = _gradients(loss, weights, index)
            for several, rows in zip(parts, found, strict=True):
                along = [part.per_unit(_along(part.target.parameter, gradients, part.dim)) for part in several]
                rows.append(torch.stack([entries.sum(1) for entries in along]).sum(0))

    frozen = [weight for weight in weights if not weight.requires_grad]

    def freeze() -> None:
        for weight in frozen:
            weight.requires_grad_(False)

    with undoing(freeze), layers_apart(model), torch.enable_grad():
        for weight in frozen:
            weight.requires_grad_(True)
        for index, batch in enumerate(batches):
            see(index, batch)
    return [torch.stack(rows) for rows in found]


def _gradients(loss: Tensor, weights: Sequence[nn.Parameter], batch: int) -> Mapping[nn.Parameter, Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"loss_fn returned {loss!r:.80}; it must be a loss with one element and a gradient")
    if not bool(loss.isfinite().all()):
        raise ValueError(f"the loss of batch {batch} of data is {loss.item()}; leave such batches out")
    found = torch.autograd.grad(loss.sum(), list(weights), allow_unused=True, retain_graph=True)
    return {weight: one for weight, one in zip(weights, found, strict=True) if one is not None}


@torch.no_grad()
def _along(weight: nn.Parameter, gradients: Mapping[nn.Parameter, Tensor], dim: int) -> Tensor:
    """Return sums of weight times gradient, one for each entry along a dimension."""
    if weight not in gradients:  # a batch need not use all of a model
        return torch.zeros(weight.shape[dim], dtype=torch.float64)
    wide = torch.promote_types(weight.dtype, torch.float32)
    products = weight.to(wide) * gradients[weight].to(wide)
    return products.movedim(dim, 0).flatten(1).sum(1).double().cpu()


# ---- losses without labels ----


def drawn_losses(likelihood: Likelihood | None, draws: int) -> Losses:
    """Return losses whose squared gradients are the Fisher information of what a model puts out, without labels.

    The distance of a model to itself has no gradient. What has is the likelihood of outputs that are drawn from the
    model's own distribution: the squares of such gradients are, in the mean, its Fisher information. Of logits these
    are labels ("categorical"). Of other values they are the values and standard normal noise ("normal"), and then the
    gradient is that of the sum of noise times values.

    Args:
        likelihood: which; None for "categorical" where the output has ``logits`` of two classes or more.
        draws: how many losses of each batch.
    """

    def losses(model: nn.Module, batch: Any) -> Iterable[Tensor]:
        output = forward(model, batch, "a batch of data")
        values = values_of(output)
        padding = Padding(model)
        padding.begin(batch)
        kept = kept_positions(padding, values)
        by_classes = likelihood == "categorical" or (
            likelihood is None and _logits(output) is values and values.shape[-1] > 1
        )
        if by_classes and not (values.dim() > 1 and values.shape[-1] > 1):
            raise ValueError(
                f"likelihood is 'categorical', and the output has shape {tuple(values.shape)}; it takes logits of "
                "two classes or more along the last dimension"
            )
        if kept is not None:
            values = values[kept]
        for _ in range(draws):
            if by_classes:
                logits = values.flatten(0, -2).float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                yield F.cross_entropy(logits, labels, reduction="sum")
            else:
                yield (values * torch.randn_like(values)).sum()

    return losses


def _logits(output: Any) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def values_of(output: Any, *, with_gradient: bool = True) -> Tensor:
    """Return the logits of an output, or the first tensor of it that is of real numbers, and has a gradient."""
    leaves = [_logits(output), *tree_leaves(output)]
    real = (one for one in leaves if isinstance(one, Tensor) and one.is_floating_point())
    values = next((one for one in real if one.requires_grad or not with_gradient), None)
    if values is None:
        raise ValueError(
            f"the model puts out {shown(output)}, in which no tensor has a gradient; give a loss_fn of the model and "
            "a batch"
        )
    if not bool(values.isfinite().all()):
        raise ValueError("the model puts out NaN or infinite values; repair its weights, or leave such batches out")
    return values


def kept_positions(padding: Padding, values: Tensor) -> Tensor | None:
    """Return which positions of (batch, positions, ...) are no padding; None if all are, or that cannot be said."""
    found = [real for real in padding.real if values.dim() == 3 and real.shape == values.shape[:2]]
    return found[0] if found and all(torch.equal(found[0], real) for real in found) else None
