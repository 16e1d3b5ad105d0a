"""Adapt BatchNorm statistics to the weights that are left."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyprune.attachments import check_module
from pyprune.calibration import check_initialized, evaluating, forward


class Dataset:
    """Batches for calibration: any iterable, and a function that turns an item into the input of the model.

    Args:
        data_source: a DataLoader, another iterable of batches, or a map-style dataset of them (``__getitem__`` and
            ``__len__``).
        transform_func: takes an item and returns the model's input (drops the labels, moves it to the device):
            a dict becomes keyword arguments, a tuple positional ones, anything else the one argument.

    Example:
        >>> dataset = Dataset([("image", "label")], lambda item: item[0])
        >>> list(dataset.get_inference_data())
        ['image']
    """

    def __init__(self, data_source: Iterable[Any], transform_func: Callable[[Any], Any] | None = None) -> None:
        if not isinstance(data_source, Iterable) and not (
            hasattr(data_source, "__getitem__") and hasattr(data_source, "__len__")
        ):
            raise TypeError(
                f"data_source is a {type(data_source).__name__}; give a DataLoader or another iterable, or a "
                "dataset with __getitem__ and __len__"
            )
        if transform_func is not None and not callable(transform_func):
            raise TypeError(f"transform_func is a {type(transform_func).__name__}; give a function or None")
        self._data_source = data_source
        self._transform_func = transform_func

    def get_data(self, indices: Iterable[int] | None = None) -> Iterator[Any]:
        """Yield the items as the source gives them, all or those at ``indices``, in the source's order."""
        source = self._data_source
        # Python would ask a map-style dataset for one item after the other until it raises IndexError.
        items = source if isinstance(source, Iterable) else (source[index] for index in range(len(source)))
        if indices is None:
            yield from items
            return
        chosen = set(indices)
        for index, item in enumerate(islice(items, max(chosen, default=-1) + 1)):
            if index in chosen:
                yield item

    def get_inference_data(self, indices: Iterable[int] | None = None) -> Iterator[Any]:
        """Yield the transformed items, ready to be given to the model."""
        for item in self.get_data(indices):
            yield item if self._transform_func is None else self._transform_func(item)

    def get_length(self) -> int | None:
        """Return the number of items, or None if the source does not know."""
        try:
            return len(self._data_source)  # type: ignore[arg-type]
        except TypeError:
            return None

    def get_batch_size(self) -> int | None:
        """Return the ``batch_size`` of the source, or None if it has none."""
        return getattr(self._data_source, "batch_size", None)


def batch_norm_adaptation(
    model: nn.Module,
    calibration_dataset: Dataset | Iterable[Any],
    *,
    num_iterations: int | None = None,
    reset: bool = False,
) -> nn.Module:
    """Re-estimate the running statistics of BatchNorm and SyncBatchNorm from data, in place.

    Only ``running_mean``, ``running_var`` and ``num_batches_tracked`` change. All other modules run in
    evaluation mode, without gradients, and every training flag is given back. By default a statistic s moves by
    its layer's momentum m, s = (1 - m) * s + m * batch, so after k batches (1 - m)^k of the old one is left (a
    layer with momentum None goes on averaging over all batches it has seen). With ``reset=True`` the old one
    is forgotten, and the mean over these batches takes its place.

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
            statistics, no batch, or a batch that is a longer list. After any error, also one of the loader or the
            model, the statistics are as they were.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> _ = batch_norm_adaptation(norm, [torch.tensor([[1.0], [3.0]])], reset=True)
        >>> norm.running_mean.item()
        2.0
    """
    check_module(model)
    check_initialized(model)
    if num_iterations is not None and (isinstance(num_iterations, bool) or not isinstance(num_iterations, int)):
        raise TypeError(f"num_iterations is {num_iterations!r}; give a number of batches, or None for all")
    if num_iterations is not None and num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; give at least 1, or None for all batches")
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm with running statistics, so there is nothing to adapt; "
            "leave batch_norm_adaptation out"
        )
    if any(buffer.is_inference() for norm in norms for buffer in norm.buffers()):
        raise ValueError("the statistics were made under torch.inference_mode; build or load the model outside it")
    dataset = calibration_dataset if isinstance(calibration_dataset, Dataset) else Dataset(calibration_dataset)
    saved = [(norm, norm.momentum, [(buffer, buffer.clone()) for buffer in norm.buffers()]) for norm in norms]
    try:
        with evaluating(model, training=norms):
            if reset:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a cumulative average
            _forward_all(model, dataset, num_iterations)
    except BaseException:
        for _, _, buffers in saved:
            for buffer, value in buffers:
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum, _ in saved:
            norm.momentum = momentum
    return model


def _forward_all(model: nn.Module, dataset: Dataset, num_iterations: int | None) -> None:
    # Imported here: `import pyprune` must cost little.
    from rich.console import Console
    from rich.progress import Progress

    batches = islice(dataset.get_inference_data(), num_iterations)
    known = [count for count in (dataset.get_length(), num_iterations) if count is not None]
    console = Console(stderr=True)
    empty = True
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for batch in progress.track(batches, min(known, default=None), description="BatchNorm adaptation"):
            plain_list = isinstance(batch, list) and dataset._transform_func is None
            if plain_list and len(batch) == 1:
                batch = batch[0]
            elif plain_list:
                raise ValueError(
                    f"a calibration batch is a list of {len(batch)}, which does not say what the model takes. "
                    "Wrap the loader: pyprune.Dataset(loader, transform_func=lambda batch: batch[0]) drops the "
                    "labels; return a tuple for several positional arguments, a dict for keyword arguments"
                )
            forward(model, batch)
            empty = False
    if empty:
        raise ValueError("the calibration dataset gave no batch; a generator, for one, can be read only once")
