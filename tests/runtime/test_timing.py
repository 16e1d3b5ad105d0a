import pytest
import torch

from pyprune.runtime.timing import gain, in_turns, waiting_for


def test_in_turns_calls_ways_first_and_last_in_turns():
    calls = []
    ways = {name: (lambda *given, name=name: calls.append((name, *given))) for name in "abc"}
    prepared = iter(range(100))
    times = in_turns(
        ways, seconds=0, least=4, prepare=lambda way: (next(prepared), way), wait=lambda: calls.append("wait")
    )
    assert [len(one) for one in times.values()] == [4, 4, 4]
    assert all(second > 0 for one in times.values() for second in one)
    names = [call[0] for call in calls if call != "wait"]
    assert "".join(names) == "abc" + "abc" + "cba" + "abc" + "cba"
    # Each timed call has arguments of its own, and stands between two waits.
    assert [call[1] for call in calls if call != "wait"] == list(range(15))
    assert calls[3:6] == ["wait", ("a", 3, "a"), "wait"]


def test_in_turns_goes_on_until_the_time_is_over(monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    # After two rounds, each asks for the time (5, 8, ... 29) and reads it twice.
    assert len(in_turns({"a": lambda: None}, seconds=30, least=2)["a"]) == 11


@pytest.mark.parametrize(
    ("before", "after", "times"), [([2.0], [1.0], 2.0), ([1.0, 2.0, 60.0], [1.0, 4.0, 1.0], 1.0)]
)
def test_gain_is_the_median_over_the_rounds(before, after, times):
    assert gain(before, after) == times


def test_waiting_for_waits_for_each_gpu_once(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    waiting_for(map(torch.device, ("cpu", "cuda:1", "cuda", "cuda:0", "cuda:1")))()
    assert waited == [0, 1]
