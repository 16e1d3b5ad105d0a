"""Groups of small models, against what they are by hand (`GROUPS`: members, units, and what the first unit has)."""

import json
from pathlib import Path

import pytest

from pyprune import coupled_groups
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
