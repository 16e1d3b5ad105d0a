import pytest
import torch
from torch import nn

import pyprune
from pyprune.modules.gates import HardConcreteGate, StochasticGate
from pyprune.modules.optimizer import check_optimizer, gate_parameters, weight_parameters


@pytest.fixture(params=["UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"])
def gated(request, case):
    return pyprune.prune(case.model, request.param)


def test_parameters_are_split_and_each_comes_once(gated):
    gates, weights = gate_parameters(gated), weight_parameters(gated)
    assert {id(p) for p in [*gates, *weights]} == {id(p) for p in gated.parameters()}
    assert len(gates) + len(weights) == len(list(gated.parameters()))
    assert {id(p) for p in gates} == {id(m.logits) for m in gated.modules() if isinstance(m, StochasticGate)}
    assert [id(p) for p in weights] == [id(p) for p in gated.parameters() if id(p) in {id(w) for w in weights}]


def test_weight_parameters_of_a_dense_model_are_all(case):
    assert gate_parameters(case.model) == []
    assert [id(p) for p in weight_parameters(case.model)] == [id(p) for p in case.model.parameters()]


def test_gates_used_by_hand_are_found():
    model = nn.ModuleDict({"gate": HardConcreteGate((2, 3)), "layer": nn.Linear(3, 2)})
    assert gate_parameters(model)[0] is model["gate"].logits
    assert len(weight_parameters(model)) == 2


@pytest.mark.parametrize("decay", [0, 0.0, None])
def test_check_optimizer_accepts_gates_without_weight_decay(gated, decay):
    groups = [{"params": weight_parameters(gated), "weight_decay": 0.1}, {"params": gate_parameters(gated)}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.param_groups[1]["weight_decay"] = decay
    check_optimizer(gated, optimizer)


def test_check_optimizer_names_gates_under_weight_decay(gated):
    with pytest.raises(ValueError, match=r"probability of 1/2: .*\.logits.*weight_decay=0"):
        check_optimizer(gated, torch.optim.AdamW(gated.parameters()))  # 0.01 by default


def test_check_optimizer_names_only_the_gates_concerned():
    model = pyprune.prune(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "UNSTRUCTURED_REGULARIZATION_BASED")
    first, second = gate_parameters(model)
    groups = [{"params": [first]}, {"params": [second], "weight_decay": 0.1}]
    with pytest.raises(ValueError, match=r"1/2: 1\.weight_mask\.logits\. Put"):
        check_optimizer(model, torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ValueError, match=r"not learn: 0\.weight_mask\.logits\. Build"):
        check_optimizer(model, torch.optim.SGD([second], lr=0.1))


def test_check_optimizer_finds_one_that_was_built_before_prune(case):
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    pyprune.prune(case.model, "UNSTRUCTURED_REGULARIZATION_BASED")
    with pytest.raises(ValueError, match="Build the optimizer after prune"):
        check_optimizer(case.model, optimizer)
    optimizer.add_param_group({"params": gate_parameters(case.model)})
    check_optimizer(case.model, optimizer)


def test_check_optimizer_does_not_ask_for_frozen_gates():
    model = pyprune.prune(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "UNSTRUCTURED_HARD_CONCRETE")
    gate_parameters(model)[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_optimizer(model, torch.optim.SGD(trained, lr=0.1))


def test_check_optimizer_refuses_wrong_arguments(case):
    with pytest.raises(ValueError, match="no learned gates"):
        check_optimizer(case.model, torch.optim.SGD(case.model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        gate_parameters(case.model.parameters())
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        check_optimizer(pyprune.prune(case.model, "UNSTRUCTURED_HARD_CONCRETE"), [0.1])


def test_weight_decay_does_what_the_error_says():
    model = pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_REGULARIZATION_BASED")
    (logits,) = gate_parameters(model)
    optimizer = torch.optim.SGD([logits], lr=1.0, weight_decay=0.1)
    for _ in range(100):
        logits.grad = torch.zeros_like(logits)
        optimizer.step()
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.5), atol=1e-4, rtol=0)
