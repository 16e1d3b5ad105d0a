import math

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune.methods.allocation import er, erk
from tests.conftest import attached, masks_of
from tests.training.test_pruner import backward, masks, plain_gradient, raw, sgd, small


def lowest(values, allowed, count):
    """Return the places of the ``count`` lowest of those that are allowed, by NumPy; of equals the first."""
    places = np.flatnonzero(allowed.ravel())
    return places[np.argsort(values.ravel()[places], kind="stable")[:count]]


def expected_mask(weight, gradient, mask, share):
    mask = mask.numpy().copy()
    moved = int(share * mask.sum())
    mask.flat[lowest(np.abs(weight.numpy()), mask, moved)] = False
    kept = mask.copy()
    # The largest gradients: of equals the last grow, as the first go.
    candidates = np.flatnonzero(~kept.ravel())
    order = np.argsort(np.abs(gradient.numpy()).ravel()[candidates], kind="stable")
    mask.flat[candidates[order[len(order) - moved :]]] = True
    return torch.from_numpy(mask)


@pytest.mark.parametrize("allocation", ["erk", "er", "uniform"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_every_update_drops_the_smallest_weights_and_grows_the_largest_gradients(allocation, optimizer):
    model = small().double()
    shapes = [layer.weight.shape for layer in (model.conv, model.hidden, model.head)]
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer(model.parameters(), lr=0.05, weight_decay=0.01, **options)
    pruner = pyprune.RigLPruner(
        model, 0.6, optimizer, end=12, frequency=4, fraction=0.5, allocation=allocation, seed=3
    )
    ratios = {
        "erk": erk(shapes, 0.6),
        "er": er(shapes, [shape[:2] for shape in shapes], 0.6),
        "uniform": [0.6] * len(shapes),
    }[allocation]
    counts = [math.floor(ratio * math.prod(shape) + 0.5) for ratio, shape in zip(ratios, shapes, strict=True)]
    moved = 0
    for step in range(1, 15):
        before = masks(model)
        assert [int((~mask).sum()) for mask in before.values()] == counts
        gradients = plain_gradient(model, step)
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        weights = raw(model)
        updated = pruner.step()
        assert updated == (step in (4, 8, 12))
        now = masks(model)
        share = 0.25 * (1 + math.cos(math.pi * step / 12)) if updated else 0.0
        for target, mask in masks_of(model).items():
            name = target.name
            assert torch.equal(mask, expected_mask(weights[name], gradients[name], before[name], share)), name
            grown = mask & ~before[name]
            moved += int(grown.sum())
            states = [s for s in optimizer.state[target.parameter].values() if s.shape == mask.shape]
            assert len(states) == (1 if options else 2)
            for tensor in (target.parameter, *states):
                assert (tensor[grown] == 0).all()
                assert (tensor[~mask] == 0).all()
            # Those that were there before go on as they were.
            assert torch.equal(target.parameter[mask & before[name]], weights[name][mask & before[name]])
        assert pruner.ratio == 0.6
        assert all((mask != before[name]).any() for name, mask in now.items()) == (updated and step < 12)
    assert moved > 20


def test_first_masks_are_random_by_seed_and_weights_are_zero_under_them():
    def first(seed):
        model = small()
        pyprune.RigLPruner(model, 0.5, sgd(model), end=4, frequency=2, seed=seed)
        for target, mask in masks_of(model).items():
            assert (target.parameter[~mask] == 0).all()
        return torch.cat([mask.flatten() for mask in masks(model).values()])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_only_the_batch_before_an_update_is_looked_at():
    model = small()
    optimizer = sgd(model)
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=6, frequency=3)
    seen = []
    for step in range(1, 10):
        backward(model, step)
        optimizer.step()
        seen.append(len(pruner._gradients))
        pruner.step()
    assert seen == [0, 0, 3, 0, 0, 3, 0, 0, 0]


def test_an_update_waits_for_a_step_that_is_taken():
    model = small()
    optimizer = sgd(model)
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=9, frequency=3, fraction=0.8)
    before = masks(model)
    for step in range(1, 6):
        optimizer.zero_grad()
        backward(model, step)
        if step not in (3, 4):  # overflowed
            optimizer.step()
        assert pruner.step() == (step == 5)
    assert any((mask != before[name]).any() for name, mask in masks(model).items())


def test_a_weight_without_gradient_is_an_error_that_changes_nothing():
    model = small()
    optimizer = sgd(model)
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=4, frequency=1)
    before = masks(model)
    model.norm(model.conv(torch.randn(2, 2, 4, 4))).square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"hidden\.weight, head\.weight had no gradient in the last step"):
        pruner.step()
    assert all(torch.equal(before[name], mask) for name, mask in masks(model).items())


def test_what_was_seen_before_a_checkpoint_is_loaded_does_not_count():
    model = small()
    optimizer = sgd(model)
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=4, frequency=1, fraction=0.8)
    state, before = pruner.state_dict(), masks(model)
    backward(model)
    optimizer.step()
    pruner.load_state_dict(state)
    backward(model)  # overflows, and the optimizer leaves it out
    assert not pruner.step()
    assert all(torch.equal(before[name], mask) for name, mask in masks(model).items())


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_nan_is_an_error_that_changes_nothing(where):
    model = small()
    optimizer = sgd(model, lr=0.0, momentum=0.0)
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=4, frequency=1)
    before = masks(model)
    backward(model)
    if where == "gradient":
        model.zero_grad()
        (model(torch.randn(2, 2, 4, 4)).sum() * torch.nan).backward()
    optimizer.step()
    if where == "weight":
        model.head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the training diverged"):
        pruner.step()
    assert all(torch.equal(before[name], mask) for name, mask in masks(model).items())


def test_dead_channels_of_an_earlier_prune_are_followed():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    magnitude = pyprune.importance.magnitude()
    dead = pyprune.Method(magnitude, pyprune.granularity.channel("out"), pyprune.scope.tensor())
    pyprune.prune(model, dead, ratio=0.5, zero_dead_channels=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pyprune.RigLPruner(model, 0.9, optimizer, end=9, frequency=1, allocation="uniform")
    for step in range(6):
        torch.manual_seed(step)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        pruner.step()
        alive = masks(model)["0.weight"].any(1)
        assert torch.equal(attached(model[0], "bias").mask, alive)


def test_what_grows_starts_without_the_momentum_of_a_dense_training():
    model = small()
    optimizer = sgd(model)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=9, frequency=3, fraction=0.8)
    before = masks(model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        pruner.step()
    count = 0
    for target, mask in masks_of(model).items():
        grown = mask & ~before[target.name]
        count += int(grown.sum())
        for tensor in (target.parameter, *optimizer.state[target.parameter].values()):
            assert (tensor[grown] == 0).all()
    assert count > 5


def test_a_frequency_at_which_nothing_would_move_is_refused():
    model = small()
    with pytest.raises(ValueError, match="frequency is 100 and end 60"):
        pyprune.RigLPruner(model, 0.5, sgd(model), end=60)
