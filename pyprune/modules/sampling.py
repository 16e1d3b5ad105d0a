"""Which seed a gate samples with: one per forward pass of a model, also when activations are computed again.

- A pass has one seed for each of its gates, drawn by ``torch.randint`` when it begins (one call per device), so that
  ``torch.manual_seed`` governs it. Each rank of `torch.distributed` makes other noise of it. Outside of passes
  every read of a weight draws.
- While a pass is open, each gate finds its seed in a `Seat` of its own. So compiled code need not know the number of
  a gate, which torch.compile would guard, and one piece of it serves all layers that are alike.
- Recomputation calls modules again during the backward pass, possibly after other forward passes. Autograd numbers
  its nodes in the order in which they are made, so the node that asks for the recomputation tells which pass it was
  made in: the one whose first and last number enclose it. Its seeds are used again. If the pass began inside the
  checkpointed part, it drew there and draws again: the generator is in the same state (not with
  ``preserve_rng_state=False``; and a reentrant checkpoint around the whole model makes no nodes in its forward
  pass, so then it samples anew).
- Every thread counts its nodes by itself. Where passes of several threads enclose the number, that of the thread of
  the backward pass is meant; a GPU's backward thread has none, and then an error asks for a copy of the model per
  thread.
- What is recomputed is kept apart, by thread, and held by a callback of the engine, so that it goes when that run
  ends or fails.
- Copies share nothing: a sampler knows no gates, gates know the sampler, and a copied sampler is a new one.
"""

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

# So many forward passes may wait for their backward pass, if activations are checkpointed.
_REMEMBERED = 1024


@dataclass(eq=False)
class _Pass:
    """The seeds of one pass, by device and gate, and the numbers of the autograd nodes that were made in it."""

    opener: int
    seeds: dict[torch.device, dict[int, Tensor]]
    thread: object = None
    start: int = 0
    end: float = math.inf
    run: int = -1  # of the autograd engine, if the pass is a recomputation


class _PerThread(threading.local):
    # The backward pass, and with it recomputation, runs in one thread per GPU.
    def __init__(self) -> None:
        self.open: _Pass | None = None
        # Each lives as long as the run of the autograd engine that it is part of.
        self.recomputations: weakref.WeakSet[_Pass] = weakref.WeakSet()
        # Threads number their nodes by themselves. Not the number of the thread, which a later one may get.
        self.itself = object()


class Seat(threading.local):
    """Where one gate finds its seed while a pass is open; each thread has passes of its own."""

    def __init__(self) -> None:
        self.seed: Tensor | None = None

    def __reduce__(self) -> tuple[type["Seat"], tuple[()]]:
        return Seat, ()


class Sampled(Protocol):
    """What asks for seeds, a gate: the number by which its sampler tells it from others, and its seat."""

    stream: int
    seat: Seat


class Sampler:
    """Hands out the seeds of gates that belong to one model: one seed per gate, device and pass.

    The seeds come from torch's generator of the device, so that ``torch.manual_seed`` reproduces a run.

    Example:
        >>> sampler, cpu = Sampler(), torch.device("cpu")
        >>> sampler.begin({})
        >>> bool(sampler.seed(cpu) == sampler.seed(cpu))
        True
        >>> sampler.end()
        >>> bool(sampler.seed(cpu) == sampler.seed(cpu))
        False
    """

    def __init__(self) -> None:
        self._thread = _PerThread()
        self._passes: deque[_Pass] = deque(maxlen=_REMEMBERED)

    def __reduce__(self) -> tuple[type["Sampler"], tuple[()]]:
        # A copy of a model has passes of its own.
        return Sampler, ()

    @property
    def is_open(self) -> bool:
        """Whether this thread is in a pass."""
        return self._thread.open is not None

    def begin(self, gates: Mapping[torch.device, Sequence[Sampled]], opener: object = None) -> None:
        """Open a pass, draw seeds, and lay each on the seat of its gate. Who ends the pass clears the seats.

        Args:
            gates: the gates that will ask for seeds, by device; none if all are in evaluation.
            opener: the module whose call is the pass.
        """
        if torch.compiler.is_compiling():
            # What is checkpointed in here is compiled too: modules are not called again in the backward pass.
            self._thread.open = _Pass(0, {})
            for device, several in gates.items():
                # By their order here: a guard on a number of a gate would forbid its code to gates of other layers.
                drawn = _draw(len(several), device)
                for index, gate in enumerate(several):
                    gate.seat.seed = drawn[index]
            return
        original = self._recomputed_pass() if gates else None
        # Checkpointing restores the generator to its state where the checkpointed part began. If the pass began
        # in that part, it drew there, and draws again, so that what is random after it is the same too.
        seeds: dict[torch.device, dict[int, Tensor]] = {}
        if original is None or original.opener == id(opener):
            for device, several in gates.items():
                drawn = _draw(len(several), device)
                # Not by zip: torch.fx can index what it traces, but not go through it.
                seeds[device] = {gate.stream: drawn[index] for index, gate in enumerate(several)}
        started = _Pass(
            id(opener), seeds if original is None else original.seeds, self._thread.itself, start=_next_node()
        )
        for device, several in gates.items():
            for gate in several:
                gate.seat.seed = _seed_in(started, device, gate.stream)
        self._thread.open = started
        if torch._C._current_autograd_node() is None:
            self._passes.append(started)
        else:
            # Its nodes are numbered by this thread, not that of the forward pass, and used before this run ends.
            started.run = torch._C._current_graph_task_id()
            self._thread.recomputations.add(started)
            # The engine drops its callbacks when the run ends or fails, and with them the pass.
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_keep, started))

    def end(self) -> None:
        """Close the pass."""
        if not torch.compiler.is_compiling():
            cast(_Pass, self._thread.open).end = _next_node()
        self._thread.open = None

    def seed(self, device: torch.device, stream: int = 0) -> Tensor:
        """Return the seed that a gate has in this pass; outside of passes, a new one."""
        current = self._thread.open
        if current is None and not torch.compiler.is_compiling():
            current = self._recomputed_pass()
        if current is None:
            return _draw(1, device)[0]
        return _seed_in(current, device, stream)

    def _recomputed_pass(self) -> _Pass | None:
        """Return the pass whose activations the backward pass is about to compute again."""
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        number, run = node._sequence_nr(), torch._C._current_graph_task_id()
        for one in self._thread.recomputations:
            # A recomputation in this same run made no node that this run visits.
            if one.start <= number < one.end and one.run != run:
                return one
        passes = tuple(self._passes)
        # Without seeds, nothing was drawn that must be the same again.
        found = [one for one in passes if one.start <= number < one.end and one.seeds]
        # The backward pass runs in the thread that asks for it, mostly that of the forward pass; on a GPU, in one
        # without forward passes.
        own = [one for one in found if one.thread is self._thread.itself]
        if len(own or found) > 1:
            raise RuntimeError(
                "checkpointed activations are to be computed again, and forward passes of several threads may have "
                "made them, with different samples of the gates; give each thread a copy of the model"
            )
        if found:
            return (own or found)[0]
        if len(passes) == self._passes.maxlen and number < passes[0].start:
            raise RuntimeError(
                "checkpointed activations are to be computed again with the gates of a forward pass that was "
                f"followed by {len(passes)} others, and is forgotten; call backward() sooner"
            )
        return None


def _keep(recomputation: _Pass) -> None:
    """Hold a pass that a sampler refers to weakly, as a callback."""


def _seed_in(one: _Pass, device: torch.device, stream: int) -> Tensor:
    seeds = one.seeds.setdefault(device, {})
    if stream not in seeds:
        seeds[stream] = _draw(1, device)[0]
    return seeds[stream]


def _draw(count: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device).unbind()


def _next_node() -> int:
    return torch._C._autograd._get_sequence_nr()
