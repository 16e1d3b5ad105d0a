"""Passes of a dense model and of what pruning made of it, side by side: what layers get, and what they make."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyprune.modules.evaluation import evaluating, forward, untouched
from pyprune.modules.undo import Before, undoing
from pyprune.structured.paired_layers import Reader, geometry
from pyprune.structured.passes import first_argument
from pyprune.structured.unfolding import call, channel_dim, matrix_of

Hook = Callable[[Any, Any, Any], None]


class _Enough(BaseException):
    """Ends a forward pass of which nothing more is to be seen; no Exception, because models may catch those."""


@contextmanager
def evaluating_both(dense: nn.Module, model: nn.Module) -> Iterator[None]:
    """Have both models in evaluation; flags, buffers and random numbers are given back."""
    with untouched(dense), evaluating(dense), untouched(model), evaluating(model):
        yield


def run(model: nn.Module, batch: Any, hooks: Sequence[tuple[nn.Module, Hook]], calls: int | None = None) -> None:
    """Run a model on a batch; hooks are called after modules, with (args, kwargs, output).

    Args:
        model, batch: as for `forward`.
        hooks: modules with what is to be called.
        calls: after so many calls of hooks the rest of the pass is left out.
    """
    made = 0

    def after(hook: Hook, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal made
        hook(args, kwargs, output)
        made += 1
        if made == calls:
            raise _Enough

    was = Before(*(module for module, _ in hooks), with_attributes=False)
    with undoing(was.restore):
        for module, hook in hooks:
            module.register_forward_hook(partial(after, hook), with_kwargs=True)
        with suppress(_Enough):
            forward(model, batch, "a batch")


@dataclass(eq=False)
class Job:
    """What is solved together: layers that get the same input, or layers that share a weight.

    Args:
        legs: layers that get the same input are one leg. There are several legs only if all layers share a weight.
        calls: how often the layers of each leg are called, batch by batch.
    """

    legs: list[list[Reader]]
    calls: list[list[int]]

    @property
    def bytes(self) -> int:
        """How much memory it takes to solve it by sums: the sums, what is taken from them, and a factorisation."""
        groups, inputs, _ = self.legs[0][0].matrix().shape
        return 8 * (3 * len(self.legs) + 3) * groups * inputs**2

    def see(
        self,
        dense: nn.Module,
        model: nn.Module,
        index: int,
        batch: Any,
        take: Callable[[int, Tensor, list[Tensor]], None],
    ) -> None:
        """Run both models on a batch; for each call of the layers give leg, input, and what each layer is to make."""
        expected = [calls[index] for calls in self.calls]
        if not sum(expected):
            return
        made: dict[Reader, list[Tensor]] = {reader: [] for leg in self.legs for reader in leg}

        def keep(reader: Reader, args: Any, kwargs: Any, output: Tensor) -> None:
            made[reader].append(reader.wanted(output).clone())  # what comes after may write into it

        def give(leg: int, args: Any, kwargs: Any, output: Tensor) -> None:
            take(leg, first_argument(args, kwargs), [made[reader].pop(0) for reader in self.legs[leg]])

        hooks = [(reader.dense, partial(keep, reader)) for reader in made]
        run(dense, batch, hooks, sum(count * len(leg) for count, leg in zip(expected, self.legs, strict=True)))
        run(model, batch, [(leg[0].layer, partial(give, i)) for i, leg in enumerate(self.legs)], sum(expected))


@dataclass
class _Seen:
    """What was seen of a layer in the passes of one model: of each call what tells inputs apart, by batch.

    Of each channel of the inputs it has the smallest and the largest value.
    """

    inputs: list[list[tuple[Any, ...]]] = field(default_factory=list)
    low: Tensor | None = None
    high: Tensor | None = None
    places: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    order: int = -1
    problem: str = ""


@dataclass(frozen=True)
class Look:
    """The jobs, in the order of the forward pass; why layers are in none; and which need not be."""

    jobs: list[Job]
    problems: dict[str, str]
    others: tuple[str, ...]


def look_at_both(
    dense: nn.Module, model: nn.Module, batches: Sequence[Any], weights: Sequence[Sequence[Reader]], *, only_cut: bool
) -> Look:
    """Run both models on all batches, and find out in which order their layers come, and which get the same input.

    Args:
        dense, model: the models.
        batches: inputs.
        weights: the layers, those that share a weight together.
        only_cut: whether layers that lost no inputs are left out, or only those that are as in the dense model.

    Raises:
        ValueError: for inputs or outputs of a layer that are not finite.
    """
    readers = list(chain.from_iterable(weights))
    seen_dense, seen = {one: _Seen() for one in readers}, {one: _Seen() for one in readers}
    order = iter(range(2**62))
    for index, batch in enumerate(batches):
        for which, run_model, notes in (("dense", dense, seen_dense), ("pruned", model, seen)):
            for note in notes.values():
                note.inputs.append([])
            hooks = [
                (one.dense if run_model is dense else one.layer, partial(_note, one, notes[one], which, index, order))
                for one in readers
            ]
            run(run_model, batch, hooks)
    jobs: dict[Any, Job] = {}
    problems: dict[str, str] = {}
    others: list[str] = []
    is_done = _is_cut if only_cut else _is_changed
    for group in sorted(weights, key=lambda group: min(seen[one].order for one in group)):
        why = next(filter(None, (_problem(one, seen_dense[one], seen[one]) for one in group)), "")
        if why:
            problems |= {f"{one.name}.weight": why for one in group}
        elif not any(is_done(one, seen_dense[one], seen[one]) for one in group):
            others += [one.name for one in group]
        else:
            calls = [[len(inputs) for inputs in seen[one].inputs] for one in group]
            first = group[0]
            key = (
                (geometry(first.layer), tuple(seen[first].places), str(seen[first].inputs))
                if len(group) == 1
                else first
            )
            if key in jobs:
                jobs[key].legs[0].append(first)  # what it gets is what the others get
            else:
                jobs[key] = Job([[one] for one in group], calls)
    return Look(list(jobs.values()), problems, tuple(others))


def _note(
    reader: Reader, seen: _Seen, which: str, batch: int, order: Iterator[int], args: Any, kwargs: Any, output: Any
) -> None:
    x = first_argument(args, kwargs)
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.is_floating_point():
        seen.problem = "what goes in or comes out is no tensor of real numbers"
        return
    marks = [_mark(x), _mark(output)]
    if not all(map(_is_finite, marks)):
        what = "gets" if not _is_finite(marks[0]) else "makes"
        raise ValueError(
            f"in the {which} model {reader.name} {what} NaN or infinite values on batch {batch}; leave such batches "
            "out, or repair the weights before it"
        )
    if seen.order < 0:
        seen.order = next(order)
        if which == "pruned" and not _is_plain(reader, x, output):
            seen.problem = f"its class, {type(reader.layer).__name__}, computes something else than its layer"
    seen.inputs[-1].append(marks[0])
    channels = x.detach().movedim(channel_dim(reader.layer), -1).flatten(0, -2)
    if len(channels):
        low, high = channels.amin(0), channels.amax(0)
        seen.low = low if seen.low is None else torch.minimum(low, seen.low)
        seen.high = high if seen.high is None else torch.maximum(high, seen.high)
    seen.places.append((x.data_ptr(), *x.stride()))
    shape = list(output.shape)
    del shape[channel_dim(reader.layer)]
    seen.outputs.append(tuple(shape))


def _mark(x: Tensor) -> tuple[Any, ...]:
    """Return the shape and a sum that other values, or the same ones in another order, would not have."""
    values = x.detach().reshape(-1).double()
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64, device=x.device)
    return (*x.shape, float(values @ weights))


def _is_finite(mark: tuple[Any, ...]) -> bool:
    return math.isfinite(mark[-1])


def _is_plain(reader: Reader, x: Tensor, output: Tensor) -> bool:
    """Whether a layer does what layers of torch's class do, with its weight as it is."""
    try:
        plain = call(reader.layer, x, reader.weight, reader.bias, output)
    except (RuntimeError, ValueError, TypeError):
        return False
    if plain.shape != output.shape:
        return False
    near = 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((plain - output).double().norm() <= near * plain.double().norm())


def _problem(reader: Reader, dense: _Seen, pruned: _Seen) -> str:
    if pruned.problem or dense.problem:
        return pruned.problem or dense.problem
    if pruned.order < 0 and dense.order < 0:
        return "no batch goes through it as a layer"
    if [len(one) for one in dense.inputs] != [len(one) for one in pruned.inputs] or dense.outputs != pruned.outputs:
        return "other samples go through it than in the dense model"
    return ""


def _is_changed(reader: Reader, dense: _Seen, pruned: _Seen) -> bool:
    """Whether a layer gets something else than in the dense model, or makes something else of it."""
    return dense.inputs != pruned.inputs or not all(torch.equal(*pair) for pair in reader.before_and_now())


def _is_cut(reader: Reader, dense: _Seen, pruned: _Seen) -> bool:
    """Whether outputs of a layer have lost inputs: by its own weight, or because these are constant now."""
    there, left = matrix_of(reader.dense, cast(Tensor, reader.dense.weight)), reader.matrix()
    if there.shape[1] != left.shape[1]:  # groups that went as a whole took their outputs with them
        return True
    if reader.mask is not None and not bool((reader.mask | ~reader.mask.any(1, keepdim=True)).all()):
        return True
    return _constants(pruned) > _constants(dense)


def _constants(seen: _Seen) -> int:
    assert seen.low is not None
    assert seen.high is not None
    return int((seen.low == seen.high).sum())
