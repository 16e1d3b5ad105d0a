import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.modules.snapshots import Snapshot, check_rewindable, dense_tensors, restored_on_failure, rewind

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
