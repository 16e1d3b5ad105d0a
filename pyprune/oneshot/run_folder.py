"""A one-shot pruning that can be interrupted: a folder with what is done, from which it goes on bit for bit."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyprune.checks import check_path, shown
from pyprune.files import whole_file, write_json
from pyprune.oneshot.one_shot_result import PrunedWeight, weights_of
from pyprune.oneshot.stored import InFolder, read_file, write_file

_VERSION = 1
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Done:
    """A block that is done.

    Args:
        block: its name.
        weights: what became of its weights.
        notes: what is to be known of its weights: what it is, and the name.
        fit: error of its output before and after a reconstruction.
    """

    block: str
    weights: tuple[PrunedWeight, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    fit: tuple[float, float] | None = None


class RunFolder:
    """The folder of one run: ``progress.json``, a file for the weights of each block, and the outputs of blocks.

    Args:
        path: of the folder; it is made if there is none.
        resume: whether to go on with a run that is in it.

    Attributes:
        done: the blocks that are done, in order.

    Raises:
        TypeError, ValueError: if it is no such path, cannot be written to, or has a run in it that is not to go on.

    Example:
        >>> import tempfile, torch
        >>> folder = RunFolder(tempfile.mkdtemp(), resume=False)
        >>> folder.begin({"data": "a"}, {"0": "b"})
        >>> folder.finish(Done("0"), {"0.weight": torch.ones(1)})
        >>> RunFolder(folder.path, resume=True).done
        [Done(block='0', weights=(), notes=(), fit=None)]
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        check_path("store", path)
        self.path = Path(path)
        self._content: dict[str, Any] = {}
        try:
            for folder in (self.path, self.path / "outputs", self.path / "dense"):
                folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path / "writable") as unfinished:
                unfinished.write_text("")
            (self.path / "writable").unlink()
            text = (self.path / _PROGRESS).read_text() if (self.path / _PROGRESS).exists() else ""
        except OSError as error:
            raise ValueError(f"store is {shown(str(path))}, a folder that cannot be written to: {error}") from error
        if text and not resume:
            raise ValueError(
                f"store is {shown(str(path))}, where a run is already; give resume=True to go on with it, or another "
                "folder"
            )
        self._content = _read(self.path / _PROGRESS, text) if text else {}
        self.done = [_done(entry) for entry in self._content.get("done", [])]
        turns = self._content.get("turns", {})
        self.outputs = InFolder(self.path / "outputs", turns.get("outputs"))
        self.dense = InFolder(self.path / "dense", turns.get("dense"))

    def begin(self, run: Mapping[str, str], blocks: Mapping[str, str]) -> None:
        """Take down what this run is, or compare it with the one that goes on.

        Args:
            run: what says of each thing that results depend on which one it is.
            blocks: the same of the weights of each block, in the order of the pass.

        Raises:
            ValueError: if it is another run.
        """
        if not self._content:
            self._content = {"version": _VERSION, "run": dict(run), "blocks": dict(blocks), "done": [], "turns": {}}
            self._write()
            return
        known = self._content["run"]
        other = [name for name in {**run, **known} if known.get(name) != run.get(name)]
        if list(self._content["blocks"]) != list(blocks):
            other.append("blocks")
        ended = self._content.get("ended", {})
        weights = [
            name for name, now in blocks.items() if now not in (self._content["blocks"].get(name), ended.get(name))
        ]
        if not other and weights:
            other.append("model")
        if other:
            raise ValueError(
                f"resume goes on with a run of another {', '.join(other)} in {self.path}; give what that run had, or "
                "another folder"
            )

    def finish(self, done: Done, tensors: Mapping[str, Tensor] | None, now: str = "") -> None:
        """Take down that a block is done.

        Args:
            done: which one, and what is said of it.
            tensors: by name: what it has become; None if that is kept elsewhere.
            now: what says which weights it has.
        """
        if tensors is not None:
            write_file(self._file(len(self.done)), {name: one.detach().cpu() for name, one in tensors.items()})
        self._content["done"].append(asdict(done))
        self._content.setdefault("ended", {})[done.block] = now
        self._content["turns"] = {"outputs": self.outputs.turns, "dense": self.dense.turns}
        self._write()
        self.done.append(done)
        self.outputs.clean()
        self.dense.clean()

    def tensors(self, place: int) -> dict[str, Tensor]:
        """Return what a block that is done has become."""
        found: dict[str, Tensor] = read_file(self._file(place))
        return found

    def end(self) -> None:
        """Remove the outputs, which nobody needs when all blocks are done."""
        for folder in (self.outputs.folder, self.dense.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _file(self, place: int) -> Path:
        return self.path / f"block-{place:05d}.pt"

    def _write(self) -> None:
        write_json(self.path / _PROGRESS, self._content)


def _read(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if content["version"] != _VERSION or not all(isinstance(content[part], dict) for part in ("run", "blocks")):
            raise ValueError("it is of another version")
        for entry in content["done"]:
            _done(entry)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no progress of a one-shot pruning: {error!s:.200}; give another store"
        ) from error
    assert isinstance(content, dict)
    return content


def _done(entry: Mapping[str, Any]) -> Done:
    notes = tuple((str(what), str(name)) for what, name in entry["notes"])
    fit = None if entry["fit"] is None else (float(entry["fit"][0]), float(entry["fit"][1]))
    return Done(str(entry["block"]), weights_of(entry["weights"]), notes, fit)
