import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, granularity, importance, iterative_prune, lottery_ticket, schedules, scope
from pyprune.modules.zeros import holds_in, settle
from tests.conftest import masks_of
from tests.selection.test_prune_methods import grouped_transformer

LOCAL = Method(importance.magnitude(), scope=scope.tensor())
GLOBAL = Method(importance.magnitude())
PAIRS = Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4))
FILTERS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())


def shake(model):
    """Stand in for training: move all weights, and those under masks."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    settle(holds_in(model))


def run(model, schedule, method=LOCAL, finetune=shake, score=lambda model: 1.0, **arguments):
    return iterative_prune(model, schedule, method, finetune, score, **arguments)


def sparsities(result):
    return [one.sparsity for one in result.history]


# ---- iterative pruning ----


@pytest.mark.parametrize(
    ("schedule", "arguments", "ratios"),
    [
        ((0.2, 0.5, 0.7), {}, [0.2, 0.5, 0.7]),
        ([0.5], {"num_iterations": 1}, [0.5]),
        (schedules.linear(0.8, end=4), {}, [0.2, 0.4, 0.6, 0.8]),
        # What the example of a skill page wants and does not reach.
        (schedules.linear(0.8, end=3, initial=0.2), {}, [0.2, 0.4, 0.6, 0.8]),
        (schedules.cubic(0.8, end=40, frequency=10), {}, [0.4625, 0.7, 0.7875, 0.8]),
        (schedules.multi_step({0: 0.3, 50: 0.5, 70: 0.5}), {}, [0.3, 0.5]),
        (schedules.one_shot(0.6, start=9), {}, [0.6]),
        (lambda i: 0.25 * i, {"num_iterations": 3}, [0.25, 0.5, 0.75]),
        (schedules.custom(lambda step: step / 100, frequency=20), {"num_iterations": 2}, [0.2, 0.4]),
    ],
)
def test_iterative_prune_takes_ratios_from_any_schedule(schedule, arguments, ratios):
    model = nn.Linear(40, 20)
    result = run(model, schedule, **arguments)
    assert [one.ratio for one in result.history] == pytest.approx(ratios)
    assert sparsities(result) == pytest.approx(ratios)
    assert [one.iteration for one in result.history] == list(range(1, len(ratios) + 1))
    assert result.kept is result.history[-1]
    assert pyprune.pruning_statistic(model).pruning_ratio == pytest.approx(ratios[-1])


@pytest.mark.parametrize("method", [LOCAL, GLOBAL, FILTERS], ids=["local", "global", "filters"])
@pytest.mark.parametrize("reintroduce", [False, True])
def test_iterative_prune_counts_are_exact_and_dropped_units_stay(cnn, method, reintroduce):
    masks = []

    def finetune(model):
        masks.append([mask.clone() for mask in masks_of(model).values()])
        with torch.no_grad():  # the smallest become the largest
            for parameter in model.parameters():
                parameter.copy_(1 / (parameter + 1e-3))

    result = run(cnn.model, (0.13, 0.37, 0.61), method, finetune, reintroduce=reintroduce)
    fresh = copy.deepcopy(cnn.model)
    for one, now in zip(result.history, masks, strict=True):
        pyprune.prune(fresh, method, ratio=one.ratio)
        assert one.sparsity == pytest.approx(pyprune.pruning_statistic(fresh).pruning_ratio, abs=0.02)
        counted = sum(int((~mask).sum()) for mask in now) / sum(mask.numel() for mask in now)
        assert one.sparsity == counted
    if method is GLOBAL:
        total = sum(mask.numel() for mask in masks[0])
        assert [round(sparsity * total) for sparsity in sparsities(result)] == [
            int(ratio * total + 0.5) for ratio in (0.13, 0.37, 0.61)
        ]
    for before, after in pairwise(masks):
        came_back = any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
        assert came_back == reintroduce


def test_iterative_prune_records_scores_before_and_after_training(device):
    model = nn.Linear(10, 10, bias=False).to(device)
    nn.init.ones_(model.weight)

    def double(model):
        with torch.no_grad():
            model.weight.mul_(2)

    result = run(model, (0.25, 0.5), LOCAL, double, lambda model: model.weight.sum())
    assert result.baseline == 100
    assert [(one.score_before, one.score) for one in result.history] == [(75, 150), (100, 200)]
    assert result.dense["weight"].tolist() == [[1.0] * 10] * 10
    assert result.to_dict() == {
        "baseline": 100.0,
        "history": [
            {"iteration": 1, "ratio": 0.25, "sparsity": 0.25, "score_before": 75.0, "score": 150.0},
            {"iteration": 2, "ratio": 0.5, "sparsity": 0.5, "score_before": 100.0, "score": 200.0},
        ],
        "kept": 2,
    }
    rows = [line.split() for line in str(result).splitlines()]
    assert ["dense", "100"] in rows
    assert ["2", "0.5", "50.00%", "100", "200", "kept"] in rows


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_iterative_prune_stops_at_the_drop_and_keeps_the_best(cnn, higher_is_better):
    sign = 1 if higher_is_better else -1
    # Scores are asked for dense, then before and after training in each round.
    scores = iter([1.0, 0.5, 0.98, 0.4, 0.95, 0.3, 0.8])
    states = []

    def finetune(model):
        shake(model)
        model.bn1.running_mean.add_(1)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    result = run(
        cnn.model,
        (0.2, 0.4, 0.6, 0.8),
        FILTERS,
        finetune,
        lambda model: sign * next(scores),
        max_drop=0.1,
        higher_is_better=higher_is_better,
    )
    assert [one.ratio for one in result.history] == [0.2, 0.4, 0.6]
    assert result.kept is result.history[1]
    assert pyprune.pruning_statistic(cnn.model).pruning_ratio == result.kept.sparsity
    for name, tensor in cnn.model.state_dict().items():
        assert torch.equal(tensor, states[1][name]), name


def test_iterative_prune_is_as_it_was_if_no_round_holds_the_drop(cnn, unchanged):
    before = unchanged(cnn.model)
    scores = iter([1.0, 0.5, float("nan")])
    rng = torch.get_rng_state()
    result = run(cnn.model, (0.2, 0.4), score=lambda model: next(scores), max_drop=10)
    assert result.kept is None
    assert len(result.history) == 1
    torch.set_rng_state(rng)  # training draws
    before.check()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("masked", [False, True])
def test_iterative_prune_is_as_it_was_if_training_fails(cnn, unchanged, error, masked):
    if masked:
        pyprune.prune(cnn.model, FILTERS, ratio=0.2)
    before = unchanged(cnn.model.eval())
    rng = torch.get_rng_state()
    rounds = []

    def fail(model):
        rounds.append(shake(model.train()))
        if len(rounds) == 2:
            raise error

    with pytest.raises(error):
        run(cnn.model, (0.3, 0.5), GLOBAL, fail)
    torch.set_rng_state(rng)
    before.check()


def test_iterative_prune_prunes_heads_and_ratios_by_name(device):
    model, _ = grouped_transformer(device)
    heads = Method(importance.magnitude(), granularity.head(4, 2), scope.tensor())
    result = run(model, (0.1, 0.5), heads)
    assert sparsities(result) == [0.0, 0.5]
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    result = run(model, schedules.linear({"0": 0.8, "1": 0.4}, end=2))
    assert [one.ratio for one in result.history] == [{"0": 0.4, "1": 0.2}, {"0": 0.8, "1": 0.4}]
    assert sparsities(result) == [0.3, 0.6]
    assert "by name" in str(result)


def test_iterative_prune_trains_after_each_layer():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    seen = []

    def finetune(model):
        shake(model)
        seen.append([int((model[i].weight == 0).sum()) for i in range(3)])

    run(model, schedules.in_turn([("1", 0.5), ("0.weight", 0.25)]), finetune=finetune)
    assert seen == [[0, 16, 0], [8, 16, 0]]


def test_iterative_prune_of_tied_weights_counts_once(transformer):
    result = run(transformer.model, (0.5,), LOCAL, lambda model: None)
    assert torch.equal(transformer.model.embed.weight, transformer.model.decoder.weight)
    assert result.kept.sparsity == pyprune.pruning_statistic(transformer.model).pruning_ratio


def test_iterative_prune_calibrates_in_every_round(cnn):
    seen = []

    def calibrate(model):
        seen.append(pyprune.pruning_statistic(model).pruning_ratio)
        return pyprune.calibrate(model, [cnn.inputs], importance.wanda())

    run(cnn.model, (0.2, 0.4), Method(importance.wanda(), scope=scope.row()), calibrate_fn=calibrate)
    assert seen[0] == 0
    assert seen[1] > 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": (0.5, 0.3)}, ValueError, "falls from 0.5 to 0.3.*reintroduce=True"),
        ({"schedule": schedules.alternating(0.5, end=20, frequency=5)}, ValueError, "falls from 0.5 to 0"),
        ({"schedule": (0.5, 1.0)}, ValueError, r"ratio of schedule is 1.0.*\[0, 1\)"),
        ({"schedule": schedules.one_shot(0.0)}, ValueError, "one_shot is always 0"),
        ({"schedule": ()}, ValueError, "schedule has 0 ratios"),
        ({"schedule": (0.5,), "num_iterations": 2}, ValueError, "has 1 ratios and num_iterations is 2"),
        ({"schedule": schedules.linear(0.5, end=5), "num_iterations": 2}, ValueError, "num_iterations is 2, but the"),
        ({"schedule": lambda i: 0.1}, ValueError, "the schedule has no end"),
        ({"schedule": "0.5"}, TypeError, "schedule is '0.5'"),
        ({"num_iterations": 0}, ValueError, "num_iterations is 0"),
        ({"method": PAIRS, "schedule": (0.2, 0.6)}, ValueError, "keeping 2 of 4 removes at most 0.5"),
        ({"method": GLOBAL, "schedule": ({"fc": 0.5},)}, ValueError, "dict of ratios"),
        ({"method": "UNSTRUCTURED_REGULARIZATION_BASED"}, ValueError, "trains gates"),
        ({"method": Method(importance.wanda())}, ValueError, "give calibrate_fn="),
        ({"calibrate_fn": print}, ValueError, "takes no calibration"),
        ({"finetune": None}, TypeError, "finetune_fn is None"),
        ({"score": None}, TypeError, "eval_fn is None"),
        ({"max_drop": -1}, ValueError, "max_drop is -1"),
        ({"ignored_scope": IgnoredScope(names=["nothing"])}, ValueError, "nothing"),
    ],
)
def test_iterative_prune_says_what_is_wrong_before_it_trains(cnn, unchanged, arguments, error, message):
    before = unchanged(cnn.model)
    good = {"schedule": (0.5,), "finetune": lambda model: pytest.fail("trained")}
    with pytest.raises(error, match=message):
        run(cnn.model, **(good | arguments))
    before.check()


# ---- lottery tickets ----


def test_lottery_ticket_takes_the_same_share_each_round():
    model = nn.Sequential(nn.Linear(100, 80), nn.Linear(80, 25))
    result = lottery_ticket(model, shake, 0.8, iterations=4)
    assert [one.ratio for one in result.history] == pytest.approx([0.3313, 0.5528, 0.7009, 0.8], abs=5e-5)
    assert sparsities(result) == [0.3313, 0.5528, 0.7009, 0.8]
    assert result.history[-1].ratio == 0.8
    assert [one.score for one in result.history] == [None] * 4
    assert "56" not in str(result)


@pytest.mark.parametrize("early", [False, True])
def test_lottery_ticket_prunes_trained_weights_and_rewinds(cnn, early):
    model = cnn.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if early:
        shake(model)
        model.bn1.running_var.add_(1)
        rewind_to = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(start)
    else:
        rewind_to = None
    tickets, trained, masks = [], [], []

    def train(model):
        raw = copy.deepcopy(model)
        if masks_of(raw):
            pyprune.prune(raw, GLOBAL, ratio=0.0)
        tickets.append(copy.deepcopy(raw.state_dict()))
        masks.append({target.name: mask.clone() for target, mask in masks_of(model).items()})
        shake(model)
        model.bn1.running_var.mul_(2)
        trained.append(copy.deepcopy(model))

    result = lottery_ticket(
        model,
        train,
        0.75,
        iterations=2,
        rewind_to=rewind_to,
        eval_fn=lambda model: sum(float(p.abs().sum()) for p in model.parameters()),
    )
    assert len(tickets) == 3
    for name, tensor in start.items():
        assert torch.equal(tickets[0][name], tensor)
        for ticket in tickets[1:]:
            assert torch.equal(ticket[name], (rewind_to or start)[name]), name
    # Each mask is that of the weights that the round before had trained, among what was left.
    fresh = pyprune.prune(trained[0], GLOBAL, ratio=0.5)
    assert_equal_masks(fresh, masks[1])
    fresh = pyprune.prune(trained[1], GLOBAL, ratio=0.5, from_remaining=True)
    assert_equal_masks(fresh, masks[2])
    assert_equal_masks(model, masks[2])
    assert torch.equal(model.conv1.weight, trained[2].conv1.weight)
    assert result.kept is result.history[-1]
    assert result.baseline != result.history[0].score_before != result.history[0].score
    assert torch.equal(result.dense["conv1.weight"].to(model.fc.bias.device), start["conv1.weight"])


def assert_equal_masks(model, masks):
    found = masks_of(model)
    assert {target.name for target in found} == set(masks)
    for target, mask in found.items():
        assert torch.equal(mask, masks[target.name]), target.name


def test_lottery_ticket_learns_with_less(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    inputs = torch.randn(256, 20, device=device)
    outputs = inputs[:, :2].prod(1, keepdim=True)

    def loss(model):
        return nn.functional.mse_loss(model(inputs), outputs)

    def train(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(25):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    result = lottery_ticket(model, train, 0.8, iterations=2, eval_fn=loss)
    last = result.history[-1]
    assert last.score < 0.5 * last.score_before
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == round(0.8 * 672)


def test_lottery_ticket_is_as_it_was_if_training_fails(cnn, unchanged):
    before = unchanged(cnn.model)
    rng = torch.get_rng_state()
    rounds = []

    def fail(model):
        rounds.append(shake(model))
        if len(rounds) == 3:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        lottery_ticket(cnn.model, fail, 0.5, iterations=4)
    torch.set_rng_state(rng)
    before.check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, "ratio is 1.0"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"iterations": 1.5}, TypeError, "iterations is 1.5"),
        ({"train_fn": None}, TypeError, "train_fn is None"),
        ({"eval_fn": 1}, TypeError, "eval_fn is 1"),
        ({"rewind_to": {}}, ValueError, "rewind_to is no state_dict of this model"),
        ({"method": PAIRS, "ratio": 0.7}, ValueError, "keeping 2 of 4 removes at most 0.5"),
        ({"method": Method(importance.snip())}, ValueError, "give calibrate_fn="),
    ],
)
def test_lottery_ticket_says_what_is_wrong_before_it_trains(cnn, unchanged, arguments, error, message):
    before = unchanged(cnn.model)
    good = {"train_fn": lambda model: pytest.fail("trained"), "ratio": 0.5, "iterations": 2}
    with pytest.raises(error, match=message):
        lottery_ticket(cnn.model, **(good | arguments))
    before.check()


def test_lottery_ticket_begins_with_a_dense_model(cnn):
    pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    with pytest.raises(ValueError, match="strip it first"):
        lottery_ticket(cnn.model, shake, 0.5, iterations=2)
