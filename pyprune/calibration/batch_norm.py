"""Adapt BatchNorm statistics to the weights that are left."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyprune.calibration.batches import Dataset, batches_of
from pyprune.checks import check_bool
from pyprune.console import listed, warn
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_initialized, evaluating, forward
from pyprune.modules.undo import Change, undoing

_M = TypeVar("_M", bound=nn.Module)


def batch_norm_adaptation(
    model: _M,
    calibration_dataset: Dataset | Iterable[Any],
    *,
    num_iterations: int | None = None,
    reset: bool = False,
) -> _M:
    """Re-estimate the running statistics of BatchNorm and SyncBatchNorm from data, in place.

    Only ``running_mean``, ``running_var`` and ``num_batches_tracked`` change. All other modules run in
    evaluation mode, without gradients, and every training flag is given back. By default a statistic s moves by
    its layer's momentum m, s = (1 - m) * s + m * batch, so after k batches (1 - m)^k of the old one is left (a
    layer with momentum None goes on averaging over all batches it has seen). With ``reset=True`` the old one
    is forgotten, and the mean over these batches takes its place. A layer that no batch reaches (another expert, an
    early exit) keeps its statistics, and a warning names it.

    Args:
        model: the model, on the device of the data.
        calibration_dataset: a `Dataset`, or a plain iterable of inputs. A dict becomes keyword arguments, a
            tuple positional ones. A list of one, which torch's default collate makes of samples without labels, is
            that one input. A longer list is refused: it makes [input, label] of labelled samples, and nothing tells
            what of it the model takes; ``Dataset(loader, lambda batch: batch[0])`` does. What a ``transform_func``
            returns is taken as it is.
        num_iterations: how many batches to use; all if None or if there are fewer.
        reset: start from nothing and average over the batches, instead of moving the present statistics.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: for arguments out of range, a lazy model or one without BatchNorm that tracks
            statistics, no batch, a batch that is a longer list, or one that makes statistics that are not finite.
            After any error, also one of the loader or the model, the statistics are as they were.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> _ = batch_norm_adaptation(norm, [torch.tensor([[1.0], [3.0]])], reset=True)
        >>> norm.running_mean.item()
        2.0
    """
    check_module(model)
    check_bool("reset", reset)
    check_initialized(model)
    batches = batches_of(
        calibration_dataset, num_iterations, "BatchNorm adaptation", names=("calibration_dataset", "num_iterations")
    )
    names = {
        norm: name or type(norm).__name__
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None
    }
    norms = list(names)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm with running statistics, so there is nothing to adapt; "
            "leave batch_norm_adaptation out"
        )
    if any(buffer.is_inference() for norm in norms for buffer in norm.buffers()):
        raise ValueError("the statistics were made under torch.inference_mode; build or load the model outside it")
    if reset and (uncounted := [name for norm, name in names.items() if norm.num_batches_tracked is None]):
        raise ValueError(
            f"reset averages over the batches, and {listed(uncounted)} does not count them (num_batches_tracked is "
            "None); leave reset out, or give it a counter"
        )
    momenta = [(norm, norm.momentum) for norm in norms]

    def undo() -> None:
        for norm, momentum in momenta:
            norm.momentum = momentum

    saved = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms}
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    with Change(model, values=statistics), undoing(undo), evaluating(model, training=norms):
        if reset:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
        start = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms}
        for index, batch in enumerate(batches):
            forward(model, batch, "a batch of calibration_dataset")
            _check_finite({norm: name for norm, name in names.items() if _has_changed(norm, start)}, index)
        # They count batches, so whatever saw one has changed.
        missed = [norm for norm in norms if not _has_changed(norm, start)]
        for norm in missed:
            for buffer, value in zip(norm.buffers(), saved[norm], strict=True):
                buffer.copy_(value)
        if missed:
            warn(
                f"no batch reached {listed([names[norm] for norm in missed])}: these keep the statistics that they "
                "had. Give data that goes through them, or leave them as they are"
            )
    return model


def _has_changed(norm: _BatchNorm, start: Mapping[_BatchNorm, Sequence[Tensor]]) -> bool:
    there = zip(norm.buffers(), start[norm], strict=True)
    return any(not torch.equal(now, then) and not (now.isnan() & then.isnan()).all() for now, then in there)


def _check_finite(names: Mapping[_BatchNorm, str], batch: int) -> None:
    """Raise ValueError if the statistics of a layer are NaN or infinite."""
    bad = [
        name
        for norm, name in names.items()
        if not all(
            bool(buffer.isfinite().all()) for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        )
    ]
    if bad:
        raise ValueError(
            f"after batch {batch} the BatchNorm statistics of {listed(bad)} are NaN or infinite: what goes in is not "
            "finite. Leave such batches out, or repair the weights; statistics that were so before go by reset=True"
        )
