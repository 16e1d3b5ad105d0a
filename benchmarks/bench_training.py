"""A training step of a small network that is masked or gated, beside the dense one; eager and under torch.compile."""

import copy
from collections.abc import Callable
from functools import cache, partial

import nncf_peer
import torch
from measure import Way, with_floor
from shapes import NETS, Case
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import pyprune

MODELS = tuple(NETS)
DTYPES = ("float32",)
STEP = "training step"
MASKED, GATED = f"{STEP}, masked", f"{STEP}, gated"


def step_of(net: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """Return a training step of any network: forward, backward, SGD."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
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


def ways(case: Case) -> list[Way]:
    torch.manual_seed(0)
    net, inputs = NETS[case.model]()

    def way(group: str, name: str, change: Callable[..., object], compiled: bool = False) -> Way:
        @cache
        def step() -> Callable[[], None]:
            changed = copy.deepcopy(net)
            changed = change(changed, case) or changed
            return step_of(torch.compile(changed) if compiled else changed, inputs)

        suffix = ", compiled" if compiled else ""
        return Way(group + suffix, name, lambda run: run(), lambda: (step(),), compiles=compiled)

    def nncf(mode: str, ratio: float | None, net: nn.Module, case: Case) -> nn.Module:
        return nncf_peer.prune_net(net, inputs, mode, ratio)

    bernoulli = partial(gated, pyprune.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
    hard_concrete = partial(gated, pyprune.PruneMode.UNSTRUCTURED_HARD_CONCRETE)
    found: list[Way] = []
    for compiled in (False, True):
        masks = [way(MASKED, "pyprune", masked, compiled)]
        gates = [
            way(GATED, "pyprune, Bernoulli", bernoulli, compiled),
            way(GATED, "pyprune, hard concrete", hard_concrete, compiled),
        ]
        if not compiled:
            masks.append(way(MASKED, "torch.nn.utils.prune", masked_by_torch))
        if nncf_peer.AVAILABLE and not compiled:
            masks.append(way(MASKED, "NNCF", partial(nncf, nncf_peer.GLOBAL, case.ratio)))
            gates.append(way(GATED, "NNCF", partial(nncf, nncf_peer.GATES, None)))
        found += with_floor(way(STEP, "dense", dense, compiled), masks + gates)
    return found
