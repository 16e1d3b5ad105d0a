import pytest
import torch

import pyprune
from pyprune import Method, Pruner, importance, schedules, scope
from tests.conftest import masks_of
from tests.training.test_pruner import assert_same_masks, masks, sgd, small, train


@pytest.mark.parametrize("method", [None, "UNSTRUCTURED_MAGNITUDE_GLOBAL"])
@pytest.mark.parametrize("reintroduce", [True, False])
def test_gmp_is_a_pruner_with_a_cubic_schedule(method, reintroduce):
    model, twin = small(), small()
    span = {"end": 8, "start": 2, "initial": 0.2, "frequency": 3}
    ignored = pyprune.IgnoredScope(names=["head"])
    pruner = pyprune.gmp(model, 0.8, method=method, reintroduce=reintroduce, ignored_scope=ignored, **span)
    local = Method(importance.magnitude(), scope=scope.tensor())
    schedule = schedules.cubic(0.8, **span)
    other = Pruner(twin, method or local, schedule, reintroduce=reintroduce, ignored_scope=ignored)
    for step in range(10):
        assert_same_masks(masks(model), masks(twin))
        assert pruner.ratio == other.ratio == schedule(step)
        train(model, sgd(model), pruner, 1, step)
        train(twin, sgd(twin), other, 1, step)
    assert list(masks(model)) == ["conv.weight", "hidden.weight"]


def test_each_weight_ends_at_the_ratio():
    model = small()
    pruner = pyprune.gmp(model, 0.75, end=4)
    ratios = []
    for _ in range(5):
        pruner.step()
        ratios.append([1 - mask.float().mean().item() for mask in masks_of(model).values()])
    assert ratios[-1] == ratios[-2] == [0.75] * 3
    assert torch.tensor(ratios).diff(dim=0).min() >= 0


def test_ratios_may_have_names():
    model = small()
    pruner = pyprune.gmp(model, {"conv": 0.5, "head": 0.25}, end=1)
    pruner.step()
    assert [int((~mask).sum()) for mask in masks_of(model).values()] == [72, 0, 8]
