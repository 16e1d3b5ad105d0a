"""Each model in a process of its own, with limits: what hangs, dies or eats the memory is a line of the table."""

import importlib
import json
import multiprocessing
import resource
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

FAMILIES = {
    "by_hand": "zoo.by_hand",
    "torchvision": "zoo.torchvision_models",
    "timm": "zoo.timm_models",
    "transformers": "zoo.transformers_models",
    "torch_geometric": "zoo.graph_models",
    "unknown": "zoo.unknown_models",
}


def server() -> ForkServerContext:
    """Return what forks a process in which all libraries are loaded, and nothing was done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.judge", *FAMILIES.values()])
    return context


def judge_in_child(
    context: ForkServerContext, name: str, folder: Path, *, limit_s: float, limit_gib: float
) -> dict[str, Any]:
    """Judge one model, named family/name, in a child, and rebuild it in another."""
    seen = _run(context, _judge, name, folder, limit_s=limit_s, limit_gib=limit_gib)
    if (folder / "plan.json").exists():
        again = _run(context, _rebuild, name, folder, limit_s=limit_s, limit_gib=limit_gib)
        seen["rebuilt_elsewhere"] = again.get("rebuilt_elsewhere", again.get("failed"))
        for file in ("state.pt", "output.pt"):
            (folder / file).unlink(missing_ok=True)
    return seen


def _run(
    context: ForkServerContext, work: Any, name: str, folder: Path, *, limit_s: float, limit_gib: float
) -> dict[str, Any]:
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_answer, args=(work, name, folder, limit_gib))
    process.start()
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        return {"failed": f"no answer in {limit_s:.0f} s"}
    if not answer.exists():
        return {"failed": f"the process ended with code {process.exitcode}"}
    return json.loads(answer.read_text())


def _answer(work: Any, name: str, folder: Path, limit_gib: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)
    family, _, key = name.partition("/")
    try:
        seen = work(importlib.import_module(FAMILIES[family]).CASES[key], folder)
    except ImportError as error:
        seen = {"missing": str(error)}
    except Exception as error:
        where = "".join(traceback.format_exception(error, limit=-3))
        seen = {"failed": f"{type(error).__name__}: {error}"[:600], "traceback": where[-4000:]}
    (folder / "answer.json").write_text(json.dumps(seen, indent=1))


def _judge(case: Any, folder: Path) -> dict[str, Any]:
    from zoo.judge import judge

    return judge(case, folder=folder)


def _rebuild(case: Any, folder: Path) -> dict[str, Any]:
    from zoo.judge import rebuilds_what_was_left

    return {"rebuilt_elsewhere": rebuilds_what_was_left(case, folder)}
