import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pyprune import granularity, importance, ops, scope
from pyprune.methods.allocation import Amount, limits, removed_count
from pyprune.methods.method import METHODS, Method, PruneMode
from pyprune.methods.unit_groups import Member, UnitGroup, Weight
from pyprune.selection.choose_units import choose_units
from tests.ops.families import FAMILIES, draw

LOCAL, GLOBAL = METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL], METHODS[PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL]


def unit_groups_of(method, weights, **options):
    described = [Weight(str(index), weight, **options) for index, weight in enumerate(weights)]
    return [UnitGroup(one.name, (Member(one, method.granularity.block_of(one)),)) for one in described]


def magnitude_masks(method, weights, ratio):
    selected = choose_units(method, unit_groups_of(method, weights), Amount(ratio))
    return selected.masks, selected.nonfinite.tolist()


def numpy_keep(scores, count):
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_local_magnitude_matches_numpy(ratio):
    weights = [torch.randn(7, 5), torch.randint(-2, 3, (40,)).half(), torch.randn(3).double(), torch.zeros(6)]
    masks, nonfinite = magnitude_masks(LOCAL, weights, ratio)
    for weight, mask in zip(weights, masks, strict=True):
        expected = numpy_keep(np.abs(weight.numpy().ravel()), removed_count(weight.numel(), ratio))
        np.testing.assert_array_equal(mask.numpy().ravel(), expected)
    assert nonfinite == [0, 0, 0, 0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_global_magnitude_divides_by_the_norm_of_each_tensor(ratio):
    # Values whose scores do not tie or round alike.
    weights = [torch.randn(7, 5) * 1000, torch.randn(40), torch.randn(3) * 1e-6]
    masks, _ = magnitude_masks(GLOBAL, weights, ratio)
    arrays = [weight.double().numpy().ravel() for weight in weights]
    scores = np.concatenate([np.abs(array) / np.linalg.norm(array) for array in arrays])
    expected = numpy_keep(scores, removed_count(scores.size, ratio))
    np.testing.assert_array_equal(torch.cat([mask.ravel() for mask in masks]).numpy(), expected)


def test_global_magnitude_drops_an_all_zero_tensor_first():
    masks, _ = magnitude_masks(GLOBAL, [torch.tensor([1e-30, 2e-30]), torch.zeros(3), torch.tensor([1e30])], 0.5)
    assert [mask.tolist() for mask in masks] == [[True, True], [False] * 3, [True]]


@pytest.mark.parametrize("among", [scope.model(), scope.tensor(), scope.row()], ids=lambda among: among.name)
@pytest.mark.parametrize("dtype", ops.WEIGHT_DTYPES, ids=str)
def test_choose_units_is_exact_up_to_the_last_element(among, dtype):
    method = Method(importance.magnitude(), granularity.element(), among)
    for seed, family in enumerate(FAMILIES):
        rng = np.random.default_rng(seed)
        weights = [draw(rng, family, size, dtype).view(3, -1) for size in (30_000, 9, 3)]
        scores = [weight.abs().double().numpy() for weight in weights]
        if among.name == "model":
            sets = [np.concatenate([score.ravel() for score in scores])]
        else:
            sets = [part for score in scores for part in (score if among.name == "row" else [score.ravel()])]
        count = max(part.size for part in sets)
        for ratio in (0.0, 1 / count, 0.5, 0.99, 0.9999, 1 - 1 / count, math.nextafter(1.0, 0.0)):
            masks, _ = magnitude_masks(method, weights, ratio)
            found = torch.cat([mask.ravel() for mask in masks]).numpy()
            expected = [numpy_keep(part, removed_count(part.size, ratio)) for part in sets]
            assert np.array_equal(found, np.concatenate(expected)), f"{family} at {ratio}"


def test_global_magnitude_survives_norms_at_the_ends_of_float64():
    tiny = torch.tensor([5e-324, 0.0], dtype=torch.float64)
    huge = torch.full((2,), 1.7e308, dtype=torch.float64)
    masks, nonfinite = magnitude_masks(GLOBAL, [tiny, huge], 0.25)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, True]]
    assert nonfinite == [0, 0]


def test_global_magnitude_counts_nonfinite_elements():
    _, nonfinite = magnitude_masks(GLOBAL, [torch.tensor([1.0, math.nan, math.inf]), torch.ones(2)], 0.5)
    assert nonfinite == [2, 0]


def units_of(shape, block):
    """List the units of a tensor in C order, each as a tuple of slices."""
    places = [range(0, size, step) for size, step in zip(shape, block, strict=True)]
    return [
        tuple(slice(start, start + step) for start, step in zip(corner, block, strict=True))
        for corner in itertools.product(*places)
    ]


def expected_masks(weights, blocks, sets, reduce):
    """Sort the units of each set by (score, place in the list), drop so many of the first, element by element.

    ``sets`` are pairs of (weight index, unit index) lists and counts; what is in no set stays.
    """
    masks = [np.ones(weight.shape, dtype=bool) for weight in weights]
    for chosen, removed in sets:
        scored = []
        for tensor, unit in sorted(chosen):
            place = units_of(weights[tensor].shape, blocks[tensor])[unit]
            scored.append((reduce(np.abs(weights[tensor].double().numpy()[place])), tensor, unit, place))
        for _, tensor, _, place in sorted(scored, key=lambda one: one[:3])[:removed]:
            masks[tensor][place] = False
    return masks


CUTS = {
    "element": granularity.element(),
    "block": granularity.block(2, 3),
    "block of sums": granularity.block(3, 2, reduction="sum"),
    "block of largest": granularity.block(2, 2, reduction="max"),
    "out": granularity.channel("out"),
    "in": granularity.channel("in", reduction="mean"),
}
SHAPES = st.lists(st.tuples(st.integers(3, 7), st.integers(3, 8)), min_size=1, max_size=4)


@st.composite
def cases(draw, scopes):
    shapes = draw(SHAPES)
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Quarters with many ties, whose sums and means over small blocks are exact or rounded alike.
    weights = [torch.from_numpy(numbers.integers(-6, 7, shape) / 4.0).float() for shape in shapes]
    if draw(st.booleans()):
        shape = (4, 3, 2, 2)
        weights.append(torch.from_numpy(numbers.integers(-6, 7, shape) / 4.0).float())
    cut = CUTS[draw(st.sampled_from(sorted(CUTS)))]
    return weights, cut, draw(st.sampled_from(scopes)), draw(st.floats(0, 0.999))


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def all_units(weights, blocks, index):
    return [(index, unit) for unit in range(len(units_of(weights[index].shape, blocks[index])))]


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(cases(["model", "tensor", "group"]))
def test_choose_units_drops_exactly_the_lowest_units_of_each_set(drawn):
    weights, cut, name, ratio = drawn
    halves = {"first": ["0", "1"], "second": [str(index) for index in range(2, len(weights))]}
    among = (
        scope.group({key: rules for key, rules in halves.items() if rules}) if name == "group" else scope.Scope(name)
    )
    method = Method(importance.magnitude(), cut, among)
    unit_groups = unit_groups_of(method, weights)
    blocks = [unit_group.members[0].block for unit_group in unit_groups]
    each = [all_units(weights, blocks, index) for index in range(len(weights))]
    sets = {"model": [joined(each)], "tensor": each, "group": [joined(each[:2]), joined(each[2:])]}[name]
    reduce = {"sum": np.sum, "mean": np.mean, "max": np.max}[cut.reduction]
    expected = expected_masks(
        weights,
        blocks,
        [(units, removed_count(len(units), ratio)) for units in sets],
        lambda x: np.float32(reduce(x)),
    )
    masks = choose_units(method, unit_groups, Amount(ratio)).masks
    for mask, want in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask.numpy(), want)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(cases(["model"]), st.data())
def test_choose_units_with_caps_keeps_each_and_the_total(drawn, data):
    weights, cut, _, ratio = drawn
    method = Method(importance.magnitude(), cut, scope.model())
    unit_groups = unit_groups_of(method, weights)
    sizes = [math.prod(unit_group.unit_shape) for unit_group in unit_groups]
    names = [unit_group.name for unit_group in unit_groups]
    low = {name: data.draw(st.floats(0, 0.5)) for name in names}
    high = {name: data.draw(st.floats(0.5, 1)) for name in names}
    bounds = [limits(size, low[name], high[name]) for name, size in zip(names, sizes, strict=True)]
    removed = removed_count(sum(sizes), ratio)
    amount = Amount(ratio, min_ratio=low, max_ratio=high)
    least, most = (sum(bound) for bound in zip(*bounds, strict=True))
    if any(low > high for low, high in bounds) or not least <= removed <= most:
        with pytest.raises(ValueError, match=r"min_ratio.* and .*max_ratio"):
            choose_units(method, unit_groups, amount)
        return
    masks = choose_units(method, unit_groups, amount).masks
    gone = [
        sum(not mask[place].any() for place in units_of(mask.shape, unit_group.members[0].block))
        for mask, unit_group in zip(masks, unit_groups, strict=True)
    ]
    assert sum(gone) == removed
    assert all(low <= count <= high for (low, high), count in zip(bounds, gone, strict=True))
    # Within a weight the lowest go.
    for weight, mask, unit_group, count in zip(weights, masks, unit_groups, gone, strict=True):
        block = unit_group.members[0].block
        reduce = {"sum": np.sum, "mean": np.mean, "max": np.max}[cut.reduction]
        chosen = [(0, unit) for unit in range(len(units_of(weight.shape, block)))]
        (want,) = expected_masks([weight], [block], [(chosen, count)], lambda x, r=reduce: np.float32(r(x)))
        np.testing.assert_array_equal(mask.numpy(), want)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(cases(["row", "n_of_m"]), st.integers(2, 5), st.data())
def test_choose_units_in_rows_keeps_the_same_number_everywhere(drawn, of, data):
    weights, _, name, ratio = drawn
    keep = data.draw(st.integers(1, of - 1))
    among = scope.row() if name == "row" else scope.n_of_m(keep=keep, of=of)
    method = Method(importance.magnitude(), scope=among)
    masks = choose_units(method, unit_groups_of(method, weights), Amount(ratio if name == "row" else None)).masks
    for weight, mask in zip(weights, masks, strict=True):
        if name == "row":
            lines = [(line, flags) for line, flags in zip(weight.flatten(1), mask.flatten(1), strict=True)]
            expected = [(len(line), len(line) - removed_count(len(line), ratio)) for line, _ in lines]
        else:
            flat, flags = (x.movedim(1, -1).flatten(0, -2) for x in (weight, mask))
            lines = [
                pair
                for row in zip(flat, flags, strict=True)
                for pair in zip(*(x.split(of) for x in row), strict=True)
            ]
            expected = [(len(line), min(keep, len(line))) for line, _ in lines]
        for (line, flags), (_, kept) in zip(lines, expected, strict=True):
            want = numpy_keep(line.abs().numpy(), len(line) - kept)
            np.testing.assert_array_equal(flags.numpy(), want)


@pytest.mark.parametrize("name", ["model", "tensor", "n_of_m"])
@pytest.mark.parametrize("cut", ["element", "block", "in"])
def test_choose_units_among_the_remaining_only_takes_more(name, cut):
    weights = [torch.randn(6, 9), torch.randn(5, 3, 2, 2)]
    bases = [torch.rand(6, 9) > 0.3, torch.ones(5, 3, 2, 2, dtype=torch.bool)]
    among = scope.n_of_m(keep=1, of=3) if name == "n_of_m" else scope.Scope(name)
    method = Method(importance.magnitude(), CUTS[cut], among)
    unit_groups = [
        UnitGroup(str(i), (Member(one, method.granularity.block_of(one)),))
        for i, one in enumerate(
            Weight(str(i), w, base=b) for i, (w, b) in enumerate(zip(weights, bases, strict=True))
        )
    ]
    ratio = None if name == "n_of_m" else 0.5
    masks = choose_units(method, unit_groups, Amount(ratio, from_remaining=True)).masks
    blocks = [unit_group.members[0].block for unit_group in unit_groups]
    before, after = (
        [[bool(m[place].any()) for place in units_of(m.shape, block)] for m, block in zip(some, blocks, strict=True)]
        for some in (bases, masks)
    )
    for old, new in zip(before, after, strict=True):
        assert all(was or not now for was, now in zip(old, new, strict=True))
    if name == "tensor":
        assert [sum(new) for new in after] == [sum(old) - removed_count(sum(old), 0.5) for old in before]
    elif name == "model":
        left = sum(map(sum, before))
        assert sum(map(sum, after)) == left - removed_count(left, 0.5)


def test_choose_units_in_rows_among_the_remaining_wants_rows_alike():
    weight = torch.randn(3, 4)
    method = Method(importance.magnitude(), scope=scope.row())
    base = torch.tensor([[True, True, False, False], [True, False, True, False], [False, False, True, True]])
    (mask,) = choose_units(
        method, unit_groups_of(method, [weight], base=base), Amount(0.5, from_remaining=True)
    ).masks
    assert (mask & ~base).sum() == 0
    assert mask.sum(1).tolist() == [1, 1, 1]
    base[0, 0] = False
    with pytest.raises(ValueError, match="from 1 to 2 units left"):
        choose_units(method, unit_groups_of(method, [weight], base=base), Amount(0.5, from_remaining=True))


@pytest.mark.parametrize(
    ("keep", "of", "expected"),
    [
        (1, 4, [[0, 0, 0, 1], [1, 0, 0, 0]]),
        (3, 4, [[0, 1, 1, 1], [1, 1, 1, 0]]),
        (2, 4, [[0, 0, 1, 1], [1, 1, 0, 0]]),
    ],
)
def test_n_of_m_keeps_the_number_that_is_named_keep(keep, of, expected):
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    method = Method(importance.magnitude(), scope=scope.n_of_m(keep=keep, of=of))
    (mask,) = choose_units(method, unit_groups_of(method, [weight]), Amount()).masks
    assert mask.int().tolist() == expected


def test_wanda_masks_of_the_example_in_the_paper():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    norm = torch.tensor([[1.0, 2.0, 1.0, 0.5]])
    for among, ratio in ((scope.row(), 0.5), (scope.n_of_m(keep=2, of=4), None)):
        method = Method(importance.wanda(), scope=among)
        (mask,) = choose_units(method, unit_groups_of(method, [weight], statistic=norm), Amount(ratio)).masks
        assert mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("among", [scope.row(), scope.n_of_m(keep=1, of=2)])
@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (4, 6, 1, 1)])
def test_wanda_of_a_convolution_multiplies_each_input_channel(among, shape):
    weight, norm = torch.randn(4, 6, 3, 3), torch.rand(shape)
    wanda, plain = (Method(rule, scope=among) for rule in (importance.wanda(), importance.magnitude()))
    amount = Amount(0.5 if among.name == "row" else None)
    (mask,) = choose_units(wanda, unit_groups_of(wanda, [weight], statistic=norm), amount).masks
    (same,) = choose_units(plain, unit_groups_of(plain, [weight * norm]), amount).masks
    assert torch.equal(mask, same)


def test_blocks_of_4_by_1_drop_the_lowest_means():
    weight = torch.arange(32.0).reshape(8, 4)  # the blocks of the upper half have the lowest means
    method = Method(importance.magnitude(), granularity.block(4, 1), scope.tensor())
    (mask,) = choose_units(method, unit_groups_of(method, [weight]), Amount(0.5)).masks
    assert mask.int().tolist() == [[0] * 4] * 4 + [[1] * 4] * 4


def test_geometric_median_drops_the_filter_that_others_can_replace():
    weight = torch.zeros(4, 2, 1, 1)
    weight[:, 0, 0, 0] = torch.tensor([0.0, 10.0, 9.0, 30.0])  # sums of distances: 49, 31, 31 (2 ties), 71
    method = Method(importance.geometric_median(), granularity.channel("out"), scope.tensor())
    (mask,) = choose_units(method, unit_groups_of(method, [weight]), Amount(0.25)).masks
    assert mask.flatten(1).all(1).tolist() == [True, False, True, True]


def test_scores_of_a_function_may_be_negative():
    weight = torch.tensor([3.0, -1.0, 2.0, -5.0])
    method = Method(lambda weight: weight, scope=scope.tensor())
    (mask,) = choose_units(method, unit_groups_of(method, [weight]), Amount(0.5)).masks
    assert mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize("normalize", ["none", "l2", "mean", "gaussian", "lamp"])
@pytest.mark.parametrize("cut", ["element", "out"])
def test_normalized_magnitude_competes_as_its_formula_says(normalize, cut):
    weights = [torch.randn(8, 9) * 100, torch.randn(5, 7), torch.randn(6, 4) * 0.01]
    method = Method(importance.magnitude(normalize=normalize), CUTS[cut], scope.model())
    masks = choose_units(method, unit_groups_of(method, weights), Amount(0.5)).masks
    scores = [weight.double().abs() if cut == "element" else weight.double().abs().sum(1) for weight in weights]

    def lamp(score):
        order = score.flatten().sort().indices
        squares = score.flatten()[order].square()
        return torch.empty_like(squares).scatter_(0, order, squares / squares.flip(0).cumsum(0).flip(0))

    rules = {
        "none": lambda s: s,
        "l2": lambda s: s / s.norm(),
        "mean": lambda s: s / s.mean(),
        "gaussian": lambda s: (s - s.mean()) / s.std(correction=0),
        "lamp": lamp,
    }
    flat = torch.cat([rules[normalize](score).flatten() for score in scores])
    want = torch.ones_like(flat, dtype=torch.bool)
    want[flat.argsort()[: removed_count(len(flat), 0.5)]] = False
    got = torch.cat([(mask if cut == "element" else mask.any(1)).flatten() for mask in masks])
    assert torch.equal(got, want)


def test_choose_units_of_functions_says_what_they_return():
    weight = torch.randn(3, 4)
    for function, error, words in (
        (lambda weight: weight.sum(0), ValueError, r"shape \(4,\)"),
        (lambda weight: weight > 0, TypeError, "floating-point"),
        (lambda weight: None, TypeError, "floating-point"),
    ):
        method = Method(function)
        with pytest.raises(error, match=words):
            choose_units(method, unit_groups_of(method, [weight]), Amount(0.5))
    method = Method(lambda weight: weight / 0)
    assert choose_units(method, unit_groups_of(method, [weight]), Amount(0.5)).nonfinite.tolist() == [12]
