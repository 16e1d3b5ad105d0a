"""States of pruners, recipes and losses, damaged in every field: refused, and nothing is changed."""

import copy
import math

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, Recipe, importance, schedules

DAMAGES = (None, True, -1, 2.5, 2**70, "no", [], [1], {}, {"a": 1}, b"x", math.nan, torch.zeros(23))
# What is right, too, where it says so: other numbers and flags.
RIGHT = {"step_count": (), "ratio": (), "frozen": (True,), "is_late": (True,), "unit": (None,)}
RIGHT |= {"parked": (None,), "followers": (None,), "multipliers": (), "_steps": ()}


def trained(make, steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = make(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        pruner.step()
    return model, pruner


def pruner_by(rule):
    schedule = schedules.cubic(0.5, start=2, end=9, frequency=2)
    return lambda model, optimizer: pyprune.Pruner(model, Method(rule), schedule, optimizer)


def with_followers(model, optimizer):
    with torch.no_grad():
        model[0].weight[:2] = 0
    return pyprune.Pruner(
        model, Method(importance.magnitude()), schedules.cubic(0.5, end=9), optimizer, zero_dead_channels=True
    )


def constant(model, optimizer):
    with torch.no_grad():
        model[0].weight[:2] = 0
    return Recipe.from_string("stages: [constant]").apply(model, optimizer, steps_per_epoch=2)


RECIPE = Recipe.from_string("stages: [prune: {final: 0.5, end: 4}]")
PRUNERS = {
    "magnitude": pruner_by(importance.magnitude()),
    "taylor": pruner_by(importance.taylor()),
    "wanda": pruner_by(importance.wanda()),
    "dead channels": with_followers,
    "ac_dc": lambda model, optimizer: pyprune.ac_dc(model, 0.5, optimizer, end=8, frequency=2),
    "rigl": lambda model, optimizer: pyprune.RigLPruner(model, 0.5, optimizer, end=8, frequency=2),
    "movement": lambda model, optimizer: pyprune.MovementPruner(
        model, schedules.cubic(0.5, start=1, end=8), optimizer
    ),
    "recipe": lambda model, optimizer: RECIPE.apply(model, optimizer, steps_per_epoch=2),
    "constant recipe": constant,
}


def places(state, path=()):
    """Yield the way to each entry of a state, but of torch's own state of an optimizer only the first steps."""
    for key in state if isinstance(state, dict) else range(len(state)):
        yield (*path, key)
        if isinstance(state[key], (dict, list)) and "score_optimizer" not in (*path, key):
            yield from places(state[key], (*path, key))


def damaged(state, path, value):
    changed = copy.deepcopy(state)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def is_right(path, value, old):
    if type(value) is type(old) and not isinstance(value, torch.Tensor) and repr(value) == repr(old):
        return True
    name = path[-1] if isinstance(path[-1], str) else path[-2] if len(path) > 1 else ""
    return any(type(value) is type(one) and value == one for one in RIGHT.get(name, ()))


@pytest.mark.parametrize("kind", PRUNERS)
def test_load_state_dict_refuses_every_damage_and_changes_nothing(kind, unchanged):
    model, pruner = trained(PRUNERS[kind])
    state = pruner.state_dict()
    before, masks = unchanged(model), pyprune.get_config(model)["masks"]
    seen = 0
    for path in places(state):
        old = state
        for key in path:
            old = old[key]
        for value in DAMAGES:
            if is_right(path, value, old):
                continue
            with pytest.raises((TypeError, ValueError)):
                pruner.load_state_dict(damaged(state, path, value))
            seen += 1
        if isinstance(old, torch.Tensor) and old.is_floating_point() and old.numel():
            with pytest.raises(ValueError, match=r"finite|NaN"):
                pruner.load_state_dict(damaged(state, path, torch.full_like(old, math.nan)))
        if isinstance(old, torch.Tensor) and old.is_floating_point():
            for dtype in (torch.complex64, torch.int64, torch.bool):
                with pytest.raises(ValueError, match=r"numbers|weights"):
                    pruner.load_state_dict(damaged(state, path, old.to(dtype)))
        if path[-1] == "followers":
            for wrong in (old[:-1] if old else [None], [*old, None], [torch.ones(3) for _ in old] or [None]):
                with pytest.raises(ValueError, match=rf"the state of {path[-2]} has "):
                    pruner.load_state_dict(damaged(state, path, wrong))
    assert seen > 40
    before.check()
    assert [one["bits"].tolist() for one in pyprune.get_config(model)["masks"]] == [m["bits"].tolist() for m in masks]
    pruner.load_state_dict(state)


def test_lagrangian_loss_refuses_a_damaged_state():
    model = pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_HARD_CONCRETE")
    loss = pyprune.LagrangianLoss(model, 0.5)
    loss.step()
    state = loss.state_dict()
    for name, value in state.items():
        for damage in (torch.full_like(value.double(), math.nan), torch.zeros(5), None, 3, "no", value.to("meta")):
            with pytest.raises(ValueError, match=name):
                loss.load_state_dict({**state, name: damage})
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())
    loss.load_state_dict(state)
