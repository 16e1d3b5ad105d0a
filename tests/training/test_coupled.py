"""Coupled units over a training: schedules, rounds, recipes, states."""

import copy
import warnings

import numpy as np
import pytest
import torch

import pyprune
from pyprune import IgnoredScope, Method, Pruner, coupled_groups, granularity, importance, schedules, scope
from pyprune.modules.masks import masks_in
from pyprune.structured import trace
from tests.selection.coupled_models import model_and_inputs

MAGNITUDE = Method(importance.magnitude(p=2), granularity.coupled(), scope.tensor())


def method(rule, **options):
    return Method(rule, granularity.coupled(**options), scope.tensor())


def train_step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def left_of(model):
    """Return how many channels of the stream and of the branch are left, in all that they lie in."""
    stream = [
        model.a.weight.flatten(1).any(1),
        model.c.weight.flatten(1).any(1),
        model.c.bias != 0,
        model.n.weight != 0,
        model.n.bias != 0,
        model.b.weight.transpose(0, 1).flatten(1).any(1),
        model.h.weight.any(0),
    ]
    inner = [model.b.weight.flatten(1).any(1), model.b.bias != 0, model.c.weight.transpose(0, 1).flatten(1).any(1)]
    for kind in (stream, inner):
        assert all(torch.equal(one, kind[0]) for one in kind)
    return int(stream[0].sum()), int(inner[0].sum())


@pytest.fixture
def training():
    torch.manual_seed(0)
    model, inputs = model_and_inputs("residual")
    return model.train(), inputs, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


RULES = [
    importance.magnitude(p=2),
    importance.snip(),
    importance.taylor(),
    importance.taylor(joint=True),
    importance.wanda(),
    importance.apoz(),
    importance.geometric_median(),
    importance.random(),
    importance.batch_norm_scale(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.filterwarnings("ignore:coupled units of these groups are left alone")
def test_pruner_coupled_follows_a_schedule(training, rule):
    model, inputs, optimizer = training
    schedule = schedules.linear(0.5, start=1, end=5, frequency=2)
    pruner = Pruner(model, method(rule), schedule, optimizer, examples_inputs=inputs)
    seen = [left_of(model)]
    for _ in range(6):
        train_step(model, optimizer, inputs)
        pruner.step()
        seen.append(left_of(model))
    if rule.name == "batch_norm_scale":  # there is none inside of the branch
        assert seen == [(8, 6), (8, 6), (8, 6), (6, 6), (6, 6), (4, 6), (4, 6)]
    else:
        assert seen == [(8, 6), (8, 6), (8, 6), (6, 4), (6, 4), (4, 3), (4, 3)]


def test_pruner_coupled_traces_once(training, monkeypatch):
    model, inputs, optimizer = training
    calls, real = [], trace.trace
    monkeypatch.setattr("pyprune.structured.groups.trace", lambda *args: calls.append(1) or real(*args))
    pruner = Pruner(model, MAGNITUDE, schedules.linear(0.5, end=4), optimizer, examples_inputs=inputs)
    for _ in range(4):
        train_step(model, optimizer, inputs)
        assert pruner.step()
    assert len(calls) == 1
    assert left_of(model) == (4, 3)


@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_gmp_coupled_of_a_cost(training, of):
    model, inputs, optimizer = training
    found = coupled_groups(model, inputs)
    cost = found.macs if of == "macs" else found.parameters
    counted = method(importance.magnitude(p=2), ratio_of=of)
    pruner = pyprune.gmp(model, 0.6, optimizer, end=4, method=counted, examples_inputs=inputs)
    shares = []
    for _ in range(4):
        train_step(model, optimizer, inputs)
        pruner.step()
        left = left_of(model)
        kept = [np.arange(len(group)) < count for group, count in zip(found, left, strict=True)]
        shares.append(cost(kept) / cost())
        assert shares[-1] <= 1 - pruner.ratio
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < shares[-1] <= 0.4


def test_pruner_coupled_that_never_comes_back(training):
    model, inputs, optimizer = training
    steps = schedules.linear(0.75, end=3)
    pruner = Pruner(model, method(importance.random()), steps, optimizer, examples_inputs=inputs, reintroduce=False)
    before = model.n.weight != 0
    for _ in range(3):
        train_step(model, optimizer, inputs)
        pruner.method = method(importance.random(pruner.step_count))  # which wants others each time
        pruner.step()
        now = model.n.weight != 0
        assert not (now & ~before).any()
        before = now
    assert left_of(model) == (2, 1)


def test_pruner_coupled_resumes(training):
    model, inputs, optimizer = training
    other = copy.deepcopy(model)
    optimizers = [optimizer, torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9)]
    pruners = [
        Pruner(one, MAGNITUDE, schedules.linear(0.5, end=4), its, examples_inputs=inputs)
        for one, its in zip((model, other), optimizers, strict=True)
    ]
    for _ in range(2):
        train_step(model, optimizer, inputs)
        pruners[0].step()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pruners[1].load_state_dict(pruners[0].state_dict())
    for _ in range(2):
        for one, its, pruner in zip((model, other), optimizers, pruners, strict=True):
            train_step(one, its, inputs)
            pruner.step()
    for one, its in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, its)
    only_stream = Method(MAGNITUDE.importance, MAGNITUDE.granularity, scope.group({"stream": ["a"]}))
    plain, _ = model_and_inputs("residual")
    narrower = Pruner(plain, only_stream, schedules.linear(0.5, end=4), examples_inputs=inputs)
    with pytest.raises(ValueError, match="the state is of the weights"):
        narrower.load_state_dict(pruners[0].state_dict())


def test_ac_dc_coupled_opens_all(training):
    model, inputs, optimizer = training
    pruner = pyprune.ac_dc(model, 0.5, optimizer, end=8, frequency=2, method=MAGNITUDE, examples_inputs=inputs)
    seen = []
    for _ in range(8):
        train_step(model, optimizer, inputs)
        pruner.step()
        masks = {id(mask.parameter): mask.mask for mask in masks_in(model)}
        seen.append(int(masks[id(model.n.bias)].sum()))
    assert seen == [8, 4, 4, 8, 8, 4, 4, 4]


def test_iterative_prune_coupled(training):
    model, inputs, _ = training
    result = pyprune.iterative_prune(
        model,
        (0.25, 0.5),
        MAGNITUDE,
        lambda model: train_step(model, torch.optim.SGD(model.parameters(), lr=0.01), inputs),
        lambda model: float(model(inputs).square().mean()),
        examples_inputs=inputs,
        progress=False,
    )
    assert left_of(model) == (4, 3)
    assert [one.ratio for one in result.history] == [0.25, 0.5]
    dense, _ = model_and_inputs("residual")
    with pytest.raises(ValueError, match="examples_inputs is None"):
        pyprune.iterative_prune(dense, (0.5,), MAGNITUDE, lambda model: None, lambda model: 0.0)


RECIPE = """
stages:
  - prune:
      final: 0.5
      end: 2
      importance: {magnitude: {p: 2}}
      granularity: {coupled: {ratio_of: macs, round_to: 2}}
      scope: model
  - constant
"""


def test_recipe_coupled(training):
    model, inputs, optimizer = training
    found = coupled_groups(model, inputs)
    pruner = pyprune.Recipe.from_string(RECIPE).apply(model, optimizer, steps_per_epoch=2, examples_inputs=inputs)
    for _ in range(5):
        train_step(model, optimizer, inputs)
        pruner.step()
    left = left_of(model)
    assert all(count % 2 == 0 for count in left)
    assert found.macs([np.arange(len(group)) < count for group, count in zip(found, left, strict=True)]) <= (
        0.5 * found.macs()
    )
    pruner.finish()
    assert not masks_in(model)
    assert left_of(model) == left


def test_recipe_coupled_says_what_lacks(training):
    model, _, optimizer = training
    with pytest.raises(ValueError, match="examples_inputs is None"):
        pyprune.Recipe.from_string(RECIPE).apply(model, optimizer, steps_per_epoch=2)
    with pytest.raises(ValueError, match="ratio_of"):
        pyprune.Recipe.from_string(RECIPE.replace("macs", "flops"))


def test_sensitivity_coupled_by_group():
    model, inputs = model_and_inputs("residual")
    before = copy.deepcopy(model.state_dict())
    seen = []

    def score(pruned):
        seen.append(left_of(pruned))
        return float(pruned(inputs).square().mean())

    counted = Method(importance.magnitude(p=2), granularity.coupled(ratio_of="macs"), scope.model())
    result = pyprune.sensitivity(
        model, score, ratios=[0.5, 0.75], method=counted, examples_inputs=inputs, progress=False
    )
    assert seen == [(8, 6), (4, 6), (2, 6), (8, 3), (8, 1)]
    assert {name: target.units for name, target in result.targets.items()} == {"a.weight": 8, "b.weight": 6}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ratios = pyprune.allocation_from_sensitivity(result, 0.5)
    pyprune.prune(model, MAGNITUDE, ratio=ratios, examples_inputs=inputs)
    assert left_of(model) != (8, 6)


def test_ratios_below_coupled():
    model, inputs = model_and_inputs("residual")
    scores = {"a.weight": torch.arange(8.0), "b.weight": torch.arange(6.0)}
    given = method(importance.given(scores))
    ratios = pyprune.ratios_below(model, given, 3.0, examples_inputs=inputs)
    assert ratios == {"a.weight": 3 / 8, "b.weight": 0.5}
    pyprune.prune(model, given, ratio=ratios, examples_inputs=inputs)
    assert left_of(model) == (5, 3)


def test_pruner_coupled_ignores_groups_with_a_part_that_is_ignored(training):
    model, inputs, optimizer = training
    ignored = IgnoredScope(names=["h"])
    with pytest.warns(UserWarning, match=r"left alone: a.weight \(a part of the group is in ignored_scope\)"):
        pruner = Pruner(
            model, MAGNITUDE, schedules.linear(0.5, end=1), optimizer, ignored_scope=ignored, examples_inputs=inputs
        )
    train_step(model, optimizer, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        pruner.step()
    assert left_of(model) == (8, 3)
    with pytest.raises(ValueError, match="zero_dead_channels masks"):
        Pruner(model, MAGNITUDE, schedules.linear(0.5, end=1), zero_dead_channels=True, examples_inputs=inputs)
