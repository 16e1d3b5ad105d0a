"""Relative importance and activations, from the scores to the masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.methods.layout import Layout
from pyprune.selection.scores import scores_of_elements

GOLDEN = json.loads((Path(__file__).parents[1] / "oneshot" / "golden.json").read_text())
W, X = torch.tensor(GOLDEN["W"]), torch.tensor(GOLDEN["X"])


def test_ria_gives_the_golden_scores():
    norms = torch.tensor(GOLDEN["wanda"]["scaler_row"]).sqrt()[None]
    expected = torch.tensor(GOLDEN["ria"]["score"])
    torch.testing.assert_close(importance.ria(power=GOLDEN["ria"]["a"]).score(W, norms), expected)


@pytest.mark.parametrize(
    ("among", "ratio", "golden"),
    [
        (scope.tensor(), 0.5, "mask_.5_tensor_exact_count"),
        (scope.row(), 0.5, "mask_.5_row"),
        (scope.n_of_m(keep=2, of=4), None, "mask_2of4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prune_by_ria_gives_the_golden_masks(among, ratio, golden):
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model[0].weight.data.copy_(W)
    method = Method(importance.ria(), scope=among)
    pyprune.prune(model, method, ratio=ratio, calibration=pyprune.calibrate(model, [X], method))
    assert (model[0].weight == 0).tolist() == GOLDEN["ria"][golden]


# What is one matrix of outputs by inputs, worked out by hand: its rows and columns are summed by themselves.
LAYOUTS = {
    "linear": ((4, 6), Layout(), lambda w: w[None]),
    "inputs first": ((6, 4), Layout(1, 0), lambda w: w.T[None]),
    "convolution": ((4, 3, 2, 5), Layout(), lambda w: w.reshape(1, 4, 30)),
    "groups": ((4, 3, 2), Layout(groups=2), lambda w: w.reshape(2, 2, 6)),
    "transposed": ((6, 2, 3), Layout(1, 0, 2), lambda w: w.reshape(2, 3, 2, 3).swapaxes(1, 2).reshape(2, 2, 9)),
    "experts": ((3, 4, 5), Layout(1, 2, 3), lambda w: w),
    "experts, inputs first": ((3, 4, 5), Layout(2, 1, 3), lambda w: w.swapaxes(1, 2)),
    "vector": ((7,), Layout(), lambda w: w[None, None]),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ria_compares_rows_and_columns_of_each_matrix_of_a_weight(kind, dtype, device):
    shape, layout, matrices = LAYOUTS[kind]
    torch.manual_seed(0)
    weight, norms = torch.randn(shape, dtype=dtype), torch.rand(shape) + 0.1
    weight[0] = 0 if len(shape) > 1 else weight[0]
    got = scores_of_elements(importance.ria(), "w", weight.to(device), norms.to(device), layout)
    values = matrices(weight.double().abs().numpy())
    with np.errstate(invalid="ignore"):
        relative = values / values.sum(-1, keepdims=True) + values / values.sum(-2, keepdims=True)
    expected = np.nan_to_num(relative) * np.sqrt(matrices(norms.double().numpy()))
    assert got.shape == shape
    np.testing.assert_allclose(matrices(got.cpu().double().numpy()), expected, rtol=1e-6)


def test_ria_of_a_weight_without_directions_is_refused():
    weight, unknown = torch.ones(2, 2), Layout(None, None, problem="it is in no layer")
    with pytest.raises(ValueError, match=r"compares outputs and inputs, .* of w .*it is in no layer\. Name"):
        scores_of_elements(importance.ria(), "w", weight, weight, unknown)


def test_prune_by_ria_refuses_what_is_not_finite():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"0\.weight"):
        pyprune.prune(model, Method(importance.ria(power=0), scope=scope.tensor()), ratio=0.5)


def test_prune_by_ria_takes_blocks_and_coupled_units():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    blocks = Method(importance.ria(), granularity.block(2, 2), scope.tensor())
    calibration = pyprune.calibrate(model, [torch.randn(16, 8)], blocks)
    pyprune.prune(model, blocks, ratio=0.5, calibration=calibration)
    assert int(model[0].weight.count_nonzero()) == 32
    pyprune.strip(model)
    coupled = Method(importance.ria(), granularity.coupled())
    pyprune.prune(model, coupled, ratio=0.5, calibration=calibration, examples_inputs=torch.randn(1, 8))
    assert int((model[0].weight != 0).any(1).sum()) == 4
