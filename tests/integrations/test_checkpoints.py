import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.integrations.checkpoints import keep_plain, load_masked_state, masked_state
from tests.conftest import masks_of

LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
CHANNELS = Method(importance.magnitude(), granularity.channel(), scope.tensor())


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_keep_plain_saves_what_strip_leaves(case):
    model = pyprune.prune(case.model, LOCAL, ratio=0.5)
    stripped = pyprune.strip(model, do_copy=True)
    hooks = keep_plain(model)
    assert equal(dict(model.state_dict()), dict(stripped.state_dict()))
    for hook in hooks:
        hook.remove()
    assert any("parametrizations" in name for name in model.state_dict())


def test_keep_plain_saves_one_tensor_of_a_tied_weight(transformer):
    model = pyprune.prune(transformer.model, LOCAL, ratio=0.5)
    keep_plain(model)
    state = model.state_dict()
    assert state["embed.weight"].data_ptr() == state["decoder.weight"].data_ptr()


def test_keep_plain_loads_what_it_saved(case):
    model = pyprune.prune(case.model, LOCAL, ratio=0.5)
    other = pyprune.prune(copy.deepcopy(model), LOCAL, ratio=0.2)
    keep_plain(model)
    keep_plain(other)
    for parameter in other.parameters():
        parameter.data.normal_()
    other.load_state_dict(model.state_dict())
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    for mine, others in zip(masks_of(model).values(), masks_of(other).values(), strict=True):
        assert torch.equal(mine, others)


def test_keep_plain_knows_the_names_below_a_wrapper(cnn):
    model = pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    keep_plain(model)
    wrapper = nn.Sequential(model)
    names = [f"0.{name}" for name in pyprune.strip(model, do_copy=True).state_dict()]
    state = wrapper.state_dict()
    assert sorted(state) == sorted(names)
    wrapper.load_state_dict(state)


def test_loading_keeps_biases_that_are_zero_by_chance(cnn):
    model = pyprune.prune(cnn.model, CHANNELS, ratio=0.5, examples_inputs=cnn.inputs, zero_dead_channels=True)
    keep_plain(model)
    state = model.state_dict()
    assert (state["bn1.bias"] == 0).all()
    before = [mask.clone() for mask in masks_of(model).values()]
    model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, masks_of(model).values(), strict=True))


def test_masked_state_brings_back_what_lies_under_the_masks(case):
    model = pyprune.prune(case.model, LOCAL, ratio=0.5)
    exact = copy.deepcopy(model.state_dict())
    state = masked_state(model)
    again = pyprune.prune(copy.deepcopy(model), LOCAL, ratio=0.1)
    keep_plain(again)
    again.load_state_dict(pyprune.strip(model, do_copy=True).state_dict())
    for hooks in (again._state_dict_hooks, again._load_state_dict_pre_hooks):
        hooks.clear()
    assert not equal(dict(again.state_dict()), exact)
    load_masked_state(again, state)
    assert equal(dict(again.state_dict()), exact)


def test_load_masked_state_refuses_other_masks(cnn, unchanged):
    state = masked_state(pyprune.prune(copy.deepcopy(cnn.model), LOCAL, ratio=0.5))
    scope = pyprune.IgnoredScope(names=["fc"])
    model = pyprune.prune(cnn.model, LOCAL, ratio=0.5, ignored_scope=scope)
    before = unchanged(model)
    with pytest.raises(ValueError, match=r"differ in fc\.weight; resume with"):
        load_masked_state(model, state)
    before.check()
