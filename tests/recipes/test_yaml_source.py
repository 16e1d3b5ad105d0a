import re
import sys

import pytest

from pyprune.recipes.yaml_source import nearest, read

pytest.importorskip("yaml")


def place(text):
    return read(text, "file.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("'1e-3'", "1e-3"),
        ("-2E+5", -2e5),
        ("1e3x", "1e3x"),
        ("yes", True),
        ("[1, a]", [1, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_value_is_that_of_yaml_and_exponents_are_numbers(text, value):
    assert place(text).value() == value


@pytest.mark.parametrize("text", ["ten", "true", "[1]", ".nan", ".inf", "-1", "0"])
def test_number_refuses_what_is_none_or_out_of_range(text):
    with pytest.raises(ValueError, match=r"^file.yaml:1: .* is not a length; give a number"):
        place(text).number("a length", above=True)


def test_lines_are_those_of_the_keys():
    fields = place("a:\n\n  b:\n  - 1\n  - c: 2\n").fields(("a",))
    assert str(fields["a"]) == "file.yaml:1: a"
    assert str(fields["a"].pairs()["b"]) == "file.yaml:3: a.b"
    assert str(fields["a"].pairs()["b"].items()[1].pairs()["c"]) == "file.yaml:5: a.b[1].c"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("start: 1\nedn: 2", "file.yaml:2: edn: 'edn' is unknown here; did you mean end? Allowed: start, end"),
        ("end: 1\nend: 2", "file.yaml:2: end: it is in line 1 already; give it once"),
        ("start: 2", "file.yaml:1: it lacks end; give it"),
        ("[1]: 2", "file.yaml:1: [1] is no name"),
        ("- 1", "file.yaml:1: [1] is no dict; give lines of 'name: value'"),
    ],
)
def test_fields_names_what_is_wrong(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        place(text).fields(("start", "end"), ("end",))


def test_choice_takes_a_name_with_or_without_arguments():
    assert place("linear").choice(("linear",))[0] == "linear"
    assert place("linear").choice(("linear",))[1].pairs() == {}
    assert place("linear:").choice(("linear",))[1].pairs() == {}
    name, arguments = place("linear: {end: 3}").choice(("linear",))
    assert (name, arguments.pairs()["end"].value(), arguments.name) == ("linear", 3, "linear")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("liner", "'liner' is unknown; did you mean linear? Allowed: linear, cubic"),
        ("{linear: 1, cubic: 2}", "it names linear, cubic; give one name"),
        ("{}", "it names nothing; give one name"),
        ("[linear]", "['linear'] is no dict"),
    ],
)
def test_choice_refuses_others(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        place(text).choice(("linear", "cubic"))


def test_checked_says_where():
    def refuse(value):
        raise TypeError(f"{value} is too much")

    with pytest.raises(ValueError, match=r"^file.yaml:1: 7 is too much$"):
        place("7").checked(refuse, 7)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "file.yaml: the file is empty"),
        ("a: [1", "file.yaml:1: this is no YAML: expected ',' or ']'"),
        ("a: 1\n b: 2", "file.yaml:2: this is no YAML: mapping values are not allowed here"),
        ("a\n---\nb", "file.yaml:2: this is no YAML: but found another document"),
    ],
)
def test_read_refuses_what_is_no_document(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        place(text)


def test_value_of_an_unknown_tag_says_where():
    with pytest.raises(
        ValueError, match=r"file.yaml:2: a: could not determine a constructor for the tag '!Modifier'"
    ):
        place("b: 1\na: !Modifier {}").pairs()["a"].value()


def test_read_without_yaml_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pyprune\[recipes\]'"):
        place("a: 1")


def test_nearest_without_one_lists_all():
    assert nearest("x", ("start", "end")) == "Allowed: start, end"


def bomb(levels):
    lists = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, levels)]
    return "[" + ", ".join(lists) + "]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (bomb(9), r"^file.yaml:1: with its aliases written out it has more than 10,000 values"),
        ("a: 1\nb: &b [*b]", r"^file.yaml:2: an alias stands here for what it is itself a part of"),
        ("a: 1\nb: &b {<<: *b}", r"^file.yaml:2: an alias stands here for what it is itself a part of"),
        ("a: 1\nb: " + "[" * 3000, r"^file.yaml:2: lists and dicts nest deeper than 50"),
        ("a: 1\nb: " + "{x: " * 3000, r"^file.yaml:2: lists and dicts nest deeper than 50"),
        ("a: 1\nb: " + "- " * 3000 + "1", r"^file.yaml:2: "),
        ("a: *nowhere", r"^file.yaml:1: this is no YAML: found undefined alias"),
    ],
)
def test_read_refuses_what_grows_without_end(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        place(text)


def test_aliases_and_merge_keys_work():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: {<<: [{x: 7}, *a], z: *a}\nd: {k: &k [1, 2], l: *k}"
    fields = place(text).pairs()
    assert {key: one.value() for key, one in fields["b"].pairs().items()} == {"x": 1, "y": 3}
    assert {key: one.value() for key, one in fields["c"].pairs().items()} == {"x": 7, "y": 2, "z": {"x": 1, "y": 2}}
    assert str(fields["b"].pairs()["x"]) == "file.yaml:1: b.x"
    assert fields["d"].value() == {"k": [1, 2], "l": [1, 2]}
    assert fields["b"].value() == fields["b"].value() == {"x": 1, "y": 3}
    with pytest.raises(ValueError, match=r"^file.yaml:2: b.<<: 3 is no dict"):
        place("a: 1\nb: {<<: 3}").pairs()["b"].pairs()


@pytest.mark.parametrize(
    "written", ["0", "1e3", "1.0", "fc", "'no'", '"null"', "0x10", "1_000", "a b", "ε", "!!str on"]
)
def test_names_are_text_as_it_is_written(written):
    text = written.removeprefix("!!str ").strip("'\"")
    assert place(f"[{written}]").texts() == [text]
    assert list(place(f"{{{written}: 1}}").pairs()) == [text]


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("no", "'no' is true or false in YAML; if it is a name, put it in quotes"),
        ("on", "'on' is true or false"),
        ("null", "'null' is nothing in YAML"),
        ("~", "'~' is nothing"),
        ("2001-01-01", "'2001-01-01' is a date in YAML"),
        ("!!int abc", "has the tag tag:yaml.org,2002:int"),
        ("!mine abc", "has the tag !mine"),
        ("[a]", r"\['a'\] is no name"),
        ("{a: 1}", "{'a': 1} is no name"),
    ],
)
def test_names_that_yaml_reads_as_something_else_are_refused(written, complaint):
    with pytest.raises(ValueError, match=f"^file.yaml:2: a\\[0\\]: .*{complaint}"):
        place(f"a:\n- {written}").pairs()["a"].texts()
    if not written.startswith(("[", "{")):
        with pytest.raises(ValueError, match=f"^file.yaml:2: a: .*{complaint}"):
            place(f"a:\n  ? {written}\n  : 1").pairs()["a"].pairs()


@pytest.mark.parametrize(
    "written",
    [
        "2001-99-99",
        "2001-01-01 99:99:99",
        "1" + "0" * 5000,
        "!!int abc",
        "!!bool maybe",
        "!!timestamp abc",
        "!!float x",
        "!!python/object:os.system {}",
        "!!set [1]",
        "{? [1] : 2}",
        "!!omap 3",
        "!mine 3",
        "!!int [1]",
    ],
)
def test_value_says_where_it_cannot_be_read(written):
    with pytest.raises(ValueError, match=r"^file.yaml:2: a: ") as raised:
        place(f"b: 1\na: {written}").pairs()["a"].value()
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "written", ["1" + "0" * 400, "-1" + "0" * 400, "1e400", ".inf", "2001-01-01", "[]", "{}", "~", "no"]
)
def test_number_refuses_every_other_value(written):
    with pytest.raises(ValueError, match=r"^file.yaml:1: a: .* is not a length; give a number") as raised:
        place(f"a: {written}").pairs()["a"].number("a length")
    assert len(str(raised.value)) < 200
