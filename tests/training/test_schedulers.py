import copy
import gc
import inspect
import math

import pytest
import torch
from torch import nn

import pyprune
from pyprune import PruneMode
from pyprune.modules.gates import StochasticGate
from pyprune.training.losses import L0Loss, RBLoss
from pyprune.training.schedulers import (
    ExponentialMagnitudePruningScheduler,
    ExponentialRBPruningScheduler,
    MultiStepMagnitudePruningScheduler,
    MultiStepRBPruningScheduler,
)
from tests.conftest import attached, masks_of

LOCAL, GLOBAL = PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
GOLDEN = [0.2, 0.3036, 0.3937, 0.4722, 0.5405, 0.6, 0.6518, 0.6969, 0.7361, 0.7703, 0.8]
STEPS = {0: 0.1, 2: 0.5, 4: 0.3}


def masked(mode=LOCAL):
    return pyprune.prune(nn.Linear(100, 100), mode, ratio=0.0)


def pruned_share(model):
    masks = masks_of(model).values()
    return sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def rb_loss(target_ratio=0.0):
    return RBLoss(nn.ModuleList([StochasticGate((10, 10))]), target_ratio)


def make_all():
    """One of each: the scheduler, and a function that reads what it has set."""
    model, other, loss, another = masked(), masked(), rb_loss(), rb_loss()
    exponential = {"initial_ratio": 0.2, "target_ratio": 0.8, "target_epoch": 10}
    return [
        (MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps=STEPS), lambda: pruned_share(model)),
        (ExponentialMagnitudePruningScheduler(other, mode=LOCAL, **exponential), lambda: pruned_share(other)),
        (MultiStepRBPruningScheduler(loss, steps=STEPS), lambda: loss.target_ratio),
        (ExponentialRBPruningScheduler(another, **exponential), lambda: another.target_ratio),
    ]


@pytest.fixture(params=range(4), ids=["multi step", "exponential", "multi step RB", "exponential RB"])
def scheduler_and_read(request):
    return make_all()[request.param]


@pytest.mark.parametrize("mode", [LOCAL, GLOBAL])
def test_multi_step_magnitude_sets_masks(cnn, mode):
    model = pyprune.prune(cnn.model, mode, ratio=0.9)
    scheduler = MultiStepMagnitudePruningScheduler(model, mode=mode, steps=STEPS)
    for ratio in (0.1, 0.1, 0.5, 0.5, 0.3, 0.3):
        scheduler.step()
        assert scheduler.current_ratio == ratio
        expected = pyprune.prune(copy.deepcopy(model), mode, ratio=ratio)
        for one, other in zip(masks_of(model).values(), masks_of(expected).values(), strict=True):
            assert torch.equal(one, other)


def test_exponential_magnitude_golden_values():
    model = masked()
    scheduler = ExponentialMagnitudePruningScheduler(
        model, mode="unstructured_magnitude_local", initial_ratio=0.2, target_ratio=0.8, target_epoch=10
    )
    for ratio in [*GOLDEN, 0.8, 0.8]:
        scheduler.step()
        assert scheduler.current_ratio == pytest.approx(ratio, abs=5e-5)
        assert pruned_share(model) == pytest.approx(ratio, abs=1e-4)


def test_magnitude_reads_the_raw_weights_at_every_step():
    model = masked()
    scheduler = MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps={0: 0.5})
    scheduler.step()
    mask = attached(model).mask.clone()
    with torch.no_grad():  # what was small is now large
        model.weight.copy_(torch.where(mask, 0.0, 1.0))
    scheduler.step()
    assert torch.equal(attached(model).mask, ~mask)


def test_magnitude_touches_only_weights_with_masks():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    pyprune.prune(model, LOCAL, ratio=0.1, ignored_scope=pyprune.IgnoredScope(names=["1"]))
    MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps={0: 0.5}).step()
    assert [name for name, _ in model[1].named_parameters()] == ["weight", "bias"]
    assert pruned_share(model) == 0.5


def test_multi_step_rb_sets_the_target():
    loss = rb_loss(0.9)
    scheduler = MultiStepRBPruningScheduler(loss, STEPS)
    assert loss.target_ratio == 0.9
    for ratio in (0.1, 0.1, 0.5, 0.5, 0.3, 0.3):
        scheduler.step()
        assert loss.target_ratio == ratio
    assert scheduler.current_ratio == loss.current_ratio == 0.0  # what the gates have reached


def test_exponential_rb_golden_values():
    loss = rb_loss()
    scheduler = ExponentialRBPruningScheduler(loss, 0.2, 0.8, 10)
    for ratio in [*GOLDEN, 0.8, 0.8]:
        scheduler.step()
        assert loss.target_ratio == pytest.approx(ratio, abs=5e-5)


def test_rb_takes_a_compiled_loss():
    loss = rb_loss()
    MultiStepRBPruningScheduler(torch.compile(loss, backend="eager"), {0: 0.25}).step()
    assert loss.target_ratio == 0.25


def test_rb_says_that_a_layer_was_replaced():
    model = pyprune.prune(nn.Sequential(nn.Linear(4, 4)), PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
    scheduler = MultiStepRBPruningScheduler(pyprune.RBLoss(model, 0.1), STEPS)
    scheduler.step()
    model[0] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"in the model no more: 0\.weight"):
        scheduler.step()
    assert scheduler.epoch == 1


def test_step_sets_the_present_epoch_then_goes_on(scheduler_and_read):
    scheduler, read = scheduler_and_read
    for epoch in range(5):
        assert scheduler.epoch == epoch
        scheduler.step()
        assert read() == pytest.approx(scheduler.get_pruning_ratio(epoch), abs=1e-4)
    scheduler.step(3)
    assert scheduler.epoch == 4
    assert read() == pytest.approx(scheduler.get_pruning_ratio(3), abs=1e-4)
    scheduler.step()
    assert read() == pytest.approx(scheduler.get_pruning_ratio(4), abs=1e-4)


@pytest.mark.parametrize(
    ("epoch", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)]
)
def test_step_refuses_a_wrong_epoch_and_stays_where_it_is(scheduler_and_read, epoch, error):
    scheduler, read = scheduler_and_read
    scheduler.step(2)
    before = read(), scheduler.state_dict()
    with pytest.raises(error, match="give an integer, 0 or more"):
        scheduler.step(epoch)
    assert (read(), scheduler.state_dict()) == before


def test_state_dict_resumes(tmp_path):
    for (one, read), (other, read_other) in zip(make_all(), make_all(), strict=True):
        for _ in range(3):
            one.step()
        torch.save(one.state_dict(), tmp_path / "scheduler.pt")
        other.load_state_dict(torch.load(tmp_path / "scheduler.pt"))
        assert other.state_dict() == one.state_dict()
        if isinstance(other, (MultiStepRBPruningScheduler, ExponentialRBPruningScheduler)):
            assert read_other() == read()  # the target is in no other state; masks are in the model's
        for _ in range(3):
            one.step()
            other.step()
            assert read_other() == pytest.approx(read(), abs=1e-4)
            assert other.state_dict() == one.state_dict()


def test_state_dict_before_the_first_step_leaves_the_target_alone():
    loss = rb_loss(0.4)
    scheduler = MultiStepRBPruningScheduler(loss, STEPS)
    scheduler.load_state_dict(MultiStepRBPruningScheduler(rb_loss(), STEPS).state_dict())
    assert loss.target_ratio == 0.4


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"epoch": 1},
        {"epoch": -1, "ratio": 0.5},
        {"epoch": 1, "ratio": 1.5},
        {"epoch": "1", "ratio": 0.5},
        {"epoch": 1, "ratio": math.nan},
        {"epoch": 1, "ratio": 0.5, "last_lr": 0.1},
    ],
)
def test_load_state_dict_refuses_what_is_none(scheduler_and_read, state):
    scheduler, read = scheduler_and_read
    scheduler.step(2)
    before = read(), scheduler.state_dict()
    with pytest.raises((TypeError, ValueError)):
        scheduler.load_state_dict(state)
    assert (read(), scheduler.state_dict()) == before


def test_magnitude_does_not_keep_the_model_alive():
    model = masked()
    scheduler = MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps=STEPS)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="Keep a reference to the model"):
        scheduler.step()
    assert scheduler.epoch == 0


def test_magnitude_needs_masks():
    for model in (nn.Linear(3, 3), pyprune.prune(nn.Linear(3, 3), PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)):
        with pytest.raises(ValueError, match="carries no masks"):
            MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps=STEPS)
    model = masked()
    scheduler = MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps=STEPS)
    pyprune.strip(model)
    with pytest.raises(ValueError, match="carries no masks"):
        scheduler.step()
    assert scheduler.epoch == 0


def test_magnitude_refuses_wrong_arguments():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        MultiStepMagnitudePruningScheduler(None, mode=LOCAL, steps=STEPS)
    with pytest.raises(ValueError, match="schedule an RBLoss"):
        MultiStepMagnitudePruningScheduler(masked(), mode=PruneMode.UNSTRUCTURED_REGULARIZATION_BASED, steps=STEPS)
    with pytest.raises(ValueError, match="allowed are"):
        MultiStepMagnitudePruningScheduler(masked(), mode="LOCAL", steps=STEPS)


@pytest.mark.parametrize("loss", [None, nn.Linear(2, 2), L0Loss(nn.ModuleList([StochasticGate((2, 2))]))])
def test_rb_refuses_what_is_no_rb_loss(loss):
    with pytest.raises(TypeError, match="give the RBLoss"):
        MultiStepRBPruningScheduler(loss, STEPS)


def test_a_wrong_schedule_is_refused_at_once():
    for make in (
        lambda steps: MultiStepMagnitudePruningScheduler(masked(), mode=LOCAL, steps=steps),
        lambda steps: MultiStepRBPruningScheduler(rb_loss(), steps),
    ):
        with pytest.raises(ValueError, match="epoch 0"):
            make({3: 0.5})
        with pytest.raises(TypeError, match="give a dict"):
            make(0.5)
    for make in (
        lambda *values: ExponentialMagnitudePruningScheduler(
            masked(), mode=LOCAL, initial_ratio=values[0], target_ratio=values[1], target_epoch=values[2]
        ),
        lambda *values: ExponentialRBPruningScheduler(rb_loss(), *values),
    ):
        with pytest.raises(ValueError, match="above the initial ratio"):
            make(0.8, 0.2, 10)
        with pytest.raises(ValueError, match="target_epoch is 0; give an integer, 1 or more"):
            make(0.2, 0.8, 0)


def gated():
    return pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_HARD_CONCRETE")


NAMED = {
    r"steps\[0\] is 10": [
        lambda: MultiStepMagnitudePruningScheduler(masked(), mode=LOCAL, steps={0: 10}),
        lambda: MultiStepRBPruningScheduler(rb_loss(), {0: 10}),
    ],
    "^ratio is 10": [
        lambda: pyprune.gmp(nn.Linear(4, 4), 10, end=5),
        lambda: pyprune.ac_dc(nn.Linear(4, 4), 10, None, end=5, frequency=1),
        lambda: pyprune.RigLPruner(nn.Linear(4, 4), 10, None, end=5, frequency=1),
    ],
    r"ratio\['weight'\] is 10": [
        lambda: pyprune.gmp(nn.Linear(4, 4), {"weight": 10}, end=5),
        lambda: pyprune.ac_dc(nn.Linear(4, 4), {"weight": 10}, None, end=5, frequency=1),
    ],
    "target_ratio is 10": [
        lambda: ExponentialRBPruningScheduler(rb_loss(), 0.1, 10, 5),
        lambda: setattr(rb_loss(), "target_ratio", 10),
        lambda: pyprune.LagrangianLoss(gated(), 10),
    ],
    "start_ratio is 10": [lambda: pyprune.LagrangianLoss(gated(), 0.5, start_ratio=10)],
}


@pytest.mark.parametrize("words", NAMED)
def test_messages_name_the_argument_that_was_given(words):
    for make in NAMED[words]:
        with pytest.raises(ValueError, match=words):
            make()


def test_editing_the_dict_of_steps_changes_nothing():
    steps = {0: 0.5}
    scheduler = MultiStepRBPruningScheduler(rb_loss(), steps)
    steps[0] = 1.5
    assert scheduler.get_pruning_ratio(0) == 0.5


def test_arguments_have_the_names_of_nncf():
    def names(cls):
        return list(inspect.signature(cls).parameters)

    assert names(MultiStepMagnitudePruningScheduler) == ["model", "mode", "steps"]
    assert names(MultiStepRBPruningScheduler) == ["rb_loss", "steps"]
    exponential = ["initial_ratio", "target_ratio", "target_epoch"]
    assert names(ExponentialMagnitudePruningScheduler) == ["model", "mode", *exponential]
    assert names(ExponentialRBPruningScheduler) == ["rb_loss", *exponential]
