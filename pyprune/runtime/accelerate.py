"""Let layers compute with packed weights where that is faster on this machine."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pyprune.checks import check_number, shown
from pyprune.console import listed
from pyprune.modules.attachments import parameters_of
from pyprune.modules.targets import attachments_of
from pyprune.modules.undo import Change
from pyprune.runtime.accelerated import Accelerated, AcceleratedLayer
from pyprune.runtime.find_layers import Layer, find_layers
from pyprune.runtime.measure import DENSE, Bench, Found, bytes_of
from pyprune.runtime.runs import copies_of, devices_of, run, still
from pyprune.runtime.sparse_layer import SparseLayer
from pyprune.runtime.sparse_layers import is_semi_structured, put, take
from pyprune.runtime.timing import gain, in_turns, waiting_for
from pyprune.structured.models import check_model, check_values
from pyprune.structured.passes import all_outputs, check_examples, difference

# The model as a whole must be faster by so much: less is no more than noise.
_LEAST = 1.02
_VERIFY = {None: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.int8: 1e-1}


@torch.inference_mode(False)
@torch.no_grad()
def accelerate(
    model: nn.Module,
    examples: Any,
    *,
    dtype: torch.dtype | None = None,
    min_gain: float = 1.1,
    seconds: float = 0.2,
    verify: float | None = None,
) -> Accelerated:
    """Replace layers, in place, by those that compute with packed weights, where these are faster.

    Each layer is timed with the rows that the examples have, dense and in each layout, in turns, with cold caches and
    torch's threads. What wins is replaced; then the whole model is timed, and if that is not faster, all is put back:
    a model never becomes slower. One without zeros stays as it is.

    Modules keep their names. The packed tensors are buffers (``weight_values``, ...), in ``state_dict`` in place of
    the weight; copies, pickles, ``torch.compile`` and ``torch.export`` take the model as any other. It is for
    inference: gradients are an error.

    Args:
        model: in evaluation, on a CPU; on a GPU weights that are 2:4 become torch's semi-structured tensors.
        examples: what the model takes, as it will be given: a tensor, a tuple of positional or a dict of keyword
            arguments, or a list of these.
        dtype: of the packed values, as bfloat16: half of the bytes, and weights rounded to it; int8 has a scale for
            each row. Products are computed in float32. None leaves them as they are.
        min_gain: how many times faster a layer must be.
        seconds: how long each layer is timed, and the model ten times as long; five rounds there are in any case.
        verify: how much outputs may differ, relative to their norm; None is 0.001, and where ``dtype`` or the outputs
            are of these, 0.01 for float16, 0.05 for bfloat16, 0.1 for int8. With ``math.inf`` they may as they like.

    Returns:
        An `Accelerated`: ``str()`` is a table of the layers: zeros, layout, gain, bytes, and why others stay dense.

    Raises:
        TypeError, ValueError: for other arguments, models with masks or gates on (``strip(model, do_copy=True)`` is
            one without), in training mode, wrapped, quantised or accelerated already, or if outputs differ by more
            than ``verify``. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> report = accelerate(model, torch.randn(16, 64), seconds=0)
        >>> report.replaced  # there are no zeros
        []
    """
    check_model(model, "accelerate")
    check_values(model)
    _check_state(model)
    dtype = _check_dtype(dtype)
    min_gain = check_number("min_gain", min_gain, what="how many times faster, at least 1", least=1)
    seconds = check_number("seconds", seconds, what="how long to measure, at least 0", least=0, most=1e5)
    if verify is not None and not (isinstance(verify, float) and verify == math.inf):
        verify = check_number("verify", verify, what="a relative difference, at least 0, or math.inf", least=0)
    given = copies_of(check_examples(examples))
    threads = torch.get_num_threads()
    with Change(model):
        layers = find_layers(model, given())
        size = sum(one.nbytes for one in parameters_of(model))
        bench = Bench(dtype, min_gain, seconds, size)
        with still(model):
            found = [bench.best(layer) for layer in layers]
        found = _attention_as_a_whole(layers, found)
        chosen = [(layer, one) for layer, one in zip(layers, found, strict=True) if one.layout != DENSE]
        if not chosen:
            return Accelerated(_rows(layers, found), threads=threads)
        expected = all_outputs(model, given(), may_be_nan=True)
        _replace(chosen)
        apart = difference(all_outputs(model, given(), may_be_nan=True), expected)
        if verify is None:
            dtypes = {tensor.dtype for outputs in expected for tensors in outputs.values() for tensor in tensors}
            verify = max(_VERIFY.get(one, 0.0) for one in (dtype, *dtypes))
        if not apart <= verify:
            raise ValueError(
                f"outputs differ by {apart:.1e} of their norm, more than verify={verify:g}; the model is as it was. "
                "A model that computes something else each time takes verify=math.inf"
            )
        times = _whole(model, given, chosen, 10 * seconds)
        faster = gain(times[DENSE], times["sparse"])
        milliseconds = (1e3 * statistics.median(times[DENSE]), 1e3 * statistics.median(times["sparse"]))
        reason = ""
        if faster < _LEAST:
            _put_back(chosen)
            reason = "the model as a whole was not faster"
            found = [one if one.layout == DENSE else Found(gain=one.gain, reason=reason) for one in found]
        return Accelerated(_rows(layers, found), faster if not reason else 1.0, milliseconds, apart, threads, reason)


def _check_dtype(dtype: object) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) and dtype in _VERIFY:
        return dtype
    if dtype is not None:
        allowed = ", ".join(map(str, _VERIFY))
        raise (ValueError if isinstance(dtype, torch.dtype) else TypeError)(
            f"dtype is {shown(dtype)}; allowed are {allowed}"
        )
    return None


def _check_state(model: nn.Module) -> None:
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"model is in training mode ({listed(training)}), and accelerated layers have no gradients; call "
            "model.eval()"
        )
    carrying = [target.name for target in attachments_of(model)]
    if carrying:
        raise ValueError(
            f"model has masks or gates on {listed(carrying)}; accelerate pyprune.strip(model), or a copy without "
            "them, pyprune.strip(model, do_copy=True)"
        )
    names = [name for name, module in model.named_modules() if isinstance(module, SparseLayer)]
    names += [name for name, parameter in model.named_parameters() if is_semi_structured(parameter)]
    if names:
        raise ValueError(f"model is accelerated already ({listed(names)}); accelerate pyprune.densify(model)")


def _attention_as_a_whole(layers: Sequence[Layer], found: Sequence[Found]) -> list[Found]:
    """Leave output projections of attention dense whose input projections are: torch's own does not call them."""
    dense = {
        layer.module.out_proj
        for layer, one in zip(layers, found, strict=True)
        if isinstance(layer.module, nn.MultiheadAttention) and one.layout == DENSE
    }
    why = "the projections before it stay dense"
    return [
        Found(gain=one.gain, reason=why) if layer.module in dense and one.layout != DENSE else one
        for layer, one in zip(layers, found, strict=True)
    ]


def _replace(chosen: Sequence[tuple[Layer, Found]]) -> None:
    for layer, found in chosen:
        if isinstance(found.packed, nn.Parameter):
            layer.module._parameters["weight"] = found.packed
        else:
            put(layer.module, found.packed)


def _put_back(chosen: Sequence[tuple[Layer, Found]]) -> None:
    for layer, _ in chosen:
        if isinstance(layer.module, SparseLayer):
            take(layer.module, layer.weight)
        else:
            layer.module._parameters["weight"] = layer.weight


def _whole(
    model: nn.Module,
    given: Callable[[], tuple[Any, ...]],
    chosen: Sequence[tuple[Layer, Found]],
    seconds: float,
) -> dict[str, list[float]]:
    """Time the model dense and replaced, in turns; it is replaced before and after."""
    now = "sparse"

    def prepare(way: str) -> tuple[Any, ...]:
        nonlocal now
        if way != now:
            (_replace if way == "sparse" else _put_back)(chosen)
            now = way
        return given()

    ways = dict.fromkeys((DENSE, "sparse"), partial(run, model))
    with still(model):
        times = in_turns(ways, seconds=seconds, prepare=prepare, wait=waiting_for(devices_of([model], given())))
        prepare("sparse")
    return times


def _rows(layers: Sequence[Layer], found: Sequence[Found]) -> tuple[AcceleratedLayer, ...]:
    rows = []
    for layer, one in zip(layers, found, strict=True):
        dense = layer.weight.nbytes
        size = dense if one.layout == DENSE else bytes_of(one.packed)
        rows.append(AcceleratedLayer(layer.name, layer.zeros, one.layout, one.gain, dense, size, one.reason))
    return tuple(rows)
