"""Gates of coupled units: one logit for each unit, in all that it lies in, beside plain torch."""

import copy
import pickle

import pytest
import torch

import pyprune
from pyprune import (
    HardConcreteGate,
    IgnoredScope,
    L0Loss,
    LagrangianLoss,
    Method,
    RBLoss,
    StochasticGate,
    attach_gate,
    coupled_groups,
    gate_parameters,
    granularity,
    importance,
    prune,
    strip,
    weight_parameters,
)
from pyprune.modules.gates import gates_of
from pyprune.modules.unit_gates import UnitGates
from tests.selection.coupled_models import NAMES, model_and_inputs, with_zeros

RB, HARD = "UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"
pytestmark = pytest.mark.filterwarnings("ignore:coupled units of these groups are left alone")


def gated(name, mode=RB, **options):
    model, inputs = model_and_inputs(name)
    dense = copy.deepcopy(model)
    prune(model, mode, granularity=granularity.coupled(**options), examples_inputs=inputs)
    return model, inputs, dense


def exact_groups(model, inputs):
    return [group for group in coupled_groups(model, inputs) if group.is_exact]


@torch.no_grad()
def close(model, seed=0):
    """Close about half of the gates; return which units are closed, for each group."""
    torch.manual_seed(seed)
    closed = []
    for gate in gates_of(model):
        shut = torch.rand(gate.shape) < 0.5
        gate.logits[shut], gate.logits[~shut] = -9.0, 9.0
        closed.append(shut.numpy())
    return closed


@pytest.mark.parametrize("mode", [RB, HARD])
@pytest.mark.parametrize("name", NAMES)
def test_prune_gates_of_units_close_all_that_a_unit_has(name, mode):
    model, inputs, dense = gated(name, mode)
    groups = exact_groups(dense, inputs)
    assert [tuple(logits.shape) for logits in gate_parameters(model)] == [(len(group),) for group in groups]
    assert all(type(gate) is (StochasticGate if mode == RB else HardConcreteGate) for gate in gates_of(model))
    open_ = model(inputs)
    torch.testing.assert_close(open_, dense(inputs), rtol=1e-5 if mode == RB else 10, atol=1e-5 if mode == RB else 10)
    zeroed = with_zeros(dense, groups, close(model))
    torch.testing.assert_close(model(inputs), zeroed(inputs), rtol=1e-4, atol=1e-4)
    folded = strip(copy.deepcopy(model))
    assert not gates_of(folded)
    for (key, value), other in zip(folded.state_dict().items(), zeroed.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=key)
    pyprune.shrink(model, inputs)
    torch.testing.assert_close(model(inputs), zeroed(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [RB, HARD])
@pytest.mark.parametrize("name", NAMES)
def test_prune_gates_of_units_gradient_is_the_sum_over_all(name, mode):
    model, inputs, dense = gated(name, mode)
    groups = exact_groups(dense, inputs)
    with torch.no_grad():
        for logits in gate_parameters(model):
            logits.normal_()  # so that the noise matters
    with pyprune.one_gate_sample(model.train()):
        output = model(inputs)
        # The same in plain torch: all parameters of a unit times the one sample of its gate.
        own = dict(dense.train().named_parameters())
        for gate, group in zip(gates_of(model), groups, strict=True):
            sample = gate(torch.ones(gate.shape))
            for member in group.members:
                if member.name in own:
                    factor = torch.ones(member.tensor.shape[member.dim])
                    indices = torch.from_numpy(member.indices)
                    factor = factor.index_put((indices,), sample[:, None].expand(indices.shape))
                    shape = [-1 if dim == member.dim else 1 for dim in range(member.tensor.dim())]
                    own[member.name] = own[member.name] * factor.view(shape)
    expected = torch.func.functional_call(dense, own, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(
        output.square().mean(), [*gate_parameters(model), model.get_parameter(groups[0].name)]
    )
    wanted = torch.autograd.grad(
        expected.square().mean(), [*gate_parameters(model), dense.get_parameter(groups[0].name)]
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert any(one.any() for one in found)


def test_prune_gates_of_units_share_one_sample():
    model, _, _ = gated("residual")
    with torch.no_grad():
        for logits in gate_parameters(model):
            logits.zero_()
    model.train()
    seen = []
    for _ in range(5):
        with pyprune.one_gate_sample(model):
            rows = [(model.a.weight != 0).flatten(1).any(1), (model.c.bias != 0), (model.n.weight != 0)]
            rows.append((model.h.weight != 0).any(0))
            assert all(torch.equal(one, rows[0]) for one in rows)
            seen.append(tuple(rows[0].tolist()))
    assert len(set(seen)) > 1


def test_prune_gates_of_units_losses_count_units():
    model, _, _ = gated("residual")
    with torch.no_grad():
        gate_parameters(model)[0][:4] = -5.0
    assert RBLoss(model, target_ratio=0.5).current_ratio == pytest.approx(4 / 14)
    hard, _, _ = gated("residual", HARD)
    assert LagrangianLoss(hard, target_ratio=0.5).current_ratio == pytest.approx(0.01, abs=1e-3)
    assert L0Loss(hard, 2.0)().item() == pytest.approx(1.98, abs=1e-3)
    with pytest.raises(ValueError, match="leave examples_inputs out"):
        L0Loss(hard, examples_inputs=torch.randn(1, 3, 6, 6))


def test_prune_gates_of_units_train_to_a_ratio():
    model, inputs, _ = gated("residual")
    optimizer = torch.optim.Adam(
        [{"params": weight_parameters(model), "lr": 1e-3}, {"params": gate_parameters(model), "lr": 0.1}]
    )
    pyprune.check_optimizer(model, optimizer)
    with torch.no_grad():
        gate_parameters(model)[0].add_(torch.linspace(0, 2, 8))
        gate_parameters(model)[1].add_(torch.linspace(0, 2, 6))
    loss = RBLoss(model, target_ratio=0.5, p=0.5)
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        (model(inputs).square().mean() * 1e-3 + loss()).backward()
        optimizer.step()
    assert 0.2 < loss.current_ratio < 0.8


def test_prune_gates_of_units_are_kept_by_a_second_call():
    model, inputs, _ = gated("residual")
    before = gate_parameters(model)
    close(model)
    prune(model, RB, granularity=granularity.coupled(), examples_inputs=inputs)
    assert all(one is other for one, other in zip(before, gate_parameters(model), strict=True))
    copied = pickle.loads(pickle.dumps(model))
    assert len(gate_parameters(copied)) == 2
    torch.testing.assert_close(copied(inputs), model(inputs))
    fresh, _, _ = gated("residual")
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(inputs), model(inputs))
    assert pyprune.pruning_statistic(model).pruning_ratio > 0.3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: prune(m, RB, granularity=granularity.coupled()), ValueError, "examples_inputs is None"),
        (lambda m, x: prune(m, RB, granularity="coupled", examples_inputs=x), TypeError, "granularity is 'coupled'"),
        (
            lambda m, x: prune(m, RB, granularity=granularity.channel(), examples_inputs=x),
            ValueError,
            "see attach_gate",
        ),
        (
            lambda m, x: prune(
                m, Method(importance.magnitude()), ratio=0.5, granularity=granularity.coupled(), examples_inputs=x
            ),
            ValueError,
            "give a Method with this granularity",
        ),
        (
            lambda m, x: prune(
                attach_gate(m.a, "weight", StochasticGate((8, 3, 3, 3))) and m,
                RB,
                granularity=granularity.coupled(),
                examples_inputs=x,
            ),
            ValueError,
            "a.weight carries a StochasticGate",
        ),
        (
            lambda m, x: prune(
                prune(m, HARD, granularity=granularity.coupled(), examples_inputs=x),
                RB,
                granularity=granularity.coupled(),
                examples_inputs=x,
            ),
            ValueError,
            "gates of other units, or of another kind",
        ),
        (
            lambda m, x: prune(
                prune(m, RB, granularity=granularity.coupled(), examples_inputs=x),
                "UNSTRUCTURED_MAGNITUDE_LOCAL",
                ratio=0.5,
            ),
            ValueError,
            "carries a UnitGates",
        ),
        (
            lambda m, x: pyprune.get_config(prune(m, RB, granularity=granularity.coupled(), examples_inputs=x)),
            TypeError,
            "a config cannot describe",
        ),
        (
            lambda m, x: prune(
                m,
                RB,
                granularity=granularity.coupled(),
                ignored_scope=IgnoredScope(names=["c"]),
                examples_inputs=x,
            ),
            ValueError,
            "no coupled units to prune",
        ),
    ],
)
def test_prune_gates_of_units_wrong_values(call, error, message):
    model, inputs = model_and_inputs("residual")
    with pytest.raises(error, match=message):
        call(model, inputs)


def test_prune_gates_of_units_says_what_does_nothing():
    model, inputs = model_and_inputs("residual")
    with pytest.warns(UserWarning, match="gates take heads and width alone"):
        prune(model, RB, granularity=granularity.coupled(round_to=8), examples_inputs=inputs)
    other, _ = model_and_inputs("residual")
    with pytest.warns(UserWarning, match="ratio does nothing in mode"):
        prune(other, RB, ratio=0.5, granularity=granularity.coupled(), examples_inputs=inputs)


def test_prune_gates_of_units_nonfinite_weights():
    model, inputs = model_and_inputs("residual")
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        prune(model, RB, granularity=granularity.coupled(), examples_inputs=inputs)
    assert not any(isinstance(module, UnitGates) for module in model.modules())
