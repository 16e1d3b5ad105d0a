import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.following import norms_after
from pyprune.masks import FollowingMask
from pyprune.targets import attachments_of

FILTERS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())


def followers(model):
    return {t.name: m.mask for t, m in attachments_of(model).items() if isinstance(m, FollowingMask)}


def test_norms_after_sees_what_goes_in_as_it_is(cnn):
    model = cnn.model
    assert norms_after(model, [model.conv1, model.conv2, model.fc], cnn.inputs) == {
        model.conv1: model.bn1,
        model.conv2: model.bn2,
    }


class Doubtful(nn.Module):
    """A convolution whose output is changed before the norm, two that share a norm, and one that two follow."""

    def __init__(self):
        super().__init__()
        self.changed, self.one, self.other, self.twice = (nn.Conv2d(2, 2, 1) for _ in range(4))
        self.norm, self.shared, self.first, self.second = (nn.BatchNorm2d(2) for _ in range(4))

    def forward(self, x):
        changed = self.changed(x)
        changed += x
        both = self.shared(self.one(x)) + self.shared(self.other(x))
        twice = self.twice(x)
        return self.norm(changed) + both + self.first(twice) + self.second(twice)


def test_norms_after_leaves_out_what_is_not_certain(unchanged):
    model, x = Doubtful(), torch.randn(1, 2, 3, 3)
    before = unchanged(model)
    layers = [model.changed, model.one, model.other, model.twice]
    assert norms_after(model, layers, x) == {}
    before.check()


def test_dead_channels_are_zero_with_their_bias_and_norm(cnn):
    model = cnn.model
    model.train()(cnn.inputs)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.bias.fill_(1.0)
    pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=cnn.inputs, zero_dead_channels=True)
    assert set(followers(model)) == {"conv1.bias", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", "fc.bias"}
    seen = {}
    model.bn1.register_forward_hook(lambda *call: seen.update(bn1=call[2]))
    model.bn2.register_forward_hook(lambda *call: seen.update(bn2=call[2]))
    output = model.eval()(cnn.inputs)
    assert (seen["bn1"] == 0).all(3).all(2).all(0).sum() == 2
    assert (seen["bn2"] == 0).all(3).all(2).all(0).sum() == 3
    assert (output == 0).all(0).sum() == 2
    plain = pyprune.strip(model, do_copy=True)
    torch.testing.assert_close(plain(cnn.inputs), output)
    assert (plain.bn1.bias == 0).sum() == 2


def test_followers_keep_in_step_and_are_no_targets(cnn):
    model = cnn.model
    pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=cnn.inputs, zero_dead_channels=True)
    names = [tensor.tensor_name for tensor in pyprune.pruning_statistic(model).pruned_tensors]
    assert names == ["conv1.weight", "conv2.weight", "fc.weight"]
    model.conv1.parametrizations.weight.original.data[:2] *= 100
    model.conv1.parametrizations.weight.original.data[2:] *= 0.01
    pyprune.prune(model, FILTERS, ratio=0.5)
    assert followers(model)["bn1.bias"].tolist() == [True, True, False, False]
    pyprune.prune(model, FILTERS, ratio=0.0)
    assert all(mask.all() for mask in followers(model).values())
    # again, with the option: nothing is put on twice
    pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=cnn.inputs, zero_dead_channels=True)
    assert len(followers(model)) == 6


def test_followers_of_a_grouped_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    # An output channel of its weight is one of each group.
    model[0].weight.data[:, 1] = 0.1
    pyprune.prune(model, FILTERS, ratio=0.34, examples_inputs=torch.randn(1, 4, 3, 3), zero_dead_channels=True)
    assert followers(model)["1.bias"].tolist() == [True, False, True, True, False, True]
    assert (model.eval()(torch.randn(1, 4, 3, 3)) == 0).all(3).all(2).squeeze(0).tolist() == [
        False, True, False, False, True, False
    ]  # fmt: skip


def test_followers_are_saved_and_loaded(cnn, device):
    pyprune.prune(cnn.model, FILTERS, ratio=0.5, examples_inputs=cnn.inputs, zero_dead_channels=True)
    fresh = type(cnn.model)().to(device)
    pyprune.load_from_config(fresh, pyprune.get_config(cnn.model)).load_state_dict(cnn.model.state_dict())
    assert pyprune.pruning_statistic(fresh) == pyprune.pruning_statistic(cnn.model)
    torch.testing.assert_close(fresh.eval()(cnn.inputs), cnn.model.eval()(cnn.inputs))
    pyprune.prune(fresh, FILTERS, ratio=0.0)
    assert all(mask.all() for mask in followers(fresh).values())


def test_zero_dead_channels_must_see_the_norms(cnn, unchanged):
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match="give examples_inputs"):
        pyprune.prune(cnn.model, FILTERS, ratio=0.5, zero_dead_channels=True)
    before.check()
    pyprune.prune(cnn.model.fc, FILTERS, ratio=0.5, zero_dead_channels=True)  # no norm, no inputs
    assert (cnn.model.fc.bias == 0).sum() == 2


def test_batch_norm_scale_is_the_raw_one_under_a_mask():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model[1].weight.data = torch.arange(8.0, 0.0, -1.0)
    method = Method(importance.batch_norm_scale(), granularity.channel("out"), scope.tensor())
    for ratio in (0.9, 0.5):
        inputs = torch.randn(2, 1, 8, 8)
        pyprune.prune(model, method, ratio=ratio, examples_inputs=inputs, zero_dead_channels=True)
    assert followers(model)["1.weight"].tolist() == [True] * 4 + [False] * 4
