import pytest
import torch
from torch import nn

import pyprune
from pyprune.integrations.training import Training, start_of

pytest.importorskip("yaml")

TEXT = "stages: [prune: {final: 0.5, end: 1}]"


def model_and_optimizer():
    model = nn.Linear(8, 8)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:the model has no zeros to hold")
def test_start_of_takes_recipes_paths_keep_sparse_and_functions(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT)
    recipe = pyprune.Recipe.from_string(TEXT)
    for prune in (recipe, tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml"), recipe.apply):
        assert isinstance(start_of(prune)(*model_and_optimizer(), 4), pyprune.RecipePruner)
    assert isinstance(start_of(pyprune.keep_sparse)(*model_and_optimizer(), 4), pyprune.KeepSparse)


def test_start_of_refuses_others():
    with pytest.raises(TypeError, match="prune is a int; give a Recipe or its path"):
        start_of(3)
    with pytest.raises(ValueError, match="leave them out here"):
        start_of(lambda *_: None, torch.ones(1))


def test_training_refuses_what_does_not_prune():
    with pytest.raises(TypeError, match="prune returned a NoneType; it must return a Pruner"):
        Training(lambda *_: None, *model_and_optimizer(), 4, None)


@pytest.mark.filterwarnings("ignore:the model has no zeros to hold")
def test_training_looks_through_wrapped_optimizers():
    model, optimizer = model_and_optimizer()

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    seen = []

    def start(model, optimizer, steps):
        seen.append(optimizer)
        return pyprune.keep_sparse(model, optimizer)

    Training(start, model, Wrapper(Wrapper(optimizer)), 4, None)
    assert seen == [optimizer]


def test_training_counts_what_is_dropped():
    training = Training(pyprune.Recipe.from_string(TEXT).apply, *model_and_optimizer(), 4, None)
    assert training.sparsity() == 0
    for _ in range(4):
        training.step()
    assert training.sparsity() == 0.5
    training.finish(strip_masks=True)
    assert (training.model.weight == 0).sum() == 32


@pytest.mark.parametrize("strip_masks", [True, False])
def test_training_holds_zeros_until_it_is_to_leave_a_plain_model(strip_masks):
    model, optimizer = model_and_optimizer()
    with torch.no_grad():
        model.weight[:4] = 0
    training = Training(pyprune.Recipe.from_string("stages: [constant]").apply, model, optimizer, 4, None)
    training.finish(strip_masks=strip_masks)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert bool((model.weight[:4] == 0).all()) is not strip_masks


def test_training_that_ends_too_early_warns():
    training = Training(pyprune.Recipe.from_string(TEXT).apply, *model_and_optimizer(), 4, None)
    with pytest.warns(UserWarning, match="the recipe ends at step 4, but the training at step 0"):
        training.finish(strip_masks=True)


@pytest.mark.parametrize("recipe", [False, True])
def test_training_goes_on_with_a_weight_of_which_nothing_is_left(recipe):
    def start(model, optimizer, steps):
        if recipe:
            return pyprune.Recipe.from_string(TEXT.replace("end: 1", "end: 1, scope: model")).apply(
                model, optimizer, steps
            )
        method = pyprune.Method(pyprune.importance.magnitude(), scope=pyprune.scope.model())
        return pyprune.Pruner(model, method, lambda step: 0.5, optimizer)

    def made():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        with torch.no_grad():
            model[0].weight.mul_(1e-3)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = made()
    training = Training(start, model, optimizer, 4, None)
    for _ in range(4):
        training.step()
    assert not model[0].weight.any()
    again, optimizer = made()
    again.load_state_dict(model.state_dict())
    resumed = Training(start, again, optimizer, 4, training.state())
    assert torch.equal(again[0].weight, model[0].weight)
    assert resumed.sparsity() == 0.5
    for one in (model, again):
        pyprune.prune(one, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.0)  # the values that were dropped come back
    assert torch.equal(again[0].weight, model[0].weight)
    assert model[0].weight.all()
    other, optimizer = made()
    nn.init.zeros_(other[0].weight)
    with pytest.raises(TypeError, match="must return a Pruner"):
        Training(lambda *_: None, other, optimizer, 4, training.state())
    assert not other[0].weight.any()


@pytest.mark.parametrize("importance", ["magnitude", "snip"])
@pytest.mark.parametrize("recipe", [False, True])
def test_training_makes_several_steps_at_once(importance, recipe):
    method = pyprune.Method(getattr(pyprune.importance, importance)())
    schedule = pyprune.schedules.cubic(0.5, start=1, end=6)
    text = f"stages: [prune: {{final: 0.5, start: 0.25, end: 1.5, importance: {importance}}}]"

    def start(model, optimizer, steps):
        if recipe:
            return pyprune.Recipe.from_string(text).apply(model, optimizer, steps)
        return pyprune.Pruner(model, method, schedule, optimizer)

    model, optimizer = model_and_optimizer()
    training = Training(start, model, optimizer, 4, None)
    assert training.measures() == (importance == "snip")
    found = []
    for count in (2, 3, 2, 4):
        model(torch.rand(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((training.steps(count), training.pruning.step_count, training.sparsity()))
    updated, counts, sparsities = zip(*found, strict=True)
    assert updated == (True, True, True, False)
    assert counts == (2, 5, 7, 11)
    # What is measured has one ratio less, that of the step that was late.
    assert sparsities[2:] == (0.5, 0.5)
