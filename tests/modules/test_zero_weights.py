import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, calibrate, importance, prune, pruning_statistic, schedules
from pyprune.modules.targets import find_targets
from pyprune.modules.zero_weights import are_zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool])
def test_are_zero_looks_at_all_elements(dtype, device):
    def tensor(shape, at=None):
        made = torch.zeros(shape, dtype=dtype, device=device)
        if at is not None:
            made.view(-1)[at] = 1
        return made

    zero = [
        tensor((5000, 3)),
        tensor(()),
        tensor((3, 7)).T,
        tensor((2, 3, 4, 4)).to(memory_format=torch.channels_last),
    ]
    other = [tensor((5000, 3), -1), tensor((), 0), tensor((3, 7), 20).T, tensor((0, 3)), tensor((5000, 3), 0)]
    assert are_zero(zero + other) == [True] * len(zero) + [False] * len(other)
    assert are_zero([torch.zeros(2, device="meta")]) == [False]
    if dtype.is_floating_point:
        assert are_zero([torch.full((3,), value, dtype=dtype, device=device) for value in (-0.0, float("nan"))]) == [
            True,
            False,
        ]


def with_zero_head():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.zeros_(model[2].weight)
    return model


def loss_of(model, batch):
    return model(batch).add(1).square().sum()


@pytest.mark.parametrize(
    ("rule", "loss_fn"),
    [
        (importance.magnitude(), None),
        (importance.magnitude(normalize="l2"), None),
        (importance.random(), None),
        (importance.wanda(), None),
        (importance.taylor(), loss_of),
    ],
    ids=["magnitude", "normalised", "random", "wanda", "taylor"],
)
def test_what_is_zero_everywhere_does_not_compete(rule, loss_fn):
    model, calibration, named = (
        with_zero_head(),
        None,
        r"zero everywhere, and left out as if ignored, .*: 2\.weight\. ",
    )
    if rule.needs != "none":
        with pytest.warns(UserWarning, match=named):
            calibration = calibrate(model, [torch.randn(5, 8)], rule, loss_fn=loss_fn)
    with pytest.warns(UserWarning, match=named) as caught:
        prune(model, Method(rule), ratio=0.5, calibration=calibration)
    assert all(one.filename == __file__ for one in caught)
    assert [(one.tensor_name, one.pruned_units) for one in pruning_statistic(model).pruned_tensors] == [
        ("0.weight", 64)
    ]


def test_the_scope_lets_what_is_zero_everywhere_compete():
    model = with_zero_head()
    prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5, ignored_scope=IgnoredScope(all_zero=False))
    assert pruning_statistic(model).pruned_tensors[1].pruned_ratio == 1.0


@pytest.mark.parametrize(
    "put_on",
    [
        lambda model: prune(model, "UNSTRUCTURED_REGULARIZATION_BASED"),
        lambda model: prune(model, "UNSTRUCTURED_HARD_CONCRETE"),
        lambda model: pyprune.Pruner(model, Method(importance.magnitude()), schedules.linear(0.5, end=4)),
        lambda model: pyprune.gmp(model, 0.5, None, end=4),
    ],
    ids=["bernoulli", "hard concrete", "pruner", "gmp"],
)
def test_gates_and_pruners_leave_out_what_is_zero_everywhere(put_on):
    model = with_zero_head()
    with pytest.warns(UserWarning, match=r"zero everywhere, .*: 2\.weight"):
        put_on(model)
    assert [one.tensor_name for one in pruning_statistic(model).pruned_tensors] == ["0.weight"]


def test_a_weight_keeps_its_mask_though_nothing_is_left_of_it():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight.data.mul_(1e-3)
    for _ in range(2):
        prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    assert [target.name for target in find_targets(model)] == ["0.weight", "2.weight"]


def test_a_model_of_zeros_is_refused():
    linear = nn.Linear(3, 2)
    nn.init.zeros_(linear.weight)
    with pytest.raises(ValueError, match=r"every weight to prune is zero everywhere: weight\. Load the weights"):
        prune(linear, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
