import random

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.modules.snapshots import Snapshot, check_rewindable, dense_tensors, restored_on_failure, rewind
from tests.fault_injector import differences, look

FILTERS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())


def disturb(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(1)


def test_restore_brings_back_a_dense_model(case, unchanged):
    before = unchanged(case.model)
    snapshot = Snapshot.of(case.model)
    pyprune.prune(case.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    disturb(case.model)
    snapshot.restore(case.model)
    before.check()


def test_restore_brings_back_masks_and_takes_off_what_followed_others(cnn):
    model = pyprune.prune(cnn.model, FILTERS, ratio=0.3, ignored_scope=pyprune.IgnoredScope(names=["conv2"]))
    units = pyprune.pruning_statistic(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshot = Snapshot.of(model)
    # Other masks on the same weights, of other units, and new ones.
    everywhere = Method(importance.magnitude())
    pyprune.prune(model, everywhere, ratio=0.8, examples_inputs=cnn.inputs, zero_dead_channels=True)
    disturb(model)
    snapshot.restore(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert pyprune.pruning_statistic(model) == units


def test_snapshot_shares_no_memory_with_the_model_and_keeps_ties(transformer):
    snapshot = Snapshot.of(transformer.model)
    assert snapshot.state["decoder.weight"] is snapshot.state["embed.weight"]
    old = snapshot.state["embed.weight"].clone()
    disturb(transformer.model)
    assert torch.equal(snapshot.state["embed.weight"], old)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_restored_on_failure(cnn, unchanged, error):
    before = unchanged(cnn.model.eval())

    def prune_and_fail():
        with restored_on_failure(cnn.model):
            pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
            disturb(cnn.model.train())
            raise error

    with pytest.raises(error):
        prune_and_fail()
    before.check()
    with restored_on_failure(cnn.model):
        disturb(cnn.model)
    assert not torch.equal(cnn.model.fc.bias, before.seen["state"]["fc.bias"])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, inputs):
        return self.norm(self.fc(inputs))


def train(model):
    """Do to a model what the functions of users do."""
    model.train()
    model.seen += 1
    model(torch.randn(16, 8)).square().mean().backward()
    disturb(model)
    model.norm.requires_grad_(False)
    model.fc.register_forward_hook(lambda *given: None)
    model.note = np.random.rand(), random.random()
    model.fc.bias.data = torch.zeros(3)


@pytest.mark.parametrize("is_masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("has_gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_restored_on_failure_brings_back_whatever_a_function_did(error, is_masked, has_gradients):
    model = Counting().eval()
    model.norm.train()
    model.fc.bias.requires_grad_(False)
    if is_masked:
        pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    if has_gradients:
        model(torch.randn(16, 8)).square().mean().backward()
    before = look({"model": model})

    def fail():
        with restored_on_failure(model):
            if is_masked:
                pyprune.prune(model, FILTERS, ratio=0.7)
            train(model)
            raise error

    with pytest.raises(error):
        fail()
    assert not differences(before, look({"model": model}))
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.0)  # what is parked came back, too
    torch.manual_seed(0)
    assert model.fc.weight.count_nonzero() == 64


def test_restore_holds_zeros_that_follow_a_weight_outside_of_the_model(cnn):
    pyprune.prune(cnn.model, FILTERS, ratio=0.6, examples_inputs=cnn.inputs, zero_dead_channels=True)
    part = nn.Sequential(cnn.model.bn1, cnn.model.fc)  # without the convolution that BatchNorm follows
    before = look({"model": part})
    snapshot = Snapshot.of(part)
    disturb(part)
    snapshot.restore(part)
    part.state_dict()
    assert not differences(before, look({"model": part}))


def test_dense_tensors_have_the_names_of_the_dense_model(case):
    dense = list(case.model.state_dict())
    pyprune.prune(case.model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    assert sorted(dense_tensors(case.model)) == sorted(dense)


def test_rewind_sets_weights_and_buffers_and_leaves_masks(cnn):
    early = {name: tensor.clone() for name, tensor in cnn.model.state_dict().items()}
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    zeros = pyprune.pruning_statistic(cnn.model)
    disturb(cnn.model)
    check_rewindable(cnn.model, early)
    rewind(cnn.model, early)
    assert pyprune.pruning_statistic(cnn.model) == zeros
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.0)
    for name, tensor in dense_tensors(cnn.model).items():
        assert torch.equal(tensor, early[name]), name


def test_check_rewindable_says_what_does_not_fit():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = dict(model.state_dict())
    with pytest.raises(TypeError, match="rewind_to is a list"):
        check_rewindable(model, [])
    with pytest.raises(ValueError, match=r"lacks 1.running_mean, has besides other, and has other shapes of 0.bias"):
        check_rewindable(model, {**state, "1.running_mean": None, "other": torch.ones(1), "0.bias": torch.ones(3)})
