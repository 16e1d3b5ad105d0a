import json

import pytest
import torch

from pyprune import Plan
from pyprune.structured.compact import cut

PLAN = Plan(
    {"a.weight": {0: [0, 2], 1: [1]}, "b": {0: [3]}},
    {"a.weight": [3, 2], "b": [4]},
    [["a", "heads", 2, 4], ["", "sizes", [1, 2], [2, 2]], ["", "config.head_dim", 16, None]],
    ["a.bias"],
    "Net",
)


def changed(**fields):
    return json.dumps({**json.loads(PLAN.to_json()), **fields})


def test_from_json_returns_what_to_json_wrote(tmp_path):
    assert Plan.from_json(PLAN.to_json()) == PLAN
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN
    assert Plan.from_json('{"pyprune_plan": 1}') == Plan()


NO_DICTS = [None, True, 1, 1.5, "text", [], [[1]]]
NO_LISTS = [None, True, 1, 1.5, "text", {}]
DAMAGED = {
    "nothing": "",
    "no JSON": "{",
    "no dict": "[]",
    "a number": "1",
    "null": "null",
    "other JSON": '{"a": 1}',
    "without end": "[" * 100_000,
    "a name twice": '{"pyprune_plan": 1, "tensors": {}, "tensors": {}}',
    "an unknown field": changed(more=1),
    "a part": PLAN.to_json()[:-20],
    **{f"version {value!r}": changed(pyprune_plan=value) for value in (0, 2, 1.0, True, "1", None, [1], 10**30)},
    **{f"tensors {value!r}": changed(tensors=value) for value in NO_DICTS},
    **{f"shapes {value!r}": changed(shapes=value) for value in NO_DICTS},
    **{f"attributes {value!r}": changed(attributes=value) for value in NO_LISTS},
    **{f"biases {value!r}": changed(biases=value) for value in NO_LISTS},
    **{f"model {value!r}": changed(model=value) for value in (None, True, 1, [], {})},
    "shapes of others": changed(shapes={"a.weight": [3, 2]}),
    "positions of others": changed(tensors={"a.weight": {"0": [1]}}),
    **{
        f"shape {value!r}": changed(shapes={"a.weight": value, "b": [4]})
        for value in (None, 3, "32", [3, -2], [3, 2.0], [3], [True, 2], {})
    },
    **{f"dims {value!r}": changed(tensors={"a.weight": value, "b": {"0": [3]}}) for value in (None, 1, "a", [0], [])},
    **{
        f"dim {value!r}": changed(tensors={"a.weight": {value: [0]}, "b": {"0": [3]}})
        for value in ("2", "-1", "x", "", "0.0", "1e0", "²", "9" * 5000)
    },
    **{
        f"positions {value!r}": changed(tensors={"a.weight": {"0": value}, "b": {"0": [3]}})
        for value in (
            *(None, 1, "0", [], [3], [-1], [0, 0], [1, 0], [0.0], [True], ["0"], [None], [[0]], {"0": 0}, [10**30]),
        )
    },
    **{
        f"attribute {value!r}": changed(attributes=[value])
        for value in (
            *(None, 1, "abc", [], {}, ["a"], ["a", "b"], ["a", "b", 1, 2, 3], ["a", "b", True, 2], ["a", "b", None]),
            *(["a", "b", 1.5, 2], ["a", "b", float("nan")], ["a", "b", [1], 1]),
            *(["a", "b", "1", 2], [1, "b", 1, 2], ["a", 1, 1, 2], ["a", "b", [1, "2"], [1, 1]]),
            *(["a", "b", 1, "2"], ["a", "b", {"1": 2}, 1], ["a", "b", {"1": "2"}], ["a", "b", [[1]], 1]),
        )
    },
    **{f"bias {value!r}": changed(biases=[value]) for value in (None, 1, "a.weight", "", ["a.bias"])},
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_from_json_refuses_what_is_damaged(kind, tmp_path):
    with pytest.raises(ValueError, match="plan") as raised:
        Plan.from_json(DAMAGED[kind])
    assert len(str(raised.value)) < 400
    (tmp_path / "odd.json").write_text(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"odd\.json"):
        Plan.load(tmp_path / "odd.json")


def test_from_json_and_load_refuse_other_types(tmp_path):
    for value in (None, 1, b"{}", {}, PLAN):
        with pytest.raises(TypeError, match="text"):
            Plan.from_json(value)
    for value in (None, 1, b"a"):
        with pytest.raises(TypeError, match="path"):
            Plan.load(value)
        with pytest.raises(TypeError, match="path"):
            PLAN.save(value)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary"):
        Plan.load(tmp_path / "binary")
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({0: [1, 2, 5]}, {0: [0, 2]}),
        ({0: [1, 2, 5]}, {1: [0, 3]}),
        ({0: [0, 4], 1: [1, 2]}, {0: [1], 1: [1]}),
        ({}, {0: [3]}),
        ({1: [0]}, {}),
    ],
)
def test_then_is_one_cut_after_the_other(first, second):
    tensor = torch.arange(24).view(6, 4)
    small = cut(tensor, {dim: torch.tensor(kept) for dim, kept in first.items()})
    one = Plan({"w": first}, {"w": [6, 4]}) if first else Plan()
    other = Plan({"w": second}, {"w": list(small.shape)}) if second else Plan()
    both = one.then(other)
    expected = cut(small, {dim: torch.tensor(kept) for dim, kept in second.items()})
    made = cut(tensor, {dim: torch.tensor(kept) for dim, kept in both.tensors["w"].items()})
    assert torch.equal(made, expected)
    assert both.shapes == {"w": [6, 4]}
    assert one == (Plan({"w": first}, {"w": [6, 4]}) if first else Plan())  # as it was


def test_then_keeps_the_first_old_and_the_last_new_value():
    one = Plan(attributes=[["a", "n", 4, 8], ["a", "m", 1, 2]], biases=["a.bias"], model="Net")
    other = Plan({"a.bias": {0: [0]}}, {"a.bias": [2]}, [["a", "n", 2, 4], ["b", "n", 3, 6]], ["a.bias", "b.bias"])
    both = one.then(other)
    assert both.attributes == [["a", "n", 2, 8], ["a", "m", 1, 2], ["b", "n", 3, 6]]
    # A new bias is as large as its layer, so there is nothing to cut.
    assert (both.biases, both.tensors, both.model) == (["a.bias", "b.bias"], {}, "Net")


def test_then_refuses_a_plan_of_other_sizes():
    with pytest.raises(ValueError, match=r"w has shape \(6, 4\) there, and \(2, 4\) here"):
        Plan({"w": {0: [1, 2]}}, {"w": [6, 4]}).then(Plan({"w": {0: [1]}}, {"w": [6, 4]}))
