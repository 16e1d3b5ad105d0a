"""Gather what an importance asks for from real batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.calibration.padding import Padding
from pyprune.calibration.sums import GradientSums, warn_of_tables
from pyprune.calibration.use_sums import UseSums
from pyprune.checks import shown
from pyprune.methods.importance import Importance, Statistic
from pyprune.methods.method import Method
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_initialized, evaluating, forward, untouched
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.targets import Target, find_targets
from pyprune.modules.undo import Change, undoing


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` gathered: one float32 tensor for each weight, by its name.

    Args:
        statistic: what it is.
        options: what it depends on besides the data; see `pyprune.importance.Importance`.
        tensors: the statistics, on the devices of the weights.
        num_batches: how many batches they are from.
    """

    statistic: Statistic
    options: tuple[object, ...]
    tensors: Mapping[str, Tensor]
    num_batches: int


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    dataset: Dataset | Iterable[Any],
    importance: Importance | Method,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    num_batches: int | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
) -> Calibration:
    """Run batches through the model, and keep of each weight only the statistic that an importance is computed from.

    For gradients ``loss_fn`` runs the model; the gradient is that of the weight in use, so it is not zero where a
    mask drops a weight. Activations need no loss; they are seen where a weight is multiplied with them, whoever
    does that (attention, ``F.linear(x, layer.weight)``, experts). Embeddings that are only looked up have no inputs:
    they are left out, by `prune` too, and a warning names them. Positions that are padding by the batch's
    ``attention_mask``, or the ``src_key_padding_mask`` and the like of torch's transformers, do not count: padded or
    not, a text gives the same statistic. Where it cannot be told which rows of an input are padding, all count, and a
    warning names the weights. What counts for gradients is for the loss to say. What is measured is the model as it
    is, with the masks that it carries: calibrate before pruning if masks are to be chosen from raw weights. All
    modules run in evaluation mode. Training flags, ``requires_grad``, ``grad``, buffers and torch's random numbers
    are as before in the end.

    Args:
        model: the model, on the device of the data.
        dataset: a `Dataset`, or an iterable of batches. Without ``loss_fn`` they are inputs of the model, as in
            `batch_norm_adaptation`.
        importance: what the statistic is for, or a `Method` with it.
        loss_fn: takes the model and a batch, and returns the loss, a tensor with one element:
            ``lambda model, batch: cross_entropy(model(batch[0]), batch[1])``.
        num_batches: how many batches to use; all if None or if there are fewer.
        ignored_scope: weights to leave out.
        examples_inputs: as in `prune`; finds bare parameters, and directions.

    Returns:
        What `prune` takes as ``calibration``.

    Raises:
        TypeError, ValueError: for wrong arguments, an importance that needs no calibration, a layer whose activations
            cannot be seen, no batch, or a statistic that is not finite. The model is then as it was.

    Example:
        >>> from pyprune import Method, prune
        >>> from pyprune.methods import importance, scope
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> wanda = Method(importance.wanda(), scope=scope.n_of_m(keep=2, of=4))
        >>> calibration = calibrate(model, [torch.randn(16, 4)], wanda)
        >>> _ = prune(model, wanda, calibration=calibration)
        >>> int(model[0].weight.count_nonzero())
        16
    """
    check_module(model)
    check_initialized(model)
    rule = _check_importance(importance)
    batches = batches_of(dataset, num_batches, "Calibration", checked=loss_fn is None)
    targets = find_targets(model, ignored_scope, examples_inputs)
    if rule.needs in ("gradient", "squared gradient", "momentum"):
        if not callable(loss_fn):
            raise TypeError(
                f"importance {rule.name} needs gradients, and loss_fn is {shown(loss_fn)}; give a function of the "
                "model and a batch that returns the loss"
            )
        sums = GradientSums(rule, targets)
        gradients = BatchGradients(sums, targets)
        gathered: BatchGradients | UseSums = gradients
        results: Callable[[int], Mapping[Target, Tensor]] = sums.results
        run: Callable[[nn.Module, Any], None] = partial(gradients.run, loss_fn)
    elif loss_fn is not None:
        raise ValueError(f"importance {rule.name} needs activations, and no loss_fn; leave it out")
    else:
        padding = Padding(model)
        gathered = UseSums(rule, targets, padding)
        results = gathered.results

        def run_padded(model: nn.Module, batch: Any) -> None:
            padding.begin(batch)
            forward(model, batch, "a batch of dataset")

        run = run_padded
    count = 0
    with Change(model), untouched(model), evaluating(model), gathered.watching(model):
        for batch in batches:
            run(model, batch)
            count += 1
    tensors = {target.name: tensor for target, tensor in results(count).items()}
    if not tensors:
        raise ValueError(f"importance {rule.name} needs products, and in all weights rows are only looked up")
    tables = [target for target in targets if target.name not in tensors]
    if tables:
        warn_of_tables(rule, tables)
    _check_finite(tensors)
    return Calibration(rule.needs, rule.options, tensors, count)


def _check_importance(importance: Importance | Method) -> Importance:
    rule = importance.importance if isinstance(importance, Method) else importance
    if not isinstance(rule, Importance):
        raise TypeError(f"importance is a {type(rule).__name__}; give one of pyprune.importance, or a Method")
    if rule.needs in ("none", "given"):
        raise ValueError(f"importance {rule.name} needs no calibration; call prune without it")
    if rule.needs == "gram":
        raise ValueError(f"importance {rule.name} is for solvers; give it to pyprune.prune_one_shot")
    if rule.needs == "norm scale":
        raise ValueError(f"importance {rule.name} needs no data; give examples_inputs to prune instead")
    return rule


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"the statistics of {', '.join(bad)} are NaN or infinite: the loss or an activation is. Check the batches"
        )


class TakesGradients(Protocol):
    """What is told the gradient of each weight, batch by batch."""

    def add(self, target: Target, gradient: Tensor) -> None:
        """Take in the gradient of the weight that a batch used."""

    def add_nothing(self, target: Target) -> None:
        """Take in that a batch did not use the weight."""


class BatchGradients:
    """Gradients of a loss, gathered without touching ``grad``.

    Args:
        sums: what they go to.
        targets: of which weights.
    """

    def __init__(self, sums: TakesGradients, targets: list[Target]) -> None:
        self.sums = sums
        self.targets = targets
        self.in_use: dict[Target, list[Tensor]] = {}
        self.is_recurrent = any(isinstance(owner.module, nn.RNNBase) for t in targets for owner in t.owners)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Let all targets have gradients, and see what masks make of the weights."""
        frozen = [target.parameter for target in self.targets if not target.parameter.requires_grad]
        hooks: list[RemovableHandle] = []

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            for parameter in frozen:
                parameter.requires_grad_(False)

        with undoing(undo):
            for parameter in frozen:
                parameter.requires_grad_(True)
            for target in self.targets:
                gate = target.attachment
                if isinstance(gate, nn.Module):
                    hooks.append(gate.register_forward_hook(partial(self._see, target)))
            yield

    def _see(self, target: Target, attachment: nn.Module, args: Any, output: Tensor) -> None:
        self.in_use.setdefault(target, []).append(output)

    def run(self, loss_fn: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any) -> None:
        """Take in the gradients of a batch."""
        self.in_use.clear()
        # cuDNN has no backward pass for recurrent layers in evaluation mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=not self.is_recurrent):
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"loss_fn returned {loss!r:.80}; it must be a loss with one element and a gradient")
            # Masked weights have no gradient where the mask is False, what the layers use has.
            tensors = [(t, used) for t in self.targets for used in self.in_use.get(t, [t.parameter])]
            gradients = torch.autograd.grad(loss.sum(), [used for _, used in tensors], allow_unused=True)
        self.in_use.clear()
        total: dict[Target, Tensor] = {}
        for (target, _), gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                total[target] = total[target] + gradient if target in total else gradient
        for target in self.targets:
            if target in total:
                self.sums.add(target, total[target])
            else:  # a batch that does not use a weight makes no exception for decay
                self.sums.add_nothing(target)
