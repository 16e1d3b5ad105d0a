"""Measure what pruning a model has gained, beside the dense one."""

import copy
import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pyprune.analysis.benchmark_costs import counts_of, files_of, memory_of
from pyprune.analysis.benchmark_result import BenchmarkResult, ModelBenchmark
from pyprune.analysis.peak_memory import NotMeasured, peak_memory
from pyprune.checks import check_bool, check_number
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_initialized
from pyprune.runtime.densify import densify
from pyprune.runtime.runs import copies_of, devices_of, run, still
from pyprune.runtime.sparse_layer import SparseLayer
from pyprune.runtime.timing import in_turns, waiting_for
from pyprune.structured.models import check_values, tensors_within
from pyprune.structured.passes import check_examples


def benchmark(
    model: nn.Module,
    examples: Any,
    *,
    dense: nn.Module | None = None,
    seconds: float = 3.0,
    memory: bool = True,
    files: bool = True,
) -> BenchmarkResult:
    """Measure latency, memory, files and work of a model, and of the dense one beside it in turns.

    Models run in evaluation, without gradients, with as many threads as torch has (``torch.set_num_threads``), and
    are as they were then. What cannot be measured is None, and ``notes`` say why.

    Args:
        model: the model, on a CPU or a GPU, compiled or not.
        examples: what a run gives it: a tensor, a tuple of positional or a dict of keyword arguments, or a list of
            these, which are one run together.
        dense: the model as it was before, for instance a copy that was made then.
        seconds: how long runs are timed, in all; each model gets at least five in any case.
        memory: whether to measure the peak of memory, in a process of its own for each model.
        files: whether to measure files, which are written to the folder for temporary ones.

    Returns:
        The result, whose ``str()`` is a table, ``plot`` a picture, and ``to_json`` a file.

    Raises:
        TypeError, ValueError: for other arguments, models without values, and examples that the models do not take.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> result = benchmark(model, torch.randn(4, 8), seconds=0.01, memory=False)
        >>> result.model.parameters, result.model.macs, len(result.model.seconds) >= 5
        (90, 320, True)
    """
    check_module(model)
    models = {"model": model}
    if dense is not None:
        check_module(dense, "dense")
        if dense is model:
            raise ValueError(
                "dense is the model itself, which was pruned in place; give a copy from before (copy.deepcopy(model))"
            )
        models["dense"] = dense
    inputs = check_examples(examples)
    seconds = check_number("seconds", seconds, what="how long to measure, at least 0", least=0, most=1e6)
    check_bool("memory", memory)
    check_bool("files", files)
    for one in models.values():
        check_initialized(one)
        check_values(one)
    devices = devices_of(models.values(), inputs)
    with still(*models.values()):
        given = copies_of(inputs)
        for one in models.values():  # whether they take the examples, before anything is measured
            run(one, *given())
        ways = {name: partial(run, one) for name, one in models.items()}
        times = in_turns(ways, seconds=seconds, prepare=lambda _: given(), wait=waiting_for(devices))
    measured = {name: _costs(one, inputs, tuple(times[name]), memory, files) for name, one in models.items()}
    items, unit = _items(inputs)
    setting = {
        "threads": torch.get_num_threads(),
        "device": ", ".join(sorted({str(device) for device in devices})),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    return BenchmarkResult(measured["model"], measured.get("dense"), items, unit, setting)


def _items(inputs: Sequence[Any]) -> tuple[int, str]:
    """Return how many images or tokens there are, by the shape of the first tensor of each input."""
    found: list[tuple[int, str]] = []
    for one in inputs:
        first = next(tensors_within(one))
        if first.is_floating_point() and first.ndim == 4:
            found.append((len(first), "images"))
        elif first.dtype in (torch.int32, torch.int64) and first.ndim == 2:
            found.append((first.numel(), "tokens"))
    units = {unit for _, unit in found}
    if len(found) < len(inputs) or len(units) > 1:
        return 0, ""
    return sum(count for count, _ in found), units.pop()


def _costs(
    model: nn.Module, inputs: Sequence[Any], times: tuple[float, ...], memory: bool, files: bool
) -> ModelBenchmark:
    notes: list[str] = []

    def tried(what: str, measure: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return measure()
        except (NotMeasured, TypeError, ValueError) as error:
            notes.append(f"{what} not measured: {error}")
            return otherwise

    # Packed weights are no parameters; what is counted are those that they stand for.
    is_packed = any(isinstance(module, SparseLayer) for module in model.modules())
    plain = densify(copy.deepcopy(model)) if is_packed else model
    peak = tried("peak memory", lambda: peak_memory(model, inputs), None) if memory else None
    file, zipped, packed = tried("files", lambda: files_of(model, plain), (None,) * 3) if files else (None,) * 3
    parameters, zeros, macs, left = tried("counts", lambda: counts_of(plain, inputs), (None,) * 4)
    nonzero = None if parameters is None else parameters - zeros
    return ModelBenchmark(
        times, peak, memory_of(model), file, zipped, packed, parameters, nonzero, macs, left, tuple(notes)
    )
