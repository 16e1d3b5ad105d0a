import copy
import pickle

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, keep_sparse
from tests.conftest import masks_of

LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
CHANNELS = pyprune.Method(pyprune.importance.magnitude(), pyprune.granularity.channel("out"), pyprune.scope.tensor())


def two_layers():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def masked(model, ratio=0.6):
    return pyprune.prune(model, LOCAL, ratio=ratio)


def sparse(model, ratio=0.6):
    return pyprune.strip(masked(model, ratio))


def zeros_of(model):
    return {name: parameter == 0 for name, parameter in model.named_parameters()}


def dense_step(model, optimizer):
    """Step with gradients everywhere."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


# ---- what is held ----


def test_keep_sparse_holds_the_zeros_of_the_weights_that_prune_would_choose(case):
    before = {name: parameter.clone() for name, parameter in sparse(case.model).named_parameters()}
    optimizer = sgd(case.model, weight_decay=0.1)
    keep = keep_sparse(case.model, optimizer)
    assert list(keep.masks) == [one.tensor_name for one in pyprune.pruning_statistic(case.model).pruned_tensors]
    for _ in range(3):
        optimizer.zero_grad()
        case.model(case.inputs).square().sum().backward()
        optimizer.step()
    for name, parameter in case.model.named_parameters():
        if name in keep.masks:
            assert torch.equal(keep.masks[name], before[name] != 0)
            assert torch.equal(parameter == 0, before[name] == 0)
    moved = [name for name, p in case.model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2


def test_keep_sparse_strips_a_masked_model_and_holds_its_masks_not_its_zeros():
    model = two_layers()
    optimizer = sgd(model)
    masked(model)
    masks = {target.name: mask.clone() for target, mask in masks_of(model).items()}
    with torch.no_grad():
        model[0].weight[masks["0.weight"]] = 0  # kept, and zero by chance
    keep = keep_sparse(model, optimizer)
    assert list(model.state_dict()) == list(two_layers().state_dict())
    dense_step(model, optimizer)
    for name, mask in masks.items():
        assert torch.equal(keep.masks[name], mask)
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_keep_sparse_holds_masks_of_biases_and_batch_norm():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
    inputs = torch.randn(2, 1, 5, 5)
    pyprune.prune(model, CHANNELS, ratio=0.5, zero_dead_channels=True, examples_inputs=inputs)
    optimizer = sgd(model)
    keep = keep_sparse(model, optimizer)
    assert set(keep.masks) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    dense_step(model, optimizer)
    dead = ~keep.masks["0.bias"]
    assert int(dead.sum()) == 3
    assert not model(inputs)[:, dead].any()
    assert model(inputs)[:, ~dead].any()


def test_what_follows_an_ignored_weight_is_let_go_with_it():
    model = two_layers()
    pyprune.prune(model, CHANNELS, ratio=0.5, zero_dead_channels=True)
    keep = keep_sparse(model, sgd(model), ignored_scope=IgnoredScope(names=["0.weight"]))
    assert list(keep.masks) == ["2.weight", "2.bias"]


def test_keep_sparse_with_an_ignored_scope_lets_go_of_what_it_names():
    for model in (masked(two_layers()), sparse(two_layers())):
        optimizer = sgd(model)
        keep = keep_sparse(model, optimizer, ignored_scope=IgnoredScope(names=["0.weight"]))
        assert list(keep.masks) == ["2.weight"]
        assert (model[0].weight == 0).any()
        dense_step(model, optimizer)
        assert not (model[0].weight == 0).any()
        assert (model[2].weight == 0).sum() == 19


def test_keep_sparse_of_what_is_whole_costs_nothing():
    model = two_layers()
    pyprune.prune(model[0], LOCAL, ratio=0.5)
    pyprune.prune(model[2], LOCAL, ratio=0.0)
    assert list(keep_sparse(model, sgd(model)).masks) == ["0.weight"]
    with pytest.warns(UserWarning, match="no zeros to hold"):
        assert keep_sparse(two_layers(), None).masks == {}


def test_keep_sparse_holds_zeros_beside_masks():
    model = two_layers()
    sparse(model[0])
    masked(model[2])
    assert list(keep_sparse(model, sgd(model)).masks) == ["0.weight", "2.weight"]


def test_keep_sparse_finds_bare_parameters_by_one_pass():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return x @ self.kernel

    model = Bare()
    keep = keep_sparse(model, None, examples_inputs=torch.ones(1, 4))
    assert torch.equal(keep.masks["kernel"], torch.eye(4).bool())


def test_keep_sparse_takes_frozen_weights_into_its_masks():
    model = sparse(two_layers())
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[2].weight.zero_()
    model[2].weight.requires_grad_(False)
    every = pyprune.IgnoredScope(all_zero=False)
    keep = keep_sparse(model, torch.optim.SGD([model[0].bias], lr=0.1), ignored_scope=every)
    assert list(keep.masks) == ["0.weight", "2.weight"]
    assert not keep.masks["2.weight"].any()


def test_keep_sparse_leaves_out_what_is_zero_everywhere():
    model = zero_layer(sparse(two_layers()))
    with pytest.warns(UserWarning, match=r"zero everywhere, and left out as if ignored, .*: 2\.weight\."):
        keep = keep_sparse(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(keep.masks) == ["0.weight"]


def test_keep_sparse_names_weights_as_the_plain_model_does():
    compiled = torch.compile(sparse(two_layers()), backend="eager")
    assert list(keep_sparse(compiled, None).masks) == ["0.weight", "2.weight"]


# ---- optimizers ----


def test_gradients_and_state_of_dropped_weights_are_zero():
    model = sparse(two_layers())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)
    dense_step(model, optimizer)
    sparse(model)
    keep = keep_sparse(model, optimizer)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for steps in range(3):
        for name, mask in keep.masks.items():
            state = optimizer.state[model.get_parameter(name)]
            for tensor in (state[key] for key in names):
                assert torch.equal(tensor != 0, mask)
            assert state["step"] == steps + 1
        dense_step(model, optimizer)
        assert all(torch.equal(model.get_parameter(name).grad != 0, mask) for name, mask in keep.masks.items())


def test_state_that_is_loaded_is_masked():
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    dense_step(model, optimizer)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    keep = keep_sparse(sparse(model), optimizer)
    optimizer.load_state_dict(checkpoint)
    dense_step(model, optimizer)
    for name, mask in keep.masks.items():
        assert torch.equal(optimizer.state[model.get_parameter(name)]["exp_avg"] != 0, mask)
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert checkpoint["state"][0]["exp_avg"].all()


def test_a_step_that_divides_zero_by_zero_leaves_zeros():
    model = sparse(two_layers())
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)
    keep = keep_sparse(model, optimizer)
    for _ in range(2):
        dense_step(model, optimizer)
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in keep.masks.items())
        # An optimizer goes on with what is frozen as long as it has a gradient.
        model[0].weight.requires_grad_(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_that_a_closure_computes_are_masked_each_time(by_name):
    model = sparse(two_layers())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    keep = keep_sparse(model, optimizer)
    inputs, seen = torch.randn(8, 6), []

    def closure():
        seen.append([weight != 0 for weight in (model[0].weight, model[2].weight)])
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure=closure) if by_name else optimizer.step(closure) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert len(seen) > 8
    for kept in seen:
        # Not only after a step: within it the dropped weights do not move either.
        assert all(map(torch.equal, kept, keep.masks.values()))


def test_several_optimizers_hold_what_is_theirs():
    model = sparse(two_layers())
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    keep = keep_sparse(model, (one for one in (first, second)))
    dense_step(model, first)
    # What the second one holds, its own step zeroes.
    assert torch.equal(model[0].weight != 0, keep.masks["0.weight"])
    assert model[0].weight.grad.eq(0).any()
    assert not model[2].weight.grad.eq(0).any()
    dense_step(model, second)
    assert torch.equal(model[2].weight != 0, keep.masks["2.weight"])


def test_a_group_that_is_added_later_is_held():
    model = sparse(two_layers())
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    keep = keep_sparse(model, optimizer)
    model[2].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model[2].weight]})
    dense_step(model, optimizer)
    assert torch.equal(model[2].weight != 0, keep.masks["2.weight"])


def test_wrapped_optimizers_are_hooked_inside():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = sparse(two_layers())
    optimizer = sgd(model)
    keep = keep_sparse(model, Wrapper(Wrapper(optimizer)))
    dense_step(model, optimizer)
    assert torch.equal(model[0].weight != 0, keep.masks["0.weight"])


def test_steps_cope_with_missing_and_replaced_gradients_and_replaced_data():
    model = sparse(two_layers())
    optimizer = sgd(model)
    keep = keep_sparse(model, optimizer)
    optimizer.step()
    model[0].weight.grad = torch.ones(6, 8).t()
    model[0].weight.data = torch.ones(6, 8).t()
    optimizer.step()
    assert torch.equal(model[0].weight != 0, keep.masks["0.weight"])


def test_a_sparse_gradient_is_named():
    model = sparse(nn.Embedding(4, 2))
    optimizer = sgd(model)
    keep = keep_sparse(model, optimizer)
    model.weight.grad = torch.ones(4, 2).to_sparse()
    for act in (keep.mask_gradients, optimizer.step):
        with pytest.raises(TypeError, match="the gradient of a pruned weight is sparse"):
            act()


def test_masks_follow_a_model_that_is_moved(device):
    model = sparse(two_layers())
    optimizer = sgd(model)
    keep = keep_sparse(model, optimizer)
    model.to(device, torch.float64)
    dense_step(model, optimizer)
    assert keep.masks["0.weight"].device == model[0].weight.device
    assert torch.equal(model[0].weight != 0, keep.masks["0.weight"])


# ---- what KeepSparse does when asked ----


def test_apply_zeroes_weights_without_an_optimizer():
    model = sparse(two_layers())
    keep = keep_sparse(model, None)
    for name in keep.masks:
        model.get_parameter(name).data.fill_(1.0)
    keep.apply()
    for name, mask in keep.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_mask_gradients_makes_the_norm_that_of_what_is_kept():
    model = sparse(two_layers())
    keep = keep_sparse(model, None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    keep.mask_gradients()
    kept = sum(int(mask.sum()) for mask in keep.masks.values()) + 8 + 4
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(kept**0.5)


def test_reapply_zeroes_a_model_with_adapters_merged_in():
    model = sparse(two_layers())
    keep = keep_sparse(model, sgd(model))
    merged = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        for layer in (merged[0], merged[2]):
            down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            layer.weight += up @ down
    expected = merged[0].weight.detach().clone()
    keep.reapply(merged)
    assert torch.equal(merged[0].weight, torch.where(keep.masks["0.weight"], expected, 0))
    assert pyprune.pruning_statistic(merged).pruning_ratio == pyprune.pruning_statistic(model).pruning_ratio


def test_reapply_names_what_does_not_fit_and_changes_nothing(unchanged):
    keep = keep_sparse(sparse(two_layers()), None)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    before = unchanged(other)
    with pytest.raises(ValueError, match=r"held: 2\.weight \(4, 8\) \(there: \(5, 8\)\)\. Give a"):
        keep.reapply(other)
    with pytest.raises(ValueError, match=r"0\.weight \(8, 6\) \(there: none\), 2\.weight"):
        keep.reapply(nn.Sequential(nn.Sequential(other)))
    with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"):
        keep.reapply(other.state_dict())
    before.check()


def test_remove_lets_go():
    model = sparse(two_layers())
    optimizer = sgd(model)
    with keep_sparse(model, optimizer) as keep:
        assert repr(keep) == "KeepSparse(parameters=2, held=True)"
        dense_step(model, optimizer)
        assert (model[0].weight == 0).any()
    dense_step(model, optimizer)
    assert not (model[0].weight == 0).any()
    assert repr(keep) == "KeepSparse(parameters=2, held=False)"


def test_keep_sparse_is_not_copied_but_what_it_works_on_is():
    model = sparse(two_layers())
    optimizer = sgd(model)
    keep = keep_sparse(model, optimizer)
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="holds its zeros by itself"):
            act(keep)
    twin, other = copy.deepcopy((model, optimizer))
    keep_sparse(twin, other)
    dense_step(twin, other)
    assert torch.equal(twin[0].weight != 0, keep.masks["0.weight"])


# ---- errors ----


def gates(model):
    return pyprune.prune(model, "UNSTRUCTURED_REGULARIZATION_BASED")


def zero_layer(model):
    nn.init.zeros_(model[2].weight)
    return model


def untrained(model):
    return torch.optim.SGD(model[0].parameters(), lr=0.1)


@pytest.mark.parametrize("prepare", [masked, sparse])
@pytest.mark.parametrize(
    ("change", "optimizer", "options", "error", "text"),
    [
        (None, untrained, {}, ValueError, r"in no group of the optimizer: 2\.weight"),
        (None, lambda model: [], {}, ValueError, r"in no group of the optimizer: 0\.weight, 2\.weight"),
        (None, lambda model: "adam", {}, TypeError, "optimizer is of type str"),
        (None, lambda model: 3, {}, TypeError, "optimizer is of type int; give a torch"),
        (None, sgd, {"ignored_scope": IgnoredScope(names=["1.weight"])}, ValueError, "1.weight"),
        (None, sgd, {"ignored_scope": "0.weight"}, TypeError, "IgnoredScope"),
    ],
)
def test_keep_sparse_refuses_wrong_arguments(prepare, change, optimizer, options, error, text, unchanged):
    model = prepare(two_layers())
    before = unchanged(model)
    with pytest.raises(error, match=text):
        keep_sparse(model, optimizer(model), **options)
    before.check()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (gates, r"learned gates are on 0\.weight, 2\.weight; fold them in with pyprune\.strip"),
    ],
)
def test_keep_sparse_refuses_what_it_cannot_hold(change, text, unchanged):
    model = change(sparse(two_layers()))
    optimizer = sgd(model)
    before = unchanged(model)
    with pytest.raises(ValueError, match=text):
        keep_sparse(model, optimizer)
    before.check()
    dense_step(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_keep_sparse_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"):
        keep_sparse({}, None)


def test_a_padding_row_is_no_sparsity():
    embedding = nn.Embedding(10, 4, padding_idx=3)
    model = nn.Sequential(embedding, nn.Linear(4, 4))
    masked(model[1])
    optimizer = sgd(model)
    keep = keep_sparse(model, optimizer)
    assert list(keep.masks) == ["1.weight"]
    model(torch.arange(10)).sum().backward()
    optimizer.step()
    assert (embedding.weight[3] == 0).all()
    assert embedding.weight.count_nonzero() == 36
    tied = nn.Sequential(nn.Embedding(10, 4, padding_idx=3), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight  # as an output its row has a gradient
    assert list(keep_sparse(tied, None).masks) == ["0.weight"]
    with torch.no_grad():
        embedding.weight[0, 0] = 0
    assert sorted(keep_sparse(model, None).masks) == ["0.weight", "1.weight"]
