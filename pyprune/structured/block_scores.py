"""How much a block matters: scores, of which the lowest go."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.calibration.padding import Padding
from pyprune.checks import check_choice, check_number
from pyprune.modules.evaluation import forward
from pyprune.structured.blocks import Block, bypassing, find_blocks, repeated
from pyprune.structured.passes import (
    Outputs,
    all_outputs,
    check_examples,
    check_removable,
    difference,
    first_argument,
    hooked,
)


@torch.inference_mode(False)
def block_scores(model: nn.Module, examples: Any, *, importance: str = "influence") -> dict[str, float]:
    """Score the residual blocks of a model that repeat, as `drop_blocks` does before it removes any.

    Args:
        model, examples: as for `drop_blocks`; the model is only run.
        importance: ``"influence"``, 1 - cos(input, output), the mean over all tokens but padding (ShortGPT); or
            ``"output_error"``, the relative change of the model's output without the block.

    Returns:
        A score for each block by its name (higher = keep), such as a later
        ``drop_blocks(..., importance=lambda name, block: scores[name])`` goes by.

    Raises:
        TypeError, ValueError: for wrong arguments, and if no block repeats.

    Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
        >>> list(block_scores(nn.Sequential(*layers), torch.randn(2, 5, 8)))
        ['0', '1', '2']
    """
    check_removable(model)
    inputs = check_examples(examples)
    check_choice("importance", importance, ("influence", "output_error"))
    dense = all_outputs(model, inputs)  # they fit, and are numbers
    blocks = repeated(model, find_blocks(model, inputs)[0])
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that repeat: residual members of a list, of one class"
        )
    return (
        influence(model, inputs, blocks)
        if importance == "influence"
        else output_error(model, inputs, blocks, [], dense)
    )


def influence(model: nn.Module, examples: Iterable[Any], blocks: Iterable[Block]) -> dict[str, float]:
    """Return 1 - cos(input, output) of each block, the mean over all tokens of all examples but padding.

    A token is a vector along the last dimension; of inputs with four dimensions and more, images, each is one vector.

    Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".

    Example:
        >>> from pyprune.structured.blocks import Block
        >>> turn = nn.Linear(2, 2, bias=False)
        >>> _ = turn.weight.data.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> influence(nn.Sequential(turn), [torch.ones(3, 2)], [Block("0", turn)])
        {'0': 1.0}
    """
    names = {block.module: block.name for block in blocks}
    sums = dict.fromkeys(names.values(), 0.0)
    tokens = dict.fromkeys(names.values(), 0)
    given: dict[nn.Module, Tensor] = {}
    padding = Padding(model)

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given[module] = first_argument(args, keywords).clone()  # blocks may write into it

    def after(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        cosines, real = _cosines(given.pop(module), tensor), padding.positions(tensor)
        if real is not None and cosines.shape == real.shape:
            cosines = cosines[real]
        sums[names[module]] += float((1 - cosines).sum())
        tokens[names[module]] += cosines.numel()

    with hooked(model, [(one, before) for one in names], [(one, after) for one in names]):
        for inputs in examples:
            padding.begin(inputs)
            forward(model, inputs, "examples")
    return {name: sums[name] / max(1, tokens[name]) for name in sums}


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    start = 1 if one.dim() > 3 else max(0, one.dim() - 1)
    one, other = (x.double().flatten(start) if x.dim() else x.double().reshape(1) for x in (one, other))
    lengths = one.norm(dim=-1), other.norm(dim=-1)
    # Zero stays zero: nothing was done to it.
    return torch.where(
        (lengths[0] == 0) & (lengths[1] == 0),
        1.0,
        (one * other).sum(-1) / (lengths[0] * lengths[1]).clamp_min(1e-300),
    )


def output_error(
    model: nn.Module,
    examples: Sequence[Any],
    blocks: Iterable[Block],
    gone: Sequence[Block],
    dense: Sequence[Outputs],
) -> dict[str, float]:
    """Return the relative change of the model's outputs without each block: norm(y - dense) / norm(dense).

    Args:
        gone: blocks that are bypassed besides.
        dense: the outputs with all blocks.
    """
    return {
        block.name: difference(all_outputs(model, examples, *bypassing([*gone, block])), dense) for block in blocks
    }


def given_by(function: Callable[[str, nn.Module], object], blocks: Iterable[Block]) -> dict[str, float]:
    """Return what a function of the user makes of each block's name and module.

    Example:
        >>> from pyprune.structured.blocks import Block
        >>> given_by(lambda name, block: block.in_features, [Block("0", nn.Linear(2, 2))])
        {'0': 2.0}
    """
    return {
        block.name: check_number(
            f"the score that importance gave {block.name}", function(block.name, block.module), what="a finite number"
        )
        for block in blocks
    }
