"""Groups of small models, against what they are by hand (`GROUPS`: members, units, and what the first unit has)."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import Method, coupled_groups, granularity, importance, prune, scope
from tests.structured.small_models import MODELS

GOLDEN = json.loads(Path(__file__).with_name("golden_groups.json").read_text())


def described(groups):
    return [
        {
            "members": sorted([member.name, member.dim, member.tensor.shape[member.dim]] for member in group.members),
            "units": group.units,
            "first_unit": {f"{member.name}:{member.dim}": member.indices[0].tolist() for member in group.members},
        }
        for group in groups
    ]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_coupled_groups_finds_the_units_of_a_model(name):
    model, examples = MODELS[name]()
    groups = coupled_groups(model, examples)
    exact = [group for group in groups if group.is_exact]
    assert sorted(described(exact), key=str) == sorted(GOLDEN[name], key=str)
    assert not groups.unknown


def test_coupled_groups_tells_units_that_are_not_exact():
    model, examples = MODELS["layernorm_stream"]()
    groups = coupled_groups(model, examples)
    assert sorted(described(groups), key=str) == sorted(GOLDEN["layernorm_stream, width allowed"], key=str)
    assert [group.inexact for group in groups if not group.is_exact] == ["native_layer_norm is over all of them"]


POSITIONS = {
    "argmax": lambda scores: scores.argmax(-1),
    "argmax of all": torch.argmax,
    "argmin": lambda scores: scores.argmin(-1),
    "one-hot": lambda scores: F.one_hot(scores.argmax(-1), 6),
    "nonzero": lambda scores: (scores > 0).nonzero(),
    "multinomial": lambda scores: torch.multinomial(scores.exp(), 1),
}


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_coupled_groups_leaves_axes_of_which_positions_are_told(name):
    """Without a class, the number of the next one is another."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 6)

        def forward(self, inputs):
            return POSITIONS[name](self.other(self.one(inputs).relu()))

    groups = coupled_groups(Chooses(), torch.randn(3, 4))
    assert [group.name for group in groups] == ["one.weight"]
    assert any(stay.name == "other.weight" and stay.dim == 0 and "along it" in stay.why for stay in groups.stays)


WRITTEN = {
    "copied": copy.deepcopy,
    "loaded": lambda model: (
        model.load_state_dict({key: one + 1 for key, one in model.state_dict().items()}) and model
    ),
    "written": lambda model: (nn.init.ones_(model[0].weight), model)[1],
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("units", [granularity.coupled(), granularity.element()])
def test_coupled_groups_looks_under_masks_that_were_written_over(name, units):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    expected = [group.units for group in coupled_groups(model, inputs)]
    prune(model, Method(importance.magnitude(), units, scope.tensor()), ratio=0.5, examples_inputs=inputs)
    model = WRITTEN[name](model)
    assert [group.units for group in coupled_groups(model, inputs)] == expected
    assert (model[0].weight == 0).sum() == 16
