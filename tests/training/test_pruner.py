import copy
import math

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, Pruner, granularity, importance, prune, schedules, scope
from pyprune.modules.masks import changing_masks, masks_in
from tests.conftest import Unchanged, masks_of
from tests.fault_injector import plain

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
        channels = self.norm(self.conv(images)).tanh().mean((2, 3))
        return self.head(self.twin(self.hidden(channels).tanh()).tanh())


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
    with changing_masks(masks_in(twin)):
        for mask in masks_of(twin).values():
            mask.fill_(True)
    return pyprune.strip(twin)


def assert_same_masks(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def has_hooks(model):
    """Whether something looks at a model, or at its gradients."""
    of_layers = any(module._forward_hooks for module in model.modules())
    return of_layers or any(parameter._backward_hooks for parameter in model.parameters())


# ---- what the masks are ----

RATIOS = schedules.cubic(0.8, end=6, start=1, initial=0.1, frequency=2)
BY_NAME = schedules.linear({"conv": 0.3, r"h.*": 0.9}, end=6, frequency=2)
HALF = schedules.one_shot(0.5, start=2)
TO_75, TO_50 = (schedules.cubic(final, end=6, start=1, frequency=2) for final in (0.75, 0.5))
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
    "1:4 of outputs": (Method(MAGNITUDE, scope=scope.n_of_m(keep=1, of=4, dim="out")), TO_75, {}),
    "2:4 of both": (Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim="both", among="model")), TO_50, {}),
    "2:4 by name": (
        Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4)),
        schedules.linear({"conv": 0.3, r"h.*": 0.5}, end=6, frequency=2),
        {},
    ),
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
    expected = masks(model)
    for step in range(9):
        if step:
            train(model, optimizer, pruner, 1, step)
        if schedule.is_due(step):
            ratio = schedule(step)
            twin = raw_copy(model)
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


BOUND = ["local", "global", "blocks", "rows", "by name", "falling", "erk", "2:4", "1:4 of outputs", "groups"]


@pytest.mark.parametrize("name", BOUND)
def test_without_reintroduction_masks_only_lose_and_counts_are_exact(name):
    method, schedule, options = EQUAL_TO_PRUNE[name]
    options = with_scope(options)
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
    raw = {name: tensor.clone() for name, tensor in model.named_parameters()}
    pruner = Pruner(model, LOCAL, schedules.multi_step({0: 0.5, 1: 0.0}))
    pruner.step()
    assert_same_masks({n: p.detach() for n, p in pyprune.strip(model).named_parameters() if n == "head.weight"},
                      {"head.weight": raw["head.weight"]})  # fmt: skip


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


def test_followers_that_come_later_or_by_a_copy_are_in_step_too():
    model = small()
    method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
    schedule = schedules.multi_step({0: 0.0, 1: 0.5, 2: 0.25})
    pruner = Pruner(model, method, schedule)
    prune(model, method, ratio=0.0, zero_dead_channels=True, examples_inputs=batch()[0])
    twin = copy.deepcopy(model)
    pruner.step()
    assert (int((model.norm.weight == 0).sum()), int((twin.norm.weight == 0).sum())) == (4, 0)
    of_copy = Pruner(twin, method, schedule)
    of_copy.step()
    of_copy.step()
    assert (int((model.norm.weight == 0).sum()), int((twin.norm.weight == 0).sum())) == (4, 2)


def test_batch_norm_scales_are_those_of_the_moment():
    model = small()
    method = Method(importance.batch_norm_scale(), granularity.channel("out"))
    with pytest.warns(
        UserWarning, match=r"leaves out hidden.weight, head.weight \(without a score by batch_norm_scale"
    ):
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
    momentum = dict.fromkeys(masks(model), 0.0)
    for step in range(1, 7):
        optimizer.zero_grad()
        gradients, weights = plain_gradient(model, step), raw(model)
        momentum = {n: 0.5 * s + 2.0 * (weights[n] * gradients[n]).abs() for n, s in momentum.items()}
        backward(model, step)
        optimizer.step()
        if pruner.step():
            assert_same_masks(masks(model), dropped_of(momentum, pruner.ratio))
    assert pruner.ratio == 0.6


def taylor_pruner(model, optimizer, **options):
    return Pruner(model, Method(importance.taylor()), schedules.one_shot(0.5, start=2), optimizer, **options)


def sums_of(pruner):
    return pruner.state_dict()["sums"]


def test_batches_of_gradient_accumulation_count_as_one():
    model = small().double()
    optimizer = sgd(model, lr=0.0)
    pruner = taylor_pruner(model, optimizer)
    weights, gradients = raw(model), [plain_gradient(model, step) for step in range(4)]
    for step in (0, 2):
        optimizer.zero_grad(set_to_none=step == 0)
        backward(model, step)
        backward(model, step + 1)
        optimizer.step()
        pruner.step()
    squares = {
        n: (gradients[0][n] + gradients[1][n]) ** 2 + (gradients[2][n] + gradients[3][n]) ** 2 for n in weights
    }
    assert_same_masks(masks(model), dropped_of({n: weights[n] ** 2 * squares[n] for n in weights}, 0.5))


@pytest.mark.parametrize("how", ["never stepped", "zero_grad", "fused"])
def test_a_batch_that_overflowed_is_dropped(how):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=how == "fused")
    pruner = taylor_pruner(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(scale):
        optimizer.zero_grad()
        (scaler.scale(model(batch()[0]).square().mean()) * scale).backward()
        scaler.step(optimizer)
        scaler.update(4.0)

    step(1.0)
    pruner.step()
    before = sums_of(pruner)
    step(torch.inf)
    if how == "zero_grad":  # as when step() is called once per epoch
        step(1.0)
        assert sums_of(pruner)["count"] == 2
    assert all(tensor.isfinite().all() for tensor in sums_of(pruner)["sums"].values())
    if how != "zero_grad":
        assert sums_of(pruner)["count"] == 1
        assert_same_masks(sums_of(pruner)["sums"], before["sums"])
    assert pruner.step()


def test_masks_wait_for_a_batch_if_all_overflowed():
    model = small()
    optimizer = sgd(model)
    pruner = taylor_pruner(model, optimizer)
    for _ in range(3):
        backward(model)  # and no step of the optimizer
        assert not pruner.step()
    state = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    other = small()
    resumed = taylor_pruner(other, sgd(other))
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for each, its in ((pruner, model), (resumed, other)):
        train(its, each.optimizer, each, 1)
        assert (each.ratio, each.step_count) == (0.5, 4)
        assert int((its.head.weight == 0).sum()) > 0
        assert not each.step()


@pytest.mark.parametrize("name", ["taylor", "rigl", "hard movement"])
def test_step_must_come_after_that_of_the_optimizer(name):
    model = small()
    optimizer = sgd(model)
    pruner = PRUNERS[name](model, optimizer)

    def wrong_order():
        for step in range(3):
            backward(model, step)
            pruner.step()
            optimizer.step()

    with pytest.raises(ValueError, match=r"came between backward\(\) and the optimizer's step; call it after both"):
        wrong_order()


def test_an_optimizer_step_without_any_gradient_is_no_batch():
    model = small()
    optimizer = sgd(model)
    pruner = taylor_pruner(model, optimizer)
    optimizer.step()
    pruner.step()
    assert sums_of(pruner)["count"] == 0
    train(model, optimizer, pruner, 1)
    assert pruner.ratio == 0.5


def test_without_any_batch_there_is_an_error():
    model = small()
    pruner = taylor_pruner(model, sgd(model))
    pruner.step()
    with pytest.raises(ValueError, match=r"no batch was trained on.*after the optimizer's"):
        pruner.step()


def test_a_closure_is_a_batch():
    """As Lightning trains: the gradients are made within the step of the optimizer."""
    model, twin = small(), small()
    optimizer, other = sgd(model), sgd(twin)
    pruner, reference = taylor_pruner(model, optimizer), taylor_pruner(twin, other)

    def closure():
        optimizer.zero_grad()
        backward(model, 1)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    optimizer.step(closure=closure)
    for _ in range(2):
        other.zero_grad()
        backward(twin, 1)
        other.step()
    assert sums_of(pruner)["count"] == sums_of(reference)["count"] == 2
    assert_same_masks(sums_of(pruner)["sums"], sums_of(reference)["sums"])


def test_grad_is_masked_as_without_a_pruner():
    model, twin = small(), small()
    pruner = Pruner(model, Method(importance.taylor()), schedules.linear(0.5, start=1, end=9), sgd(model))
    prune(twin, LOCAL, ratio=0.5)
    with changing_masks(masks_in(model)):
        for target, mask in masks_of(model).items():
            mask.copy_(masks(twin)[target.name])
    backward(model)
    backward(twin)
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert (model.head.weight.grad == 0).sum() == 16
    norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 0.01) for each in (model, twin)]
    assert norms[0] == norms[1]
    pruner.freeze()
    assert not has_hooks(model)
    model.zero_grad()
    backward(model)
    assert (model.head.weight.grad == 0).sum() == 16


def test_a_weight_that_a_batch_does_not_use_counts_as_zero():
    model = small()
    optimizer = sgd(model, lr=0.0)
    rule = importance.snip_momentum(decay=0.5)
    pruner = Pruner(model, Method(rule), schedules.one_shot(0.5, start=9), optimizer)
    train(model, optimizer, pruner, 1)
    before = sums_of(pruner)["sums"]
    optimizer.zero_grad()
    model.norm(model.conv(batch()[0])).square().mean().backward()
    optimizer.step()
    after = sums_of(pruner)["sums"]
    assert torch.equal(after["head.weight"], before["head.weight"] * 0.5)
    assert not torch.equal(after["conv.weight"], before["conv.weight"] * 0.5)


@pytest.mark.parametrize("rule", [importance.wanda(), importance.apoz(), importance.mean_activation()])
def test_activations_are_those_of_training_batches_since_the_last_update(rule):
    cut = granularity.element() if rule.needs == "input norm" else granularity.channel("out")
    method = Method(rule, cut, scope.tensor())
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    pruner = Pruner(model, method, schedules.linear(0.5, end=4, frequency=2))
    for update in range(2):
        batches = [torch.randn(5 - i, 6) for i in range(2)]
        for inputs in batches:
            model.eval()(torch.full((9, 6), 1e3))
            model.train()(inputs)
            pruner.step()
        calibration = pyprune.calibrate(twin, batches, method)
        prune(twin, method, ratio=pruner.ratio, calibration=calibration)
        assert_same_masks(masks(model), masks(twin))
        assert pruner.ratio == (0.25, 0.5)[update]
    model(batches[0])
    assert not sums_of(pruner)["sums"]  # nothing is looked at after the last update


# ---- a checkpoint in the middle ----

METHODS = {
    "magnitude": MAGNITUDE,
    "gradient": importance.gradient(),
    "snip": importance.snip(),
    "momentum": importance.snip_momentum(),
    "taylor": importance.taylor(),
    "fisher": importance.fisher(),
    "wanda": importance.wanda(),
    "random": importance.random(),
}
CUBIC = schedules.cubic(0.7, start=1, end=9, frequency=3)
PRUNERS = {
    **{
        name: lambda model, optimizer, rule=rule: Pruner(model, Method(rule), CUBIC, optimizer)
        for name, rule in METHODS.items()
    },
    "apoz": lambda m, o: Pruner(m, Method(importance.apoz(), granularity.channel("out")), CUBIC, o),
    "by name": lambda m, o: Pruner(m, LOCAL, schedules.linear({"conv": 0.3, "head": 0.6}, end=9, frequency=3), o),
    "bound": lambda m, o: Pruner(m, LOCAL, CUBIC, o, reintroduce=False),
    "gmp": lambda m, o: pyprune.gmp(m, 0.7, o, end=9, frequency=3),
    "ac/dc": lambda m, o: pyprune.ac_dc(m, 0.7, o, end=11, frequency=3),
    "ac/dc taylor": lambda m, o: pyprune.ac_dc(m, 0.7, o, end=11, frequency=3, method=Method(importance.taylor())),
    "rigl": lambda m, o: pyprune.RigLPruner(m, 0.7, o, end=11, frequency=3),
    "hard movement": lambda m, o: pyprune.MovementPruner(m, CUBIC, o),
    "soft movement": lambda m, o: pyprune.MovementPruner(m, CUBIC, o, threshold=0.6, regularization=1.0),
    "frozen": lambda m, o: Pruner(m, LOCAL, schedules.linear(0.5, end=2), o),
}


def checkpoint(model, optimizer, pruner, path):
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, path
    )
    return torch.load(path, weights_only=True)


def everything(model, optimizer):
    state = optimizer.state_dict()["state"]
    moments = [value for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    return [*model.state_dict().values(), *moments]


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("done", [1, 5, 6])
def test_training_resumes_to_the_same_bits(name, done, tmp_path):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = PRUNERS[name](model, optimizer)
    train(model, optimizer, pruner, done)
    if name == "frozen" and done > 1:
        pruner.freeze()
    saved = checkpoint(model, optimizer, pruner, tmp_path / "saved.pt")
    train(model, optimizer, pruner, 12 - done, done)

    torch.manual_seed(9)
    other = Small()
    resumed_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    resumed = PRUNERS[name](other, resumed_optimizer)
    train(other, resumed_optimizer, resumed, 2)
    other.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["pruner"])
    assert (resumed.ratio, resumed.step_count) == (saved["pruner"]["ratio"], done)
    train(other, resumed_optimizer, resumed, 12 - done, done)

    for one, two in zip(everything(model, optimizer), everything(other, resumed_optimizer), strict=True):
        assert torch.equal(one, two)
    assert (pruner.ratio, pruner.step_count, pruner.frozen) == (resumed.ratio, 12, resumed.frozen)
    last, again = pruner.state_dict(), resumed.state_dict()
    assert last.keys() == again.keys()
    assert any((~mask).any() for mask in masks(model).values()) or name == "soft movement"


def wrong_states(name):
    model = small()
    pruner = PRUNERS[name](model, sgd(model))
    good = pruner.state_dict()
    yield "no dict", 3
    yield "nothing", {}
    yield "of an optimizer", sgd(model).state_dict()
    yield "more", {**good, "more": 1}
    yield "step", {**good, "step_count": -1}
    yield "step", {**good, "step_count": "1"}
    yield "ratio", {**good, "ratio": "0.5"}
    yield "ratio", {**good, "ratio": 1.0}
    for other in ("magnitude", "taylor", "wanda", "hard movement"):
        if other != name and (other in ("wanda", "taylor") or name not in ("gmp", "ac/dc", "rigl")):
            twin = small()
            yield f"of {other}", PRUNERS[other](twin, sgd(twin)).state_dict()
    if good["sums"] and good["sums"]["sums"]:
        sums = good["sums"]
        yield "another weight", {**good, "sums": {**sums, "sums": {**sums["sums"], "x": torch.ones(2)}}}
        yield "missing weight", {**good, "sums": {**sums, "sums": {}}}
        shape = {key: tensor[:1] for key, tensor in sums["sums"].items()}
        yield "another shape", {**good, "sums": {**sums, "sums": shape}}
        yield "no sums", {**good, "sums": {"x": 1}}
    if "scores" in good:
        yield "another score", {**good, "scores": {**good["scores"], "x": torch.ones(2)}}
        yield "shape of score", {**good, "scores": {key: tensor[:1] for key, tensor in good["scores"].items()}}
        yield "no score", {**good, "scores": 3}
        groups = {"state": {}, "param_groups": []}
        yield "groups of scores", {**good, "score_optimizer": groups}


@pytest.mark.parametrize("name", ["magnitude", "taylor", "wanda", "gmp", "ac/dc", "rigl", "hard movement"])
def test_wrong_states_are_refused_and_change_nothing(name):
    model = small()
    optimizer = sgd(model)
    pruner = PRUNERS[name](model, optimizer)
    train(model, optimizer, pruner, 4)
    before, unchanged = copy.deepcopy(pruner.state_dict()), Unchanged(model)
    for what, state in wrong_states(name):
        with pytest.raises((TypeError, ValueError)):
            pruner.load_state_dict(state)
        assert str(pruner.state_dict()) == str(before), what
        unchanged.check()
    pruner.load_state_dict(before)


def test_loading_undoes_a_freeze():
    model = small()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(importance.taylor()), schedules.linear(0.5, end=6), optimizer)
    train(model, optimizer, pruner, 2)
    state, before = pruner.state_dict(), masks(model)
    pruner.freeze()
    train(model, optimizer, pruner, 3)
    assert_same_masks(masks(model), before)
    assert not has_hooks(model)
    pruner.load_state_dict(state)
    train(model, optimizer, pruner, 4)
    assert pruner.ratio == 0.5
    assert sum(int((~mask).sum()) for mask in masks(model).values()) == 120


def test_a_checkpoint_can_be_loaded_after_the_training_diverged():
    model = small()
    pruner = Pruner(model, LOCAL, schedules.linear(0.5, end=4))
    state, weights = pruner.state_dict(), copy.deepcopy(model.state_dict())
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite weights: 1 in head\.weight"):
        pruner.step()
    model.load_state_dict(weights)
    pruner.load_state_dict(state)
    assert pruner.step()
    assert pruner.step_count == 1


def test_a_loaded_model_has_the_units_of_the_method():
    model = small()
    method = Method(MAGNITUDE, granularity.block(2, 2))
    pruner = Pruner(model, method, schedules.one_shot(0.5, start=1))
    pruner.step()
    other = small()
    again = Pruner(other, method, schedules.one_shot(0.5, start=1))
    other.load_state_dict(model.state_dict())
    again.load_state_dict(pruner.state_dict())
    one, two = (pyprune.pruning_statistic(each).pruned_tensors for each in (model, other))
    assert [(t.units, t.pruned_units) for t in one] == [(t.units, t.pruned_units) for t in two]


# ---- freezing, stripping, copies ----


def test_freeze_lets_masks_stay():
    model = small()
    pruner = Pruner(model, LOCAL, schedules.linear(0.5, end=4))
    pruner.step()
    before = masks(model)
    pruner.freeze()
    pruner.freeze()
    assert not any(pruner.step() for _ in range(5))
    assert_same_masks(masks(model), before)
    assert (pruner.ratio, pruner.step_count) == (0.125, 6)


@pytest.mark.parametrize("rule", [MAGNITUDE, importance.taylor(), importance.wanda()])
def test_strip_ends_what_a_pruner_does(rule):
    model = small()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(rule), schedules.linear(0.5, end=4), optimizer)
    train(model, optimizer, pruner, 2)
    pyprune.strip(model)
    model.zero_grad()
    backward(model)
    assert (model.head.weight.grad != 0).all()
    optimizer.step()
    assert (model.head.weight != 0).all()
    with pytest.raises(ValueError, match=r"conv\.weight carries no mask any more; make a new Pruner"):
        pruner.step()
    # A new one can be made.
    again = Pruner(model, Method(rule), schedules.linear(0.5, end=4), optimizer)
    train(model, optimizer, again, 4)
    assert again.ratio == 0.5


def test_a_copy_trains_with_masked_gradients():
    model = small()
    Pruner(model, Method(importance.taylor()), schedules.linear(0.5, start=1, end=4), sgd(model))
    with changing_masks(masks_in(model)):
        for mask in masks_of(model).values():
            mask.view(-1)[::2] = False
    twin = copy.deepcopy(model)
    model.zero_grad()
    for each in (model, twin):
        backward(each)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not has_hooks(twin)


@pytest.mark.parametrize("rule", [MAGNITUDE, importance.taylor(), importance.snip_momentum(), importance.wanda()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_be_cast_between_updates(rule, dtype):
    model = small()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(rule), schedules.linear(0.5, end=6, frequency=2), optimizer)
    train(model, optimizer, pruner, 3)
    model.to(dtype)
    optimizer.state.clear()
    train(model, optimizer, pruner, 3, 3)
    assert pruner.ratio == 0.5
    assert sum(int((~mask).sum()) for mask in masks(model).values()) == 120
    assert {tensor.dtype for tensor in masks(model).values()} == {torch.bool}


def test_a_pruner_may_be_made_under_inference_mode():
    model = small()
    with torch.inference_mode():
        pruner = Pruner(model, LOCAL, schedules.linear(0.5, end=2))
        pruner.step()
    train(model, sgd(model), pruner, 2)
    assert pruner.ratio == 0.5


# ---- what is refused ----

TAYLOR, LOCAL_TAYLOR = Method(importance.taylor()), Method(importance.taylor(), scope=scope.tensor())
WRONG = {
    "gates": (lambda m: Pruner(m, "UNSTRUCTURED_HARD_CONCRETE", HALF), "learned gates are drawn to a ratio"),
    "no mode": (lambda m: Pruner(m, "local", HALF), "allowed are"),
    "no method": (lambda m: Pruner(m, 3, HALF), "method is a int"),
    "no schedule": (lambda m: Pruner(m, LOCAL, 0.5), "give one of pyprune.schedules"),
    "schedule of 1": (lambda m: Pruner(m, LOCAL, lambda step: 1.0), "the ratio of step 0 is 1.0"),
    "schedule of text": (lambda m: Pruner(m, LOCAL, lambda step: "x"), "the ratio of step 0 is 'x'"),
    "no optimizer": (lambda m: Pruner(m, LOCAL, HALF, m.parameters()), "give a torch.optim.Optimizer"),
    "another model's": (lambda m: Pruner(m, LOCAL, HALF, sgd(small())), "trains none of the weights"),
    "none": (lambda m: Pruner(m, TAYLOR, HALF), "importance taylor is measured in training; give the optimizer"),
    "step 0": (lambda m: Pruner(m, TAYLOR, schedules.one_shot(0.5), sgd(m)), "wants masks at step 0"),
    "ratio of N:M": (
        lambda m: Pruner(m, Method(MAGNITUDE, scope=scope.n_of_m(keep=3, of=4)), HALF),
        "ratio is 0.5, but keeping 3 of 4 removes at most 0.25",
    ),
    "dict of N:M": (
        lambda m: Pruner(m, Method(MAGNITUDE, scope=scope.n_of_m(keep=1, of=2)), schedules.one_shot({"head": 0.6})),
        "keeping 1 of 2 removes at most 0.5",
    ),
    "unknown name": (lambda m: Pruner(m, LOCAL, schedules.one_shot({"haed": 0.5}, start=2)), "'haed' matches no"),
    "name in training": (
        lambda m: Pruner(m, LOCAL_TAYLOR, schedules.one_shot({"x": 0.5}, start=2), sgd(m)),
        "'x' matches no",
    ),
    "dict among all": (lambda m: Pruner(m, Method(MAGNITUDE), schedules.one_shot({"head": 0.5})), "do not compete"),
    "large block": (lambda m: Pruner(m, Method(MAGNITUDE, granularity.block(16, 16)), HALF), "16"),
    "large block in training": (
        lambda m: Pruner(m, Method(importance.taylor(), granularity.block(16, 16)), HALF, sgd(m)),
        "16",
    ),
    "caps": (lambda m: Pruner(m, Method(MAGNITUDE), HALF, max_ratio=0.3), "allow 0 to"),
    "caps in training": (lambda m: Pruner(m, TAYLOR, HALF, sgd(m), max_ratio=0.3), "allow 0 to"),
    "caps alone": (lambda m: Pruner(m, LOCAL, HALF, max_ratio=0.3), "none compete"),
    "erk": (lambda m: Pruner(m, Method(MAGNITUDE), HALF, allocation="erk"), "erk"),
    "no norm": (
        lambda m: Pruner(m, Method(importance.batch_norm_scale(), granularity.channel("out")), HALF),
        "give examples_inputs",
    ),
    "dead channels": (lambda m: Pruner(m, LOCAL, HALF, zero_dead_channels=True), "examples_inputs"),
    "AC/DC": (lambda m: pyprune.AcDcPruner(m, LOCAL, HALF), "optimizer is None"),
    "AC/DC's end": (lambda m: pyprune.ac_dc(m, 0.5, sgd(m), end=0, frequency=1), "end must come after"),
    "RigL": (lambda m: pyprune.RigLPruner(m, 0.5, None, end=4, frequency=2), "optimizer is None"),
    "RigL's fraction": (lambda m: pyprune.RigLPruner(m, 0.5, sgd(m), end=4, fraction=1.0), "fraction is 1.0"),
    "movement": (lambda m: pyprune.MovementPruner(m, HALF, None), "optimizer is None"),
    "lr of scores": (lambda m: pyprune.MovementPruner(m, HALF, sgd(m), lr=-1.0), "learning rate"),
    "optimizer of scores": (
        lambda m: pyprune.MovementPruner(m, HALF, sgd(m), score_optimizer=lambda scores: 1 / 0), "division"
    ),
    "scope of movement": (lambda m: pyprune.MovementPruner(m, HALF, sgd(m), scope=scope.row()), "scope is row"),
    "threshold": (lambda m: pyprune.MovementPruner(m, HALF, sgd(m), threshold=1.0), "between 0 and 1"),
    "regularization": (lambda m: pyprune.MovementPruner(m, HALF, sgd(m), regularization=1.0), "it is for soft masks"),
    "dict of movement": (
        lambda m: pyprune.MovementPruner(m, schedules.one_shot({"head": 0.5}, start=1), sgd(m)), "not a dict"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_wrong_is_refused_and_leaves_the_model_as_it_was(name, masked):
    make, message = WRONG[name]
    model = small()
    if masked:
        prune(model, LOCAL, ratio=0.25)
    before = Unchanged(model)
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)) as caught:
        make(model)
    assert message in str(caught.value)
    before.check()
    assert not has_hooks(model)


FROZEN = {
    "taylor": lambda m: Pruner(m, TAYLOR, HALF, sgd(m)),
    "rigl": lambda m: pyprune.RigLPruner(m, 0.5, sgd(m), end=4, frequency=2),
    "movement": lambda m: pyprune.MovementPruner(m, HALF, sgd(m)),
}


@pytest.mark.parametrize("name", FROZEN)
def test_weights_without_gradient_are_refused_where_it_is_needed(name):
    model = small()
    model.conv.weight.requires_grad_(False)
    before = Unchanged(model)
    with pytest.raises(ValueError, match=r"conv\.weight has none \(requires_grad is False\); name it in"):
        FROZEN[name](model)
    before.check()
    assert not has_hooks(model)
    assert Pruner(model, LOCAL, HALF, sgd(model)).ratio == 0.0


def test_several_pruners_see_the_same_gradients():
    """As those of the stages of a recipe do."""
    model = small()
    optimizer = sgd(model)
    first, second = (taylor_pruner(model, optimizer) for _ in range(2))
    with changing_masks(masks_in(model)):
        for mask in masks_of(model).values():
            mask.view(-1)[::2] = False
    train(model, optimizer, first, 1)
    assert_same_masks(sums_of(first)["sums"], sums_of(second)["sums"])
    assert (sums_of(second)["sums"]["head.weight"] != 0).all()
    assert (model.head.weight.grad.view(-1)[::2] == 0).all()
    first.freeze()
    train(model, optimizer, second, 1)
    assert (sums_of(second)["count"], sums_of(first)["count"]) == (2, 1)
    second.freeze()
    assert not has_hooks(model)


def test_activations_that_cannot_be_seen_are_refused_before_masks_are_on():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"activations of 1\.in_proj_weight cannot be seen while"):
        Pruner(model, Method(importance.wanda()), HALF)
    assert not masks(model)
    assert not has_hooks(model)


def test_parameters_that_were_replaced_are_an_error():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    pruner = Pruner(model, LOCAL, schedules.linear(0.5, end=2))
    pruner.step()
    before = masks(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"0\.weight is another parameter than before .*make a new Pruner"):
        pruner.step()
    assert_same_masks(masks(model), before)
    again = Pruner(model, LOCAL, schedules.linear(0.5, end=2))
    again.step()
    assert again.ratio == 0.25


def test_nan_is_an_error_at_the_update_and_names_the_weight():
    model = small()
    optimizer = sgd(model)
    pruner = Pruner(model, TAYLOR, schedules.linear(0.5, end=4), optimizer)
    train(model, optimizer, pruner, 1)
    backward(model)
    model.conv.weight.grad[0] = torch.nan
    optimizer.step()
    with pytest.raises(ValueError, match=r"NaN or infinite scores by taylor: \d+ in conv\.weight"):
        pruner.step()


def test_masks_of_step_0_are_those_of_the_schedule_whatever_was_there():
    model = prune(small(), LOCAL, ratio=0.8)
    pruner = Pruner(model, LOCAL, schedules.cubic(0.9, end=20))
    assert pruner.ratio == 0.0
    assert all(mask.all() for mask in masks(model).values())


def test_the_least_ratio_holds_with_a_schedule_that_has_no_end():
    model, other = small(), small()
    method = Method(importance.magnitude())
    Pruner(model, method, lambda step: 0.5, min_ratio=0.45)
    assert_same_masks(masks(model), masks(prune(other, method, ratio=0.5, min_ratio=0.45)))


@pytest.mark.parametrize("dim", ["in", "out", "both"])
def test_a_schedule_turns_more_and_more_groups_into_n_of_m(dim):
    method = Method(importance.magnitude(), scope=scope.n_of_m(keep=1, of=4, dim=dim))
    model, ignored = small(), pyprune.IgnoredScope(names=["conv"])
    pruner = Pruner(model, method, schedules.linear(0.75, end=4), ignored_scope=ignored)
    size = 4 if dim != "both" else 16
    for step in range(5):
        ratio = 0.75 * step / 4
        assert pruner.ratio == pytest.approx(ratio)
        for mask in masks(model).values():
            assert int((~mask).sum()) == math.floor(step / 4 * mask.numel() / size + 0.5) * size * 3 // 4
        pruner.step()


class Wrapped:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_wrappers_of_optimizers_are_looked_through():
    model = small()
    optimizer = sgd(model)
    taylor = Method(importance.taylor())
    pruner = Pruner(model, taylor, schedules.one_shot(0.5, start=1), Wrapped(Wrapped(optimizer)))
    train(model, optimizer, pruner, 1)
    assert pruner.ratio == 0.5
    with pytest.raises(TypeError, match=r"give a torch\.optim\.Optimizer"):
        Pruner(small(), LOCAL, schedules.one_shot(0.5), object())


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_pruner_is_not_copied(make):
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        make(Pruner(small(), LOCAL, schedules.one_shot(0.5)))


def test_a_copy_of_a_model_whose_activations_are_watched_watches_nothing():
    model = small()
    pruner = Pruner(model, Method(importance.wanda()), schedules.one_shot(0.5, start=2), sgd(model))
    backward(copy.deepcopy(model))
    assert not pruner._is_measured()
    backward(model)
    assert pruner._is_measured()


def test_a_weight_without_any_gradient_since_the_last_update_is_an_error():
    model = small()
    optimizer = sgd(model)
    pruner = Pruner(model, Method(importance.taylor()), schedules.linear(0.5, end=4, frequency=2), optimizer)
    train(model, optimizer, pruner, 2)
    model.hidden.weight.requires_grad_(False)
    backward(model)
    optimizer.step()
    pruner.step()
    backward(model)
    optimizer.step()
    with pytest.raises(ValueError, match=r"hidden\.weight had no gradient since"):
        pruner.step()


def test_a_step_that_fails_is_not_counted(device):
    model = small().to(device)
    pruner = Pruner(model, LOCAL, schedules.linear(0.5, end=4))
    pruner.step()
    before = plain(pruner.state_dict())
    model.head.weight.data[0, 0] = torch.nan
    for _ in range(2 if device.type == "cpu" else 0):
        with pytest.raises(ValueError, match=r"NaN or infinite weights: 1 in head\.weight"):
            pruner.step()
        assert plain(pruner.state_dict()) == before
    model.head.weight.data[0, 0] = 1.0
    assert pruner.step()
    assert (pruner.step_count, pruner.ratio) == (2, 0.25)


MAKERS = {
    "linear": lambda model, optimizer: Pruner(model, LOCAL, schedules.linear(0.5, end=4), optimizer),
    "one update": lambda model, optimizer: Pruner(model, LOCAL, schedules.multi_step({1: 0.5}), optimizer),
    "gmp": lambda model, optimizer: pyprune.gmp(model, 0.5, optimizer, end=4),
    "AC/DC": lambda model, optimizer: pyprune.ac_dc(model, 0.5, optimizer, end=4, frequency=1),
    "recipe": lambda model, optimizer: pyprune.Recipe.from_string("stages: [prune: {final: 0.5, end: 4}]").apply(
        model, optimizer, 1
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_failed_step_that_is_repaired_makes_the_update_that_failed(name):
    def ratios(fails):
        torch.manual_seed(0)
        model = small()
        pruner = MAKERS[name](model, torch.optim.SGD(model.parameters(), lr=0.1))
        found = []
        for step in range(4):
            if fails and step == 0:
                good = model.head.weight.detach().clone()
                with torch.no_grad():
                    model.head.weight[0, 0] = torch.nan
                with pytest.raises(ValueError, match="NaN"):
                    pruner.step()
                with torch.no_grad():
                    model.head.weight.copy_(good)
            pruner.step()
            found.append(int((model.head.weight == 0).sum()))
        return found

    assert ratios(fails=True) == ratios(fails=False)


@pytest.mark.parametrize("option", ["reintroduce", "zero_dead_channels"])
def test_flags_are_true_or_false(option):
    with pytest.raises(TypeError, match=f"{option} is 'no'"):
        Pruner(small(), LOCAL, schedules.one_shot(0.5), **{option: "no"})
