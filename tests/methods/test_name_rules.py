from functools import partial

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, Recipe, importance, scope
from pyprune.methods.name_rules import all_above, by_name, check_rules, meaning
from pyprune.modules.ignored_scope import ignored_by

LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"


def layers():
    return nn.ModuleDict({"layers": nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)]), "head": nn.Linear(3, 3)})


def pruned(model):
    return {name for name, weight in model.named_parameters() if weight.dim() == 2 and bool((weight == 0).any())}


def by_ignoring(pattern):
    model = layers()
    pyprune.prune(model, LOCAL, ratio=0.5, ignored_scope=IgnoredScope(patterns=[pattern]))
    return {name for name, weight in model.named_parameters() if weight.dim() == 2} - pruned(model)


def by_ratio(pattern):
    return pruned(pyprune.prune(layers(), LOCAL, ratio={pattern: 0.5}))


def by_min_ratio(pattern):
    return pruned(
        pyprune.prune(layers(), "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5, min_ratio={pattern: 0.9}, max_ratio=0.95)
    )


def by_group(pattern):
    method = Method(importance.magnitude(), scope=scope.group({"a": [pattern]}))
    return pruned(pyprune.prune(layers(), method, ratio=0.5))


def by_recipe(pattern):
    model = layers()
    pruner = Recipe.from_string(f"stages: [prune: {{final: {{'{pattern}': 0.5}}, end: 1}}]").apply(model, None, 1)
    pruner.step()
    return pruned(model)


def by_recipe_ignore(pattern):
    model = layers()
    text = f"stages: [prune: {{final: 0.5, end: 1, ignore: {{patterns: ['{pattern}']}}}}]"
    Recipe.from_string(text).apply(model, None, 1).step()
    return {name for name, weight in model.named_parameters() if weight.dim() == 2} - pruned(model)


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        (r"layers\.1", {1, 10, 11}),
        (r"layers\.1$", {1}),
        (r"layers\.1\.", {1}),
        (r"layers\.(1|2)$", {1, 2}),
        (r".*\.1\d", {10, 11}),
        (r"layers\.\d\.weight", set(range(10))),
        (r"(layers|none)\.[3-5]\b", {3, 4, 5}),
        (r"(?!layers\.[02-9])layers\.\d", {1, 10, 11}),
        (r"(\w+\.)+11\.weight", {11}),
    ],
)
@pytest.mark.parametrize("place", [by_ignoring, by_ratio, by_group, by_recipe, by_recipe_ignore])
def test_a_pattern_means_the_same_weights_everywhere(place, pattern, numbers):
    assert place(pattern) == {f"layers.{number}.weight" for number in numbers}


def test_a_name_is_no_pattern_where_both_could_be():
    for place in (by_ratio, by_group, by_recipe):
        assert place("layers.1") == {"layers.1.weight"}
    known = all_above(["a.weight", "b(.weight"])
    assert meaning("b(", known)("b(.weight")
    assert meaning("a.w", known) is None
    with pytest.raises(ValueError, match=r"'layer' matches no weight .*give 'layer\.\*'; correct it in ratio"):
        by_ratio("layer")


@pytest.mark.parametrize("rule", [r"(a)\1", "(", "a{99999999999999}"])
@pytest.mark.parametrize("place", [by_ignoring, by_ratio, by_min_ratio, by_group, by_recipe, by_recipe_ignore])
def test_patterns_without_an_answer_are_refused_everywhere(place, rule):
    with pytest.raises(ValueError, match=r"regular expression|can take for ever"):
        place(rule)


@pytest.mark.parametrize("rule", [r"(\w+\.?)+!", r"(.*a){20}!"])
@pytest.mark.parametrize("place", [by_ignoring, by_ratio, by_min_ratio, by_group, by_recipe, by_recipe_ignore])
def test_patterns_without_an_end_match_nothing_everywhere(place, rule):
    with pytest.raises(ValueError, match=r"match(es)? no"):
        place(rule)


# The second name of each is what a wrapper's word must not be cut out of.
@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("module.fc", ["module.fc.weight", "fc.weight"]),
        ("module.module.fc", ["module.fc.weight", "fc.weight"]),
        (r"module\.module\.f", ["module.fc.weight", "fc.weight"]),
        ("_orig_mod.module.fc", ["module.fc.weight", "fc.weight"]),
        ("net.module.fc", ["net.module.fc.weight", "net.fc.weight"]),
    ],
)
def test_rules_mean_a_module_that_is_called_as_a_wrapper_is(rule, names):
    assert by_name({rule: 0.5}, names, 0.0) == [0.5, 0.0]
    ignored = ignored_by(
        IgnoredScope(**{"patterns" if "\\" in rule else "names": [rule]}),
        names,
        {"": []} | {name.rpartition(".")[0]: [] for name in names},
    )
    assert [ignored(name) for name in names] == [True, False]


@pytest.mark.parametrize("rule", ["my_forward_module.fc", r"my_orig_mod\.f"])
def test_a_word_of_a_wrapper_is_a_whole_part_of_a_name(rule):
    with pytest.raises(ValueError, match="matches no weight"):
        by_name({rule: 0.5}, ["myfc.weight"], 0.0)


@pytest.mark.parametrize(
    "rule", ["net.fc", "module.net.fc", "_orig_mod.net.fc", "module._orig_mod.net.fc", r"net\.f"]
)
def test_rules_for_a_wrapped_model_mean_the_plain_one(rule):
    names = ["net.fc.weight", "net.conv.weight"]
    assert by_name({rule: 0.5}, names, 0.0) == [0.5, 0.0]


@pytest.mark.parametrize(("rule", "error"), [(0, TypeError), (None, TypeError), ("(", ValueError)])
def test_check_rules_wants_strings_that_can_be_read(rule, error):
    with pytest.raises(error, match="ratio"):
        check_rules("ratio", {rule: 0.5})


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_names_of_the_plain_model_work_on_a_wrapped_one(wrap):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    wrapped = wrap(model)
    for options in (
        {"ratio": {"0": 0.5}},
        {"ratio": 0.5, "ignored_scope": IgnoredScope(names=["2"])},
        {"ratio": 0.5, "ignored_scope": IgnoredScope(patterns=["2"])},
    ):
        pyprune.prune(wrapped, LOCAL, **options)
        statistic = pyprune.pruning_statistic(wrapped)
        assert {one.tensor_name: one.pruned_ratio > 0 for one in statistic.pruned_tensors}["0.weight"]
        assert pruned(model) == {"0.weight"}
        pyprune.strip(wrapped)
        nn.init.normal_(model[0].weight)
