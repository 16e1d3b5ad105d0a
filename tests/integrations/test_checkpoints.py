import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.integrations.checkpoints import load_masks, masks_follow_loading, state_of_masks
from tests.conftest import masks_of

LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
CHANNELS = Method(importance.magnitude(), granularity.channel(), scope.tensor())


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_dict_is_what_strip_leaves(case):
    model = pyprune.prune(case.model, LOCAL, ratio=0.5)
    stripped = pyprune.strip(model, do_copy=True)
    assert equal(dict(model.state_dict()), dict(stripped.state_dict()))
    with torch.no_grad():  # what is written, but not used yet, is not saved either
        for target in masks_of(model):
            target.parameter.add_(1)
    kept = {target.name: mask for target, mask in masks_of(model).items()}
    state = model.state_dict()
    assert all(not state[name][~mask].any() for name, mask in kept.items())


def test_a_state_dict_has_one_tensor_of_a_tied_weight(transformer):
    model = pyprune.prune(transformer.model, LOCAL, ratio=0.5)
    state = model.state_dict()
    assert state["embed.weight"].data_ptr() == state["decoder.weight"].data_ptr()


def test_masks_follow_loading(case):
    model = pyprune.prune(case.model, LOCAL, ratio=0.5)
    other = pyprune.prune(copy.deepcopy(model), LOCAL, ratio=0.2)
    hooks = masks_follow_loading(other)
    for parameter in other.parameters():
        parameter.data.normal_()
    other.load_state_dict(model.state_dict())
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    for mine, others in zip(masks_of(model).values(), masks_of(other).values(), strict=True):
        assert torch.equal(mine, others)
    for hook in hooks:
        hook.remove()
    before = [mask.clone() for mask in masks_of(other).values()]
    other.load_state_dict({name: torch.ones_like(tensor) for name, tensor in other.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(before, masks_of(other).values(), strict=True))


def test_masks_follow_what_is_loaded_into_a_part(cnn):
    model = pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    dense = {name: torch.ones_like(tensor) for name, tensor in model.fc.state_dict().items()}
    masks_follow_loading(nn.Sequential(model))
    model.fc.load_state_dict(dense)
    assert {target.name: bool(mask.all()) for target, mask in masks_of(model).items()} == {
        "conv1.weight": False,
        "conv2.weight": False,
        "fc.weight": True,
    }


def test_loading_keeps_biases_that_are_zero_by_chance(cnn):
    model = pyprune.prune(cnn.model, CHANNELS, ratio=0.5, examples_inputs=cnn.inputs, zero_dead_channels=True)
    masks_follow_loading(model)
    state = copy.deepcopy(model.state_dict())
    assert (state["bn1.bias"] == 0).all()
    before = [mask.clone() for mask in masks_of(model).values()]
    model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, masks_of(model).values(), strict=True))


def test_a_state_of_masks_brings_back_what_lies_under_them(case):
    model = pyprune.prune(case.model, LOCAL, ratio=0.5)
    state = state_of_masks(model)
    again = pyprune.prune(copy.deepcopy(model), LOCAL, ratio=0.1)
    again.load_state_dict(pyprune.strip(model, do_copy=True).state_dict())
    load_masks(again, state)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))
    for each in (again, model):
        pyprune.prune(each, LOCAL, ratio=0.0)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))


def test_load_masks_refuses_other_masks(cnn, unchanged):
    state = state_of_masks(pyprune.prune(copy.deepcopy(cnn.model), LOCAL, ratio=0.5))
    scope = pyprune.IgnoredScope(names=["fc"])
    model = pyprune.prune(cnn.model, LOCAL, ratio=0.5, ignored_scope=scope)
    before = unchanged(model)
    with pytest.raises(ValueError, match=r"differ in fc\.weight; resume with"):
        load_masks(model, state)
    before.check()
