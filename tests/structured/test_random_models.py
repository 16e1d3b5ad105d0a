"""Networks that nobody wrote: half of what can go is zeroed, and what is left computes the same."""

import os

import pytest
import torch

from pyprune import coupled_groups, shrink
from tests.structured.random_models import RandomNet
from tests.structured.zeroing import shake, zero_half

SEED = int(os.environ.get("RANDOM_MODELS_SEED", "0"))


def judge(kind, seed):
    torch.manual_seed(seed)
    model = RandomNet(seed, kind=kind)
    inputs = [torch.randn(2, 3, 6, 6) if kind == "image" else torch.randn(2, 5, 3) for _ in range(2)]
    model(inputs[0])
    model = shake(model, seed).double()
    inputs = [one.double() for one in inputs]
    groups = coupled_groups(model, inputs[0])
    assert not groups.unknown
    left = zero_half(groups, seed)
    wanted = [model(one) for one in inputs]
    shrunk = shrink(model, inputs[0], verify=1e-8)
    for one, expected in zip(inputs, wanted, strict=True):
        assert torch.allclose(model(one), expected, rtol=0, atol=1e-8 * expected.abs().max().item())
    return groups, left, shrunk


@pytest.mark.parametrize("kind", ["image", "sequence"])
def test_shrink_leaves_what_random_models_compute(kind):
    for seed in range(SEED, SEED + 25):
        groups, left, shrunk = judge(kind, seed)
        assert not shrunk.held, (kind, seed, shrunk.held)
        after = {one.name: one.after for one in shrunk.removed}
        # What dies with the rest may go, too.
        assert all(after.get(group.name, group.units) <= count for group, count in zip(groups, left, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "sequence"])
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_shrink_leaves_what_many_random_models_compute(kind, start):
    for seed in range(1000 + start, 1100 + start):
        judge(kind, seed)
