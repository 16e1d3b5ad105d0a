"""Time magnitude masks, folding and counting beside torch's own ways and NNCF's formula, as ratios.

All ways run in one process, in turns; the medians are compared. See ``--help`` for the options. The default run
takes about two minutes and 7 GB of memory.
"""

import argparse

import torch
from measure import Way, interleave, measured, parse, parser_of, table_of, with_floor
from peers import cat_kthvalue, kthvalue_per_tensor, nncf_formula
from rich.console import Console
from shapes import DTYPES, MODELS, as_modules, random_weights, title_of
from torch import Tensor
from torch.nn.utils import prune as torch_prune

import pyprune
from pyprune import ops
from pyprune.methods import removed_count

NOTES = """\
x floor         medians, beside the floor of the job: nothing can be faster than moving the bytes
floor of masks  ops.threshold with nothing to remove, into existing masks: it reads each
                weight once and writes each mask byte once, and finds no threshold
x pyprune       medians, beside the first line of pyprune in the same part
existing masks  are overwritten; new masks pay for fresh memory, as torch's own ways do
L2-normalised   scores |w| / ||w||_2; NNCF's formula: torch.cat of them, and kthvalue
global_unstructured, pyprune.prune   also put the masks on the layers"""


def l2_normalised(weights: list[Tensor], removed: int, masks: list[Tensor] | None = None) -> list[Tensor]:
    return ops.threshold(weights, removed, scales=ops.norms(weights).reciprocal(), masks=masks)[0]


def threshold_ways(weights: list[Tensor], ratio: float, masks: list[Tensor]) -> list[Way]:
    removed = removed_count(sum(weight.numel() for weight in weights), ratio)
    removed_each = [removed_count(weight.numel(), ratio) for weight in weights]

    def new_layers() -> tuple[torch.nn.ModuleList]:
        return (as_modules(weights),)

    def global_unstructured(layers: torch.nn.ModuleList) -> None:
        torch_prune.global_unstructured(
            [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=ratio
        )

    def pyprune_prune(layers: torch.nn.ModuleList) -> None:
        pyprune.prune(layers, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=ratio)

    def local(masks: list[Tensor] | None = None) -> None:
        ops.threshold(weights, removed_each, masks=masks)

    floor = Way("masks", "floor: read weights, write masks", lambda: ops.threshold(weights, 0, masks=masks))
    ways = [
        Way("global, |w|", "pyprune, existing masks", lambda: ops.threshold(weights, removed, masks=masks)),
        Way("global, |w|", "pyprune, new masks", lambda: ops.threshold(weights, removed)),
        Way("global, |w|", "torch.cat + kthvalue", lambda: cat_kthvalue(weights, removed)),
        Way("global, |w|", "torch global_unstructured (L1)", global_unstructured, new_layers),
        Way("global, L2-normalised", "pyprune, existing masks", lambda: l2_normalised(weights, removed, masks)),
        Way("global, L2-normalised", "pyprune, new masks", lambda: l2_normalised(weights, removed)),
        Way("global, L2-normalised", "pyprune.prune, the whole call", pyprune_prune, new_layers),
        Way("global, L2-normalised", "NNCF's formula", lambda: nncf_formula(weights, ratio)),
        Way("local, |w|", "pyprune, existing masks", lambda: local(masks)),
        Way("local, |w|", "pyprune, new masks", local),
        Way("local, |w|", "kthvalue per tensor", lambda: kthvalue_per_tensor(weights, removed_each)),
    ]
    return with_floor(floor, ways)


def fold_ways(weights: list[Tensor], masks: list[Tensor]) -> list[Way]:
    floor = Way("fold", "floor: torch._foreach_mul_, 1.0", lambda: torch._foreach_mul_(weights, 1.0))
    ways = [
        Way("fold", "pyprune", lambda: ops.fold(weights, masks)),
        Way("fold", "torch._foreach_mul_, bool masks", lambda: torch._foreach_mul_(weights, masks)),
    ]
    return with_floor(floor, ways)


def count_ways(masks: list[Tensor]) -> list[Way]:
    return [
        Way("count zeros of masks", "pyprune", lambda: ops.count_zeros(masks)),
        Way("count zeros of masks", "torch.count_nonzero", lambda: [torch.count_nonzero(mask) for mask in masks]),
    ]


def compare_masks(weights: list[Tensor], ratio: float) -> str:
    """Say how our masks differ from those of torch.cat + kthvalue; raise if they do elsewhere than at ties."""
    removed = removed_count(sum(weight.numel() for weight in weights), ratio)
    masks, _ = ops.threshold(weights, removed)
    ours = sum(int((~mask).sum()) for mask in masks)
    if ours != removed:
        raise RuntimeError(f"pyprune removed {ours} elements instead of {removed}")
    bound = max(weight.abs()[~mask].max() for weight, mask in zip(weights, masks, strict=True) if not mask.all())
    more = 0
    for weight, mask, other in zip(weights, masks, cat_kthvalue(weights, removed), strict=True):
        differs = mask != other
        more += int(differs.sum())
        if not (weight.abs()[differs] == bound).all() or other[~mask].any():
            raise RuntimeError("the masks of pyprune and of torch.cat + kthvalue differ elsewhere than at ties")
    return f"pyprune removes exactly {removed:,}; torch.cat + kthvalue these and {more:,} more (ties)"


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--ratio", type=float, default=0.7, help="fraction to remove (default: %(default)s)")
    arguments = parse(parser)
    if not 0 < arguments.ratio < 1:
        parser.error(f"--ratio is {arguments.ratio}; it must be above 0 and below 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console, results = Console(), []
    with measured(arguments, console, results, NOTES, {"ratio": arguments.ratio}):
        for model in arguments.model:
            for dtype in arguments.dtype:
                weights = random_weights(MODELS[model](), DTYPES[dtype])
                title = title_of(model, dtype, weights)
                agreement = compare_masks(weights, arguments.ratio)
                masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
                ways = threshold_ways(weights, arguments.ratio, masks)
                interleave(ways, arguments.repeats, arguments.seconds, console, title)
                # Folding changes the weights, so it comes last.
                last = fold_ways(weights, masks) + count_ways(masks)
                interleave(last, arguments.repeats, arguments.seconds, console, title)
                console.print(table_of(title, ways + last))
                console.print(f"{agreement}\n", highlight=False)
                results += [way.as_dict() | {"model": model, "dtype": dtype} for way in ways + last]


if __name__ == "__main__":
    main()
