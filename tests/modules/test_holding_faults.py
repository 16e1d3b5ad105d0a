"""Situations in which zeros or raw values would get lost, found by reading."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyprune
from pyprune import Method, Pruner, get_config, importance, keep_sparse, prune, schedules, scope, strip
from pyprune.modules.zeros import raw_values
from tests.conftest import attached, masks_of

LOCAL = Method(importance.magnitude(), scope=scope.tensor())


def layer(size=16):
    return nn.Linear(size, size, bias=False)


def layers(count, size=600):
    return nn.Sequential(*[layer(size) for _ in range(count)])


def strays(model):
    return [int((target.parameter[~mask] != 0).sum()) for target, mask in masks_of(model).items()]


def dirty(model, optimizer):
    """Count what the optimizer keeps of elements that are dropped."""
    found = []
    for target, mask in masks_of(model).items():
        state = optimizer.state.get(target.parameter, {}).values()
        tensors = [value for value in state if isinstance(value, torch.Tensor) and value.shape == mask.shape]
        found.append(sum(int((tensor[~mask] != 0).sum()) for tensor in tensors))
    return found


def tied():
    model = nn.Sequential(layer(), layer())
    model[1].weight = model[0].weight
    return model


def test_a_state_dict_may_be_taken_between_forward_and_backward():
    model = prune(nn.Sequential(layer(), nn.ReLU(), layer()), LOCAL, ratio=0.5)
    loss = model(torch.randn(4, 16, requires_grad=True)).sum()
    model.state_dict()
    loss.backward()


def test_masks_that_change_before_the_step_take_gradient_and_momentum_along():
    model = layers(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prune(model, LOCAL, ratio=0.0005)
    for i in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 600)).square().mean().backward()
        if i == 1:
            prune(model, LOCAL, ratio=0.001)
        optimizer.step()
        assert strays(model) == dirty(model, optimizer) == [0, 0, 0]


def test_gradients_that_are_assigned_after_a_step_that_was_skipped_are_masked():
    model = prune(layers(4), LOCAL, ratio=0.0005)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 600)).square().mean().backward()
    optimizer.zero_grad()
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert strays(model) == dirty(model, optimizer) == [0, 0, 0, 0]


def test_a_pruner_of_one_part_leaves_no_state_of_another_part_behind():
    first, second = layers(2), layer(600)
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prune(first, LOCAL, ratio=0.1)
    pruner = Pruner(second, LOCAL, schedules.cubic(0.5, end=50), optimizer)
    for i in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 600)).square().mean().backward()
        optimizer.step()
        if i == 1:
            prune(first, LOCAL, ratio=0.1005)
        pruner.step()
    optimizer.step()
    assert strays(model) == dirty(model, optimizer) == [0, 0, 0]


def test_what_is_pruned_on_top_of_keep_sparse_can_come_back():
    model = layer()
    with torch.no_grad():
        model.weight[0] = 0
    keep_sparse(model, None)
    prune(model, LOCAL, ratio=0.9)
    prune(model, LOCAL, ratio=0.5)
    assert int((model.weight == 0).sum()) == 128
    keep_sparse(model, None)
    pruner = Pruner(model, LOCAL, schedules.multi_step({1: 0.9, 2: 0.6}))
    pruner.step()
    pruner.step()
    assert int((model.weight == 0).sum()) == round(0.6 * 256)


def test_what_is_loaded_after_a_step_that_failed_is_the_new_raw_value():
    model = prune(layer(), LOCAL, ratio=0.5)

    def closure():
        raise RuntimeError("out of memory")

    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(closure)
    model.load_state_dict({"weight": torch.full((16, 16), 7.0)})
    model(torch.randn(1, 16))
    prune(model, LOCAL, ratio=0.25)
    assert set(model.weight.unique().tolist()) == {0.0, 7.0}


def test_an_average_of_a_masked_model_follows_weights_that_come_back():
    torch.manual_seed(0)
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pyprune.RigLPruner(model, 0.5, optimizer, end=30, frequency=2, allocation="uniform", fraction=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).sub(1).square().mean().backward()
        optimizer.step()
        pruner.step()
        average.update_parameters(model)
        average(torch.randn(1, 16))
        assert torch.equal(attached(average.module).mask, attached(model).mask)


def test_a_place_of_a_tied_weight_that_is_left_lets_the_others_hold():
    model = prune(tied(), LOCAL, ratio=0.5)
    for changed in (copy.deepcopy(model), copy.deepcopy(model), model):
        if changed is model:
            changed[0].weight = nn.Parameter(torch.randn(16, 16))
        else:
            strip(changed[0])
        optimizer = torch.optim.SGD(changed.parameters(), lr=0.1)
        changed(torch.randn(2, 16)).sum().backward()
        optimizer.step()
        assert int((changed[1].weight == 0).sum()) == 128


def test_strip_lets_go_of_parameters_that_are_in_a_list_too():
    model = prune(layer(), LOCAL, ratio=0.5)
    listed = nn.ParameterList(model.parameters())
    strip(model)
    optimizer = torch.optim.SGD(listed.parameters(), lr=0.1)
    model.weight.grad = torch.ones(16, 16)
    optimizer.step()
    assert not (model.weight == 0).any()


def test_a_tied_weight_has_one_mask_whichever_part_is_pruned():
    model = tied()
    prune(model[0], LOCAL, ratio=0.8)
    prune(model[1], LOCAL, ratio=0.5)
    assert attached(model[0]) is attached(model[1])
    assert int((model[0].weight == 0).sum()) == 128
    strip(model[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model[0].weight.grad = torch.ones(16, 16)
    optimizer.step()
    assert int((model[0].weight == 0).sum()) == 128


def test_copies_under_inference_mode_run():
    model = prune(layer(), LOCAL, ratio=0.5)
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        assert torch.equal(twin(torch.ones(2, 16)), model(torch.ones(2, 16)))
    twin.state_dict()


def test_an_embedding_that_loses_rows_keeps_its_zeros():
    model = prune(nn.Embedding(20, 8), LOCAL, ratio=0.5)
    mask, raw = attached(model).mask.clone(), raw_values(attached(model)).clone()
    model.weight.data = model.weight.data[:10].clone()
    with pytest.warns(UserWarning, match=r"has become one of shape \(10, 8\)"):
        model(torch.tensor([1]))
    assert torch.equal(model.weight != 0, mask[:10])
    prune(model, LOCAL, ratio=0.0)
    assert torch.equal(model.weight, raw[:10])


def test_keep_sparse_lets_go_of_weights_that_were_untied():
    model = tied()
    with torch.no_grad():
        model[0].weight[0] = 0
    keep = keep_sparse(model, None)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    keep.remove()
    assert not any("_pyprune_masks" in vars(module) for module in model)


def test_a_config_has_what_was_just_loaded():
    model = prune(layer(), LOCAL, ratio=0.5)
    model.load_state_dict({"weight": torch.full((16, 16), 7.0)})
    assert raw_values(attached(model)).eq(7).all()
    model.load_state_dict({"weight": torch.full((16, 16), 8.0)})
    assert get_config(model)["masks"][0]["parked"].eq(8).all()


def test_half_precision_with_an_eps_that_is_zero_there_keeps_zeros():
    model = layers(2, 256).half()
    with torch.no_grad():
        for one in model:
            one.weight[3, 5] = 0
    keep_sparse(model, None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(model.parameters(), lr=1e-4).step()
    assert all(one.weight[3, 5] == 0 for one in model)


def test_weights_that_are_trained_later_have_masked_gradients():
    model = layer().requires_grad_(False)
    prune(model, LOCAL, ratio=0.5)
    model.requires_grad_(True)
    model(torch.ones(2, 16)).sum().backward()
    assert torch.equal(model.weight.grad != 0, attached(model).mask)


def test_strip_after_a_weight_was_deleted():
    model = prune(nn.Sequential(layer(), layer()), LOCAL, ratio=0.5)
    del model[1].weight
    strip(model)
    assert not any("_pyprune_masks" in vars(module) for module in model)


def test_a_copy_that_averages_and_has_old_masks_is_named():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pyprune.gmp(model, 0.75, optimizer, end=3)
    average, teacher = copy.deepcopy(model), copy.deepcopy(model)

    def step():
        teacher(torch.randn(8, 16))
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        pruner.step()
        for name, value in average.state_dict().items():
            value.mul_(0.9).add_(model.state_dict()[name], alpha=0.1)

    step()
    step()
    with pytest.warns(
        UserWarning, match=r"a copy of the model has the masks that were on when it was made"
    ) as caught:
        step()
    assert [one.filename for one in caught] == [__file__]
    pyprune.reapply(model, average)
    step()
    assert all(torch.equal(a.weight == 0, b.weight == 0) for a, b in ((average[0], model[0]), (average[2], model[2])))
    assert not (teacher[0].weight == 0).any()


class OwnAverage(AveragedModel):
    pass


@pytest.mark.parametrize("before", [True, False])
def test_averages_of_other_models_are_left_alone(before):
    def network():
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    model, teacher = network(), network()
    kept = [AveragedModel(teacher)]
    average = OwnAverage(model) if before else None
    other, others = network(), network()
    prune(others, LOCAL, ratio=0.3)
    kept.append(AveragedModel(others))  # has masks of its own
    states, said = [copy.deepcopy(one.state_dict()) for one in kept], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pyprune.gmp(model, 0.75, optimizer, end=3)
    average = average or OwnAverage(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.step()
        said += [str(one.message) for one in caught]
    assert said
    assert all("an average with the names and shapes of this model, but other weights" in text for text in said)
    for one, state in zip(kept, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert all(
        torch.equal(a.weight == 0, b.weight == 0)
        for a, b in ((average.module[0], model[0]), (average.module[2], model[2]))
    )
    assert not (other[0].weight == 0).any()
