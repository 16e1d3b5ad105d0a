"""SNIP: prune a model before it is trained."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from pyprune.calibration.batches import Dataset
from pyprune.calibration.calibrate import calibrate
from pyprune.methods.allocation import check_ratio
from pyprune.methods.importance import snip as snip_scores
from pyprune.methods.method import Method
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.selection.prune import prune

_M = TypeVar("_M", bound=nn.Module)


def snip(
    model: _M,
    dataset: Dataset | Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    ratio: float,
    num_batches: int | None = 1,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
) -> _M:
    """Mask the weights of an untrained model for which |w g| is smallest, in place; return the model.

    It is ``prune`` by ``Method(importance.snip())`` after `calibrate`, both of which do more. Then train the model.

    Args:
        model, ratio, ignored_scope, examples_inputs: as for `prune`.
        dataset, loss_fn: as for `calibrate`.
        num_batches: how many batches to use; one in the paper, all if None.

    Raises:
        TypeError, ValueError: as `calibrate` and `prune` do.

    Paper: Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity".

    Example:
        >>> import torch
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> model = snip(nn.Linear(4, 2), batches, loss_fn, ratio=0.75)
        >>> int(model.weight.count_nonzero())
        2
    """
    check_ratio(ratio)
    method = Method(snip_scores())
    calibration = calibrate(
        model,
        dataset,
        method,
        loss_fn=loss_fn,
        num_batches=num_batches,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
    )
    return prune(
        model,
        method,
        ratio=ratio,
        calibration=calibration,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
    )
