import copy
import pickle

import pytest
import torch
from torch import nn

from pyprune import plan_of, rebuild, shrink
from tests.structured.dead_units import kill, shake


def block():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def small():
    torch.manual_seed(0)
    model, x = shake(nn.Sequential(block(), block())), torch.randn(3, 4)
    assert kill(model, x)
    shrink(model, x)
    return model, x


def test_plan_of_is_that_of_shrink_and_goes_with_copies():
    model, x = small()
    plan = plan_of(model)
    assert plan.tensors
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
    ):
        assert plan_of(other) == plan
    assert shrink(model, x).plan == plan  # nothing more went
    assert "_pyprune_plan" not in model.state_dict()


def test_plan_of_a_part_is_of_that_part():
    model, _ = small()
    part = model[1]
    x = torch.randn(3, part[0].in_features)
    fresh = rebuild(block(), plan_of(part))
    fresh.load_state_dict(part.state_dict())
    assert torch.equal(fresh(x), part(x))


def test_plan_of_goes_with_parts_into_another_model():
    model, x = small()
    other = nn.ModuleDict({"body": nn.Sequential(model[1], block()), "head": nn.Linear(4, 2)})
    plan = plan_of(other)
    assert plan.model == "ModuleDict"
    fresh = rebuild(nn.ModuleDict({"body": nn.Sequential(block(), block()), "head": nn.Linear(4, 2)}), plan)
    fresh.load_state_dict(other.state_dict())
    # A part first, and then all of it.
    part = shake(block(), seed=1)
    kill(part, x)
    shrink(part, x)
    whole = nn.Sequential(part, shake(block(), seed=2))
    kill(whole, x)
    expected = whole(x)
    shrink(whole, x)
    fresh = rebuild(nn.Sequential(block(), block()), plan_of(whole))
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(fresh(x), whole(x))
    assert torch.allclose(whole(x), expected, atol=1e-5)


def test_plan_of_a_model_that_was_not_shrunk():
    assert plan_of(nn.Linear(2, 2)) is None
    model = block()
    assert shrink(model, torch.randn(2, 4)).plan.tensors == {}
    assert plan_of(model) is None
    with pytest.raises(TypeError, match="model"):
        plan_of([nn.Linear(2, 2)])


def test_a_shrink_that_fails_is_not_remembered(monkeypatch):
    model, x = small()
    plan = plan_of(model)
    kill(model, x)
    monkeypatch.setattr("pyprune.structured.shrink.let_configs_say", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shrink(model, x)
    assert plan_of(model) == plan
