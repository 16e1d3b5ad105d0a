"""Residual blocks that put out what they are given, because their branch is dead."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.modules.evaluation import forward
from pyprune.structured.blocks import find_blocks
from pyprune.structured.passes import first_argument, hooked


def dead_branches(model: nn.Module, examples: Iterable[Any], dead: Iterable[str]) -> list[str]:
    """Return the outermost blocks that change nothing in the examples, of those around weights that are dead.

    Args:
        model, examples: as for `shrink`.
        dead: names of weights of which all units are dead.
    """
    dead = list(dead)
    if not dead:
        return []
    examples = list(examples)
    blocks, _ = find_blocks(model, examples)
    around = [
        block
        for block in blocks.values()
        if block.is_residual and any(one.startswith(f"{block.name}.") for one in dead)
    ]
    same = {block.module: block for block in around}

    def look(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        given, made = first_argument(args, keywords), output if isinstance(output, Tensor) else output[0]
        if not (isinstance(given, Tensor) and torch.equal(given, made)):
            same.pop(module, None)

    with hooked(model, after=[(block.module, look) for block in around]):
        for inputs in examples:
            forward(model, inputs, "examples")
    names = sorted(block.name for block in same.values())
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
