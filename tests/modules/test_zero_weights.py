import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, calibrate, importance, prune, pruning_statistic, schedules, scope
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


SCORES = {"0.weight": torch.rand(16, 8), "2.weight": torch.rand(4, 16)}
RULED = {
    "ratio": (Method(importance.magnitude()), {"ratio": {"0": 0.5, "2": 0.5}}),
    "limits": (Method(importance.magnitude()), {"ratio": 0.5, "max_ratio": {"2": 0.9}, "min_ratio": {"2": 0.1}}),
    "groups": (
        Method(importance.magnitude(), scope=scope.group({"a": ["0"], "b": ["2"]})),
        {"ratio": {"a": 0.5, "b": 0.3}, "max_ratio": {"2": 0.9}},
    ),
    "scores": (Method(importance.given(SCORES)), {"ratio": 0.5}),
}


@pytest.mark.parametrize(("method", "options"), RULED.values(), ids=RULED)
@pytest.mark.parametrize(
    "put_on",
    [
        lambda model, method, ratio, limits: prune(model, method, ratio=ratio, **limits),
        lambda model, method, ratio, limits: pyprune.Pruner(model, method, schedules.one_shot(ratio), **limits),
    ],
    ids=["prune", "pruner"],
)
def test_rules_may_name_what_is_zero_everywhere(method, options, put_on):
    if isinstance(options["ratio"], dict) and method.scope.name == "model":
        method = Method(method.importance, scope=scope.tensor())
    model = with_zero_head()
    limits = {key: value for key, value in options.items() if key != "ratio"}
    with pytest.warns(UserWarning, match=r"zero everywhere, .*: 2\.weight"):
        put_on(model, method, options["ratio"], limits)
    assert [(one.tensor_name, one.pruned_units) for one in pruning_statistic(model).pruned_tensors] == [
        ("0.weight", 64)
    ]


def test_rules_that_name_nothing_are_refused_beside_what_is_zero_everywhere():
    method = Method(importance.magnitude(), scope=scope.tensor())
    with (
        pytest.raises(ValueError, match=r"'3' matches no weight"),
        pytest.warns(UserWarning, match="zero everywhere"),
    ):
        prune(with_zero_head(), method, ratio={"0": 0.5, "3": 0.5})


def test_what_was_zero_when_calibrated_is_named():
    model = with_zero_head()
    with pytest.warns(UserWarning, match="zero everywhere"):
        calibration = calibrate(model, [torch.randn(5, 8)], importance.wanda())
    nn.init.ones_(model[2].weight)
    with pytest.raises(ValueError, match=r"calibration lacks 2\.weight; .* zero everywhere then is left out"):
        prune(model, Method(importance.wanda()), ratio=0.5, calibration=calibration)
