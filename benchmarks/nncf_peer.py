"""NNCF itself, where it can be imported: ``make bench-full`` installs it. Elsewhere its formulas stand in."""

import logging

import torch
from torch import Tensor, nn

try:
    import nncf
    from nncf.torch.function_hook.pruning.magnitude.algo import update_pruning_ratio
    from nncf.torch.function_hook.pruning.rb.algo import get_pruned_modules
    from nncf.torch.function_hook.pruning.rb.losses import RBLoss
    from nncf.torch.function_hook.pruning.rb.modules import apply_rb_binary_mask
except ImportError as error:
    AVAILABLE, VERSION = False, f"not installed ({error})"
else:
    AVAILABLE, VERSION = True, nncf.__version__
    nncf.set_log_level(logging.ERROR)

GLOBAL, LOCAL, GATES = (
    f"UNSTRUCTURED_{rule}" for rule in ("MAGNITUDE_GLOBAL", "MAGNITUDE_LOCAL", "REGULARIZATION_BASED")
)


class MaskHook(nn.Module):
    """What NNCF's hook does to a parameter at every reading."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Layers(nn.Module):
    """Calls every layer once on the smallest input that it takes, since NNCF finds weights by tracing a call."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, one: Tensor) -> Tensor:
        total = one.sum()
        for layer in self.layers:
            shape = layer.weight.shape
            total = total + layer(one.to(layer.weight.dtype).expand(1, *shape[1:])).sum()
        return total


def prune(layers: nn.ModuleList, mode: str, ratio: float | None = None) -> nn.Module:
    """Trace the layers, put masks or gates on them, and choose the masks: NNCF's whole call."""
    return nncf.prune(Layers(layers), nncf.PruneMode[mode], ratio=ratio, examples_inputs=torch.ones(1))


def prune_net(net: nn.Module, inputs: Tensor, mode: str, ratio: float | None = None) -> nn.Module:
    return nncf.prune(net, nncf.PruneMode[mode], ratio=ratio, examples_inputs=inputs)


def update(pruned: nn.Module, mode: str, ratio: float) -> None:
    """Choose masks anew, into those that are there, as NNCF's schedulers do."""
    update_pruning_ratio(pruned, nncf.PruneMode[mode], ratio)


def gate(weight: Tensor, logits: Tensor) -> Tensor:
    return apply_rb_binary_mask(weight, logits, True)


def rb_loss(layers: nn.ModuleList, target: float, p: float) -> tuple[nn.Module, list[Tensor]]:
    """Return NNCF's loss on gates with logits drawn at random, and these logits."""
    gated = prune(layers, GATES)
    logits = [module.mask for module in get_pruned_modules(gated).values()]
    for one in logits:
        one.data.normal_(2, 2)
    return RBLoss(gated, target, p), logits
