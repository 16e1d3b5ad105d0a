"""A command killed at one point after another; a program that `test_killed.py` runs.

It counts the calls into C (opening, writing, waiting for the disk, renaming) that a command makes on its way from the
first look at a checkpoint to its end. Then, for each point of those that are asked for, a copy of this process runs
the command in a folder of its own and is killed there. So torch is imported once.

Arguments: a folder with what the command reads, how many points, and the command, whose target is ``out`` in ``{}``.
It prints JSON: how many calls there are, and of each point how the copy ended and what is there.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from pyprune_command.main import main

# Whose calls count: those of the files that write.
WRITING = (
    *("/pyprune/sparse/", "/pyprune/files.py", "/shutil.py", "/tempfile.py", "/pathlib"),
    *("/pyprune/oneshot/shards.py", "/pyprune/oneshot/run_folder.py", "/pyprune/oneshot/prune_checkpoint.py"),
)


class Count:
    """Counts calls, and kills the process when there have been so many."""

    def __init__(self, last):
        self.seen, self.last = 0, last

    def __call__(self, frame, event, called):
        if event == "c_call" and any(part in frame.f_code.co_filename for part in WRITING):
            if self.seen == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1


def command(arguments, folder, last):
    """Run a command, and return its exit code and how many calls there were."""
    count = Count(last)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        sys.setprofile(count)
        try:
            code = main([one.replace("{}", str(folder)) for one in arguments])
        finally:
            sys.setprofile(None)
    return code, count.seen


def killed(arguments, folder, last):
    """Return how a copy of this process ended, by its exit code or signal (negative)."""
    process = os.fork()
    if process == 0:
        os._exit(command(arguments, folder, last)[0])
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(path):
    """Return what is in a file or folder: a number for the bytes of each file, by its name."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): hash(one.read_bytes()) for one in files}


def run(folder, points, arguments):
    """Return what became of a command at each point."""
    before = contents(folder)
    names = {one.name for one in folder.iterdir()}
    target = folder / Path(arguments[2]).name

    def remove(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    command(arguments, folder, -1)  # the first one has more to do: libraries are imported
    remove(target)
    code, calls = command(arguments, folder, -1)
    assert code == 0
    whole = contents(target)
    remove(target)
    assert contents(folder) == before
    found = []
    for point in range(points):
        last = point * calls // points
        ended = killed(arguments, folder, last)
        there = contents(target) if target.exists() else None
        left = sorted({one.name for one in folder.iterdir()} - names - {target.name})
        same = {name: one for name, one in contents(folder).items() if name in before} == before
        found.append(
            {
                "call": last,
                "ended": ended,
                "target": "absent" if there is None else "whole" if there == whole else "half",
                "left": left,
                "source": same,
            }
        )
        if target.exists():
            remove(target)
        # What is left of one stays for the next, and the last has all of it around.
        if point % 8 == 0:
            for name in left:
                remove(folder / name)
    code, _ = command(arguments, folder, -1)
    return {"calls": calls, "points": found, "again": code, "same": contents(target) == whole}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
