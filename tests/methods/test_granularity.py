import pytest
import torch

from pyprune import Method, granularity, importance, scope
from pyprune.methods.layout import Layout
from pyprune.methods.unit_groups import Member, UnitGroup, Weight, reduce_units, spread_units

CONV = Weight("conv", torch.randn(8, 6, 3, 3))
TRANSPOSED = Weight("deconv", torch.randn(6, 8, 3, 3), layout=Layout(1, 0))
LINEAR = Weight("linear", torch.randn(10, 7))


@pytest.mark.parametrize(
    ("cut", "weight", "block"),
    [
        (granularity.element(), CONV, (1, 1, 1, 1)),
        (granularity.block(4, 2), CONV, (4, 2, 1, 1)),
        (granularity.block(4, 2), TRANSPOSED, (2, 4, 1, 1)),
        (granularity.block(4, 1), LINEAR, (4, 1)),
        (granularity.block(1, "channel"), CONV, (1, 6, 1, 1)),
        (granularity.block("channel", 1), CONV, (8, 1, 1, 1)),
        (granularity.block(1, "channel"), TRANSPOSED, (6, 1, 1, 1)),
        (granularity.block("channel", 2), TRANSPOSED, (2, 8, 1, 1)),
        (granularity.block("channel", "channel"), LINEAR, (10, 7)),
        (granularity.block("channel", 1), Weight("g", torch.randn(8, 3, 3, 3), Layout(groups=2)), (4, 1, 1, 1)),
        (granularity.block(1, "channel"), Weight("g", torch.randn(8, 3, 3), Layout(1, 0, groups=4)), (2, 1, 1)),
        (granularity.channel("out"), CONV, (1, 6, 3, 3)),
        (granularity.channel("in"), CONV, (8, 1, 3, 3)),
        (granularity.channel("out"), TRANSPOSED, (6, 1, 3, 3)),
        (granularity.channel("out"), LINEAR, (1, 7)),
        (granularity.kernel(), CONV, (1, 1, 3, 3)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_granularity_cuts_weights_into_units(cut, weight, block):
    assert cut.block_of(weight) == block
    unit_group = UnitGroup(weight.name, (Member(weight, block),))
    # A round trip: what the units' masks say of elements is what they say of units again.
    units = torch.rand(unit_group.unit_shape) > 0.5
    mask = torch.empty(weight.values.shape, dtype=torch.bool)
    spread_units([unit_group], [units], [mask])
    assert torch.equal(reduce_units([unit_group], [mask], None, "max")[0] > 0, units)
    assert torch.equal(reduce_units([unit_group], [mask], None, "mean")[0] == 1, units)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: granularity.block(0, 1), ValueError, "n is 0"),
        (lambda: granularity.block(1, 2.0), TypeError, "m is 2.0"),
        (lambda: granularity.block(1, "all"), ValueError, "m is 'all'; give an int, or \"channel\""),
        (lambda: granularity.block(11, "channel").block_of(LINEAR), ValueError, "larger than linear"),
        (lambda: granularity.block(1, "channel").block_of(Weight("gain", torch.ones(4))), ValueError, "larger than"),
        (lambda: granularity.block(1, 2, reduction="median"), ValueError, "allowed are"),
        (lambda: granularity.channel("output"), ValueError, 'allowed are "out" and "in"'),
        (lambda: granularity.head(0), ValueError, "num_heads is 0"),
        (lambda: granularity.head(8, 3), ValueError, "num_kv_heads is 3"),
        (lambda: granularity.head(8, names=("q", "k", "v")), ValueError, "query, key, value and output"),
        (lambda: granularity.block(11, 1).block_of(LINEAR), ValueError, "larger than linear"),
        (lambda: granularity.block(1, 8).block_of(LINEAR), ValueError, "larger than linear"),
        (lambda: granularity.kernel().block_of(LINEAR), ValueError, "no convolution kernels"),
        (lambda: scope.n_of_m(keep=4, of=4), ValueError, "keep less than of"),
        (lambda: scope.n_of_m(keep=2, of=65), ValueError, "at most 64"),
        (lambda: scope.n_of_m(keep=0, of=4), ValueError, "keep is 0"),
        (lambda: scope.group([]), TypeError, "give a dict"),
        (lambda: scope.group({"a": "conv"}), TypeError, "give a list"),
        (lambda: Method("magnitude"), TypeError, "importance is a str"),
        (lambda: Method(importance.magnitude(), granularity.channel), TypeError, r"called with \(\)"),
        (lambda: Method(importance.magnitude(), scope="model"), TypeError, "scope is 'model'"),
        (lambda: Method(importance.apoz()), ValueError, "scores output channels"),
        (
            lambda: Method(importance.batch_norm_scale(), granularity.channel("in")),
            ValueError,
            "scores output channels",
        ),
        (lambda: Method(importance.geometric_median(), granularity.kernel()), ValueError, "compares channels"),
        (lambda: Method(importance.magnitude(), granularity.channel(), scope.row()), ValueError, "nothing competes"),
        (
            lambda: Method(importance.magnitude(), granularity.head(4), scope.n_of_m(keep=2, of=4)),
            ValueError,
            "nothing competes",
        ),
    ],
)
def test_methods_refuse_what_makes_no_sense(make, error, words):
    with pytest.raises(error, match=words):
        make()
