import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, granularity, importance, ratios_below, scope

METHODS = {
    "elements": (Method(importance.magnitude(), scope=scope.tensor()), lambda w: w.abs()),
    "squares": (Method(importance.magnitude(p=2), scope=scope.tensor()), lambda w: w.abs() ** 2),
    "filters": (
        Method(importance.magnitude(), granularity.channel("out", "mean"), scope.tensor()),
        lambda w: w.abs().flatten(1).mean(1),
    ),
    "function": (Method(torch.sin, scope=scope.tensor()), lambda w: w.sin()),
    "global scores": (Method(importance.magnitude(normalize="l2")), lambda w: w.abs()),
    "a mode": ("UNSTRUCTURED_MAGNITUDE_LOCAL", lambda w: w.abs()),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8, 6))


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_ratios_below_drops_what_scores_less(name, threshold):
    method, score = METHODS[name]
    model = network()
    weights = {f"{i}.weight": model[i].weight.detach().clone() for i in (0, 2)}
    ratios = ratios_below(model, method, threshold)
    if name == "global scores":
        method = METHODS["elements"][0]
    pyprune.prune(model, method, ratio=ratios)
    for key, weight in weights.items():
        scores = score(weight)
        below = (scores < threshold).flatten()
        if below.all():
            below[scores.flatten().argmax()] = False
        mask = (model.get_parameter(key) != 0).reshape(len(below), -1).any(1)
        assert torch.equal(~mask, below), key


def test_ratios_below_sees_raw_weights_and_leaves_the_model():
    model = network()
    method = METHODS["elements"][0]
    expected = ratios_below(model, method, 0.1)
    pyprune.prune(model, method, ratio=0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ratios_below(model, method, 0.1) == expected
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(ratios_below(model, method, 0.1, ignored_scope=IgnoredScope(names=["0"]))) == ["2.weight"]


@pytest.mark.parametrize(
    ("method", "threshold", "error", "words"),
    [
        ("UNSTRUCTURED_HARD_CONCRETE", 0.1, ValueError, "trains gates"),
        ("UNSTRUCTURED_MAGNITUDE_LOCAL", "0.1", TypeError, "threshold is '0.1'"),
        ("UNSTRUCTURED_MAGNITUDE_LOCAL", float("nan"), ValueError, "threshold is nan"),
        (Method(importance.taylor()), 0.1, TypeError, "needs statistics"),
        (Method(lambda weight: weight / 0), 0.1, ValueError, r"NaN or infinite scores in 0\.weight, 2\.weight"),
    ],
)
def test_ratios_below_says_what_is_wrong(method, threshold, error, words):
    with pytest.raises(error, match=words):
        ratios_below(network(), method, threshold)
