import pytest

from pyprune import IgnoredScope
from pyprune.modules.ignored_scope import ignored_by

PARAMETERS = ["conv1.weight", "conv1.bias", "conv10.weight", "block.conv1.weight", "block.fc.weight"]
MODULES = {
    "": ["Net", "Module"],
    "conv1": ["Conv2d", "Module"],
    "conv10": ["Conv2d", "Module"],
    "block": ["Block", "Module"],
    "block.conv1": ["MyConv", "Conv2d", "Module"],
    "block.fc": ["Linear", "Module"],
}


def ignored(scope):
    rule = ignored_by(scope, PARAMETERS, MODULES)
    return [name for name in PARAMETERS if rule(name)]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (IgnoredScope(), []),
        (IgnoredScope(names=["conv1.weight"]), ["conv1.weight"]),
        (IgnoredScope(names=["conv1"]), ["conv1.weight", "conv1.bias"]),
        (IgnoredScope(names=["block"]), ["block.conv1.weight", "block.fc.weight"]),
        (IgnoredScope(patterns=["conv1$"]), ["conv1.weight", "conv1.bias"]),
        (IgnoredScope(patterns=["conv1"]), ["conv1.weight", "conv1.bias", "conv10.weight"]),
        (IgnoredScope(patterns=[r".*\.conv1"]), ["block.conv1.weight"]),
        (IgnoredScope(patterns=[r".*bias"]), ["conv1.bias"]),
        (IgnoredScope(types=["Linear"]), ["block.fc.weight"]),
        (IgnoredScope(types=["MyConv"]), ["block.conv1.weight"]),
        (IgnoredScope(types=["Conv2d"]), PARAMETERS[:4]),
        (IgnoredScope(types=["Net"]), PARAMETERS),
        (IgnoredScope(names=["conv10"], types=["Block"]), PARAMETERS[2:]),
        (IgnoredScope(names=["nowhere"], patterns=["no"], types=["None"], validate=False), []),
    ],
)
def test_ignored_by_matches_names_patterns_and_types(scope, expected):
    assert ignored(scope) == expected


@pytest.mark.parametrize(
    ("scope", "text"),
    [
        (IgnoredScope(names=["conv1.weigth"]), r"name 'conv1.weigth' \(nearest: conv1.weight"),
        (IgnoredScope(names=["conv1", "fc"]), r"name 'fc' \(nearest: block.fc"),
        (IgnoredScope(patterns=["fc"]), "pattern 'fc'"),
        (IgnoredScope(types=["Conv2D"]), r"type 'Conv2D' \(nearest: Conv2d"),
    ],
)
def test_ignored_by_lists_the_nearest_names_for_a_rule_that_matches_nothing(scope, text):
    with pytest.raises(ValueError, match=text):
        ignored(scope)


def test_ignored_scope_refuses_what_is_no_list_of_strings():
    with pytest.raises(TypeError, match=r"names=\['fc'\]"):
        IgnoredScope(names="fc")
    with pytest.raises(TypeError, match="must be a string"):
        IgnoredScope(types=[int])
    with pytest.raises(ValueError, match="not a regular expression"):
        IgnoredScope(patterns=["("])


def test_ignored_scope_is_frozen_and_comparable():
    assert IgnoredScope(names=["a"]) == IgnoredScope(names=("a",))
    with pytest.raises(AttributeError):
        IgnoredScope().names = ["a"]


def test_ignored_by_knows_names_of_operations_in_nncf():
    for name, is_known in (("conv1/conv2d/0", True), ("conv2.weight", False)):
        with pytest.raises(ValueError, match="match nothing") as raised:
            ignored_by(IgnoredScope(names=[name]), ["conv1.weight"], {"": ["Net"], "conv1": ["Conv2d"]})
        assert ("give the name of the layer" in str(raised.value)) == is_known
