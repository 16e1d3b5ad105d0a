"""Batches for calibration, and what goes through them."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from pyprune.checks import check_count
from pyprune.console import tracked


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
        _check_source("data_source", data_source)
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


def batches_of(
    data: Dataset | Iterable[Any],
    count: int | None,
    description: str,
    *,
    checked: bool = True,
    names: tuple[str, str] = ("dataset", "num_batches"),
) -> Iterator[Any]:
    """Yield at most ``count`` batches, under a progress bar if there are several and stderr is a terminal.

    Args:
        data: a `Dataset`, or what can be made into one.
        count: how many at most; all if None.
        description: what the progress bar says.
        checked: whether a batch goes to a model as it is. Then a list of one is that one, which torch's default
            collate makes of samples without labels, and a longer list of a plain iterable is refused: it makes
            [input, label] of labelled samples, and nothing tells what of it the model takes.
        names: what the data and the count are called in messages.

    Raises:
        TypeError, ValueError: for wrong arguments or such a batch, and if there is no batch.
    """
    if count is not None:
        what = "the number of batches, an integer, at least 1, or None for all"
        count = check_count(names[1], count, least=1, most=sys.maxsize, what=what)
    dataset = data if isinstance(data, Dataset) else _dataset(names[0], data)
    return _tracked(dataset, count, description, checked and dataset._transform_func is None)


def _dataset(name: str, data: Iterable[Any]) -> Dataset:
    _check_source(name, data)
    return Dataset(data)


def _check_source(name: str, source: object) -> None:
    is_iterable = isinstance(source, Iterable) or (hasattr(source, "__getitem__") and hasattr(source, "__len__"))
    if isinstance(source, (str, bytes, Mapping, type)) or not is_iterable:
        raise TypeError(
            f"{name} is a {type(source).__name__}; give a DataLoader or another iterable of batches, or a dataset "
            "with __getitem__ and __len__ (one batch by itself goes into a list)"
        )
    if isinstance(source, Tensor) and source.dim() == 0:
        raise TypeError(f"{name} is a tensor without dimensions; give a list of batches")


def _tracked(dataset: Dataset, count: int | None, description: str, checked: bool) -> Iterator[Any]:
    known = [number for number in (dataset.get_length(), count) if number is not None]
    most = min(known, default=None)
    empty = True
    for batch in tracked(islice(dataset.get_inference_data(), count), most, description, shown=most != 1):
        if checked and isinstance(batch, list):
            if len(batch) > 1:
                raise ValueError(
                    f"a calibration batch is a list of {len(batch)}, which does not say what the model takes. "
                    "Wrap the loader: pyprune.Dataset(loader, transform_func=lambda batch: batch[0]) drops the "
                    "labels; return a tuple for several positional arguments, a dict for keyword arguments"
                )
            batch = batch[0] if batch else batch
        empty = False
        yield batch
    if empty:
        raise ValueError("the calibration dataset gave no batch; a generator, for one, can be read only once")
