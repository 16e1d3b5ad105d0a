import pytest
import torch
from torch import nn

import pyprune
from tests.conftest import Unchanged
from tests.training.test_pruner import batch, dropped_of, masks, plain_gradient, raw, small


def loss_fn(model, sample):
    return nn.functional.cross_entropy(model(sample[0]), sample[1])


def test_snip_drops_what_the_loss_depends_on_least():
    model = small().double().eval()
    weights, gradient = raw(model), None
    twin = pyprune.prune(small().double().eval(), "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.0)
    weights, gradient = raw(twin), plain_gradient(twin, 0)
    images, classes = batch(0)
    found = pyprune.snip(model, [(images.double(), classes)] * 2, loss_fn, ratio=0.8)
    assert found is model
    expected = dropped_of({name: (weights[name] * gradient[name]).abs() for name in weights}, 0.8)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model).items())


def test_one_batch_is_used_unless_told():
    samples = [batch(step) for step in range(3)]
    one, all_ = small(), small()
    pyprune.snip(one, samples, loss_fn, ratio=0.5)
    pyprune.snip(all_, samples, loss_fn, ratio=0.5, num_batches=None)
    only = pyprune.snip(small(), samples[:1], loss_fn, ratio=0.5, num_batches=None)
    assert all(torch.equal(mask, masks(only)[name]) for name, mask in masks(one).items())
    assert any(not torch.equal(mask, masks(only)[name]) for name, mask in masks(all_).items())


def test_scope_and_errors_are_those_of_prune():
    model = small()
    ignored = pyprune.IgnoredScope(names=["conv"])
    pyprune.snip(model, [batch()], loss_fn, ratio=0.5, ignored_scope=ignored)
    assert list(masks(model)) == ["hidden.weight", "head.weight"]
    model = small()
    before = Unchanged(model)
    for wrong in ({"ratio": 1.0}, {"ratio": 0.5, "num_batches": 0}):
        with pytest.raises(ValueError, match=r"ratio|num_batches|batch"):
            pyprune.snip(model, [batch()], loss_fn, **wrong)
    before.check()
