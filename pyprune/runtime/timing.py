"""How long ways of doing one thing take: in turns in one process, because absolute times drift and ratios do not."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

_Key = TypeVar("_Key")

# More samples of what takes microseconds tell nothing new.
_MOST = 10_000


def in_turns(
    ways: Mapping[_Key, Callable[..., object]],
    *,
    seconds: float,
    least: int = 5,
    prepare: Callable[[_Key], tuple[Any, ...]] = lambda way: (),
    wait: Callable[[], object] = tuple,
) -> dict[_Key, list[float]]:
    """Return the seconds of each call of each way, in rounds in which each has one, in turns first and last.

    Args:
        ways: what is timed. Each is called once before, which does not count.
        seconds: until when a new round begins.
        least: rounds that there are in any case.
        prepare: is called with a way before each call of it, and not timed; what it returns are the call's arguments.
        wait: returns when all that was begun is done (`waiting_for`).

    Example:
        >>> times = in_turns({"sum": lambda: sum(range(9)), "none": lambda: None}, seconds=0.001)
        >>> sorted(times), len(times["sum"]) == len(times["none"]) >= 5
        (['none', 'sum'], True)
    """
    for way, run in ways.items():
        run(*prepare(way))
    times: dict[_Key, list[float]] = {way: [] for way in ways}
    order, rounds = list(ways), 0
    end = time.perf_counter() + seconds
    while rounds < least or (rounds < _MOST and time.perf_counter() < end):
        for way in order:
            arguments, run = prepare(way), ways[way]
            wait()
            start = time.perf_counter()
            run(*arguments)
            wait()
            times[way].append(time.perf_counter() - start)
        order.reverse()
        rounds += 1
    return times


def gain(before: Sequence[float], after: Sequence[float]) -> float:
    """Return how many times faster it was after: the median over the rounds, in which both met the same machine.

    Example:
        >>> gain([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        2.0
    """
    return statistics.median(a / b for a, b in zip(before, after, strict=True))


def waiting_for(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Return what waits until devices have done what they were given; a CPU is done when a call returns.

    Example:
        >>> waiting_for([torch.device("cpu")])()
    """
    cards = sorted({device.index or 0 for device in devices if device.type == "cuda"})

    def wait() -> None:
        for card in cards:
            torch.cuda.synchronize(card)

    return wait
