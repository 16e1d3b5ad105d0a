"""The drop-in beside the original: all weights of a model together, and again among what is left.

Both leave the same state: a mask in the dtype of each weight, and its product with the weight.
"""

from types import ModuleType

import torch
from measure import Way, with_floor
from shapes import LISTS, Case, as_modules
from torch import nn
from torch.nn.utils import prune as original

from pyprune import torch_prune

MODELS = tuple(LISTS)
ONCE, AGAIN = "torch_prune.global_unstructured", "torch_prune.global_unstructured, pruned before"
TOO_LARGE = 300_000_000  # weights; more than this, and the original needs over 20 GB


def ways(case: Case) -> list[Way]:
    weights, ratio = case.draw(), case.ratio
    masks = [torch.ones_like(weight) for weight in weights]
    products = [torch.empty_like(weight) for weight in weights]
    memory = "needs over 20 GB" if case.count > TOO_LARGE else ""

    def layers() -> tuple[nn.ModuleList]:
        return (as_modules(weights),)

    def pruned_layers() -> tuple[nn.ModuleList]:
        (model,) = layers()
        prune(torch_prune, model)
        return (model,)

    def prune(library: ModuleType, model: nn.ModuleList) -> None:
        library.global_unstructured([(layer, "weight") for layer in model], library.L1Unstructured, amount=ratio)

    def multiply() -> None:
        for weight, mask, product in zip(weights, masks, products, strict=True):
            torch.mul(weight, mask, out=product)

    moved = 3 * sum(weight.nbytes for weight in weights)
    floor = Way("torch_prune", "floor: three tensors of each weight's size", multiply, moved=moved)
    return with_floor(
        floor,
        [
            Way(ONCE, "pyprune", lambda model: prune(torch_prune, model), layers),
            Way(ONCE, "floor in fresh memory", lambda: [(mask + 0, mask + 0) for mask in masks]),
            Way(ONCE, "torch.nn.utils.prune", lambda model: prune(original, model), layers, left_out=memory),
            Way(AGAIN, "pyprune", lambda model: prune(torch_prune, model), pruned_layers),
            Way(
                AGAIN,
                "torch.nn.utils.prune",
                lambda model: prune(original, model),
                pruned_layers,
                slow=True,
                left_out=memory,
            ),
        ],
    )
