import re
import warnings

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, granularity, importance, prune, scope


class Bare(nn.Module):
    """Most of its weights are a bare parameter."""

    def __init__(self, size):
        super().__init__()
        self.fc = nn.Linear(10, 10)
        self.bare = nn.Parameter(torch.randn(size, 10))
        self.scale = nn.Parameter(torch.ones(1000))  # no weight: one dimension

    def forward(self, x):
        return nn.functional.linear(self.fc(x), self.bare)


LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
TEXT = (
    "this reaches 33% of the weights of Bare, and leaves out bare (in no layer that is known; examples_inputs finds "
    "what a forward pass uses as a weight). Name in ignored_scope what is to stay dense"
)
CALLS = {
    "prune": lambda model, **options: prune(model, LOCAL, ratio=0.5, **options),
    "gates": lambda model, **options: prune(model, "UNSTRUCTURED_REGULARIZATION_BASED", **options),
    "pruner": lambda model, **options: pyprune.gmp(model, 0.5, None, end=3, **options),
    "keep_sparse": lambda model, **options: pyprune.keep_sparse(with_zeros(model), None, **options),
}


def with_zeros(model):
    for parameter in model.parameters():
        parameter.data.view(-1)[0] = 0
    return model


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_names_what_it_does_not_reach(call):
    with pytest.warns(UserWarning, match=f"^{re.escape(TEXT)}$") as caught:
        call(Bare(20))
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_said_of_what_is_reached_or_ignored_or_small(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(Bare(20), examples_inputs=torch.randn(2, 10))
        call(Bare(20), ignored_scope=IgnoredScope(names=["bare"]))
        call(Bare(1))


def test_it_is_said_once():
    model = Bare(20)
    with pytest.warns(UserWarning, match="this reaches"):
        prune(model, LOCAL, ratio=0.5)
    prune(model, LOCAL, ratio=0.6)  # warnings are errors in these tests


def test_names_are_the_largest_and_then_a_count():
    model = nn.ModuleDict({str(size): Bare(size) for size in range(20, 28)})
    with pytest.warns(
        UserWarning, match=r"leaves out 27\.bare, 26\.bare, 25\.bare, 24\.bare, 23\.bare and 3 more \("
    ):
        prune(model, LOCAL, ratio=0.5)


def test_what_an_importance_cannot_score_is_named():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    method = Method(importance.batch_norm_scale(), granularity.channel("out"), scope.tensor())
    with pytest.warns(
        UserWarning, match=r"reaches 20% .* leaves out 3\.weight \(without a score by batch_norm_scale\)"
    ):
        prune(model, method, ratio=0.5, examples_inputs=torch.randn(2, 1, 1, 1))


class Attending(nn.Sequential):
    def __init__(self):
        super().__init__(nn.MultiheadAttention(4, 2), nn.Linear(4, 24, bias=False))


PARTS = {
    "groups": (Method(importance.magnitude(), scope=scope.group({"first": ["0"]})), "in no group of the scope"),
    "heads": (Method(importance.magnitude(), granularity.head(2), scope.tensor()), "no part of attention heads"),
}


@pytest.mark.parametrize(
    "call",
    [
        lambda model, method, **options: prune(model, method, ratio=0.5, **options),
        lambda model, method, **options: pyprune.Pruner(model, method, pyprune.schedules.one_shot(0.5), **options),
    ],
    ids=["prune", "pruner"],
)
@pytest.mark.parametrize(("method", "reason"), PARTS.values(), ids=PARTS)
def test_what_groups_and_heads_leave_out_is_named_once(call, method, reason):
    model = Attending()
    with pytest.warns(UserWarning, match=rf"reaches 40% .* leaves out 1\.weight \({reason}\)") as caught:
        call(model, method)
    assert len(caught) == 1
    rest = Method(importance.magnitude(), scope=scope.group({"second": ["1"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, method)
        call(model, rest)
        call(Attending(), method, ignored_scope=IgnoredScope(names=["1.weight"]))
