"""Sums of gradients and activations; what `calibrate` makes of them is tested in test_calibrate."""

import pytest
import torch
from torch import nn

from pyprune import importance
from pyprune.calibration.sums import ActivationSums, GradientSums
from pyprune.modules.targets import find_targets

G = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
SUMS = {
    "gradient": (importance.snip(), 2 * G, G),
    "squared gradient": (importance.taylor(), 2 * G**2, G**2),
    # w = 2: first 3 |2 g|, then half of it and 3 |2 g| again
    "momentum": (importance.snip_momentum(decay=0.5, scale=3.0), 9 * G.abs(), 9 * G.abs()),
}


def layer(value=2.0):
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.fill_(value)
    return model


@pytest.mark.parametrize("name", SUMS)
def test_gradients_are_summed_by_what_the_importance_needs(name):
    rule, expected, result = SUMS[name]
    (target,) = find_targets(layer())
    sums = GradientSums(rule, [target])
    for _ in range(2):
        sums.add(target, G)
    assert torch.equal(sums.sums[target], expected)
    assert torch.equal(sums.result(target, 2), result)
    sums.add_nothing(target)
    assert torch.equal(sums.sums[target], expected * (0.5 if name == "momentum" else 1.0))


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_wide_and_follow_a_model_that_is_cast(name):
    rule, expected, _ = SUMS[name]
    model = layer().half()
    (target,) = find_targets(model)
    sums = GradientSums(rule, [target])
    sums.add(target, G.half())
    assert sums.sums[target].dtype == torch.float32
    model.double()
    sums.add(target, G.double())
    assert sums.sums[target].dtype == torch.float64
    assert torch.equal(sums.sums[target], expected.double())


def test_activations_are_seen_while_they_are_watched():
    model = layer()
    targets = find_targets(model)
    sums = ActivationSums(importance.wanda(), targets)
    x = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    model(x)
    assert not sums.sums
    with sums.watching():
        model(x)
        model.eval()(x * 100)
        model.train()
        sums.gathers = False
        model(x * 100)
        sums.gathers = True
        model(x)
    model(x * 100)
    (target,) = targets
    torch.testing.assert_close(sums.result(target, 2), torch.tensor([[50.0, 4.0]]).sqrt())
    assert not model._forward_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_runs_again_is_not_counted_again(reentrant):
    linear = nn.Linear(3, 2)
    sums = ActivationSums(importance.wanda(), find_targets(linear))
    inputs = torch.ones(4, 3, requires_grad=True)
    with sums.watching():
        torch.utils.checkpoint.checkpoint(linear, inputs, use_reentrant=reentrant).sum().backward()
    (total,) = sums.sums.values()
    assert total.tolist() == [4.0, 4.0, 4.0]
