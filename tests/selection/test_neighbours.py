import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune import granularity, importance, scope
from pyprune.methods.allocation import Amount
from pyprune.methods.layout import Layout
from pyprune.methods.method import Method
from pyprune.selection.choose_units import choose_units
from tests.methods.test_transposable import brute_force
from tests.selection.test_choose_units import unit_groups_of

MAGNITUDE = importance.magnitude()
KINDS = [
    (keep, of, dim)
    for keep, of in ((2, 4), (1, 4), (3, 4), (1, 2), (2, 3), (4, 8))
    for dim in ("in", "out", "both")
    if (of, dim) != (8, "both")
]
SHAPES = [(8, 8), (7, 6), (5, 9), (6, 5, 2, 2), (4, 3, 3), (9,)]


def groups_of(shape, of, dim, out_dim=0, in_dim=1):
    """Index tuples of the groups of N:M, in order of the tensor of groups."""
    sizes = [1] * len(shape)
    for one in {"in": [in_dim], "out": [out_dim], "both": [out_dim, in_dim]}[dim]:
        sizes[one if len(shape) > 1 else 0] = of
    places = [range(0, size, step) for size, step in zip(shape, sizes, strict=True)]
    return [
        tuple(slice(start, start + step) for start, step in zip(corner, sizes, strict=True))
        for corner in itertools.product(*places)
    ]


def cut(score, keep, dim, of, in_dim):
    """The mask of one group by NumPy; a square has its outputs in rows."""
    if dim == "both":
        square = torch.from_numpy(score.reshape(score.shape[:2]).swapaxes(in_dim, 1).copy())
        return brute_force(square, keep, of).numpy().swapaxes(in_dim, 1).reshape(score.shape)
    mask = np.ones(score.size, dtype=bool)
    mask[np.argsort(score.ravel(), kind="stable")[: max(0, score.size - keep)]] = False
    return mask.reshape(score.shape)


def expected_masks(scores, keep, of, dim, share, together, in_dim=1):
    """Cut every group; then put back those whose lost scores are the largest, group by group."""
    masks, groups = [np.ones(score.shape, dtype=bool) for score in scores], []
    for tensor, score in enumerate(scores):
        for index, place in enumerate(groups_of(score.shape, of, dim, 1 - in_dim, in_dim)):
            mask = cut(score[place], keep, dim, of, in_dim)
            if not mask.all():
                groups.append((float(score[place][~mask].astype(np.float64).sum()), tensor, index, place, mask))
    sets = [groups] if together else [[g for g in groups if g[1] == tensor] for tensor in range(len(scores))]
    for some in sets:
        for _, tensor, _, place, mask in sorted(some, key=lambda g: g[:3])[: math.floor(share * len(some) + 0.5)]:
            masks[tensor][place] = mask
    return masks


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0, None])
@pytest.mark.parametrize("among", ["tensor", "model"])
@pytest.mark.parametrize(("keep", "of", "dim"), KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_n_of_m_cuts_a_share_of_the_groups_that_cost_least(keep, of, dim, among, share, transposed):
    generator = torch.Generator().manual_seed(keep * 100 + of)
    shapes = [shape for shape in SHAPES if dim != "both" or len(shape) > 1]
    # Quarters, whose sums are exact, with many ties; none is 0, so that a lost one costs something.
    weights = [
        torch.randint(1, 9, shape, generator=generator) / 4 * (1 - 2 * torch.randint(2, shape, generator=generator))
        for shape in shapes
    ]
    method = Method(MAGNITUDE, scope=scope.n_of_m(keep=keep, of=of, dim=dim, among=among))
    dims = {"layout": Layout(1, 0)} if transposed else {}
    ratio = None if share is None else share * (1 - keep / of)
    masks = choose_units(method, unit_groups_of(method, weights, **dims), Amount(ratio)).masks
    scores = [weight.abs().numpy() for weight in weights]
    together = among == "model"
    wanted = expected_masks(scores, keep, of, dim, 1.0 if share is None else share, together, 1 - transposed)
    for mask, want in zip(masks, wanted, strict=True):
        np.testing.assert_array_equal(mask.numpy(), want)


SCORES = {
    "power": (importance.magnitude(p=2), lambda w, s: w.double().square()),
    "wanda": (importance.wanda(), lambda w, s: w.abs() * s),
    "signed": (importance.custom(torch.sin), lambda w, s: w.sin()),
    "taylor": (importance.taylor(), lambda w, s: w.square() * s),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dim", ["in", "out", "both"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_n_of_m_costs_are_sums_of_scores_of_any_importance(name, dim, share):
    rule, score_of = SCORES[name]
    weight = torch.randn(8, 12)
    statistic = torch.rand(1, 12) if name == "wanda" else torch.rand(8, 12)
    method = Method(rule, scope=scope.n_of_m(keep=2, of=4, dim=dim))
    (mask,) = choose_units(method, unit_groups_of(method, [weight], statistic=statistic), Amount(share * 0.5)).masks
    (want,) = expected_masks([score_of(weight, statistic).numpy()], 2, 4, dim, share, together=False)
    np.testing.assert_array_equal(mask.numpy(), want)


@pytest.mark.parametrize("dim", ["in", "out", "both"])
def test_n_of_m_of_units_counts_units_as_neighbours(dim):
    weight = torch.randn(16, 8)
    method = Method(MAGNITUDE, granularity.block(2, 1), scope.n_of_m(keep=2, of=4, dim=dim))
    (mask,) = choose_units(method, unit_groups_of(method, [weight]), Amount(0.25)).masks
    means = weight.abs().reshape(8, 2, 8).mean(1)
    (want,) = expected_masks([means.numpy()], 2, 4, dim, 0.5, together=False)
    np.testing.assert_array_equal(mask.numpy(), want.repeat(2, axis=0))


@pytest.mark.parametrize("dim", ["in", "out", "both"])
def test_n_of_m_among_the_remaining_cuts_a_share_of_the_groups_that_are_left(dim):
    weight = torch.randn(16, 16)
    method = Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim=dim))
    (half,) = choose_units(method, unit_groups_of(method, [weight]), Amount(0.25)).masks
    more, same, further = (
        choose_units(method, unit_groups_of(method, [weight], base=half), amount).masks[0]
        for amount in (
            Amount(0.25, from_remaining=True),
            Amount(0.25, dropped_stay=True),
            Amount(0.375, dropped_stay=True),
        )
    )
    assert torch.equal(same, half)
    for mask, ratio in ((more, 0.375), (further, 0.375)):
        assert not (mask & ~half).any()
        assert int((~mask).sum()) == ratio * weight.numel()


def test_prune_along_the_outputs_of_every_kind_of_layer():
    layers = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "conv": nn.Conv2d(8, 8, 3),
            "transposed": nn.ConvTranspose2d(4, 8, 3),
            "embedding": nn.Embedding(8, 6),
        }
    )
    outputs_last = {
        "linear": lambda w: w.T,
        "conv": lambda w: w.movedim(0, -1),
        "transposed": lambda w: w.movedim(1, -1),
        "embedding": lambda w: w.T,
    }
    pyprune.prune(layers, Method(MAGNITUDE, scope=scope.n_of_m(keep=1, of=4, dim="out")))
    for name, rows in outputs_last.items():
        kept = (rows(layers[name].weight) != 0).reshape(-1, 4).sum(1)
        assert (kept == 1).all(), name


@pytest.mark.parametrize("ratio", [None, 0.2])
@pytest.mark.parametrize("dim", ["in", "out", "both"])
@pytest.mark.parametrize("layout", [Layout(0, 1, groups=3), Layout(1, 0, groups=3), Layout(1, 2, groups=3)])
def test_neighbours_are_of_one_group(layout, dim, ratio):
    weight = torch.randn(18, 7, 4) if layout.inputs != 2 else torch.randn(3, 7, 6)
    method = Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim=dim))
    (mask,) = choose_units(method, unit_groups_of(method, [weight], layout=layout), Amount(ratio)).masks
    apart = Layout(layout.outputs, layout.inputs)
    if ratio is None:
        parts = [
            choose_units(method, unit_groups_of(method, [part], layout=apart), Amount(None)).masks[0]
            for part in weight.chunk(3)
        ]
        assert torch.equal(mask, torch.cat(parts))
    else:
        (every,) = choose_units(method, unit_groups_of(method, [weight], layout=layout), Amount(None)).masks
        assert (mask | ~every).sum() > (~every).sum()
        assert not (~mask & every).any()


def test_transposable_weights_are_n_of_m_in_both_passes():
    linear = nn.Linear(64, 32)
    pyprune.prune(linear, Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim="both")))
    for weight in (linear.weight, linear.weight.T):
        assert ((weight != 0).reshape(-1, 4).sum(1) == 2).all()


def test_ratios_by_name_say_the_share_of_each_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    method = Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4))
    pyprune.prune(model, method, ratio={"0": 0.5, "1": 0.125})
    assert [int((layer.weight == 0).sum()) for layer in model] == [32, 8, 0]


@pytest.mark.parametrize("dim", ["in", "out", "both"])
@pytest.mark.parametrize("ratio", [None, 0.2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_n_of_m_counts_what_is_not_finite(dim, ratio, bad):
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight[3, 2] = bad
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"NaN or infinite weights: 1 in weight"):
        pyprune.prune(model, Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim=dim)), ratio=ratio)
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0, equal_nan=True)


def test_n_of_m_refuses_what_has_no_meaning():
    for options, words in (
        ({"dim": "rows"}, 'allowed are "in", "out" and "both"'),
        ({"among": "row"}, 'allowed are "tensor" and "model"'),
        ({"keep": 4, "of": 8, "dim": "both"}, "of is at most 4 there"),
    ):
        with pytest.raises(ValueError, match=words):
            scope.n_of_m(**{"keep": 2, "of": 4, **options})
    for cut, dims in (
        (granularity.channel("out"), ("in", "both")),
        (granularity.channel("in"), ("out", "both")),
        (granularity.block(1, "channel"), ("in", "both")),
        (granularity.block("channel", 1), ("out", "both")),
        (granularity.head(2), ("in", "out", "both")),
    ):
        for dim in dims:
            with pytest.raises(ValueError, match="nothing competes"):
                Method(MAGNITUDE, cut, scope.n_of_m(keep=2, of=4, dim=dim))
    method = Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim="both"))
    with pytest.raises(ValueError, match="has no outputs and inputs"):
        choose_units(method, unit_groups_of(method, [torch.ones(8)]), Amount())


def test_channels_may_be_neighbours_along_their_own_side():
    linear = nn.Linear(8, 8)
    pyprune.prune(linear, Method(MAGNITUDE, granularity.channel("out"), scope.n_of_m(keep=2, of=4, dim="out")))
    assert (linear.weight != 0).any(1).reshape(-1, 4).sum(1).tolist() == [2, 2]
