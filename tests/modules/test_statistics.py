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
    masked = pruning_statistic(model, **selection)
    assert [tensor.tensor_name for tensor in masked.pruned_tensors] == ["kernel", "second.weight"]
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
        "macs": None,
        "macs_without_zeros": None,
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


class Pointwise(nn.Module):
    """Uses weights in the ways that models do: a transposed view, a copy in another dtype, twice, not at all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.twice = nn.Linear(8, 8)
        self.casted = nn.Linear(8, 4)
        self.unused = nn.Linear(4, 4)
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = self.twice(self.twice(x))
        x, _ = self.lstm(x)
        x = x + nn.functional.linear(x, self.casted.weight[:, :4].double().float())
        return self.attention(x, x, x)[0]


MACS = {  # inputs of 2 x 4 x 6 x 5
    "conv.weight": 2 * 30 * 8 * 2 * 9,
    "twice.weight": 2 * 2 * 30 * 8 * 8,
    "casted.weight": 2 * 30 * 4 * 4,
    "unused.weight": 0,
    "lstm.weight_ih_l0": 2 * 30 * 16 * 8,
    "lstm.weight_hh_l0": 2 * 30 * 16 * 4,
    "attention.in_proj_weight": 2 * 30 * 12 * 4,
    "attention.out_proj.weight": 2 * 30 * 4 * 4,
}
OF_SCORES = 2 * 2 * 30 * 30 * 4  # of attention, without a weight


@pytest.mark.parametrize("how", ["dense", "masks", "gates", "stripped"])
def test_pruning_statistic_counts_macs(how):
    model, inputs = Pointwise(), torch.randn(2, 4, 6, 5)
    if how == "gates":
        pyprune.prune(model, "UNSTRUCTURED_REGULARIZATION_BASED")
        for gate in gates_of(model):
            nn.init.normal_(gate.logits)
    elif how != "dense":
        pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    if how == "stripped":
        pyprune.strip(model)
    statistic = pruning_statistic(model, examples_inputs=inputs)
    assert {tensor.tensor_name: tensor.macs for tensor in statistic.pruned_tensors} == MACS
    for tensor in statistic.pruned_tensors:
        assert tensor.macs_without_zeros == pytest.approx(tensor.macs * (1 - tensor.pruned_ratio), abs=1)
    assert statistic.macs == sum(MACS.values()) + OF_SCORES
    gone = sum(tensor.macs - tensor.macs_without_zeros for tensor in statistic.pruned_tensors)
    assert statistic.macs_without_zeros == statistic.macs - gone
    assert (gone == 0) == (how == "dense")
    assert pruning_statistic(model).macs is None


def statistic_of(names, pruned=0.5, **options):
    tensors = tuple(TensorPruningStatistic(name, (10, 10), pruned, 100, int(100 * pruned)) for name in names)
    return ModelPruningStatistic(pruned, pruned, tensors, **options)


def test_the_table_has_a_row_for_each_of_a_few_weights():
    lines = str(statistic_of([f"layers.{i}.weight" for i in range(32)])).splitlines()
    assert sum("10 x 10" in line for line in lines) == 32
    assert not lines[0].count("by block")


def test_the_table_of_many_weights_is_by_block_and_ends():
    names = [f"model.layers.{i}.{part}" for i in range(100) for part in ("q.weight", "mlp.0.weight")] + [
        "head.weight"
    ]
    statistic = statistic_of(names)
    lines = str(statistic).splitlines()
    assert len(lines) == 40
    assert "by block; to_text(shortened=False) lists all 201 weights" in lines[0]
    assert any("model.layers.0 " in line and "2 weights" in line and "100 of 200" in line for line in lines)
    assert any("... and 69 more" in line for line in lines)
    assert any("head.weight" in line for line in lines)
    full = statistic.to_text(shortened=False)
    assert all(name in full for name in names)
    assert len(repr(statistic)) < 200
    assert str(statistic) in statistic._repr_html_()
    with pytest.raises(TypeError, match="shortened is 'no'; give True or False"):
        statistic.to_text(shortened="no")


def test_the_table_marks_what_has_nothing_left():
    statistic = ModelPruningStatistic(
        0.6, 0.6, statistic_of(["a"], 1.0).pruned_tensors + statistic_of(["b"]).pruned_tensors
    )
    a, b = (next(line for line in str(statistic).splitlines() if f"  {name} " in line) for name in "ab")
    assert a.endswith("nothing left")
    assert "nothing left" not in b


def test_both_ratios_say_what_they_are_of():
    text = str(statistic_of(["a"], macs=200, macs_without_zeros=100))
    assert "the weights above" in text
    assert "all parameters of the model, biases and norms too" in text
    assert "of 200 dense" in text


class Calls(nn.Module):
    def __init__(self, shape, call):
        super().__init__()
        self.w, self.call = nn.Parameter(torch.randn(shape)), call

    def forward(self, *inputs):
        return self.call(self.w, *inputs)


ROWS = torch.tensor([2, 5, 8], dtype=torch.int32)


@pytest.mark.parametrize(
    ("shape", "call", "inputs", "macs"),
    [
        ((3, 16), lambda w, x: w @ x, (16,), 48),
        ((3, 8, 5), lambda w, x: torch.addbmm(torch.zeros(6, 5), x, w), (3, 6, 8), 3 * 6 * 8 * 5),
        ((3, 16, 8), lambda w, x: nn.functional.grouped_mm(x, w, offs=ROWS), (8, 16), 8 * 16 * 8),
        ((3, 16, 8), lambda w, x: x.unsqueeze(1) @ w[[0, 0, 2, 1]], (4, 16), 4 * 16 * 8),
    ],
    ids=["mv", "addbmm", "grouped_mm", "picked"],
)
def test_pruning_statistic_counts_products_that_torch_does_not(shape, call, inputs, macs):
    statistic = pruning_statistic(Calls(shape, call), examples_inputs=torch.randn(inputs))
    assert statistic.macs == macs
    assert [tensor.macs for tensor in statistic.pruned_tensors] == [macs]


def test_pruning_statistic_counts_attention_in_one_call():
    model = Calls((16, 16), lambda w, x: nn.functional.scaled_dot_product_attention(x @ w, x @ w, x @ w))
    assert (
        pruning_statistic(model, examples_inputs=torch.randn(2, 4, 64, 16)).macs == 3 * 131072 + 2 * 8 * 64 * 64 * 16
    )


def test_blocks_of_the_table_go_deeper_where_the_first_number_says_nothing():
    names = [f"1.layer.{i}.{part}.weight" for i in range(12) for part in "abcd"]
    lines = str(statistic_of(names)).splitlines()
    assert any("1.layer.0 " in line and "4 weights" in line for line in lines)
