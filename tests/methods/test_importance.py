import math

import numpy as np
import pytest
import torch

from pyprune import importance
from pyprune.methods.importance import normalized, random_scores, without_signs

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 0.0]])
GRADIENT = torch.tensor([[2.0, 1.0, -1.0], [0.5, -4.0, 8.0]])
NORM = torch.tensor([[2.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("rule", "statistic", "expected"),
    [
        (importance.magnitude(), None, [[1, 2, 3], [4, 0.5, 0]]),
        (importance.magnitude(p=2), None, [[1, 4, 9], [16, 0.25, 0]]),
        (importance.magnitude(p=0.5), None, [[1, 2**0.5, 3**0.5], [2, 0.5**0.5, 0]]),
        (importance.gradient(), GRADIENT, [[2, 1, 1], [0.5, 4, 8]]),
        (importance.snip(), GRADIENT, [[2, 2, 3], [2, 2, 0]]),
        (importance.snip_momentum(), GRADIENT.abs(), [[2, 1, 1], [0.5, 4, 8]]),  # the statistic is the score
        (importance.taylor(), GRADIENT**2, [[4, 4, 9], [4, 4, 0]]),
        (importance.fisher(), GRADIENT**2, [[2, 2, 4.5], [2, 2, 0]]),
        (importance.fisher(damp=2.0), GRADIENT**2, [[3, 6, 13.5], [18, 2.25, 0]]),
        (importance.wanda(), NORM, [[2, 2, 1.5], [8, 0.5, 0]]),
        # rows sum to 6 and 4.5, columns to 5, 2.5 and 3
        (importance.ria(power=0), None, [[1 / 6 + 0.2, 1 / 3 + 0.8, 1.5], [4 / 4.5 + 0.8, 0.5 / 4.5 + 0.2, 0]]),
        (importance.ria(power=1), NORM, [[1 / 3 + 0.4, 1 / 3 + 0.8, 0.75], [8 / 4.5 + 1.6, 0.5 / 4.5 + 0.2, 0]]),
        (
            importance.ria(),
            NORM.square(),
            [[1 / 3 + 0.4, 1 / 3 + 0.8, 0.75], [8 / 4.5 + 1.6, 0.5 / 4.5 + 0.2, 0]],
        ),
        (importance.custom(lambda weight: weight + 1), None, [[2, -1, 4], [-3, 1.5, 1]]),
        (importance.given({}), GRADIENT, GRADIENT.tolist()),
        # one per output channel
        (importance.batch_norm_scale(), torch.tensor([-0.5, 0.25]), [0.5, 0.25]),
        (importance.apoz(), torch.tensor([0.75, 0.0]), [0.25, 1.0]),
        (importance.mean_activation(), torch.tensor([0.75, 0.5]), [0.75, 0.5]),
        (importance.geometric_median(), None, [(25 + 6.25 + 9) ** 0.5] * 2),
    ],
    ids=lambda value: value.name if isinstance(value, importance.Importance) else "",
)
def test_importance_gives_the_score_worked_out_by_hand(rule, statistic, expected):
    score = rule.score(WEIGHT, statistic)
    torch.testing.assert_close(score, torch.tensor(expected, dtype=score.dtype), rtol=1e-6, atol=0)


def test_wanda_of_the_example_in_the_paper():
    weight, norm = torch.tensor([[1.0, -2, 3, -4], [4, 3, 2, 1]]), torch.tensor([[1.0, 2, 1, 0.5]])
    assert importance.wanda().score(weight, norm).tolist() == [[1, 4, 3, 2], [4, 6, 2, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_float32_or_wider(dtype):
    weight = WEIGHT.to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    rules = (importance.magnitude(), importance.magnitude(p=2), importance.snip(), importance.taylor())
    for rule in (*rules, importance.ria(power=0)):
        assert rule.score(weight, GRADIENT.to(expected)).dtype == expected
    assert importance.geometric_median().score(weight, None).dtype == expected


@pytest.mark.parametrize("rows", [1, 2, 37, 300])
def test_geometric_median_sums_all_distances(rows):
    units = torch.randn(rows, 20)
    units[rows // 2] = units[0]  # nothing between them but rounding
    distances = np.linalg.norm(units.double().numpy()[:, None] - units.double().numpy()[None], axis=2)
    scores = importance.geometric_median().score(units, None)
    np.testing.assert_allclose(scores.numpy(), distances.sum(1), rtol=1e-6, atol=1e-5)


def test_random_scores_depend_on_seed_and_name_alone():
    cpu = torch.device("cpu")
    score = random_scores(1, "fc.weight", (20, 30), cpu)
    assert torch.equal(score, random_scores(1, "fc.weight", (20, 30), cpu))
    assert not torch.equal(score, random_scores(2, "fc.weight", (20, 30), cpu))
    assert not torch.equal(score, random_scores(1, "fd.weight", (20, 30), cpu))
    assert 0 < score.min() < 0.02 < 0.98 < score.max() < 1
    state = torch.get_rng_state()
    random_scores(1, "fc.weight", (3,), cpu)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [3.0, 4.0, 0.0, 5.0]),
        ("l2", [3 / 50**0.5, 4 / 50**0.5, 0, 5 / 50**0.5]),
        ("mean", [1, 4 / 3, 0, 5 / 3]),
        ("gaussian", [0, 1 / 3.5**0.5, -3 / 3.5**0.5, 2 / 3.5**0.5]),
        ("lamp", [9 / 50, 16 / 41, 0, 1]),
    ],
)
def test_normalized_makes_weights_comparable(how, expected):
    scores = normalized(torch.tensor([3.0, 4.0, 0.0, 5.0]), how)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert normalized(torch.zeros(3), how).isfinite().all()
    assert normalized(torch.zeros(0, 4), how).shape == (0, 4)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
def test_without_signs_keeps_order_and_ties(dtypes):
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.5, -1.5, 1.5, math.inf, math.nan, -math.inf])
    scores = [torch.cat([edges, torch.randn(100)]).to(dtype) for dtype in dtypes]
    keys = torch.cat(without_signs(scores))
    flat = torch.cat([score.double() for score in scores])
    finite = flat.isfinite()
    assert torch.equal(keys.isfinite(), finite)
    keys, flat = keys[finite], flat[finite]
    assert (keys >= 0).all()
    assert torch.equal(torch.sign(flat[:, None] - flat), torch.sign(keys[:, None] - keys))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: importance.magnitude(p=0), ValueError, "positive"),
        (lambda: importance.magnitude(p="2"), TypeError, "number"),
        (lambda: importance.magnitude(p=math.inf), ValueError, "finite"),
        (lambda: importance.magnitude(normalize="L2"), ValueError, 'allowed are "none", "l2"'),
        (lambda: importance.taylor(normalize="L2"), ValueError, 'allowed are "none", "l2"'),
        (lambda: importance.wanda(normalize="L2"), ValueError, 'allowed are "none", "l2"'),
        (lambda: importance.ria(normalize="L2"), ValueError, 'allowed are "none", "l2"'),
        (lambda: importance.ria(power=-0.5), ValueError, "0 or more"),
        (lambda: importance.ria(power="0.5"), TypeError, "0 or more"),
        (lambda: importance.snip_momentum(normalize="L2"), ValueError, 'allowed are "none", "l2"'),
        (lambda: importance.random(seed=-1), ValueError, "0 or more"),
        (lambda: importance.random(seed=0.5), TypeError, "give an int"),
        (lambda: importance.fisher(damp=-1), ValueError, "0 or more"),
        (lambda: importance.snip_momentum(decay=0), ValueError, "positive"),
        (lambda: importance.custom(3), TypeError, "give a function"),
        (lambda: importance.given([1]), TypeError, "give a dict"),
        (lambda: importance.apoz(activation="relu"), TypeError, "give a function"),
    ],
)
def test_importance_refuses_what_makes_no_sense(make, error, words):
    with pytest.raises(error, match=words):
        make()
