import copy
import warnings

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.modules.masks import FollowingMask
from pyprune.modules.norms import norms_after
from pyprune.modules.targets import attachments_of
from tests.conftest import attached

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
    model.conv1.weight.data[:2] *= 100
    model.conv1.weight.data[2:] *= 0.01
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


def test_followers_keep_in_step_under_other_names_and_in_copies():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pyprune.prune(model, FILTERS, ratio=0.5, zero_dead_channels=True)
    twin = copy.deepcopy(model)
    for wrapped, inner in ((nn.Sequential(model), model), (torch.compile(twin, backend="eager"), twin)):
        pyprune.prune(wrapped, FILTERS, ratio=0.0)
        assert all(mask.all() for mask in followers(inner).values())
        pyprune.prune(wrapped, FILTERS, ratio=0.25)
        assert [int(mask.sum()) for mask in followers(inner).values()] == [3, 3]
    pyprune.prune(model, FILTERS, ratio=0.0)
    assert [int(mask.sum()) for mask in followers(twin).values()] == [3, 3]  # a copy follows its own weights
    saved = pyprune.get_config(nn.Sequential(twin))
    fresh = pyprune.load_from_config(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), saved)
    pyprune.prune(fresh, FILTERS, ratio=0.5)
    assert [int(mask.sum()) for mask in followers(fresh).values()] == [2, 2]
    saved["masks"][1]["follows"] = "nowhere"
    with pytest.raises(ValueError, match="follows 'nowhere', which has none"):
        pyprune.load_from_config(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), saved)


def test_a_norm_that_an_ignored_layer_shares_is_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    model = Shared()
    ignored = pyprune.IgnoredScope(names=["b"])
    inputs = torch.randn(1, 1, 3, 3)
    options = {"examples_inputs": inputs, "zero_dead_channels": True, "ignored_scope": ignored}
    with pytest.warns(UserWarning, match="does not reach behind norm, where dead channels are not zero"):
        pyprune.prune(model, FILTERS, ratio=0.5, **options)
    assert set(followers(model)) == {"a.bias"}


@pytest.mark.parametrize("tokens", [4, 5])
def test_a_norm_over_tokens_does_not_follow_channels(tokens):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(tokens))
    inputs = torch.randn(2, tokens, 3)
    with pytest.warns(UserWarning, match="does not reach behind 1, where dead channels are not zero"):
        pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=inputs, zero_dead_channels=True)
    assert set(followers(model)) == {"0.bias"}


def test_a_weight_that_is_tied_the_other_way_round_is_followed_by_both_biases():
    model = nn.ModuleList([nn.Conv2d(2, 8, 3), nn.ConvTranspose2d(8, 2, 3)])
    model[1].weight = model[0].weight
    pyprune.prune(model, Method(importance.magnitude()), ratio=0.9, zero_dead_channels=True)
    mask = attached(model[0]).mask
    assert torch.equal(followers(model)["0.bias"], mask.flatten(1).any(1))
    assert torch.equal(followers(model)["1.bias"], mask.transpose(0, 1).flatten(1).any(1))


def test_what_cannot_be_zeroed_is_refused_before_anything_changes(unchanged):
    plain = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, affine=False))
    shared = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
    shared[1].bias = shared[0].bias
    inputs = torch.randn(1, 1, 3, 3)
    for model, words in ((plain, "no scale and shift"), (shared, r"several names, 0\.bias and 1\.bias")):
        before = unchanged(model)
        with pytest.raises(ValueError, match=words):
            pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=inputs if model is plain else None,
                          zero_dead_channels=True)  # fmt: skip
        before.check()


@pytest.mark.parametrize(("make", "groups"), [
    (lambda: nn.Conv2d(4, 6, 1), 0), (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2), 2)
])  # fmt: skip
def test_followers_are_loaded_from_configs_that_say_less(make, groups):
    model = pyprune.prune(nn.Sequential(make()), FILTERS, ratio=0.5, zero_dead_channels=True)
    config = pyprune.get_config(model)
    (entry,) = [entry for entry in config["masks"] if "follows" in entry]
    del entry["outputs"]
    entry["groups"] = groups
    fresh = pyprune.load_from_config(nn.Sequential(make()), config)
    fresh.load_state_dict(model.state_dict())
    pyprune.prune(fresh, FILTERS, ratio=0.34)
    assert torch.equal(fresh[0].bias == 0, torch.autograd.functional.jacobian(fresh, torch.zeros(1, 4, 1, 1)).sum(
        (0, 2, 3, 4, 5, 6, 7)) == 0)  # fmt: skip
    assert int((fresh[0].bias == 0).sum()) == 2


@pytest.mark.parametrize("wrong", [{"outputs": 4}, {"outputs": -1}, {"outputs": "0"}, {"groups": 0, "outputs": 0},
                                   {"groups": 5}, {"outputs": 1}, {"groups": "x", "outputs": None}])  # fmt: skip
def test_followers_of_other_channels_are_refused(wrong):
    model = pyprune.prune(nn.Sequential(nn.Conv2d(4, 6, 1)), FILTERS, ratio=0.5, zero_dead_channels=True)
    config = pyprune.get_config(model)
    (entry,) = [entry for entry in config["masks"] if "follows" in entry]
    entry.update(wrong)
    with pytest.raises(ValueError, match=r"mask of 0\.bias follows '0\.weight', which has none, or other channels"):
        pyprune.load_from_config(nn.Sequential(nn.Conv2d(4, 6, 1)), config)


class Net(nn.Module):
    """Layers by name, and a forward pass as a function of them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(**options):
    return nn.Conv2d(3, 8, 3, **options)


def shuffled(model):
    """Give norms and biases values that show."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1:
            tensor.data.copy_(1 + torch.rand(tensor.shape, generator=generator))
        assert name
    return model.eval()


BATCH = nn.BatchNorm2d(8)


class FrozenNorm(nn.Module):
    """As those of torchvision: scale and shift are buffers."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("shift", torch.ones(channels))

    def forward(self, x):
        return x + self.shift.reshape(1, -1, 1, 1)


def one(norm, before=lambda y: y, after=lambda y: y, layer=None):
    return Net(lambda n, x: after(n.a(before(n.c(x)))), c=layer or conv(), a=norm)


ZERO = {
    "two norms after one layer": Net(
        lambda n, x: (n.a(n.c(x)), n.b(n.c(x[..., ::2]))), c=conv(), a=BATCH, b=nn.BatchNorm2d(8)
    ),
    "group norm": one(nn.GroupNorm(4, 8)),
    "instance norm": one(nn.InstanceNorm2d(8, affine=True)),
    "instance norm without scale": one(nn.InstanceNorm2d(8)),
    "instance norm with averages": one(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "after an activation": one(BATCH, nn.functional.relu),
    "after an activation in place": one(BATCH, nn.ReLU(inplace=True)),
    "after another norm": Net(lambda n, x: n.a(n.b(n.c(x)).relu()), c=conv(), b=BATCH, a=nn.BatchNorm2d(8)),
    "after pooling": one(BATCH, nn.AvgPool2d(2)),
    "layer norm": one(nn.LayerNorm(8), layer=nn.Linear(12, 8)),
    "layer norm of patches": one(
        nn.LayerNorm(8), lambda y: y.flatten(2).transpose(1, 2), lambda y: y.transpose(1, 2), conv(stride=3)
    ),
    "layer norm of permuted images": one(
        nn.LayerNorm(8), lambda y: y.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2)
    ),
}
SAID = {
    "one norm after two layers": Net(lambda n, x: n.a(n.c(x)) + n.a(n.d(x)), c=conv(), d=conv(), a=BATCH),
    "joined": one(nn.BatchNorm2d(16), lambda y: torch.cat([y, y + 1], 1)),
    "joined after an activation": one(nn.BatchNorm2d(16), lambda y: torch.cat((y.relu(), y), 1)),
    "after a sum": Net(lambda n, x: n.a(n.c(x) + n.d(x)), c=conv(), d=conv(), a=BATCH),
    "after a product": one(BATCH, lambda y: y * 2),
    "a frozen norm": one(FrozenNorm(8)),
    "group norm without scale": one(nn.GroupNorm(4, 8, affine=False)),
    "layer norm over all": one(nn.LayerNorm([8, 10, 10])),
    "norm of positions": one(nn.BatchNorm1d(12), layer=nn.Linear(12, 8), before=lambda y: y[:, 0]),
}


def channels_of(output, name):
    output = output if isinstance(output, tuple) else (output,)
    return [one.movedim(-1, 1).flatten(2) if name == "layer norm" else one.flatten(2) for one in output]


@pytest.mark.parametrize("name", ZERO)
def test_dead_channels_are_zero_after_every_norm(name):
    model, x = shuffled(copy.deepcopy(ZERO[name])), torch.randn(2, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=x, zero_dead_channels=True)
    for output in channels_of(model(x), name):
        assert (output == 0).all(2).all(0).sum() == 4


@pytest.mark.parametrize("name", SAID)
def test_norms_behind_which_dead_channels_are_not_zero_are_named(name):
    model, x = shuffled(copy.deepcopy(SAID[name])), torch.randn(2, 3, 12, 12)
    with pytest.warns(UserWarning, match="zero_dead_channels does not reach behind a, where dead channels") as caught:
        pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=x, zero_dead_channels=True)
    assert sum("zero_dead_channels" in str(one.message) for one in caught) == 1
    schedule, fresh = pyprune.schedules.linear(0.5, end=3), shuffled(copy.deepcopy(SAID[name]))
    with pytest.warns(UserWarning, match="does not reach behind a"):
        pyprune.Pruner(fresh, FILTERS, schedule, examples_inputs=x, zero_dead_channels=True)


def test_biases_of_several_weights_are_named():
    model = nn.Sequential(nn.MultiheadAttention(16, 4, kdim=8, vdim=8))
    with pytest.warns(UserWarning, match=r"leaves 0\.in_proj_bias as they are, because they belong to s"):
        pyprune.prune(model, FILTERS, ratio=0.5, zero_dead_channels=True)


def test_other_norms_want_inputs_too():
    model = Net(lambda n, x: n.a(n.c(x)), c=conv(), a=nn.GroupNorm(2, 8))
    with pytest.warns(UserWarning, match="does not know which layers a follow, and after a norm dead"):
        pyprune.prune(model, FILTERS, ratio=0.5, zero_dead_channels=True)


@pytest.mark.parametrize(("names", "untouched"), [(["1"], ["1.weight", "1.bias"]), (["0.bias"], ["0.bias"])])
def test_what_is_ignored_is_left_as_it_is_and_named(names, untouched):
    model, x = shuffled(nn.Sequential(conv(), nn.BatchNorm2d(8))), torch.randn(2, 3, 8, 8)
    before = {name: model.get_parameter(name).clone() for name in untouched}
    scope = pyprune.IgnoredScope(names=names)
    named = "zero_dead_channels leaves " + ", ".join(untouched) + " as they are, because ignored_scope names them"
    with pytest.warns(UserWarning, match=named):
        pyprune.prune(model, FILTERS, ratio=0.5, examples_inputs=x, zero_dead_channels=True, ignored_scope=scope)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert {"0.bias", "1.weight", "1.bias"} == set(followers(model)) | set(untouched)
