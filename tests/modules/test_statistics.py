import json

import pytest
import torch
from torch import nn

import pyprune
from pyprune import ModelPruningStatistic, TensorPruningStatistic, pruning_statistic
from pyprune.modules.gates import gates_of
from pyprune.modules.targets import attachments_of, find_targets
from tests.conftest import masks_of


def test_pruning_statistic_counts_mask_zeros_exactly(case):
    targets = find_targets(case.model)
    parameters = sum(parameter.numel() for parameter in case.model.parameters())
    targets[0].parameter.data.view(-1)[:3] = 0  # zeros in a weight are no pruned elements
    pyprune.prune(case.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.3)
    statistic = pruning_statistic(case.model)
    zeros = {target.name: int((~mask).sum()) for target, mask in masks_of(case.model).items()}
    assert statistic == ModelPruningStatistic(
        sum(zeros.values()) / sum(target.parameter.numel() for target in targets),
        sum(zeros.values()) / parameters,
        tuple(
            TensorPruningStatistic(
                target.name,
                tuple(target.parameter.shape),
                zeros[target.name] / target.parameter.numel(),
                units=target.parameter.numel(),
                pruned_units=zeros[target.name],
            )
            for target in targets
        ),
    )


def test_pruning_statistic_is_the_same_after_strip(case):
    pyprune.prune(case.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.6)
    masked = pruning_statistic(case.model)
    assert pruning_statistic(pyprune.strip(case.model)) == masked


def test_pruning_statistic_is_the_same_after_strip_with_the_same_selection():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x @ self.kernel))

    selection = {"ignored_scope": pyprune.IgnoredScope(names=["first"]), "examples_inputs": torch.randn(2, 4)}
    model = pyprune.prune(Bare(), "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.6, **selection)
    masked = pruning_statistic(model)
    assert [tensor.tensor_name for tensor in masked.pruned_tensors] == ["kernel", "second.weight"]
    assert pruning_statistic(model, **selection) == masked
    some = pruning_statistic(model, ignored_scope=pyprune.IgnoredScope(names=["kernel"]))
    assert [tensor.tensor_name for tensor in some.pruned_tensors] == ["second.weight"]
    pyprune.strip(model)
    assert pruning_statistic(model, **selection) == masked
    assert pruning_statistic(model) != masked


def test_pruning_statistic_of_a_dense_model_counts_its_zeros(transformer):
    assert pruning_statistic(transformer.model).pruning_ratio == 0
    transformer.model.embed.weight.data.zero_()
    statistic = pruning_statistic(transformer.model)
    every = find_targets(transformer.model, pyprune.IgnoredScope(all_zero=False))
    assert statistic.pruning_ratio == 88 / sum(target.parameter.numel() for target in every)
    assert [tensor.tensor_name for tensor in statistic.pruned_tensors].count("embed.weight") == 1
    assert "decoder.weight" not in [tensor.tensor_name for tensor in statistic.pruned_tensors]


def test_pruning_statistic_lists_masked_weights_only(cnn):
    scope = pyprune.IgnoredScope(names=["fc"])
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, ignored_scope=scope)
    assert [tensor.tensor_name for tensor in pruning_statistic(cnn.model).pruned_tensors] == [
        "conv1.weight",
        "conv2.weight",
    ]


def test_pruning_statistic_of_nothing_is_zero():
    assert pruning_statistic(nn.ReLU()) == ModelPruningStatistic(0.0, 0.0, ())
    assert pruning_statistic(nn.LayerNorm(3)) == ModelPruningStatistic(0.0, 0.0, ())
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 3)
    assert pruning_statistic(empty).pruned_tensors[0].pruned_ratio == 0.0


def test_pruning_statistic_says_what_it_cannot_count():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        pruning_statistic(torch.ones(1))
    with pytest.raises(TypeError, match=r"pyprune\.IgnoredScope"):
        pruning_statistic(nn.Linear(2, 2), ignored_scope=["weight"])
    with pytest.raises(ValueError, match="meta device"):
        pruning_statistic(nn.Linear(2, 2, device="meta"))


def test_pruning_statistic_becomes_json(cnn):
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    statistic = pruning_statistic(cnn.model)
    values = statistic.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["pruned_tensors"][0] == {
        "tensor_name": "conv1.weight",
        "shape": [4, 1, 3, 3],
        "pruned_ratio": 0.5,
        "units": 36,
        "pruned_units": 18,
    }
    assert values["global_pruning_ratio"] == statistic.global_pruning_ratio


def test_model_pruning_statistic_prints_a_table():
    name = "encoder.layers.0." * 12 + "weight"
    statistic = ModelPruningStatistic(
        0.5,
        0.25,
        (TensorPruningStatistic(name, (30, 20), 0.875, 30, 26), TensorPruningStatistic("[b]x", (), 0.0, 1, 0)),
    )
    lines = str(statistic).splitlines()
    assert any(all(text in line for text in (name, "30 x 20", "87.50%", "26 of 30")) for line in lines)
    assert any("[b]x" in line and "0.00%" in line for line in lines)
    assert any("50.00%" in line for line in lines)
    assert any("25.00%" in line for line in lines)
    assert "\x1b" not in str(statistic)


def test_pruning_statistic_counts_what_cannot_be_pruned_but_read():
    model = nn.ModuleList([nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2)])
    model[1].weight = nn.Parameter(torch.zeros(2, 1).expand(2, 2))
    assert [tensor.pruned_ratio for tensor in pruning_statistic(model).pruned_tensors] == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"])
def test_pruning_statistic_counts_gates_that_are_zero_in_evaluation(case, mode):
    targets = find_targets(case.model)
    pyprune.prune(case.model, mode)
    assert pruning_statistic(case.model).pruning_ratio == 0
    for gate in gates_of(case.model):
        torch.nn.init.normal_(gate.logits, std=3)
    zeros = {target.name: int((gate.values() == 0).sum()) for target, gate in attachments_of(case.model).items()}
    statistic = pruning_statistic(case.model)
    assert [tensor.tensor_name for tensor in statistic.pruned_tensors] == [target.name for target in targets]
    for tensor, target in zip(statistic.pruned_tensors, targets, strict=True):
        assert tensor.shape == tuple(target.parameter.shape)
        assert tensor.pruned_ratio == zeros[target.name] / target.parameter.numel() > 0
    stripped = pruning_statistic(pyprune.strip(case.model, do_copy=True))
    assert stripped.pruned_tensors == statistic.pruned_tensors
    assert stripped.pruning_ratio == statistic.pruning_ratio


def test_pruning_statistic_counts_all_weights_of_a_gate():
    model = nn.Linear(6, 4)
    gate = pyprune.StochasticGate((4, 6), gate_shape=(2, 6))
    pyprune.attach_gate(model, "weight", gate)
    gate.logits.data[0, :3] = -1
    (tensor,) = pruning_statistic(model).pruned_tensors
    assert tensor == TensorPruningStatistic("weight", (4, 6), 0.25, 24, 6)
