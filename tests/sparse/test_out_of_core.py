import pytest
import torch

from pyprune import granularity, importance, scope
from pyprune.methods.allocation import Amount
from pyprune.methods.layout import LINEAR
from pyprune.methods.method import Method
from pyprune.methods.unit_groups import Member, UnitGroup, Weight
from pyprune.selection.choose_units import choose_units
from pyprune.sparse import out_of_core
from pyprune.sparse.out_of_core import Choice, StoredWeight
from tests.ops.cases import DTYPES, KINDS, adversarial

SHAPES = [(64, 48), (96, 64), (16, 8, 3, 3), (64, 96), (8, 8), (0, 4)]
GLOBAL = Method(importance.magnitude())
METHODS = {
    "power of two": (Method(importance.magnitude(p=2, normalize="l2")), Amount(0.5)),
    "gaussian": (Method(importance.magnitude(normalize="gaussian")), Amount(0.5)),
    "lamp": (Method(importance.magnitude(normalize="lamp")), Amount(0.5)),
    "random": (Method(importance.random(seed=5)), Amount(0.3)),
    "ria without inputs": (Method(importance.ria(power=0)), Amount(0.3)),
    "per tensor": (Method(importance.magnitude(), scope=scope.tensor()), Amount(0.7)),
    "per row": (Method(importance.magnitude(), scope=scope.row()), Amount(0.7)),
    "erk": (Method(importance.magnitude(), scope=scope.tensor()), Amount(0.7, "erk")),
    "er in rows": (Method(importance.magnitude(), scope=scope.row()), Amount(0.7, "er")),
    "2:4": (Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4)), Amount(None)),
    "half of 1:4": (Method(importance.magnitude(), scope=scope.n_of_m(keep=1, of=4)), Amount(0.375)),
    "blocks of all": (Method(importance.magnitude(), granularity.block(4, 1)), Amount(0.5)),
    "blocks per tensor": (Method(importance.magnitude(), granularity.block(1, 8), scope.tensor()), Amount(0.5)),
    "rows of all": (Method(importance.magnitude(normalize="mean"), granularity.channel()), Amount(0.25)),
    "columns per tensor": (Method(importance.magnitude(), granularity.channel("in"), scope.tensor()), Amount(0.25)),
    "at most": (GLOBAL, Amount(0.5, max_ratio=0.6)),
    "at least and at most, of scales": (
        Method(importance.magnitude(normalize="l2")),
        Amount(0.5, min_ratio=0.45, max_ratio=0.55),
    ),
    "at most, of blocks": (Method(importance.magnitude(), granularity.block(4, 1)), Amount(0.5, max_ratio=0.6)),
    "nothing": (GLOBAL, Amount(0.0)),
}


def weights_of(kind, dtypes):
    return {
        f"{number}.weight": adversarial(shape, kind, dtypes[number % len(dtypes)], number) * 2.0 ** (number % 3)
        for number, shape in enumerate(SHAPES)
    }


def stored(weights):
    return [
        StoredWeight(name, one.dtype, tuple(one.shape), lambda one=one: one, LINEAR) for name, one in weights.items()
    ]


def check(weights, method, amount, *, ordered=True):
    groups = []
    for name, values in weights.items():
        weight = Weight(name, values, names=(name,))
        groups.append(UnitGroup(name, (Member(weight, method.granularity.block_of(weight)),)))
    masks = choose_units(method, groups, amount).masks
    choice = Choice(method, amount, stored(weights), ordered=ordered)
    names = list(weights) if ordered else list(weights)[::-1]
    found = {name: torch.cat([torch.empty(0).to(weights[name].dtype), *choice.pieces(name)]) for name in names}
    for (name, values), mask in zip(weights.items(), masks, strict=True):
        assert torch.equal(found[name], torch.where(mask, values, 0).flatten()), name


@pytest.mark.parametrize("normalize", ["none", "l2", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float16,), (torch.float32,), DTYPES], ids=str)
def test_choice_is_that_of_all_weights_in_memory(monkeypatch, dtypes, kind, normalize):
    monkeypatch.setattr(out_of_core, "_PIECE", 1000)
    weights = weights_of(kind, dtypes)
    method = Method(importance.magnitude(normalize=normalize))
    check(weights, method, Amount(0.5))
    check(weights, method, Amount(0.9), ordered=False)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_choice_does_what_methods_say(name, kind):
    method, amount = METHODS[name]
    # Blocks and rows cannot be larger than the weight.
    weights = {name: one for name, one in weights_of(kind, (torch.bfloat16, torch.float32)).items() if one.numel()}
    check(weights, method, amount)


def test_choice_reads_half_types_twice_in_all():
    reads = []
    weights = [
        StoredWeight(
            f"{i}", torch.bfloat16, (32, 32), lambda i=i: reads.append(i) or torch.randn(32, 32).bfloat16(), LINEAR
        )
        for i in range(3)
    ]
    choice = Choice(GLOBAL, Amount(0.5), weights)
    for i in range(3):
        list(choice.pieces(f"{i}"))
    assert reads == [0, 1, 2, 0, 1, 2]


def test_choice_refuses_what_is_out_of_order_or_cannot_be():
    weights = stored(weights_of("normal", DTYPES))
    choice = Choice(GLOBAL, Amount(0.5), weights)
    with pytest.raises(ValueError, match=r"1.weight is asked for before 0.weight"):
        next(choice.pieces("1.weight"))
    with pytest.raises(ValueError, match="scope group is for models in memory"):
        Choice(Method(importance.magnitude(), scope=scope.group({"a": ["0"]})), Amount(0.5), weights)
