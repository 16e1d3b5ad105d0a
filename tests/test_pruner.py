import copy
import io

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, Pruner, granularity, importance, prune, schedules, scope
from tests.conftest import Unchanged, masks_of

MAGNITUDE = importance.magnitude()
LOCAL = Method(MAGNITUDE, scope=scope.tensor())


class Small(nn.Module):
    """A convolution with BatchNorm, and two linear layers of which the last is tied to another name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.hidden.weight
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        channels = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.head(self.twin(self.hidden(channels).relu()).relu())


def small():
    torch.manual_seed(0)
    return Small()


def batch(step=0, size=6):
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(size, 2, 4, 4, generator=generator)
    return images, torch.randint(4, (size,), generator=generator)


def backward(model, step=0):
    images, classes = batch(step)
    dtype = next(model.parameters()).dtype
    loss = nn.functional.cross_entropy(model(images.to(dtype)), classes)
    loss.backward()


def train(model, optimizer, pruner, steps, done=0):
    for step in range(done, done + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        pruner.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def masks(model):
    return {target.name: mask.clone() for target, mask in masks_of(model).items()}


def raw_copy(model):
    """Return a dense model with the raw weights."""
    twin = copy.deepcopy(model)
    for mask in masks_of(twin).values():
        mask.fill_(True)
    return pyprune.strip(twin)


def assert_same_masks(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def has_traces(model):
    """Whether masks or hooks are left on a model."""
    return (
        bool(masks_of(model))
        or any(p._backward_hooks for p in model.parameters())
        or any(module._forward_hooks for module in model.modules())
    )


# ---- what the masks are ----

RATIOS = schedules.cubic(0.8, end=6, start=1, initial=0.1, frequency=2)
BY_NAME = schedules.linear({"conv": 0.3, r"h.*": 0.9}, end=6, frequency=2)
HALF = schedules.one_shot(0.5, start=2)
EQUAL_TO_PRUNE = {
    "local": (LOCAL, RATIOS, {}),
    "global": (Method(MAGNITUDE), RATIOS, {}),
    "mode": ("unstructured_magnitude_global", RATIOS, {}),
    "l2": (Method(importance.magnitude(normalize="l2")), RATIOS, {}),
    "lamp": (Method(importance.magnitude(normalize="lamp")), RATIOS, {}),
    "gaussian": (Method(importance.magnitude(normalize="gaussian")), RATIOS, {}),
    "random": (Method(importance.random(seed=3)), RATIOS, {}),
    "custom": (Method(torch.sin), RATIOS, {}),
    "rows": (Method(MAGNITUDE, scope=scope.row()), RATIOS, {}),
    "erk": (LOCAL, RATIOS, {"allocation": "erk"}),
    "by name": (LOCAL, BY_NAME, {}),
    "caps": (Method(MAGNITUDE), RATIOS, {"max_ratio": 0.85}),
    "blocks": (Method(MAGNITUDE, granularity.block(2, 2)), RATIOS, {}),
    "out channels": (Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor()), RATIOS, {}),
    "in channels": (Method(MAGNITUDE, granularity.channel("in")), RATIOS, {}),
    "2:4": (Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4)), HALF, {"ignored_scope": ["conv"]}),
    "groups": (
        Method(MAGNITUDE, scope=scope.group({"a": ["conv"], "b": ["hidden", "head"]})),
        schedules.multi_step({0: {"a": 0.2, "b": 0.0}, 3: {"a": 0.5, "b": 0.7}}),
        {},
    ),
    "geometric median": (
        Method(importance.geometric_median(), granularity.channel("out"), scope.tensor()), RATIOS, {}
    ),
    "falling": (LOCAL, schedules.multi_step({0: 0.8, 2: 0.4, 4: 0.0, 5: 0.6}), {}),
    "function": (LOCAL, lambda step: min(0.1 * step, 0.5), {}),
}  # fmt: skip


def with_scope(options):
    ignored = options.get("ignored_scope")
    return options if ignored is None else {**options, "ignored_scope": pyprune.IgnoredScope(names=ignored)}


@pytest.mark.parametrize("name", EQUAL_TO_PRUNE)
def test_masks_at_every_step_are_those_of_prune_at_the_ratio_of_the_schedule(name):
    method, schedule, options = EQUAL_TO_PRUNE[name]
    options = with_scope(options)
    model = small()
    optimizer = sgd(model)
    pruner = Pruner(model, method, schedule, **options)
    schedule = pruner.schedule
    n_of_m = isinstance(method, Method) and method.scope.name == "n_of_m"
    expected = masks(model)
    for step in range(9):
        if step:
            train(model, optimizer, pruner, 1, step)
        if schedule.is_due(step):
            ratio = schedule(step)
            twin = raw_copy(model)
            if n_of_m:
                prune(twin, method, ratio=None, **options)
            else:
                prune(twin, method, ratio=ratio, **options)
            expected = masks(twin)
            assert pruner.ratio == ratio
        assert_same_masks(masks(model), expected)
        assert (pruner.step_count, pruner.ratio) == (step, schedule(step))
    assert not all(mask.all() for mask in masks(model).values())


def test_step_says_when_masks_were_computed_anew():
    pruner = Pruner(small(), LOCAL, schedules.linear(0.5, start=2, end=7, frequency=2))
    assert [pruner.step() for _ in range(9)] == [False, True, False, True, False, True, True, False, False]


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_masks_are_on_from_the_beginning(ratio):
    model = small()
    Pruner(model, LOCAL, schedules.one_shot(ratio))
    zeros = sum(int((~mask).sum()) for mask in masks(model).values())
    assert list(masks(model)) == ["conv.weight", "hidden.weight", "head.weight"]
    assert zeros == ratio * (8 * 2 * 9 + 64 + 32)


@pytest.mark.parametrize("name", ["local", "global", "blocks", "rows", "by name", "falling", "erk"])
def test_without_reintroduction_masks_only_lose_and_counts_are_exact(name):
    method, schedule, options = EQUAL_TO_PRUNE[name]
    free, bound = small(), small()
    # Without training, both choose the same counts from the same weights.
    loose, strict = (
        Pruner(free, method, schedule, **options),
        Pruner(bound, method, schedule, reintroduce=False, **options),
    )
    optimizer, before, most = sgd(bound, weight_decay=0.1), masks(bound), 0
    for step in range(1, 9):
        train(bound, optimizer, strict, 1, step)
        loose.step()
        now = masks(bound)
        assert not any((now[key] & ~before[key]).any() for key in now)
        most = max(most, sum(int((~mask).sum()) for mask in masks(free).values()))
        if name != "blocks":  # at the edges blocks are smaller
            assert sum(int((~mask).sum()) for mask in now.values()) == most
        before = now
    assert most > 0


def test_weights_come_back_with_the_value_that_they_had():
    model = small()
    pruner = Pruner(model, LOCAL, schedules.multi_step({0: 0.5, 1: 0.0}))
    raw = {name: tensor.clone() for name, tensor in model.named_parameters()}
    pruner.step()
    assert_same_masks({n: p.detach() for n, p in pyprune.strip(model).named_parameters() if n == "head.weight"},
                      {"head.weight": raw["head.parametrizations.weight.original"]})  # fmt: skip


def test_masks_that_are_there_stay_until_the_first_update():
    model = prune(small(), LOCAL, ratio=0.5)
    before = masks(model)
    pruner = Pruner(model, LOCAL, schedules.one_shot(0.25, start=2))
    pruner.step()
    assert_same_masks(masks(model), before)
    pruner.step()
    assert int((~masks(model)["head.weight"]).sum()) == 8


def test_dead_channels_are_followed_at_every_update():
    model = small()
    method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
    schedule = schedules.multi_step({0: 0.0, 1: 0.5, 2: 0.0})
    pruner = Pruner(model, method, schedule, zero_dead_channels=True, examples_inputs=batch()[0])
    seen = []
    for _ in range(3):
        seen.append(int((model.norm.weight == 0).sum()))
        pruner.step()
    assert seen == [0, 4, 0]


def test_batch_norm_scales_are_those_of_the_moment():
    model = small()
    method = Method(importance.batch_norm_scale(), granularity.channel("out"))
    pruner = Pruner(model, method, schedules.one_shot(0.5, start=1), examples_inputs=batch()[0])
    model.norm.weight.data.copy_(torch.arange(8.0).flip(0) + 1)
    pruner.step()
    assert masks(model)["conv.weight"].flatten(1).any(1).tolist() == [True] * 4 + [False] * 4


# ---- importances that are measured in training ----


def plain_gradient(model, step):
    """Return the gradients of the weights in use, of a model that has no masks: where nothing hides them."""
    twin = raw_copy(model)
    with torch.no_grad():
        for name, mask in masks(model).items():
            twin.get_parameter(name).mul_(mask)
    backward(twin, step)
    return {name: twin.get_parameter(name).grad.double() for name in masks(model)}


def raw(model):
    twin = raw_copy(model)
    return {name: twin.get_parameter(name).detach().double() for name in masks(model)}


STATISTICS = {
    "gradient": (importance.gradient(), lambda w, gs: sum(gs).abs() / len(gs)),
    "snip": (importance.snip(), lambda w, gs: (w[-1] * sum(gs) / len(gs)).abs()),
    "taylor": (importance.taylor(), lambda w, gs: w[-1] ** 2 * sum(g * g for g in gs) / len(gs)),
    "fisher": (importance.fisher(damp=1e-3), lambda w, gs: w[-1] ** 2 * (sum(g * g for g in gs) / len(gs) + 1e-3)),
}  # fmt: skip


def dropped_of(scores, ratio):
    """Say which of all elements go, by NumPy's sort."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = int(ratio * len(flat) + 0.5)
    lowest = set(flat.numpy().argsort(kind="stable")[:count].tolist())
    start, found = 0, {}
    for name, score in scores.items():
        rows = [start + i not in lowest for i in range(score.numel())]
        found[name] = torch.tensor(rows).reshape(score.shape)
        start += score.numel()
    return found


@pytest.mark.parametrize("name", STATISTICS)
def test_gradients_of_all_weights_are_measured_since_the_last_update(name):
    rule, score = STATISTICS[name]
    model = small().double()
    optimizer = sgd(model, weight_decay=0.01)
    pruner = Pruner(model, Method(rule), schedules.linear(0.6, end=6, frequency=3), optimizer)
    gradients = []
    for step in range(1, 7):
        optimizer.zero_grad()
        gradients.append(plain_gradient(model, step))
        backward(model, step)
        optimizer.step()
        weights = raw(model)
        if pruner.step():
            scores = {n: score([weights[n]], [g[n] for g in gradients]) for n in weights}
            assert_same_masks(masks(model), dropped_of(scores, pruner.ratio))
            gradients = []
    assert pruner.ratio == 0.6


def test_momentum_goes_on_from_one_update_to_the_next():
    model = small().double()
    optimizer = sgd(model)
    rule = importance.snip_momentum(decay=0.5, scale=2.0)
    pruner = Pruner(model, Method(rule), schedules.linear(0.6, end=6, frequency=3), optimizer)
    momentum = {name: 0.0 for name in masks(model)}
    for step in range(1, 7):
        optimizer.zero_grad()
        gradients, weights = plain_gradient(model, step), raw(model)
        momentum = {n: 0.5 * s + 2.0 * (weights[n] * gradients[n]).abs() for n, s in momentum.items()}
        backward(model, step)
        optimizer.step()
        if pruner.step():
            assert_same_masks(masks(model), dropped_of(momentum, pruner.ratio))
    assert pruner.ratio == 0.6
