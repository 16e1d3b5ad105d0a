"""A training step of a network that is masked, kept sparse or gated, beside the dense one; also compiled."""

import copy
from collections.abc import Callable
from functools import cache, partial

import nncf_peer
import torch
from measure import Way, with_floor
from shapes import NETS, Case
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import pyprune
from pyprune.modules.masks import Mask
from pyprune.modules.targets import attachments_of

MODELS = tuple(NETS)
DTYPES = ("float32",)
STEP = "training step"
MASKED, KEPT, GATED = f"{STEP}, masked", f"{STEP}, keep_sparse", f"{STEP}, gated"
COMPILED = ", compiled"


def step_of(net: nn.Module, inputs: Tensor, *, compiled: bool = False, kept: bool = False) -> Callable[[], None]:
    """Return a training step of any network: forward, backward, SGD; ``kept``: with its masks folded in and held."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    if kept:
        pyprune.keep_sparse(net, optimizer)
    call = torch.compile(net) if compiled else net

    def step() -> None:
        optimizer.zero_grad()
        call(inputs).square().mean().backward()
        optimizer.step()

    return step


def dense(net: nn.Module, case: Case) -> None:
    """Leave it as it is."""


def masked(net: nn.Module, case: Case) -> None:
    pyprune.prune(net, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=case.ratio)


def gated(mode: pyprune.PruneMode, net: nn.Module, case: Case) -> None:
    pyprune.prune(net, mode)


def masked_by_torch(net: nn.Module, case: Case) -> None:
    # Attention reads the weight of its output projection without calling it, so the hook that makes the weight anew
    # would not run, and the second backward pass would fail.
    projections = [module.out_proj for module in net.modules() if isinstance(module, nn.MultiheadAttention)]
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in projections:
            torch_prune.l1_unstructured(module, "weight", case.ratio)
        elif isinstance(module, nn.MultiheadAttention):
            torch_prune.l1_unstructured(module, "in_proj_weight", case.ratio)


def masked_by_nncf_formula(net: nn.Module, case: Case) -> None:
    """Put NNCF's product with a bool mask where its hook on a parameter would be."""
    masked(net, case)
    masks = {target: found.mask for target, found in attachments_of(net).items() if isinstance(found, Mask)}
    pyprune.strip(net)
    for target, mask in masks.items():
        for owner in target.owners:
            parametrize.register_parametrization(owner.module, owner.attribute, nncf_peer.MaskHook(mask))


def ways(case: Case) -> list[Way]:
    torch.manual_seed(0)
    net, inputs = NETS[case.model]()

    def way(
        group: str,
        name: str,
        change: Callable[..., object],
        compiled: bool = False,
        kept: bool = False,
        formula: bool = False,
    ) -> Way:
        @cache
        def step() -> Callable[[], None]:
            changed = copy.deepcopy(net)
            changed = change(changed, case) or changed
            return step_of(changed, inputs, compiled=compiled, kept=kept)

        suffix = COMPILED if compiled else ""
        return Way(group + suffix, name, lambda run: run(), lambda: (step(),), compiles=compiled, formula=formula)

    def nncf(mode: str, ratio: float | None, net: nn.Module, case: Case) -> nn.Module:
        return nncf_peer.prune_net(net, inputs, mode, ratio)

    bernoulli = partial(gated, pyprune.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
    hard_concrete = partial(gated, pyprune.PruneMode.UNSTRUCTURED_HARD_CONCRETE)
    found: list[Way] = []
    for compiled in (False, True):
        itself = nncf_peer.AVAILABLE and not compiled
        by_nncf = partial(nncf, nncf_peer.GLOBAL, case.ratio) if itself else masked_by_nncf_formula
        masks = [
            way(MASKED, "pyprune", masked, compiled),
            way(MASKED, "torch.nn.utils.prune", masked_by_torch, compiled),
            way(MASKED, "NNCF", by_nncf, compiled, formula=not itself),
            way(KEPT, "pyprune", masked, compiled, kept=True),
        ]
        gates = [
            way(GATED, "pyprune, Bernoulli", bernoulli, compiled),
            way(GATED, "pyprune, hard concrete", hard_concrete, compiled),
        ]
        if itself:
            gates.append(way(GATED, "NNCF", partial(nncf, nncf_peer.GATES, None)))
        found += with_floor(way(STEP, "dense", dense, compiled), masks + gates)
    return found
