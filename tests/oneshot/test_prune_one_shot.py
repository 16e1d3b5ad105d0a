"""A model pruned block by block: what goes, what is written, what is said."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, importance, scope
from pyprune.oneshot.solution import Solution

WANDA = Method(importance.wanda(), scope=scope.row())
MAGNITUDE = Method(importance.magnitude(), scope=scope.tensor())


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())


class Net(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.embed(inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


@dataclass(frozen=True)
class Exact:
    """Least squares on a mask, or on the mask of the smallest elements."""

    chooses: bool = False
    name: str = "exact"

    def solve(self, weight, gram, *, scope, ratio, mask):
        if self.chooses:
            count = min(int(ratio * weight.numel() + 0.5), weight.numel() - 1)
            order = weight.abs().flatten().argsort(stable=True)
            mask = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, order[:count], False).view_as(weight)
        solved = torch.zeros_like(weight)
        for row, kept in enumerate(mask):
            part = gram[kept][:, kept] + 1e-6 * gram.diagonal().mean() * torch.eye(int(kept.sum()), dtype=gram.dtype)
            solved[row, kept] = torch.linalg.solve(part, gram[kept] @ weight[row])
        return Solution(solved, mask, 1e-6)


def made(count=3, seed=0):
    torch.manual_seed(seed)
    return Net(count).double()


def batches(count=3):
    return list(torch.randn(count, 5, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def by_hand(model, data, *, propagate, solver=None, ratio=0.5):
    """Wanda by rows, block by block, as its authors write it."""
    hidden = [model.embed(batch) for batch in data]
    for layer in model.layers:
        dense = [layer(one) for one in hidden]
        ins = {layer.up: torch.cat([one.flatten(0, 1) for one in hidden])}
        ins[layer.down] = layer.up(ins[layer.up]).relu()
        for linear, given in ins.items():
            gram = given.T @ given
            scores = linear.weight.abs() * gram.diagonal().sqrt()
            goes = scores.argsort(dim=1, stable=True)[:, : int(ratio * scores.shape[1])]
            mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, goes, False)
            weight = linear.weight * mask
            if solver is not None:
                weight = solver.solve(linear.weight, gram, scope=None, ratio=None, mask=mask).weight
            linear.weight.copy_(weight)
        hidden = [layer(one) for one in hidden] if propagate else dense
    return model


@pytest.mark.parametrize("solver", [None, Exact()], ids=["masks", "solved"])
@pytest.mark.parametrize("propagate", [True, False])
def test_prune_one_shot_is_wanda_block_by_block(propagate, solver):
    model, data = made(), batches()
    pyprune.prune_one_shot(model, data, WANDA, ratio=0.5, solver=solver, propagate=propagate)
    with torch.no_grad():
        expected = by_hand(made(), data, propagate=propagate, solver=solver)
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
