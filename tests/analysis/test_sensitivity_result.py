import json
import math

import pytest

from pyprune import SensitivityResult, SensitivityTarget

RESULT = SensitivityResult(
    0.1 + 0.2,
    {
        "conv[1].weight": SensitivityTarget(36, 4, {0.1: 1 / 3, 0.5: 0.2}),
        'a,"b".weight': SensitivityTarget(1200, 1200, {0.1: 0.25}),
    },
    higher_is_better=False,
    setting={"method": "magnitude"},
)


def test_sensitivity_result_comes_back_from_json_and_csv(tmp_path):
    RESULT.to_json(tmp_path / "result.json")
    RESULT.to_csv(str(tmp_path / "result.csv"))
    from_json = SensitivityResult.from_json(str(tmp_path / "result.json"))
    assert from_json == RESULT
    assert from_json.setting == RESULT.setting
    assert SensitivityResult.from_csv(tmp_path / "result.csv") == RESULT
    assert SensitivityResult.from_dict(json.loads(json.dumps(RESULT.to_dict()))) == RESULT
    # Nothing unfinished is left behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.csv", "result.json"]


def test_sensitivity_result_keeps_scores_that_are_not_finite(tmp_path):
    result = SensitivityResult(1.0, {"w": SensitivityTarget(4, 4, {0.5: math.inf, 0.9: math.nan})}, False)
    result.to_json(tmp_path / "a")
    result.to_csv(tmp_path / "b")
    for read in (SensitivityResult.from_json(tmp_path / "a"), SensitivityResult.from_csv(tmp_path / "b")):
        assert read.targets["w"].scores[0.5] == math.inf
        assert math.isnan(read.targets["w"].scores[0.9])
        assert read.drop("w", 0.9) == math.inf


def test_sensitivity_result_drop_is_positive_where_it_is_worse():
    assert RESULT.drop("conv[1].weight", 0.1) == pytest.approx(1 / 3 - 0.3)
    assert SensitivityResult(0.9, {"w": SensitivityTarget(4, 4, {0.5: 0.4})}).drop("w", 0.5) == 0.5


def test_sensitivity_result_is_a_table():
    lines = str(RESULT).splitlines()
    assert lines[:2] == ["Score with one target pruned", "(lower is better)"]
    assert lines[-1].strip() == "with none pruned: 0.3"
    rows = [line.split() for line in lines if "weight " in line]
    assert rows == [["conv[1].weight", "36", "0.3333", "0.2"], ['a,"b".weight', "1,200", "0.25", "-"]]
    assert RESULT.ratios == [0.1, 0.5]
    assert RESULT.scores['a,"b".weight'] == {0.1: 0.25}


def test_to_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "result.json"
    RESULT.to_json(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        SensitivityResult(1.0, {}, setting={"method": object()}).to_json(path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"version": 2}', '{"version": 1}', '{"version": 1, "targets": [{}]}']
)
def test_from_json_names_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json: "):
        SensitivityResult.from_json(path)


@pytest.mark.parametrize("change", [("target", "name"), ("0.1,", "x,"), ("conv[1].weight,36,4", "conv[1].weight")])
def test_from_csv_names_a_file_that_is_none(tmp_path, change):
    path = tmp_path / "result.csv"
    RESULT.to_csv(path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=r"result\.csv: "):
        SensitivityResult.from_csv(path)


DAMAGES = (None, True, -1, 2.5, 10**400, "no", [], [1], {}, {"a": 1})


FIRST = ("targets", 0)


@pytest.mark.parametrize(
    "path",
    [
        (),
        *((key,) for key in ("version", "baseline", "higher_is_better", "setting", "targets")),
        FIRST,
        *((*FIRST, key) for key in ("name", "weights", "units", "scores")),
        (*FIRST, "scores", 0),
        (*FIRST, "scores", 0, 0),
        (*FIRST, "scores", 0, 1),
    ],
)
def test_from_json_refuses_every_damage_with_the_file(path, tmp_path):
    right = {"higher_is_better": (True,), "setting": ({}, {"a": 1}), "targets": ([],), "baseline": (-1, 2.5)}
    right |= {1: (-1, 2.5), "name": ("no",), "scores": ([],)}
    file = tmp_path / "result.json"
    whole = SensitivityResult(0.9, {"fc.weight": SensitivityTarget(40, 20, {0.5: 0.8, 0.75: 0.3})}).to_dict()
    for damage in DAMAGES:
        if path and any(type(damage) is type(one) and damage == one for one in right.get(path[-1], ())):
            continue
        content = json.loads(json.dumps(whole))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if path:
            inner[path[-1]] = damage
        else:
            content = damage
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"result\.json: "):
            SensitivityResult.from_json(file)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"version": 1, "targets": [{"name": "a"}]}', "\0", '{"version": 1, "version": 2}'],
)
def test_from_json_refuses_what_is_no_result(text, tmp_path):
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"result\.json: "):
        SensitivityResult.from_json(file)


@pytest.mark.parametrize(
    ("line", "old", "new"),
    [
        (0, "drop", "gain"),
        (1, "higher", "better"),
        (1, "0.9", "nan"),
        (1, "0.9", ""),
        (2, "0.5", "1.5"),
        (2, "0.5", "nan"),
        (2, "0.8", "x"),
        (2, "40", "-4"),
        (2, "40", "4.5"),
        (2, ",", ";"),
        (3, "0.75", "0.5"),
        (3, "40", "41"),
    ],
)
def test_from_csv_refuses_every_damage_with_the_file(line, old, new, tmp_path):
    file = tmp_path / "result.csv"
    SensitivityResult(0.9, {"fc.weight": SensitivityTarget(40, 20, {0.5: 0.8, 0.75: 0.3})}).to_csv(file)
    lines = file.read_text().splitlines()
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"result\.csv: "):
        SensitivityResult.from_csv(file)
