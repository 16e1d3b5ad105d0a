"""How much memory a model takes while it runs, in a process in which nothing else does.

This file is also what that process runs: ``python -m pyprune.analysis.peak_memory FILE``.
"""

import copy
import ctypes
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune.modules.attachments import parameters_of
from pyprune.modules.evaluation import evaluating, forward

_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RUNS = 2  # the first also makes what is kept for the next


class NotMeasured(Exception):
    """Why there is no number."""


def peak_memory(model: nn.Module, inputs: Sequence[Any]) -> int:
    """Return the bytes that a model and its passes take at most, beyond what torch takes by itself.

    Of a model on a GPU it is the memory of the GPU. The process gets the model as ``torch.save`` writes it, this
    process's threads, and the paths where it imports from.

    Raises:
        NotMeasured: if the model cannot go into another process, or fails there.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.pt")
        try:
            torch.save({"model": model, "inputs": list(inputs), "threads": torch.get_num_threads()}, file)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
            raise NotMeasured(f"{type(model).__name__} cannot be pickled ({error!s:.200})") from error
        local = sorted({type(one).__name__ for one in model.modules() if type(one).__module__ == "__main__"})
        if local:
            raise NotMeasured(f"{local[0]} is a class of the main program, which another process cannot import")
        paths = [os.path.abspath(path) for path in sys.path]
        done = subprocess.run(
            [sys.executable, "-m", "pyprune.analysis.peak_memory", file],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode:
        raise NotMeasured(f"the model failed in another process (exit code {done.returncode}): {last:.200}")
    found = done.stdout.strip().splitlines()[-1]
    if not found.isdigit():
        raise NotMeasured(found)
    return int(found)


def _measure(file: str) -> int:
    before = _resident("VmRSS:")
    content = torch.load(file, weights_only=False)
    model, inputs = content["model"], content["inputs"]
    torch.set_num_threads(content["threads"])
    devices = {parameter.device for parameter in parameters_of(model) if parameter.is_cuda}
    with evaluating(model):
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        gc.collect()
        _forget_peak()
        for _ in range(_RUNS):
            for one in inputs:
                forward(model, copy.deepcopy(one), "examples")
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return max(0, _resident("VmHWM:") - before)


def _forget_peak() -> None:
    """Let the peak begin anew: what loading took is none of the model's."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    _PEAK.write_text("5")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if _PEAK.exists():
        print(_measure(sys.argv[1]))
    else:
        print(f"{sys.platform} does not tell the peak of a process")
