"""Passes of a model that run one of its blocks: those before it give what they gave, those after are not reached.

The model is called as its user calls it, so masks, positions, caches and whatever else its blocks take are made by
its own code; nothing is traced.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from pyprune.calibration.padding import Padding
from pyprune.console import listed
from pyprune.modules.evaluation import forward
from pyprune.modules.undo import undoing
from pyprune.oneshot.digest import digest
from pyprune.oneshot.find_blocks import Block
from pyprune.oneshot.stored import InMemory, Stored, check_seen, copied

_WHAT = "a batch of data"


class _Stop(BaseException):
    """Leaves a forward pass after a block; models that catch errors must not catch it."""


class Walk:
    """The way of all batches through the blocks of a model, one block after the other.

    It is to be used under `evaluating` and `untouched`, as passes are that look at a model.

    Args:
        model: the model, not wrapped.
        batches: inputs of the model.
        blocks: its blocks, in any order.
        stored: where outputs are kept.
        must_be_called: whether a block that the first batch does not reach is an error.

    Attributes:
        padding: says of the batch in the last pass which positions count.
        blocks: those that the first batch reaches, in the order of the pass.
        idle: names of the others.

    Raises:
        ValueError: if a block is called several times in a pass, or takes more of the blocks before it than what the
            last one gave, and what the model's own code makes of that.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> blocks = [Block("2", model[2], ""), Block("0", model[0], "")]
        >>> with torch.no_grad():
        ...     walk = Walk(model, [torch.ones(1, 2)], blocks, InMemory())
        >>> [block.name for block in walk.blocks]
        ['0', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        blocks: Sequence[Block],
        stored: Stored,
        *,
        must_be_called: bool = True,
    ) -> None:
        self.model = model
        self.batches = batches
        self.stored = stored
        self.padding = Padding(model)
        self.blocks, self.idle = _in_order(model, batches[0], blocks, must_be_called)

    def run(self, place: int, *, into: Stored | None = None, over: Stored | None = None) -> None:
        """Run a block on all batches.

        Args:
            place: which block.
            into: what is to keep its outputs, until it turns.
            over: what has those of the blocks before it; what was given at the beginning if None.
        """
        for number in range(len(self.batches)):
            output = self.output(place, number, over)
            if into is not None:
                into.put(self.blocks[place].of, number, output)

    def output(self, place: int, number: int, over: Stored | None = None) -> Any:
        """Return what a block gives for a batch."""
        return self._pass(self.blocks, place, number, self.stored if over is None else over)

    def check(self) -> None:
        """Raise ValueError unless each block gives for the first batch what it gives in a pass of the whole model.

        Blocks of a list normally need only what the last one of it gave; where that is not so, as in a U-Net, what
        each one gives is kept. A block in whose output torch sees no tensor is refused, too.
        """
        expected: list[str] = []

        def recorded(module: nn.Module) -> Callable[..., Any]:
            plain = module.forward

            def run(*args: Any, **keywords: Any) -> Any:
                output = plain(*args, **keywords)
                expected.append(digest(output))
                return output

            return run

        with _replaced({block.module: recorded(block.module) for block in self.blocks}):
            forward(self.model, self.batches[0], _WHAT)
        problem = ""
        for blocks in (self.blocks, [replace(block, of=block.name) for block in self.blocks]):
            problem = self._difference(blocks, expected)
            if not problem:
                self.blocks = blocks
                return
        raise ValueError(
            f"{type(self.model).__name__} cannot be pruned block by block: with the blocks before it replaced by "
            f"what they gave, {problem}. Some block takes more from others than that (shared keys and values, state "
            "that is kept), or results are not the same twice; use pyprune.calibrate and pyprune.prune"
        )

    def _difference(self, blocks: Sequence[Block], expected: Sequence[str]) -> str:
        stored = InMemory()
        for place, block in enumerate(blocks):
            try:
                output = self._pass(blocks, place, 0, stored)
            except Exception as error:  # the model's own code may raise anything on what it does not expect
                return f"{block.name} fails ({type(error).__name__}: {error!s:.200})"
            check_seen(block.name, output)
            if digest(output) != expected[place]:
                return f"{block.name} gives something else than in a pass of the whole model"
            stored.put(block.of, 0, output)
            stored.turn()
        return ""

    def _pass(self, blocks: Sequence[Block], place: int, number: int, stored: Stored) -> Any:
        """Run a block on a batch, and return what it gives."""
        block, batch = blocks[place], self.batches[number]
        self.padding.begin(batch)
        plain = block.module.forward
        given: list[Any] = []

        def last(*args: Any, **keywords: Any) -> Any:
            given.append(plain(*args, **keywords))
            raise _Stop

        kept: dict[str, Any] = {}

        def stub(of: str) -> Callable[..., Any]:
            def run(*args: Any, **keywords: Any) -> Any:
                if of not in kept:
                    kept[of] = stored.get(of, number)
                return copied(kept[of])  # models write into what they get

            return run

        with _replaced({**{one.module: stub(one.of) for one in blocks[:place]}, block.module: last}):
            try:
                forward(self.model, batch, _WHAT)
            except _Stop:
                return given[0]
        raise ValueError(f"batch {number} of data does not reach {block.name}; give batches that do, or other blocks")


def _in_order(
    model: nn.Module, batch: Any, blocks: Sequence[Block], must_be_called: bool
) -> tuple[list[Block], list[str]]:
    """Return the blocks in the order in which a pass calls them, and the names of those that it does not call."""
    calls: Counter[Block] = Counter()

    def counted(block: Block) -> Callable[..., Any]:
        plain = block.module.forward

        def run(*args: Any, **keywords: Any) -> Any:
            calls[block] += 1
            return plain(*args, **keywords)

        return run

    with _replaced({block.module: counted(block) for block in blocks}):
        forward(model, batch, _WHAT)
    several = [block.name for block in calls if calls[block] > 1]
    if several:
        raise ValueError(
            f"{listed(several)} is called several times in a pass, so it has no one input and output; name other "
            "blocks, or prune with pyprune.calibrate and pyprune.prune"
        )
    idle = [block.name for block in blocks if not calls[block]]
    if idle and (must_be_called or not calls):
        raise ValueError(f"blocks has {listed(idle)}, which the model does not call for the first batch of data")
    return list(calls), idle


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules have other forward functions."""
    there = {module: vars(module).get("forward") for module in forwards}

    def undo() -> None:
        for module, function in there.items():
            if function is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = function

    with undoing(undo):
        for module, function in forwards.items():
            vars(module)["forward"] = function  # past a __setattr__ of the user
        yield
