import random
import re

import pytest

from pyprune.methods import patterns
from pyprune.methods.patterns import matcher

PATTERNS = [
    r"a*b",
    r"(a|a)*b",
    r"(a*)*",
    r"(.*a){3}",
    r"\w+\w+\w+\w+!",
    r"(\w+\.?)+!",
    r"(?i:AB)+c",
    r"(?i)A(B|C)*",
    r"^a(b|c)*$",
    r"(?!ab)(a|b)+c?",
    r"(?=.*b)(a|b|c)*$",
    r"(?<=a)(b|c)*",
    r"(a|b)*(?<=ab)c",
    r"(a|b)*(?<!ab)c$",
    r"(a|b)*(?<!^)(?=.*c)(?=b*)c",
    r"((?<=a|b)\b|(?!c).)*$",
    r"(\A|a|\n|$)*\Z",
    r"(?m)(^a|b|$|\n)*c",
    r"(\B.|\b.)*d",
    r"(?:(?:){2}a?){3}b",
    r"\b(a|b)*\b",
    r"(?:a{2,3}){2}",
    r"(a?b?c?)*d",
    r"((a|b)?){3}",
    r"[^a]*(b|c){1,2}?",
    r"(a|)*b",
    r"(?s:.)*a(b|c)",
    r"x?y?z?a?b?",
    r"(a|b)+?c",
    r"(|a)+$",
    r"(?:)*",
    r"(?P<n>a|b)*c",
]
# None of these may take as long as re takes on a name like this one.
ENDLESS = [
    r"(\w+\.?)+!",
    r"(x+x+)+y",
    r"(a|aa)+$",
    r"(.*)*!",
    r"(.*a){20}!",
    r"(a{1,30}){1,30}!",
    r".*.*.*.*.*.*.*.*.*.*!",
    "(.|.)" * 60 + "!",
    "a?" * 60 + "a" * 60 + "!",
    "(?:){40000000}!",
    "(?:(?:(?:){60000}){60000})?!",
    r"(?!(\w+\.?)+!)(\w+\.?)+!",
]
NAME = "encoder.layers.0.self_attention_of_the_first_layer_norm.weight"


@pytest.mark.parametrize("few", [3, -1])  # -1: nothing is left to re
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matcher_says_what_re_says(pattern, few, monkeypatch):
    monkeypatch.setattr(patterns, "_FEW", few)
    matcher.cache_clear()
    matches, draw = matcher(pattern), random.Random(0)
    for _ in range(400):
        text = "".join(draw.choice("aAbc\n.d") for _ in range(draw.randint(0, 9)))
        assert matches(text) == (re.match(pattern, text) is not None), text
    matcher.cache_clear()


@pytest.mark.parametrize("pattern", ENDLESS)
def test_matcher_comes_to_an_end(pattern):
    # The test would hang, if not.
    assert not matcher(pattern)(NAME)
    assert not matcher(pattern)("a" * 200 + "b")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(", "not a regular expression"),
        ("*", "not a regular expression"),
        ("(" * 5000, "not a regular expression"),
        ("a{99999999999999}", "not a regular expression"),
        (r"(a)\1", "a backreference"),
        (r"(a)?(?(1)b|c)", "a backreference, a condition"),
        ("(a{1000}){1000}", "so many repetitions"),
        ("(?:(?:(?:){9}){9}a){9999}", "so many repetitions"),
        ("(?:(?:|){9999}){9999}", "so many repetitions"),
        (r"([a-z.]{1,70}){1,70}!", "so many repetitions"),
        ("(?=.*" * 20 + "!" + ")" * 20, "looking ahead or behind within looking"),
    ],
)
def test_matcher_refuses_what_cannot_be_matched_in_bounded_time(pattern, text):
    with pytest.raises(ValueError, match=text):
        matcher(pattern)


@pytest.mark.parametrize("pattern", [r"((?=.*!)|(?=\w*!)|(?=.)|.)+!", r"((?!!)([a-z_.]{1,60}){1,8})+!"])
def test_matcher_refuses_a_text_in_which_too_much_is_looked_for(pattern):
    matches = matcher(pattern)
    for _ in range(2):  # each text counts by itself
        assert not matches("a.b")
        with pytest.raises(ValueError, match=r"too much to look for in 'encoder"):
            matches(NAME * 4)


@pytest.mark.parametrize("pattern", [r"([a-z.]{1,60}){1,16}!", r"(\b[a-z.]{1,60}){1,12}!", r"(.|\w){1,300}!"])
def test_matcher_goes_through_what_names_share_once(pattern, monkeypatch):
    seen, step = [], patterns._step

    def counted(*args):
        ahead, visited = step(*args)
        seen.append(len(visited))
        return ahead, visited

    monkeypatch.setattr(patterns, "_step", counted)
    matcher.cache_clear()
    matches = matcher(pattern)
    assert not matches(NAME)
    once = sum(seen)
    assert not any(matches(f"{NAME[:-1]}{end}") for end in "abcdefgh" * 70)
    assert sum(seen) < 2 * once
    matcher.cache_clear()
