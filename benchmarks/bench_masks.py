"""Masks of the largest magnitudes: of all tensors together (|w|, or |w| / ||w||_2), and of each by itself."""

from collections.abc import Callable
from functools import cache
from typing import Any

import nncf_peer
import torch
from measure import Way, with_floor
from peers import (
    cat_kthvalue,
    cat_sort,
    cat_topk,
    kthvalue_per_tensor,
    nncf_formula,
    numpy_partition,
)
from shapes import LISTS, Case, as_modules
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import pyprune
from pyprune import ops
from pyprune.methods.allocation import removed_count

MODELS = tuple(LISTS)
RAW, NORMALISED, LOCAL = "global masks, |w|", "global masks, L2-normalised", "local masks"
WHOLE = "prune, the whole call"  # L2-normalised, and the masks put on layers
TOO_LARGE = 300_000_000  # weights; more than this, and some peers need over 20 GB


def l2_normalised(weights: list[Tensor], removed: int, masks: list[Tensor] | None = None) -> list[Tensor]:
    return ops.threshold(weights, removed, normalize=True, masks=masks)[0]


def ways(case: Case) -> list[Way]:
    weights, ratio = case.draw(), case.ratio
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    removed, each = removed_count(case.count, ratio), [removed_count(size, ratio) for size in case.sizes]
    weight_bytes = sum(weight.nbytes for weight in weights)
    memory = "needs over 20 GB" if case.count > TOO_LARGE else ""
    time = "takes minutes" if case.count > TOO_LARGE else ""

    def new_layers() -> tuple[nn.ModuleList]:
        return (as_modules(weights),)

    def global_unstructured(layers: nn.ModuleList) -> None:
        parameters = [(layer, "weight") for layer in layers]
        torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=ratio)

    def whole_call(layers: nn.ModuleList) -> None:
        pyprune.prune(layers, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=ratio)

    def nncf_whole_call(layers: nn.ModuleList) -> None:
        nncf_peer.prune(layers, nncf_peer.GLOBAL, ratio)

    @cache
    def nncf_pruned(mode: str) -> tuple[nn.Module]:
        return (nncf_peer.prune(as_modules(weights), mode, ratio),)

    def nncf_update(group: str, mode: str) -> Way:
        return Way(group, "NNCF", lambda model: nncf_peer.update(model, mode, ratio), lambda: nncf_pruned(mode))

    def peer(group: str, name: str, run: Callable[..., object], **more: Any) -> Way:
        return Way(group, name, run, returned=case.count, **more)

    raw = [
        Way(RAW, "pyprune", lambda: ops.threshold(weights, removed, masks=masks)),
        Way(RAW, "pyprune, new masks", lambda: ops.threshold(weights, removed), returned=case.count),
        peer(RAW, "torch.cat + kthvalue", lambda: cat_kthvalue(weights, removed)),
        peer(RAW, "torch.cat + numpy.partition", lambda: numpy_partition(weights, removed)),
        peer(RAW, "torch.cat + topk", lambda: cat_topk(weights, removed), slow=True, left_out=time),
        peer(RAW, "torch.cat + sort", lambda: cat_sort(weights, removed), slow=True, left_out=time),
        peer(RAW, "torch.nn.utils.prune", global_unstructured, prepare=new_layers, left_out=memory),
    ]
    normalised = [
        Way(NORMALISED, "pyprune", lambda: l2_normalised(weights, removed, masks)),
        Way(NORMALISED, "pyprune, new masks", lambda: l2_normalised(weights, removed), returned=case.count),
    ]
    whole = [Way(WHOLE, "pyprune", whole_call, new_layers, returned=case.count)]
    local = [
        Way(LOCAL, "pyprune", lambda: ops.threshold(weights, each, masks=masks)),
        Way(LOCAL, "pyprune, new masks", lambda: ops.threshold(weights, each), returned=case.count),
        peer(LOCAL, "kthvalue per tensor", lambda: kthvalue_per_tensor(weights, each)),
    ]
    if nncf_peer.AVAILABLE:
        normalised.append(nncf_update(NORMALISED, nncf_peer.GLOBAL))
        whole.append(peer(WHOLE, "NNCF", nncf_whole_call, prepare=new_layers))
        local.append(nncf_update(LOCAL, nncf_peer.LOCAL))
    else:
        normalised.append(peer(NORMALISED, "NNCF", lambda: nncf_formula(weights, ratio), formula=True))
    # Nothing to remove: reads each weight, writes each mask, and finds no threshold.
    floor = Way(
        "masks",
        "floor: read weights, write masks",
        lambda: ops.threshold(weights, 0, masks=masks),
        moved=weight_bytes + case.count,
    )
    return with_floor(floor, raw + normalised + whole + local)
