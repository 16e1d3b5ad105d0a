import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pyprune
from pyprune.modules.attachments import (
    Owner,
    attach,
    dense_modules,
    dense_parameters,
    detach,
    shared_attachment,
)
from pyprune.modules.holding import Hold
from pyprune.modules.masks import NewMask, attach_masks, masks_in
from pyprune.modules.undo import Change

LOCAL, GLOBAL = pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL


def test_masks_leave_a_parametrization_of_another_attribute_alone():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "bias", Double())
    twin = copy.deepcopy(linear)
    pyprune.prune(linear, LOCAL, ratio=0.5)
    assert int(linear.weight.count_nonzero()) == 8
    pyprune.strip(linear)
    assert parametrize.is_parametrized(linear, "bias")
    assert not parametrize.is_parametrized(linear, "weight")
    assert torch.equal(linear.bias, twin.bias)
    assert twin(torch.ones(1, 4)).shape == (1, 4)


def test_dense_parameters_are_those_of_the_dense_model(case):
    names = [name for name, _ in case.model.named_parameters(remove_duplicate=False)]
    modules = [(name, module) for name, module in case.model.named_modules()]
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    pyprune.prune(case.model, GLOBAL, ratio=0.5)
    assert [owner.name for owner, _ in dense_parameters(case.model)] == names
    for owner, parameter in dense_parameters(case.model):
        assert parameter is parameters[owner.name]
    assert list(dense_modules(case.model)) == modules


def with_child(name):
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 4))
    model.head = nn.Linear(4, 4)
    return model


class WithWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self._orig_mod = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4))


class Fabric(nn.Module):
    """As Lightning's: what is wrapped, and the model in it."""

    def __init__(self):
        super().__init__()
        self._original_module = nn.Linear(4, 4)
        self._forward_module = nn.DataParallel(self._original_module)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (with_child("_forward_module"), ["_forward_module.weight", "head.weight"]),
        (with_child("_orig_mod"), ["_orig_mod.weight", "head.weight"]),
        (WithWeight(), ["weight", "_orig_mod.weight"]),
        (Fabric(), ["weight"]),
    ],
)
def test_dense_parameters_are_all_there_are_outside_of_wrappers(model, expected):
    assert [owner.name for owner, parameter in dense_parameters(model) if parameter.dim() == 2] == expected


def test_attach_and_detach_reach_a_module_with_two_names():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"one": shared, "two": shared})
    owners = [owner for owner, _ in dense_parameters(model) if owner.attribute == "weight"]
    assert [owner.name for owner in owners] == ["one.weight", "two.weight"]
    attach_masks(model, [NewMask(owners, torch.eye(3, dtype=torch.bool))])
    assert len(masks_in(model)) == 1
    assert int(shared.weight.count_nonzero()) == 3
    detach(owners)
    assert type(shared) is nn.Linear
    assert list(shared._parameters) == ["weight", "bias"]


def test_detach_of_one_mask_leaves_the_others(recurrent):
    lstm = recurrent.model.lstm
    owners = [Owner(name, lstm, name) for name in ("weight_ih_l0", "weight_hh_l1")]
    attach_masks(
        lstm,
        [NewMask([owner], torch.zeros_like(getattr(lstm, owner.attribute), dtype=torch.bool)) for owner in owners],
    )
    detach(owners[:1])
    assert shared_attachment(owners[:1]) is None
    assert shared_attachment(owners) is owners[1].attachment
    assert next(name for name, _ in lstm.named_parameters()) == "weight_ih_l0"
    assert not lstm.weight_hh_l1.any()
    x = torch.ones_like(recurrent.inputs)
    before = lstm(x)[0]
    with torch.no_grad():
        lstm.weight_hh_l1 += 1
    assert torch.equal(lstm(x)[0], before)


def test_detach_leaves_an_rnn_with_another_parametrization_its_own_methods():
    lstm = nn.LSTM(3, 4)
    parametrize.register_parametrization(lstm, "bias_ih_l0", nn.Identity())
    names = set(vars(type(lstm)))
    pyprune.prune(lstm, LOCAL, ratio=0.5)
    pyprune.strip(lstm)
    assert set(vars(type(lstm))) == names
    assert lstm._flat_weights[0] is lstm.weight_ih_l0


def test_attach_changes_nothing_when_one_refuses(cnn, unchanged, monkeypatch):
    owners = [[owner] for owner, _ in dense_parameters(cnn.model) if owner.attribute == "weight"]
    before = unchanged(cnn.model)
    put_on, calls = Hold.put_on, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("no room")
        put_on(*args)

    monkeypatch.setattr(Hold, "put_on", fail)
    with pytest.raises(RuntimeError, match="no room"), Change(cnn.model):
        attach((places, Hold(torch.ones_like(places[0].parameter, dtype=torch.bool))) for places in owners)
    before.check()


def test_attach_keeps_the_gradient_accumulator():
    # DistributedDataParallel hooks into it, and waits in vain for another one.
    def accumulator():
        return weight.view_as(weight).grad_fn.next_functions[0][0]

    linear = nn.Linear(4, 4)
    weight = linear.weight
    before = accumulator()
    pyprune.prune(linear, LOCAL, ratio=0.5)
    assert linear.weight is weight
    assert accumulator() is before
    pyprune.strip(linear)
    assert accumulator() is before
