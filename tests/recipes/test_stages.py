import re

import pytest

from pyprune import granularity, importance, scope
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.recipes.stages import read_stages, steps_of
from pyprune.recipes.yaml_source import read

pytest.importorskip("yaml")

LINEAR = "prune: {schedule: linear, "
PRUNE = "- prune:\n    final: 0.5\n    end: 2\n    "


def stages(text):
    return read_stages(read(text, "recipe.yaml"))


def only(text):
    (stage,) = stages(f"- {text}")
    return stage


def due(stage, steps_per_epoch, steps):
    schedule = stage.schedule(steps_per_epoch)
    return {step: round(schedule(step), 4) for step in range(steps) if schedule.is_due(step)}


def test_read_stages_gives_every_field():
    stage = only(
        """prune:
    schedule: {polynomial: {power: 2}}
    start: 1.5
    end: 3.5
    frequency: 0.5
    initial: 0.1
    final: 0.5
    importance: {magnitude: {p: 2, normalize: l2}}
    granularity: {block: {n: 4, m: 1, reduction: max}}
    scope: model
    ignore: {names: [fc], patterns: ['.*embed'], types: [Conv2d], validate: false}
    min_ratio: 0.05
    max_ratio: {fc: 0.8, 0: 1e-1}
    reintroduce: false
    zero_dead_channels: true
"""
    )
    assert (stage.kind, stage.start, stage.end) == ("prune", 1.5, 3.5)
    assert stage.method.importance.name == "magnitude(p=2)"
    assert stage.method.importance.normalize == "l2"
    assert (stage.method.granularity.name, stage.method.granularity.reduction) == ("block(4, 1)", "max")
    assert stage.method.scope == scope.model()
    assert stage.ignored_scope == IgnoredScope(["fc"], [".*embed"], ["Conv2d"], validate=False)
    assert stage.keywords == {
        "min_ratio": 0.05,
        "max_ratio": {"fc": 0.8, "0": 0.1},
        "reintroduce": False,
        "zero_dead_channels": True,
    }
    assert due(stage, 10, 40) == {15: 0.1, 20: 0.125, 25: 0.2, 30: 0.325, 35: 0.5}


def test_read_stages_defaults():
    stage = only("prune: {final: 0.9, end: 1}")
    assert stage.method.importance.name == importance.magnitude().name
    assert (stage.method.granularity.name, stage.method.scope) == (granularity.element().name, scope.tensor())
    assert (stage.start, stage.ignored_scope, dict(stage.keywords)) == (0, None, {})
    assert due(stage, 4, 9) == {0: 0.0, 1: 0.5203, 2: 0.7875, 3: 0.8859, 4: 0.9}


@pytest.mark.parametrize(
    ("text", "steps_per_epoch", "expected"),
    [
        # The last update is exactly at the end, whatever the number of steps per epoch.
        (LINEAR + "final: 0.8, end: 1, frequency: 0.3}", 10, {0: 0, 3: 0.24, 6: 0.48, 9: 0.72, 10: 0.8}),
        (LINEAR + "final: 0.8, end: 1, frequency: 0.3}", 2, {0: 0, 1: 0.4, 2: 0.8}),
        (LINEAR + "final: 0.8, end: 1, frequency: 9}", 7, {0: 0, 7: 0.8}),
        # A third of an epoch of 10 steps begins at step 3, two thirds at step 7.
        (LINEAR + "final: 0.4, start: 0.3333, end: 0.6667}", 10, {3: 0, 4: 0.1, 5: 0.2, 6: 0.3, 7: 0.4}),
        ("prune: {schedule: one_shot, final: 0.7, start: 3}", 10, {30: 0.7}),
        ("prune: {schedule: {multi_step: {2: 0.3, 2.5: 0.5, 4: 0.4}}}", 10, {20: 0.3, 25: 0.5, 40: 0.4}),
        ("ac_dc: {final: 0.9, end: 25, frequency: 5}", 2, {0: 0, 10: 0.9, 20: 0, 30: 0.9}),
        ("ac_dc: {final: 0.9, end: 20, frequency: 5, start: 0}", 1, {0: 0, 5: 0.9, 10: 0, 15: 0.9}),
    ],
)  # fmt: skip
def test_schedules_count_steps_of_the_training(text, steps_per_epoch, expected):
    assert due(only(text), steps_per_epoch, 100) == expected


@pytest.mark.parametrize("name", ["linear", "cubic", "agp", "inverse_cubic", "exponential", "cosine", "cube"])
def test_every_curve_has_its_name(name):
    schedule = only(f"prune: {{schedule: {name}, final: 0.9, end: 4}}").schedule(1)
    assert schedule.name == ("cubic" if name == "agp" else name)
    assert (schedule(0), schedule(4)) == (0.0, 0.9)


def test_ratios_by_name_are_strings_also_where_yaml_sees_numbers():
    stage = only("prune: {schedule: linear, final: {0: 0.5, conv.*: 1e-1}, end: 2}")
    assert stage.schedule(1)(2) == {"0": 0.5, "conv.*": 0.1}


def test_stages_follow_each_other():
    found = stages("- prune: {final: 0.5, end: 2}\n- constant: {end: 3}\n- ac_dc: {final: 0.9, end: 9, frequency: 2}")
    assert [(stage.start, stage.end) for stage in found] == [(0, 2), (2, 3), (3, 9)]
    assert [stage.where for stage in found] == [
        "recipe.yaml:1: [0].prune",
        "recipe.yaml:2: [1].constant",
        "recipe.yaml:3: [2].ac_dc",
    ]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("prune: {final: 0.5, end: 2}", 0.5),
        ("prune: {schedule: one_shot, final: 0.4, start: 1}", 0.4),
        ("prune: {schedule: {multi_step: {0: 0.2, 2: 0.3}}}", 0.3),
        ("prune: {schedule: one_shot, final: 0.75, start: 1, scope: {n_of_m: {keep: 1, of: 4}}}", 0.75),
        ("ac_dc: {final: 0.6, end: 2, frequency: 0.5}", 0.6),
    ],
)
def test_a_stage_begins_at_the_ratio_that_the_one_before_leaves(first, expected):
    for between in ("", "- constant: {end: 3}\n"):
        begins = stages(f"- {first}\n{between}- {LINEAR}final: 0.9, start: 4, end: 6}}")[-1].schedule(10)
        assert (begins(40), begins(60)) == (expected, 0.9)
    given = stages(f"- {first}\n- {LINEAR}final: 0.9, initial: 0.1, start: 4, end: 6}}")[-1]
    assert given.schedule(10)(40) == 0.1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("final: {fc: 0.5}", "final: 0.9"),
        ("final: 0.5", "final: {fc: 0.9}"),
        ("final: 0.5, ignore: {names: [fc]}", "final: 0.9"),
    ],
)
def test_a_stage_needs_initial_where_the_one_before_leaves_different_ratios(first, second):
    text = f"- prune: {{{first}, end: 2}}\n- prune: {{{second}, end: 4%s}}"
    assert stages(text % ", initial: 0.5")[1].schedule(1).start == 2
    complaint = "recipe.yaml:2: [1].prune: it lacks initial: recipe.yaml:1: [0].prune leaves not the same ratio"
    with pytest.raises(ValueError, match=re.escape(complaint)):
        stages(text % "")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "recipe.yaml:1: there are no stages"),
        ("prune: {}", "recipe.yaml:1: {'prune': {}} is no list"),
        ("- pruen", "recipe.yaml:1: [0]: 'pruen' is unknown; did you mean prune? Allowed: prune, ac_dc, constant"),
        ("- prune: {end: 2}", "recipe.yaml:1: [0].prune: it lacks final; give it"),
        ("- prune: {final: 0.5}", "recipe.yaml:1: [0].prune: it lacks end; give it"),
        (
            "- prune: {final: 0.5, end: 4, scope: {n_of_m: {keep: 3, of: 4}}}",
            "recipe.yaml:1: [0].prune: ratio is 0.5, but keeping 3 of 4 removes at most 0.25",
        ),
        (
            "- prune: {final: 0.5, end: 4, scope: {n_of_m: {keep: 2, of: 4, dim: rows}}}",
            "scope.n_of_m: dim is 'rows'; allowed are \"in\", \"out\" and \"both\"",
        ),
        ("- ac_dc: {final: 0.5, end: 4}", "recipe.yaml:1: [0].ac_dc: it lacks frequency; give it"),
        ("- ac_dc: {final: 0.5, end: 4, frequency: 1, initial: 0}", "[0].ac_dc.initial: 'initial' is unknown here"),
        ("- ac_dc: {final: 0.5, end: 4, frequency: 1, reintroduce: false}", "[0].ac_dc.reintroduce: 'reintroduce' is "
         "unknown here"),
        ("- constant: {final: 0.5}", "recipe.yaml:1: [0].constant.final: 'final' is unknown here"),
        (PRUNE + "strat: 1", "recipe.yaml:4: [0].prune.strat: 'strat' is unknown here; did you mean start? "),
        (PRUNE + "start: ten", "recipe.yaml:4: [0].prune.start: 'ten' is not a number of epochs; give a number"),
        (PRUNE + "start: 2", "recipe.yaml:3: [0].prune.end: the stage ends at epoch 2, but starts at 2"),
        (PRUNE + "frequency: 0", "recipe.yaml:4: [0].prune.frequency: 0 is not a number of epochs"),
        (PRUNE + "initial: 1", "recipe.yaml:4: [0].prune.initial: ratio is 1; it is the fraction"),
        (PRUNE + "final: 0.6", "recipe.yaml:4: [0].prune.final: it is in line 2 already"),
        ("- prune: {final: lots, end: 2}", "[0].prune.final: ratio is 'lots'; give the fraction"),
        ("- prune: {final: {fc: 1.5}, end: 2}", "[0].prune.final: fc is 1.5; it is the fraction"),
        (PRUNE + "schedule: qubic", "recipe.yaml:4: [0].prune.schedule: 'qubic' is unknown; did you mean cubic?"),
        (PRUNE + "schedule: {cubic: {power: 2}}", "[0].prune.schedule.cubic.power: 'power' is unknown here"),
        (PRUNE + "schedule: polynomial", "recipe.yaml:4: [0].prune.schedule: it lacks power"),
        (PRUNE + "schedule: {polynomial: {power: -1}}", "recipe.yaml:1: [0].prune: power is -1"),
        (PRUNE + "schedule: one_shot", "recipe.yaml:3: [0].prune.end: 'end' is unknown here"),
        (PRUNE + "schedule: {multi_step: {0: 0.5}}", "recipe.yaml:2: [0].prune.final: 'final' is unknown here"),
        ("- prune: {schedule: multi_step}", "recipe.yaml:1: [0].prune.schedule: it has no ratios"),
        ("- prune: {schedule: {multi_step: {a: 0.5}}}", "multi_step.a: 'a' is not a number of epochs"),
        ("- prune: {schedule: {multi_step: {1: 5}}}", "[0].prune.schedule.multi_step.1: ratio is 5"),
        (PRUNE + "importance: wands", "recipe.yaml:4: [0].prune.importance: 'wands' is unknown; did you mean wanda?"),
        (PRUNE + "importance: custom", "recipe.yaml:4: [0].prune.importance: 'custom' is unknown"),
        (PRUNE + "importance: {magnitude: {q: 2}}", "[0].prune.importance.magnitude.q: 'q' is unknown here"),
        (PRUNE + "importance:\n      magnitude: {p: 0}", "recipe.yaml:5: [0].prune.importance.magnitude: p is 0"),
        (PRUNE + "granularity: block", "recipe.yaml:4: [0].prune.granularity: it lacks n and m; give them"),
        (PRUNE + "importance: apoz", 'recipe.yaml:1: [0].prune: apoz scores output channels'),
        (PRUNE + "max_ratio: 0.9", "recipe.yaml:1: [0].prune: min_ratio and max_ratio bound what a weight loses"),
        (PRUNE + "allocation: even", "recipe.yaml:1: [0].prune: allocation is 'even'"),
        (PRUNE + "reintroduce: maybe", "recipe.yaml:4: [0].prune.reintroduce: 'maybe' is neither true nor false"),
        (PRUNE + "ignore: fc", "recipe.yaml:4: [0].prune.ignore: 'fc' is no dict"),
        (PRUNE + "ignore: {names: fc}", "recipe.yaml:4: [0].prune.ignore.names: 'fc' is no list"),
        (PRUNE + "ignore: {name: [fc]}", "[0].prune.ignore.name: 'name' is unknown here; did you mean names?"),
        (PRUNE + "\n- constant:\n    start: 1", "recipe.yaml:6: [1].constant.start: the stage begins at "
         "epoch 1, and recipe.yaml:1: [0].prune lasts from 0 to 2; stages follow each other"),
        ("- constant:\n- constant:", "recipe.yaml:2: [1].constant: recipe.yaml:1: [0].constant has no end"),
        ("- prune: {schedule: one_shot, final: 0.5}\n- prune: {final: 0.9, end: 3}", "recipe.yaml:2: [1].prune: the "
         "stage begins at epoch 0, and recipe.yaml:1: [0].prune lasts from 0 to 0; stages follow each other"),
        ("- constant: {end: 1}\n- prune: {final: 0.5, end: 2}", "recipe.yaml:2: [1].prune: recipe.yaml:1: "
         "[0].constant holds the zeros of a model without masks, and only by itself"),
        (PRUNE + "\n- constant:\n    ignore: {names: [fc]}", "[1].constant: the masks of the stages before are held"),
    ],
)  # fmt: skip
def test_read_stages_names_file_line_and_field(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        stages(text)


def test_steps_of_rounds():
    assert [steps_of(epochs, 10) for epochs in (0, 0.04, 0.05, 0.3, 2)] == [0, 0, 1, 3, 20]


@pytest.mark.parametrize(("epochs", "steps", "step"), [((0.1, 0.2), 2, 0), ((1, 1.04), 10, 10), ((0, 1e-7), 5, 0)])
def test_two_epochs_of_multi_step_are_not_one_step(epochs, steps, step):
    text = f"- prune: {{schedule: {{multi_step: {{{epochs[0]}: 0.3, {epochs[1]}: 0.9}}}}}}"
    with pytest.raises(ValueError, match=rf"epochs {epochs[0]:g} and {epochs[1]:g} are both step {step};"):
        stages(text)[0].schedule(steps)
