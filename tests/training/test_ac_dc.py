import pytest
import torch

import pyprune
from pyprune import Method, importance, schedules, scope
from tests.conftest import masks_of
from tests.training.test_pruner import backward, masks, small, train

OPTIMIZERS = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "nesterov with decay": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "fused adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
}


def one_step(model, optimizer, step):
    optimizer.zero_grad()
    backward(model, step)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("end", "phases"),
    [(20, "dense compressed dense compressed"), (25, "dense compressed dense compressed compressed")],
)
def test_phases(name, end, phases):
    """The table of the paper's schedule, with one call of step() for an epoch."""
    model = small()
    optimizer = OPTIMIZERS[name](model)
    pruner = pyprune.ac_dc(model, 0.75, optimizer, end=end, frequency=5)
    targets = list(masks_of(model))
    phases = phases.split()
    total = sum(target.parameter.numel() for target in targets)
    held = None
    for step in range(end + 3):
        phase = phases[min(step // 5, len(phases) - 1)]
        now = masks(model)
        zeros = sum(int((~mask).sum()) for mask in now.values())
        assert zeros == (0.75 * total if phase == "compressed" else 0)
        assert pruner.ratio == (0.75 if phase == "compressed" else 0.0)
        begins = step % 5 == 0 and 0 < step < end
        if begins and phases[step // 5 - 1] == "compressed" and phase == "dense":
            for target in targets:
                dropped = ~held[target.name]
                assert (target.parameter[dropped] == 0).all()  # they come back from zero
                assert target.parameter[~dropped].abs().min() > 0
                assert target.parameter not in optimizer.state
            assert model.norm.weight in optimizer.state  # what is not pruned trains on
        elif held is not None and not begins:
            assert all(torch.equal(now[key], held[key]) for key in now)
        held = now
        one_step(model, optimizer, step)
        assert pruner.step() == (step + 1 in (5, 10, 15))
    # A dropped weight has trained in a dense phase, and the model ends pruned.
    assert sum(int((~mask).sum()) for mask in masks(model).values()) == 0.75 * total


def test_masks_are_chosen_when_a_compressed_phase_begins():
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    pruner = pyprune.ac_dc(model, 0.5, optimizer, end=20, frequency=5)
    chosen = []
    for step in range(20):
        one_step(model, optimizer, step)
        if pruner.step() and pruner.ratio:
            flat = torch.cat([target.parameter.detach().abs().flatten() for target in masks_of(model)])
            kept = torch.cat([mask.flatten() for mask in masks(model).values()])
            assert flat[kept].min() > flat[~kept].max()  # among all weights
            chosen.append(kept)
    assert len(chosen) == 2
    assert not torch.equal(*chosen)


def test_weights_train_from_zero_in_a_dense_phase():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pyprune.ac_dc(model, 0.5, optimizer, end=20, frequency=5)
    train(model, optimizer, pruner, 10)
    parameter = model.head.weight
    before = parameter.detach().clone()
    one_step(model, optimizer, 10)
    # The first step has no momentum of the time before.
    torch.testing.assert_close(parameter.detach(), before - 0.1 * parameter.grad, rtol=1e-6, atol=1e-7)
    assert (parameter != 0).all()


def test_other_methods_and_scopes():
    model = small()
    optimizer = OPTIMIZERS["adamw"](model)
    method = Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4))
    ignored = pyprune.IgnoredScope(names=["conv"])
    pruner = pyprune.ac_dc(model, 0.5, optimizer, end=12, frequency=3, method=method, ignored_scope=ignored)
    assert list(masks(model)) == ["hidden.weight", "head.weight"]
    seen = []
    for step in range(12):
        one_step(model, optimizer, step)
        pruner.step()
        seen.append(set((~masks(model)["head.weight"]).reshape(-1, 4).sum(1).tolist()))
    assert seen == [{zeros} for zeros in (0, 0, 2, 2, 2, 0, 0, 0, 2, 2, 2, 2)]


def test_gradients_are_those_of_the_dense_phase():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = pyprune.ac_dc(model, 0.5, optimizer, end=16, frequency=4, method=Method(importance.taylor()))
    counts = []
    for step in range(12):
        one_step(model, optimizer, step)
        counts.append(pruner.state_dict()["sums"]["count"])
        pruner.step()
    assert counts == [1, 2, 3, 4] * 3


def test_another_schedule_resets_only_where_masks_open():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = schedules.multi_step({0: 0.5, 2: 0.25, 4: 0.0, 6: 0.5})
    pruner = pyprune.AcDcPruner(model, Method(importance.magnitude()), schedule, optimizer)
    kept = []
    for step in range(7):
        one_step(model, optimizer, step)
        pruner.step()
        kept.append(model.head.weight in optimizer.state)
    assert kept == [True, True, True, False, True, True, True]


def test_a_dense_phase_opens_masks_that_were_there():
    model = pyprune.prune(small(), Method(importance.magnitude()), ratio=0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    one_step(model, optimizer, 0)
    dropped = {name: ~mask for name, mask in masks(model).items()}
    later = pyprune.ac_dc(model, 0.5, optimizer, start=2, end=10, frequency=4)
    assert not all(mask.all() for mask in masks(model).values())
    for _ in range(2):
        later.step()
    for target, mask in masks_of(model).items():
        assert mask.all()
        assert (target.parameter[dropped[target.name]] == 0).all()
        assert target.parameter not in optimizer.state


def test_without_reintroduction_there_would_be_no_dense_phase():
    model = small()
    schedule = schedules.alternating(0.5, end=8, frequency=2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="reintroduce is False"):
        pyprune.AcDcPruner(model, Method(importance.magnitude()), schedule, optimizer, reintroduce=False)
    assert masks_of(model) == {}
