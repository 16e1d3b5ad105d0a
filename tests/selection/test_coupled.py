"""Coupled units: which go, by scores, counts and costs, and what masks then hold, beside NumPy."""

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, calibrate, coupled_groups, granularity, importance, prune, scope, strip
from pyprune.methods.allocation import Amount
from pyprune.modules.masks import masks_in
from pyprune.selection.choose_coupled import coupled_scores
from pyprune.selection.find_prunable import find_prunable
from pyprune.selection.prune import update_masks
from tests.selection.coupled_models import NAMES, model_and_inputs, with_zeros

pytestmark = pytest.mark.filterwarnings("ignore:coupled units of these groups are left alone")

# Of the model `Residual`, with all parameters drawn one after the other from numpy.random.default_rng(0): group 0 are
# the channels of the stream (a.weight), group 1 those inside of the branch (b.weight).
GOLDEN = {
    (1, "mean", 0): [0.959356, 0.976001, 1.031368, 1.019347, 0.901682, 1.114679, 0.986721, 1.010847],
    (1, "max", 0): [1.055316, 1.151343, 1.143983, 1.336699, 1.023477, 1.453577, 1.0186, 1.180708],
    (1, "sum", 1): [2.136587, 1.87436, 2.054142, 2.102902, 1.856819, 1.97519],
    (2, "mean", 0): [0.927692, 0.931256, 0.995305, 1.028477, 0.845823, 1.279944, 0.946537, 1.044966],
    (2, "sum", 0): [3.710769, 3.725025, 3.981218, 4.113907, 3.383293, 5.119776, 3.786147, 4.179865],
    (2, "max", 1): [1.363771, 0.963444, 1.061262, 1.101637, 0.889394, 1.025761],
}
REDUCED = {"mean": np.mean, "sum": np.sum, "max": np.max}


def by(rule=None, among=None, **options):
    """Return a method of coupled units."""
    return Method(rule or importance.magnitude(p=2), granularity.coupled(**options), among or scope.tensor())


def groups_of(model, inputs, *, width=False):
    return [group for group in coupled_groups(model, inputs) if width or group.is_exact]


def scores_of(model, method, inputs, calibration=None):
    """Return the scores of units by the name of their group."""
    found = find_prunable(model, method, None, inputs)
    statistics = dict.fromkeys(found.targets)
    if calibration is not None:
        statistics = {target: calibration.tensors.get(target.name) for target in found.targets}
    scores = coupled_scores(method, Amount(), found.coupled.chosen, statistics)
    return {units.name: score.numpy() for units, score in zip(found.coupled.chosen, scores, strict=True)}


def slices(member, values):
    """Return what belongs to each unit of a member, flat."""
    values = np.moveaxis(np.asarray(values), member.dim, 0)[member.indices]
    return values.reshape(len(member.indices), -1)


def weights(group):
    return [member for member in group.members if member.tensor.dim() > 1]


def oracle_scores(group, element_scores, how="mean", norm="mean"):
    """Score units by NumPy: of elements (a function of a weight) summed, normalised and reduced."""
    rows = []
    for member in weights(group):
        own = slices(member, element_scores(member)).sum(1)
        rows.append(own / REDUCED[norm](own) if norm else own)
    return REDUCED[how](np.stack(rows), axis=0)


def squares(member):
    return member.tensor.detach().numpy().astype(np.float64) ** 2


def dropped_in(model, group):
    """Return which units are zero in all parameters of a model, and check that of none only a part is."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    zero = [
        (slices(member, parameters[member.name].detach().numpy()) == 0).all(1)
        for member in group.members
        if member.name in parameters
    ]
    for other in zero:
        np.testing.assert_array_equal(other, zero[0])
    return zero[0]


def lowest(scores, count):
    gone = np.zeros(len(scores), bool)
    gone[np.argsort(scores, kind="stable")[:count]] = True
    return gone


# ---- scores ----


@pytest.mark.parametrize(("p", "how", "number"), GOLDEN)
def test_coupled_scores_golden(p, how, number):
    model, inputs = model_and_inputs("residual")
    found = scores_of(model, by(importance.magnitude(p=p), reduce=how), inputs)
    np.testing.assert_allclose([*found.values()][number], GOLDEN[p, how, number], atol=1e-5)


@pytest.mark.parametrize("norm", ["mean", "sum", "max", None])
@pytest.mark.parametrize("how", ["mean", "sum", "max"])
@pytest.mark.parametrize("name", NAMES)
def test_coupled_scores_oracle(name, how, norm):
    model, inputs = model_and_inputs(name)
    found = scores_of(model, by(reduce=how, normalize=norm), inputs)
    groups = groups_of(model, inputs)
    assert list(found) == [group.name for group in groups]
    for group in groups:
        np.testing.assert_allclose(found[group.name], oracle_scores(group, squares, how, norm), rtol=1e-5)


def gradients_of(model, inputs, labels):
    copied = copy.deepcopy(model)
    copied(inputs).square().mul(labels).sum().backward()
    return {name: parameter.grad.numpy() for name, parameter in copied.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("name", NAMES)
def test_coupled_scores_joint_taylor_keeps_signs(name):
    model, inputs = model_and_inputs(name)
    labels = torch.randn_like(model(inputs))
    rule = importance.taylor(joint=True)
    calibration = calibrate(
        model, [inputs], rule, loss_fn=lambda model, batch: model(batch).square().mul(labels).sum()
    )
    gradients = gradients_of(model, inputs, labels)
    found = scores_of(model, by(rule), inputs, calibration)
    for group in groups_of(model, inputs):
        products = [
            slices(member, member.tensor.detach().numpy() * gradients[member.name]).sum(1)
            for member in weights(group)
        ]
        np.testing.assert_allclose(found[group.name], np.abs(np.sum(products, 0)), rtol=1e-3, atol=1e-4)


def test_coupled_scores_wanda_is_column_norm_times_activation_norm():
    model, inputs = model_and_inputs("attention")
    rule = importance.wanda()
    found = scores_of(model, by(rule), inputs, calibrate(model, [inputs], rule))
    seen = {}
    for name in ("o", "down"):
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: seen.update({name: args[0].detach().flatten(0, -2).numpy()})
        )
    model(inputs)
    columns = {
        name: np.linalg.norm(model.get_submodule(name).weight.detach().numpy(), axis=0) * np.linalg.norm(read, axis=0)
        for name, read in seen.items()
    }
    heads = np.sqrt(np.square(columns["o"]).reshape(3, 8).sum(1))  # a key and value head, and two of queries
    np.testing.assert_allclose(found["q.weight"], heads / heads.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["up.weight"], columns["down"] / columns["down"].mean(), rtol=1e-4)


def test_coupled_scores_apoz_counts_outputs_of_makers():
    model, inputs = model_and_inputs("residual")
    rule = importance.apoz()
    found = scores_of(model, by(rule), inputs, calibrate(model, [inputs], rule))
    seen = {}
    for name in "abc":
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: seen.update({name: (output > 0).double().mean((0, 2, 3)).numpy()})
        )
    model(inputs)
    stream = (seen["a"] / seen["a"].mean() + seen["c"] / seen["c"].mean()) / 2
    np.testing.assert_allclose(found["a.weight"], stream, rtol=1e-4)
    np.testing.assert_allclose(found["b.weight"], seen["b"] / seen["b"].mean(), rtol=1e-4)


def test_coupled_scores_geometric_median_of_makers():
    model, inputs = model_and_inputs("residual")
    found = scores_of(model, by(importance.geometric_median()), inputs)
    for group in groups_of(model, inputs):
        rows = []
        for member in weights(group):
            if not member.reads:
                own = slices(member, member.tensor.detach().numpy())
                distances = np.linalg.norm(own[:, None] - own[None], axis=2).sum(1)
                rows.append(distances / distances.mean())
        np.testing.assert_allclose(found[group.name], np.mean(rows, 0), rtol=1e-4)


def test_coupled_scores_batch_norm_scale_of_the_norm_in_the_group():
    model, inputs = model_and_inputs("residual")
    with pytest.warns(UserWarning, match=r"left alone: b.weight \(importance batch_norm_scale has nothing to score"):
        found = scores_of(model, by(importance.batch_norm_scale()), inputs)
    scale = model.n.weight.detach().abs().numpy()
    assert list(found) == ["a.weight"]
    np.testing.assert_allclose(found["a.weight"], scale / scale.mean(), rtol=1e-6)


def test_coupled_scores_functions_and_dicts():
    model, inputs = model_and_inputs("residual")
    _, inner = groups_of(model, inputs)
    custom = scores_of(model, by(lambda weight: weight**4), inputs)
    np.testing.assert_allclose(
        custom["b.weight"], oracle_scores(inner, lambda member: squares(member) ** 2), rtol=1e-5
    )
    given = {"a.weight": torch.arange(8.0), "b.weight": torch.tensor([5.0, 4, 3, 2, 1, 0])}
    assert scores_of(model, by(importance.given(given)), inputs)["b.weight"].tolist() == [5, 4, 3, 2, 1, 0]
    one, two = (scores_of(model, by(importance.random(seed)), inputs)["a.weight"] for seed in (0, 1))
    assert len(set(one)) == 8
    assert not np.array_equal(one, two)


# ---- masks ----


@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("name", NAMES)
def test_prune_coupled_masks_whole_units(name, ratio):
    model, inputs = model_and_inputs(name)
    groups = groups_of(model, inputs)
    counts = [max(0, min(int(np.floor(ratio * len(group) + 0.5)), len(group) - 1)) for group in groups]
    expected = [lowest(oracle_scores(group, squares), count) for group, count in zip(groups, counts, strict=True)]
    zeroed = with_zeros(model, groups, expected)
    masked = pyprune.prune(copy.deepcopy(model), by(), ratio=ratio, examples_inputs=inputs)
    for (key, value), other in zip(masked.state_dict().items(), zeroed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key  # running statistics among them
    assert torch.equal(masked(inputs), zeroed(inputs))
    for group, gone in zip(groups, expected, strict=True):
        np.testing.assert_array_equal(dropped_in(masked, group), gone)


@pytest.mark.parametrize("name", NAMES)
def test_prune_coupled_holds_units_through_training(name):
    model, inputs = model_and_inputs(name)
    groups = groups_of(model, inputs)
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    before = [dropped_in(model, group) for group in groups]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    for group, gone in zip(groups, before, strict=True):
        np.testing.assert_array_equal(dropped_in(model, group), gone)
    expected = model.eval()(inputs)
    left = {}
    for group, gone in zip(groups, before, strict=True):
        for member in group.members:
            size = left.get((member.name, member.dim), member.tensor.shape[member.dim])
            left[member.name, member.dim] = size - member.indices[gone].size
    pyprune.shrink(model, inputs)
    assert not masks_in(model)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert {place: tensors[place[0]].shape[place[1]] for place in left} == left
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-4)
    assert all((layer.bias != 0).all() for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))


def test_prune_coupled_flags_say_what_goes():
    model, inputs = model_and_inputs("attention")
    heads, mlp = groups_of(model, inputs)
    (width,) = [group for group in coupled_groups(model, inputs) if not group.is_exact]
    assert (heads.what, len(heads), len(mlp), len(width)) == ("heads", 3, 20, 12)
    for options, gone in (({}, (2, 10, 0)), ({"heads": False}, (0, 10, 0)), ({"width": True}, (2, 10, 6))):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            masked = prune(copy.deepcopy(model), by(**options), ratio=0.5, examples_inputs=inputs)
        assert tuple(int(dropped_in(masked, group).sum()) for group in (heads, mlp, width)) == gone
        assert [bool(re.search("left alone: .*width=False", str(one.message))) for one in told] == (
            [] if options.get("width") else [True]
        )


def test_prune_coupled_takes_several_examples():
    model, inputs = model_and_inputs("residual")
    masked = prune(model, by(), ratio=0.5, examples_inputs=[inputs, {"x": inputs[:1]}])
    assert int(masked.n.weight.count_nonzero()) == 4


def test_prune_coupled_masks_are_no_targets_where_they_go_along():
    model, inputs = model_and_inputs("residual")
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    assert {mask.parameter.dim() > 1: mask.on_target for mask in masks_in(model)} == {True: True, False: False}
    assert pyprune.pruning_statistic(model).pruning_ratio > 0.5
    names = [target.name for target in pyprune.modules.targets.find_targets(model)]
    assert names == ["a.weight", "b.weight", "c.weight", "h.weight"]


# ---- again, and beside other masks ----


def test_prune_coupled_again_chooses_from_raw_values():
    model, inputs = model_and_inputs("residual")
    (stream, inner), dense = groups_of(model, inputs), copy.deepcopy(model)
    for ratio in (0.75, 0.25, 0.5, 0.0):
        prune(model, by(), ratio=ratio, examples_inputs=inputs)
        for group in (stream, inner):
            gone = lowest(oracle_scores(group_of_dense(group, dense), squares), int(ratio * len(group) + 0.5))
            np.testing.assert_array_equal(dropped_in(model, group), gone)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), dense.parameters(), strict=True))


def group_of_dense(group, dense):
    """Return a group with the tensors of another copy of the model."""
    from dataclasses import replace

    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    return replace(group, members=tuple(replace(member, tensor=tensors[member.name]) for member in group.members))


def test_prune_coupled_leaves_other_groups_what_they_lost():
    model, inputs = model_and_inputs("residual")
    stream, inner = groups_of(model, inputs)
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    before = dropped_in(model, inner)
    # c.weight has rows of the one and columns of the other.
    only_stream = by(among=scope.group({"stream": ["a.weight"]}))
    prune(model, only_stream, ratio=0.25, examples_inputs=inputs)
    assert int(dropped_in(model, stream).sum()) == 2
    np.testing.assert_array_equal(dropped_in(model, inner), before)


@pytest.mark.parametrize("stripped", [False, True])
def test_prune_coupled_from_remaining(stripped):
    model, inputs = model_and_inputs("residual")
    groups = groups_of(model, inputs)
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    before = [dropped_in(model, group) for group in groups]
    if stripped:
        strip(model)
    with torch.no_grad():
        model.c.bias[~before[0]] = 0  # which says nothing of units
    prune(model, by(importance.random()), ratio=0.5, from_remaining=True, examples_inputs=inputs)
    for group, gone, left in zip(groups, before, (2, 1), strict=True):
        now = [(slices(member, member.tensor.detach().numpy()) == 0).all(1) for member in weights(group)]
        assert all(int((~zero).sum()) == left for zero in now)
        assert all(zero[gone].all() for zero in now)


def test_prune_coupled_beside_masks_of_elements():
    model, inputs = model_and_inputs("residual")
    stream, inner = groups_of(model, inputs)
    elements = Method(importance.magnitude(), scope=scope.tensor())
    prune(model, elements, ratio=0.5)
    together = prune(copy.deepcopy(model), by(), ratio=0.5, from_remaining=True, examples_inputs=inputs)
    kept = ~dropped_in(together, stream)[:, None] & ~dropped_in(together, inner)
    zeros = (together.c.weight == 0).flatten(2).double().mean(2).numpy()
    assert (zeros[~kept] == 1).all()
    assert 0.3 < zeros[kept].mean() < 0.7
    anew = prune(model, by(), ratio=0.5, examples_inputs=inputs)  # as of any method, the new masks
    kept = ~dropped_in(anew, stream)[:, None] & ~dropped_in(anew, inner)
    assert ((anew.c.weight == 0).flatten(2).double().mean(2).numpy()[kept] == 0).all()


@pytest.mark.parametrize(
    "again",
    [
        lambda model: prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5),
        lambda model: update_masks(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", 0.5),
        lambda model: pyprune.gmp(model, 0.5, end=2),
        lambda model: pyprune.sensitivity(model, lambda model: 0.0, ratios=[0.5]),
    ],
)
def test_prune_coupled_refuses_masks_that_would_leave_biases_dropped(again):
    model, inputs = model_and_inputs("residual")
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="masks of coupled units"):
        again(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(model, by(), ratio=0.0, examples_inputs=inputs)
    again(model)  # nothing is dropped any more


def test_prune_coupled_then_elements_of_what_remains():
    model, inputs = model_and_inputs("residual")
    stream, _ = groups_of(model, inputs)
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    before = dropped_in(model, stream)
    prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.2, from_remaining=True)
    assert (dropped_in(model, stream)[before]).all()


def test_prune_coupled_config_round_trip():
    model, inputs = model_and_inputs("concat")
    prune(model, by(), ratio=0.5, examples_inputs=inputs)
    fresh, _ = model_and_inputs("concat", seed=1)
    pyprune.load_from_config(fresh, pyprune.get_config(model)).load_state_dict(model.state_dict())
    assert {target.on_target for target in masks_in(fresh)} == {True, False}
    for one in (model, fresh):
        prune(one, by(), ratio=0.0, examples_inputs=inputs)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), fresh.parameters(), strict=True))


# ---- how many ----


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["residual", "concat", "attention"])
def test_prune_coupled_scope_model_within_kinds(name, ratio):
    model, inputs = model_and_inputs(name)
    groups = groups_of(model, inputs)
    masked = prune(copy.deepcopy(model), by(among=scope.model()), ratio=ratio, examples_inputs=inputs)
    for what in {group.what for group in groups}:
        kind = [group for group in groups if group.what == what]
        units = sorted(
            (score, number, unit)
            for number, group in enumerate(kind)
            for rank, unit, score in ranked(oracle_scores(group, squares))
            if rank < len(group) - 1  # one of each stays
        )
        count = int(np.floor(ratio * sum(map(len, kind)) + 0.5))
        gone = {(number, unit) for _, number, unit in units[:count]}
        for number, group in enumerate(kind):
            found = {(number, int(unit)) for unit in np.flatnonzero(dropped_in(masked, group))}
            assert found == {pair for pair in gone if pair[0] == number}


def ranked(scores):
    return [(rank, int(unit), scores[unit]) for rank, unit in enumerate(np.argsort(scores, kind="stable"))]


def test_prune_coupled_scope_model_limits():
    model, inputs = model_and_inputs("residual")
    stream, inner = groups_of(model, inputs)
    scores = {"a.weight": torch.arange(8.0), "b.weight": 100 + torch.arange(6.0)}
    method = by(importance.given(scores), scope.model(), normalize=None)
    for limits, gone in (
        ({}, (7, 0)),
        ({"max_ratio": 0.5}, (4, 3)),
        ({"max_ratio": {"a.weight": 0.25}}, (2, 5)),
        ({"min_ratio": {"b": 0.5}}, (4, 3)),
    ):
        masked = prune(copy.deepcopy(model), method, ratio=0.5, examples_inputs=inputs, **limits)
        assert (int(dropped_in(masked, stream).sum()), int(dropped_in(masked, inner).sum())) == gone


def test_prune_coupled_ratios_by_name_and_group():
    model, inputs = model_and_inputs("residual")
    stream, inner = groups_of(model, inputs)
    named = prune(copy.deepcopy(model), by(), ratio={"c": 0.25, "b.weight": 0.5}, examples_inputs=inputs)
    assert (int(dropped_in(named, stream).sum()), int(dropped_in(named, inner).sum())) == (2, 3)
    among = scope.group({"stream": ["a"], "inner": ["b"]})
    grouped = prune(copy.deepcopy(model), by(among=among), ratio={"stream": 0.5}, examples_inputs=inputs)
    assert (int(dropped_in(grouped, stream).sum()), int(dropped_in(grouped, inner).sum())) == (4, 0)


@pytest.mark.parametrize(
    ("options", "ratio", "left"),
    [
        ({"round_to": 4}, 0.5, (4, 4)),
        ({"round_to": 4}, 0.4, (8, 4)),
        ({"round_to": 8}, 0.9, (8, 6)),
        ({"round_to": 3}, 0.5, (6, 3)),
        ({"min_units": 3}, 0.9, (3, 3)),
        ({"min_units": 7}, 0.9, (7, 6)),
        ({"min_units": 2, "round_to": 3}, 0.9, (3, 3)),
    ],
)
def test_prune_coupled_rounds_what_remains(options, ratio, left):
    model, inputs = model_and_inputs("residual")
    groups = groups_of(model, inputs)
    prune(model, by(**options), ratio=ratio, examples_inputs=inputs)
    assert tuple(int((~dropped_in(model, group)).sum()) for group in groups) == left


def test_prune_coupled_does_not_round_heads():
    model, inputs = model_and_inputs("attention")
    heads, mlp = groups_of(model, inputs)
    with pytest.warns(UserWarning, match="width"):
        prune(model, by(round_to=8), ratio=0.5, examples_inputs=inputs)
    assert (int((~dropped_in(model, heads)).sum()), int((~dropped_in(model, mlp)).sum())) == (1, 16)


@pytest.mark.parametrize("among", [scope.tensor(), scope.model()])
@pytest.mark.parametrize("target", [1.0, 0.9, 0.6, 0.35])
@pytest.mark.parametrize("what", ["target_params", "target_macs"])
@pytest.mark.parametrize("name", ["residual", "concat", "recurrent", "tied"])
def test_prune_coupled_reaches_a_target_by_as_few_units_as_it_takes(name, what, target, among):
    model, inputs = model_and_inputs(name)
    found = coupled_groups(model, inputs)
    groups = groups_of(model, inputs)
    masked = prune(copy.deepcopy(model), by(among=among), examples_inputs=inputs, **{what: target})
    kept = [~dropped_in(masked, group) for group in groups]
    cost = found.macs if what == "target_macs" else found.parameters
    assert cost(kept) <= target * cost()
    assert cost(kept) == size_of(masked, groups, kept, inputs, what)
    if target == 1.0:
        assert all(flags.all() for flags in kept)
        return
    # With one unit more, the one that went last in one of the groups, it would cost too much.
    more = []
    for index, (group, flags) in enumerate(zip(groups, kept, strict=True)):
        if not flags.all():
            scores = np.where(flags, -np.inf, oracle_scores(group, squares))
            again = [one.copy() for one in kept]
            again[index][np.argmax(scores)] = True
            more.append(cost(again))
    assert max(more) > target * cost()


def size_of(model, groups, kept, inputs, what):
    """Count parameters, or multiply-accumulates, of what is left of a model, by the shapes of its layers."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for group, flags in zip(groups, kept, strict=True):
        for member in group.members:
            if member.name in shapes:
                shapes[member.name][member.dim] -= member.indices[~flags].size
    if what == "target_params":
        return sum(int(np.prod(shape)) for shape in shapes.values())
    calls = dict.fromkeys(shapes, 0)
    hooks = [
        module.register_forward_hook(
            lambda layer, args, output, name=name: calls.update(
                {f"{name}.weight": calls.get(f"{name}.weight", 0) + output.numel() // output.shape[1]}
                if output.dim() == 4
                else {f"{name}.weight": calls.get(f"{name}.weight", 0) + len(output.flatten(0, -2))}
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    if "l.weight_ih_l0" in shapes:
        calls |= {name: 2 * 4 for name in shapes if name.startswith("l.weight")}
    if "again.weight" in calls:
        calls["middle.weight"] += calls["again.weight"]
    return sum(int(np.prod(shape)) * calls.get(name, 0) for name, shape in shapes.items())


def test_prune_coupled_target_beyond_reach_says_the_best():
    model, inputs = model_and_inputs("residual")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0.01 of the parameters are to be left.* 0\.0\d+ are \(\d+ of 1,\d+\)"):
        prune(model, by(), target_params=0.01, examples_inputs=inputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- wrong values ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: prune(m, by(), ratio=0.5), ValueError, "examples_inputs is None"),
        (lambda m, x: prune(m, by(), ratio=0.5, target_macs=0.5, examples_inputs=x), ValueError, "give one of ratio"),
        (
            lambda m, x: prune(m, by(), target_params=0.5, target_macs=0.5, examples_inputs=x),
            ValueError,
            "give one of ratio",
        ),
        (lambda m, x: prune(m, by(), target_macs=0, examples_inputs=x), ValueError, r"target_macs is 0.*\(0, 1\]"),
        (lambda m, x: prune(m, by(), target_macs=1.5, examples_inputs=x), ValueError, "target_macs is 1.5"),
        (lambda m, x: prune(m, by(), target_params="half", examples_inputs=x), TypeError, "target_params is 'half'"),
        (
            lambda m, x: prune(m, "UNSTRUCTURED_MAGNITUDE_LOCAL", target_macs=0.5, examples_inputs=x),
            ValueError,
            "target_macs counts what is left",
        ),
        (
            lambda m, x: prune(m, by(ratio_of="macs"), ratio={"a": 0.5}, examples_inputs=x),
            ValueError,
            'ratio is a dict, but ratio_of="macs"',
        ),
        (
            lambda m, x: prune(m, by(), ratio=0.5, allocation="erk", examples_inputs=x),
            ValueError,
            "leave it out",
        ),
        (
            lambda m, x: prune(m, by(), ratio=0.5, zero_dead_channels=True, examples_inputs=x),
            ValueError,
            "zero_dead_channels masks",
        ),
        (lambda m, x: prune(m, by(), ratio={"h": 0.5}, examples_inputs=x), ValueError, "h"),
        (
            lambda m, x: prune(m, by(), ratio=0.5, ignored_scope="a", examples_inputs=x),
            TypeError,
            "ignored_scope is a",
        ),
        (
            lambda m, x: prune(m, by(), ratio=0.5, ignored_scope=IgnoredScope(names=["c"]), examples_inputs=x),
            ValueError,
            r"no coupled units to prune: a.weight, b.weight \(a part of the group is in ignored_scope\)",
        ),
        (
            lambda m, x: prune(m, by(among=scope.model(), min_units=4), ratio=0.5, min_ratio=0.8, examples_inputs=x),
            ValueError,
            "leaves min_units, 4",
        ),
        (
            lambda m, x: prune(m, by(among=scope.model()), ratio=0.9, max_ratio=0.5, examples_inputs=x),
            ValueError,
            "give another ratio, or other limits",
        ),
        (
            lambda m, x: prune(m, by(among=scope.group({"g": ["nothing"]})), ratio=0.5, examples_inputs=x),
            ValueError,
            "matches no weight",
        ),
        (lambda m, x: prune(m, by(), ratio=0.5, examples_inputs=x[:, :2]), RuntimeError, "2 channels"),
        (
            lambda m, x: prune(m, by(importance.wanda()), ratio=0.5, examples_inputs=x),
            TypeError,
            "needs statistics, and calibration is None",
        ),
        (
            lambda m, x: prune(m, by(importance.given({"a.weight": torch.ones(8)})), ratio=0.5, examples_inputs=x),
            ValueError,
            "the group b.weight has none; give one number for each of its 6 units",
        ),
        (
            lambda m, x: prune(
                m,
                by(importance.given({"a.weight": torch.ones(8), "b.weight": torch.ones(5)})),
                ratio=0.5,
                examples_inputs=x,
            ),
            ValueError,
            r"b.weight has shape \(5,\)",
        ),
        (
            lambda m, x: prune(m, by(lambda weight: weight[0]), ratio=0.5, examples_inputs=x),
            ValueError,
            "one score for",
        ),
        (
            lambda m, x: prune(m, by(lambda weight: weight * torch.nan), ratio=0.5, examples_inputs=x),
            ValueError,
            "NaN or infinite scores.* in a.weight",
        ),
        (
            lambda m, x: pyprune.MovementPruner(
                m,
                pyprune.schedules.cubic(0.5, start=1, end=2),
                torch.optim.SGD(m.parameters(), lr=0.1),
                granularity=granularity.coupled(),
                examples_inputs=x,
            ),
            ValueError,
            "granularity is coupled, and movement",
        ),
    ],
)
def test_prune_coupled_wrong_values(call, error, message):
    model, inputs = model_and_inputs("residual")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model, inputs)
    assert not masks_in(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"heads": 1}, TypeError),
        ({"width": "no"}, TypeError),
        ({"reduce": "median"}, ValueError),
        ({"normalize": "l2"}, ValueError),
        ({"normalize": False}, (TypeError, ValueError)),
        ({"round_to": 0}, ValueError),
        ({"round_to": 2.5}, TypeError),
        ({"min_units": 0}, ValueError),
        ({"ratio_of": "flops"}, ValueError),
    ],
)
def test_coupled_refuses_wrong_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        granularity.coupled(**options)


@pytest.mark.parametrize("among", [scope.row(), scope.columns(4), scope.n_of_m(keep=2, of=4)])
def test_method_coupled_refuses_scopes_within_weights(among):
    with pytest.raises(ValueError, match=r"coupled units lie in rows .*scope.tensor\(\), scope.model\(\)"):
        by(among=among)


@pytest.mark.parametrize("name", ["weight_norm", "gate", "frozen_zero"])
def test_prune_coupled_models_that_are_not_plain(name):
    model, inputs = model_and_inputs("residual")
    if name == "weight_norm":
        nn.utils.parametrizations.weight_norm(model.b)
        with pytest.raises(ValueError, match=r"b.weight.*remove_parametrizations"):
            prune(model, by(), ratio=0.5, examples_inputs=inputs)
    elif name == "gate":
        prune(model, "UNSTRUCTURED_REGULARIZATION_BASED", ignored_scope=IgnoredScope(names=["a", "h"]))
        with pytest.raises(ValueError, match=r"carries a StochasticGate.*strip"):
            prune(model, by(), ratio=0.5, examples_inputs=inputs)
    else:
        model.c.weight.requires_grad_(False)
        with torch.no_grad():
            model.c.weight.zero_()  # as the last layers of branches are before training
        prune(model, by(), ratio=0.5, examples_inputs=inputs)
        assert int(model.b.bias.count_nonzero()) == 3
