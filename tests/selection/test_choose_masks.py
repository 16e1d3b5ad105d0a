import copy
import warnings

import pytest
import torch
from torch import nn

from pyprune import IgnoredScope, Method, Pruner, granularity, importance, prune, schedules, scope, strip
from pyprune.methods.allocation import Amount
from pyprune.modules.targets import find_targets
from pyprune.selection import choose_masks as module
from pyprune.selection.choose_masks import choose_masks, unit_groups_of


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


@pytest.mark.parametrize("where", [scope.model(), scope.tensor(), scope.row()], ids=lambda where: where.name)
def test_choose_masks_writes_where_it_is_told_to(where):
    targets = find_targets(two_layers())
    method = Method(importance.magnitude(), scope=where)
    expected = choose_masks(method, Amount(0.5), targets, {}).masks
    into = {target: torch.empty_like(target.parameter, dtype=torch.bool) for target in targets}
    chosen = choose_masks(method, Amount(0.5), targets, {}, into=into).masks
    for target in targets:
        assert chosen[target].mask is into[target]
        assert torch.equal(into[target], expected[target].mask)


def test_check_names_what_is_not_finite():
    model = two_layers()
    model[1].weight.data[0, :2] = torch.nan
    choice = choose_masks(Method(importance.magnitude()), Amount(0.5), find_targets(model), {})
    with pytest.raises(ValueError, match=r"NaN or infinite weights: 2 in 1\.weight"):
        choice.check()


@pytest.mark.parametrize(("ratio", "zeros"), [(0.2, 15), (0.5, 15), (0.8, 24)])
def test_what_is_dropped_can_stay_dropped(ratio, zeros):
    """The ratio is one of all elements, and what a base lacks counts."""
    model = prune(nn.Linear(6, 5), Method(importance.magnitude()), ratio=0.5)
    (target,) = find_targets(model)
    before = target.attachment.mask.clone()
    target.parameter.data[~before] = 10.0
    amount = Amount(ratio, dropped_stay=True)
    mask = choose_masks(Method(importance.magnitude()), amount, [target], {}).masks[target].mask
    assert int((~mask).sum()) == zeros
    assert not (mask & ~before).any()


def test_weights_that_compete_must_be_on_one_device():
    targets = find_targets(two_layers())
    method = Method(importance.magnitude())
    unit_groups = unit_groups_of(method, Amount(0.5), targets, {})
    assert [len(together) for together in module._by_device(method, unit_groups)] == [2]


@pytest.mark.parametrize("where", [scope.model(), scope.tensor(), scope.row()], ids=lambda where: where.name)
@pytest.mark.parametrize(
    "cut", [granularity.element(), granularity.channel("out"), granularity.block(2, 2)], ids=lambda cut: cut.name
)
def test_from_remaining_goes_on_where_strip_ended(where, cut):
    if where.name == "row" and cut.name != "element":
        return
    method = Method(importance.magnitude(), cut, where)
    masked, stripped = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    stripped.load_state_dict(masked.state_dict())
    for model in (masked, stripped):
        prune(model, method, ratio=0.5)
    strip(stripped)
    for model in (masked, stripped):
        prune(model, method, ratio=0.5, from_remaining=True)
    for layer, other in zip(masked, stripped, strict=True):
        assert torch.equal(layer.weight, other.weight)
    zeros = sum(int((layer.weight == 0).sum()) for layer in stripped)
    assert zeros == 0.75 * sum(layer.weight.numel() for layer in stripped)


def test_tell_names_layers_that_nothing_is_left_of():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight.data.mul_(1e-3)
    method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.model())
    with pytest.warns(UserWarning, match=r"^the masks drop all of 2\.weight: nothing goes through") as caught:
        prune(model, method, ratio=0.34)
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, method, ratio=0.34, max_ratio=0.9, ignored_scope=IgnoredScope(names=["4"]))


@pytest.mark.parametrize(
    ("method", "ignored", "said"),
    [
        (Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor()), [], True),
        (Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor()), ["2"], False),
        (Method(importance.magnitude(p=2), granularity.channel("in"), scope.tensor()), [], False),
        (Method(importance.magnitude(), scope=scope.tensor()), [], False),
    ],
)
def test_tell_names_the_last_layer_if_it_loses_outputs(method, ignored, said):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    calls = [
        lambda model, scope: prune(model, method, ratio=0.5, ignored_scope=scope),
        lambda model, scope: Pruner(model, method, schedules.linear(0.5, end=4), ignored_scope=scope),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(copy.deepcopy(model), IgnoredScope(names=ignored))
        texts = [str(one.message) for one in caught]
        expected = "outputs of the last layer, 2.weight, are pruned: where the model puts them out, as classes, "
        expected += "they are constant. To keep them, name it in ignored_scope"
        assert texts == ([expected] if said else [])


class Heads(nn.Module):
    """Its last layers are not those that it has last."""

    def __init__(self):
        super().__init__()
        self.box, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)
        self.body = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.body(x).relu()
        return {"all": torch.cat([self.box(x), self.classes(x).sigmoid()], 1).flatten(2)}


@pytest.mark.parametrize(
    ("model", "inputs", "named"),
    [
        (Heads(), torch.randn(1, 3, 5, 5), "box.weight, classes.weight"),
        (Heads(), None, "body.weight"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 10, 1)), None, "2.weight"),
        (nn.Sequential(nn.Linear(8, 8), nn.LogSoftmax(1)), torch.randn(2, 8), "0.weight"),
    ],
)
def test_tell_finds_the_layers_whose_outputs_the_model_puts_out(model, inputs, named):
    method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
    with pytest.warns(UserWarning, match=rf"^outputs of the last layer, {named}, are pruned"):
        prune(model, method, ratio=0.5, examples_inputs=inputs)


def test_tell_says_the_same_at_every_update():
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20))
    method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner = Pruner(model, method, schedules.cubic(0.6, end=10))
        for _ in range(12):
            pruner.step()
    assert len({str(one.message) for one in caught}) == 1
