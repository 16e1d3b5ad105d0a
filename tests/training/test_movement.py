import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune import MovementPruner, granularity, schedules, scope
from tests.conftest import masks_of
from tests.training.test_pruner import assert_same_masks, backward, masks, plain_gradient, raw, sgd, small, train

LR = 0.5


def descent(scores):
    return torch.optim.SGD(scores, lr=LR)


def movement(model, optimizer, schedule, **options):
    return MovementPruner(model, schedule, optimizer, score_optimizer=descent, **options)


def in_units(tensor, cut):
    """Sum over the units of a matrix."""
    rows, columns = cut
    return nn.functional.avg_pool2d(tensor[None, None], (rows, columns))[0, 0] * rows * columns


def test_scores_by_hand():
    """One neuron, y = (w m) x and the loss c y: the gradient of the weight in use is c x, whatever the mask."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = movement(model, optimizer, schedules.one_shot(0.5, start=2))
    x = torch.tensor([[2.0, 1.0, -1.0, 4.0]])
    expected = torch.zeros(1, 4)
    for step, c in enumerate((1.0, -3.0, 2.0)):
        optimizer.zero_grad()
        (c * model(x)).sum().backward()
        optimizer.step()
        pruner.step()
        # -lr (sum over steps of g w), by hand: g w = c (2, -2, -3, 2)
        expected = expected - LR * c * torch.tensor([[2.0, -2.0, -3.0, 2.0]])
        if step < 2:
            assert torch.equal(pruner.scores["weight"], expected)
    # Before the masks came scores were (2, -2, -3, 2); the two lowest went.
    assert masks(model)["weight"].tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("cut", [(1, 1), (4, 4), (2, 8)], ids=str)
@pytest.mark.parametrize("where", [scope.tensor(), scope.model()], ids=lambda where: where.name)
def test_scores_learn_from_the_gradient_of_all_weights_and_the_lowest_go(cut, where):
    model = small()
    optimizer = sgd(model, weight_decay=0.01)
    block = granularity.element() if cut == (1, 1) else granularity.block(*cut)
    schedule = schedules.cubic(0.6, start=2, end=8, initial=0.2)
    only = pyprune.IgnoredScope(names=["conv"])
    pruner = movement(model, optimizer, schedule, granularity=block, scope=where, ignored_scope=only)
    expected = {name: torch.zeros(score.shape) for name, score in pruner.scores.items()}
    came_back = 0
    before = masks(model)
    for step in range(1, 11):
        optimizer.zero_grad()
        gradients, weights = plain_gradient(model, step), raw(model)
        if step <= 8:
            for name in expected:
                expected[name] = expected[name] - LR * in_units(gradients[name] * weights[name], cut)
        backward(model, step)
        optimizer.step()
        assert pruner.step() == (2 <= step <= 8)
        now = masks(model)
        for name, score in pruner.scores.items():
            torch.testing.assert_close(score.double(), expected[name].double(), rtol=1e-4, atol=1e-6)
        if 2 <= step <= 8:
            scores = [score.flatten() for score in pruner.scores.values()]
            units = [mask[:: cut[0], :: cut[1]].flatten() for mask in now.values()]
            if where.name == "model":
                scores, units = [torch.cat(scores)], [torch.cat(units)]
            for score, unit in zip(scores, units, strict=True):
                assert int((~unit).sum()) == int(schedule(step) * len(unit) + 0.5)
                assert not (~unit).any() or score[~unit].max() <= score[unit].min()
        else:
            assert_same_masks(now, before)
        came_back += sum(int((now[name] & ~before[name]).sum()) for name in now)
        before = now
    assert came_back > 0 or cut != (1, 1)
    assert pruner.ratio == 0.6


def test_soft_masks_are_those_above_the_threshold():
    model = small()
    optimizer = sgd(model)
    schedule = schedules.linear(0.8, start=1, end=5)
    pruner = movement(model, optimizer, schedule, threshold=0.6)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for step in range(1, 6):
        for score in pruner.scores.values():
            score.copy_(torch.randn(score.shape, generator=generator))
        assert pruner.step()
        for name, score in pruner.scores.items():
            expected = score.double().sigmoid() >= 0.6 * schedule(step)
            assert torch.equal(masks(model)[name], expected)
            seen.add(int(expected.sum()))
    assert len(seen) > 5


@pytest.mark.parametrize("cut", [None, granularity.block(4, 2)])
def test_regularization_is_part_of_the_loss(cut):
    """Its gradient is that of scale * ratio * mean(sigma(S)), over all units, at the ratio of the last update."""
    scale = 3.0
    free, bound = small(), small()
    schedule = schedules.linear(0.8, start=1, end=8)
    pruners = []
    for model, regularization in ((free, 0.0), (bound, scale)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pruner = movement(model, optimizer, schedule, threshold=0.5, regularization=regularization, granularity=cut)
        for score in pruner.scores.values():
            score.copy_(torch.linspace(-1, 2, score.numel()).reshape(score.shape))
        pruner.ratio = 0.4
        pruners.append(pruner)
    leaves = [score.clone().requires_grad_() for score in pruners[1].scores.values()]
    (scale * 0.4 * torch.cat([leaf.flatten() for leaf in leaves]).sigmoid().mean()).backward()
    for model, pruner in zip((free, bound), pruners, strict=True):
        backward(model)
        pruner.optimizer.step()
    for one, other, leaf in zip(pruners[0].scores.values(), pruners[1].scores.values(), leaves, strict=True):
        torch.testing.assert_close(other - one, -LR * leaf.grad, rtol=1e-3, atol=1e-7)


def test_regularization_drives_scores_down_until_weights_go():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = schedules.linear(0.9, start=1, end=40)
    pruner = MovementPruner(model, schedule, optimizer, lr=0.1, threshold=0.5, regularization=500.0)
    train(model, optimizer, pruner, 40)
    dropped = sum(int((~mask).sum()) for mask in masks(model).values())
    assert dropped > 100


@pytest.mark.parametrize("stop", ["end", "freeze"])
def test_nothing_moves_after_the_end_or_freeze(stop):
    model = small()
    optimizer = sgd(model)
    pruner = MovementPruner(model, schedules.cubic(0.5, start=1, end=4), optimizer)
    train(model, optimizer, pruner, 4 if stop == "end" else 3)
    if stop == "freeze":
        pruner.freeze()
    state = copy.deepcopy(pruner.state_dict())
    before = masks(model)
    train(model, optimizer, pruner, 5, 4)
    assert_same_masks(masks(model), before)
    after = pruner.state_dict()
    for name, score in state["scores"].items():
        assert torch.equal(after["scores"][name], score)
    assert str(after["score_optimizer"]) == str(state["score_optimizer"])
    # What is dropped gets no gradient any more.
    grad = model.head.weight.grad
    assert (grad[~before["head.weight"]] == 0).all()


def test_batches_of_gradient_accumulation_are_one_step_of_the_scores():
    model, twin = small(), small()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.0) for each in (model, twin)]
    one, other = (movement(m, o, schedules.one_shot(0.5, start=5)) for m, o in zip((model, twin), optimizers))  # noqa: B905
    backward(model, 1)
    backward(model, 2)
    optimizers[0].step()
    gradients = [plain_gradient(twin, step) for step in (1, 2)]
    for name, score in one.scores.items():
        product = (gradients[0][name] + gradients[1][name]) * raw(twin)[name]
        torch.testing.assert_close(score.double(), -LR * product, rtol=1e-4, atol=1e-7)
    assert not any(score.any() for score in other.scores.values())


def test_an_overflow_teaches_scores_nothing():
    model = small()
    optimizer = sgd(model)
    pruner = movement(model, optimizer, schedules.cubic(0.5, start=1, end=9))
    train(model, optimizer, pruner, 2)
    before = {name: score.clone() for name, score in pruner.scores.items()}
    optimizer.zero_grad()
    (model(torch.ones(2, 2, 4, 4)).sum() * torch.inf).backward()
    pruner.step()
    assert all(torch.equal(before[name], score) for name, score in pruner.scores.items())


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_scores_that_are_not_finite_are_an_error_that_changes_no_mask(threshold):
    model = small()
    optimizer = sgd(model)
    pruner = movement(model, optimizer, schedules.cubic(0.5, start=1, end=9), threshold=threshold)
    train(model, optimizer, pruner, 2)
    before = masks(model)
    pruner.scores["conv.weight"].view(-1)[:3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite scores of movement: 3 in conv\.weight"):
        pruner.step()
    assert_same_masks(masks(model), before)


def test_heads_are_scored_over_all_their_weights():
    model = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    heads = granularity.head(2)
    pruner = movement(model, optimizer, schedules.one_shot(0.5, start=2), granularity=heads, scope=scope.model())
    (name,) = pruner.scores
    x = torch.randn(2, 3, 8)
    twin = copy.deepcopy(model)
    model(x, x, x)[0].square().sum().backward()
    optimizer.step()
    twin(x, x, x)[0].square().sum().backward()
    into, out = twin.in_proj_weight, twin.out_proj.weight
    products = (into.grad * into).detach().reshape(3, 2, 4, 8).sum((0, 2, 3))
    products = products + (out.grad * out).detach().reshape(8, 2, 4).sum((0, 2))
    torch.testing.assert_close(pruner.scores[name], -LR * products, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "model"}, TypeError, "scope is 'model'"),
        ({"threshold": "a"}, TypeError, "threshold is 'a'"),
        ({"threshold": 0.5, "regularization": "x"}, TypeError, "regularization is 'x'"),
        ({"threshold": 0.5, "regularization": float("nan")}, ValueError, "regularization is nan"),
        ({"score_optimizer": 3}, TypeError, "score_optimizer is 3"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    model = small()
    with pytest.raises(error, match=message):
        pyprune.MovementPruner(model, schedules.one_shot(0.5, start=1), sgd(model), **options)
    assert masks_of(model) == {}
