import numpy as np
import pytest
import torch

from pyprune.structured import least_squares
from pyprune.structured.least_squares import Sums, conjugate_gradients


def data(samples=60, inputs=8, outputs=5, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    return (
        torch.tensor(rng.standard_normal((groups, samples, inputs)) + 0.5),
        torch.tensor(rng.standard_normal((groups, samples, outputs)) - 1),
        torch.tensor(rng.standard_normal((groups, inputs, outputs))),
    )


def sums_of(x, y, pieces=1):
    sums = Sums(x.shape[0], x.shape[2], y.shape[2])
    for a, b in zip(x.chunk(pieces, 1), y.chunk(pieces, 1), strict=True):
        sums.add(a, b)
    return sums


def oracle(x, y, present, damping, bias):
    """The least squares of one group by NumPy: the ridge is more samples, the bias one more input."""
    x, y, present = x.numpy(), y.numpy(), present.numpy()
    centred = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    ridge = np.sqrt(damping * np.square(centred[0]).sum(0).mean())
    rows = np.concatenate([centred[0], ridge * np.eye(x.shape[1])])
    weight = np.linalg.lstsq(rows, np.concatenate([centred[1], ridge * present]), rcond=None)[0]
    return torch.tensor(weight), torch.tensor(y.mean(0) - x.mean(0) @ weight if bias else np.zeros(y.shape[1]))


@pytest.mark.parametrize("damping", [0, 1e-4, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("groups", "pieces"), [(1, 1), (1, 4), (3, 1)])
def test_solve_is_least_squares_with_a_ridge(damping, bias, groups, pieces):
    x, y, present = data(groups=groups)
    sums = sums_of(x, y, pieces)
    weight = sums.system(bias).solve(present, damping=damping)
    for g in range(groups):
        expected, expected_bias = oracle(x[g], y[g], present[g], damping, bias)
        torch.testing.assert_close(weight[g], expected)
        if bias:
            torch.testing.assert_close(sums.bias(weight)[g], expected_bias)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_solve_with_a_mask_solves_each_output_by_what_it_keeps(exact, bias, monkeypatch):
    if not exact:
        monkeypatch.setattr(least_squares, "_EXACT", 0)
    x, y, present = data(groups=2)
    mask = torch.rand(present.shape) < 0.6
    mask[0, :, 1] = mask[0, :, 0]
    mask[1, :, 2] = False
    weight = sums_of(x, y).system(bias).solve(present, damping=1e-2, mask=mask)
    assert not weight[~mask].any()
    for g in range(2):
        for o in range(5):
            kept = mask[g, :, o]
            if kept.any():
                expected, _ = oracle(x[g][:, kept], y[g][:, o : o + 1], present[g, kept, o : o + 1], 1e-2, bias)
                torch.testing.assert_close(weight[g, kept, o], expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damping", [0, 1e-8])
def test_solve_leaves_weights_of_which_inputs_say_nothing(damping):
    x, y, present = data()
    x[..., 3] = 0
    weight = sums_of(x, y).system(False).solve(present, damping=damping)
    torch.testing.assert_close(weight[:, 3], present[:, 3])
    # Fewer samples than inputs: of all solutions the one that is nearest to the present weights.
    few, wanted = x[:, :4], y[:, :4]
    weight = sums_of(few, wanted).system(False).solve(present, damping=damping)
    torch.testing.assert_close(few @ weight, wanted, rtol=1e-5, atol=1e-5)
    nearest = present[0] + torch.linalg.pinv(few[0]) @ (wanted[0] - few[0] @ present[0])
    torch.testing.assert_close(weight[0], nearest, rtol=1e-5, atol=1e-5)


def test_solve_without_inputs_changes_nothing():
    _, _, present = data()
    for count in (0, 5):
        sums = sums_of(torch.zeros(1, count, 8), torch.ones(1, count, 5))
        for centred in (False, True):
            assert torch.equal(sums.system(centred).solve(present, damping=1e-4), present)


@pytest.mark.parametrize("bias", [False, True])
def test_solve_recovers_the_weights_that_made_the_outputs(bias):
    x, _, weight = data()
    offset = torch.arange(5.0, dtype=torch.float64)[None] * bias
    sums = sums_of(x, x @ weight + offset)
    solved = sums.system(bias).solve(weight, damping=1e-4)
    assert (solved - weight).abs().max() < 1e-8
    assert (sums.system(bias).solve(torch.zeros_like(weight), damping=0) - weight).abs().max() < 1e-8
    if bias:
        assert (sums.bias(solved) - offset).abs().max() < 1e-8


def test_sums_of_systems_are_those_of_all_samples():
    x, y, present = data()
    parts = [sums_of(a, b).system(False) for a, b in zip(x.chunk(2, 1), y.chunk(2, 1), strict=True)]
    whole = sums_of(x, y).system(False)
    torch.testing.assert_close((parts[0] + parts[1]).solve(present, damping=0.1), whole.solve(present, damping=0.1))


def test_squares_are_those_of_what_is_missing():
    x, y, weight = data(groups=2)
    bias = torch.randn(2, 5, dtype=torch.float64)
    sums = sums_of(x, y)
    for given in (None, bias):
        missing, wanted = sums.squares(weight, given)
        made = x @ weight + (0 if given is None else given[:, None])
        assert missing == pytest.approx(float((y - made).square().sum()))
        assert wanted == pytest.approx(float(y.square().sum()))
    part = sums.outputs(1, 3)
    missing, _ = part.squares(weight[..., 1:3], bias[:, 1:3])
    made = x @ weight[..., 1:3] + bias[:, None, 1:3]
    assert missing == pytest.approx(float((y[..., 1:3] - made).square().sum()))


@pytest.mark.parametrize("outputs", [1, 4])
def test_conjugate_gradients_solve_each_output(outputs):
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(2, 12, 12, generator=rng, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(12, dtype=torch.float64)
    right = torch.randn(2, 12, outputs, generator=rng, dtype=torch.float64)
    right[..., 0] *= 1e6
    diagonal = matrix.diagonal(dim1=1, dim2=2)[..., None]
    step, count = conjugate_gradients(matrix.matmul, right, diagonal, tolerance=1e-10, iterations=200)
    torch.testing.assert_close(step, torch.linalg.solve(matrix, right), rtol=1e-5, atol=1e-5)
    assert 0 < count < 200
    zero, count = conjugate_gradients(matrix.matmul, right * 0, diagonal, tolerance=1e-10, iterations=200)
    assert count == 0
    assert not zero.any()


def test_conjugate_gradients_stop_in_time():
    matrix = torch.diag(torch.logspace(0, 8, 50, dtype=torch.float64))
    right = torch.ones(50, 1, dtype=torch.float64)
    _, count = conjugate_gradients(matrix.matmul, right, torch.ones(50, 1), tolerance=1e-12, iterations=7)
    assert count == 7


def test_solve_and_squares_give_the_known_values():
    # A is 40 x 6 normals of default_rng(3), with A[:, 5] = A[:, 0] + A[:, 1], then W (6 x 3) and b: columns 3, 5 go.
    rng = np.random.default_rng(3)
    a, weight, bias = rng.standard_normal((40, 6)), rng.standard_normal((6, 3)), rng.standard_normal(3)
    a[:, 5] = a[:, 0] + a[:, 1]
    kept = [0, 1, 2, 4]
    x, y, present = (torch.tensor(one)[None] for one in (a[:, kept], a @ weight + bias, weight[kept]))
    sums = sums_of(x, y)
    before = sums.squares(present, torch.tensor(bias)[None])
    solved = sums.system(True).solve(present, damping=0)
    after = sums.squares(solved, sums.bias(solved))
    assert (before[0] / before[1]) ** 0.5 == pytest.approx(0.37948612685359173, abs=1e-6)
    assert (after[0] / after[1]) ** 0.5 == pytest.approx(0.12490032286830668, abs=1e-6)
    known = [
        [0.07043242, 0.01628414, 0.57015494],
        [0.3661542, -0.40009545, -1.96391589],
        [-0.05219106, 2.31706703, -0.17992606],
        [2.25914377, -0.61829212, 0.7509761],
    ]
    torch.testing.assert_close(solved[0], torch.tensor(known, dtype=torch.float64), rtol=0, atol=1e-6)
    offset = torch.tensor([[1.78058954, -0.07121496, 0.03023591]], dtype=torch.float64)
    torch.testing.assert_close(sums.bias(solved), offset, rtol=0, atol=1e-6)


def test_conjugate_gradients_return_the_step_that_is_best_for_what_is_watched():
    x, y, _ = data(40, 30, 1)
    gram, right, diagonal = x[0].mT @ x[0], x[0].mT @ y[0], torch.ones(30, 1)
    others, wanted, _ = data(40, 30, 1, seed=1)
    errors = {}
    for count in range(1, 12):
        step, done = conjugate_gradients(gram.matmul, right, diagonal, tolerance=0, iterations=count)
        assert done == count
        errors[count] = float((wanted[0] - others[0] @ step).square().sum())
    watched = []

    def look(step):
        watched.append(float((wanted[0] - others[0] @ step).square().sum()))
        return watched[-1]

    step, count = conjugate_gradients(gram.matmul, right, diagonal, tolerance=0, iterations=11, watched=look)
    assert len(watched) < 12
    assert look(step) == min(watched)
    assert count == watched.index(min(watched))
    assert not count or errors[count] == pytest.approx(min(watched))


def test_without_takes_samples_away():
    x, y, present = data()
    whole, part = sums_of(x, y), sums_of(x[:, :20], y[:, :20])
    left = whole.without(part)
    expected = sums_of(x[:, 20:], y[:, 20:])
    for bias in (False, True):
        torch.testing.assert_close(
            left.system(bias).solve(present, damping=0.1), expected.system(bias).solve(present, damping=0.1)
        )
    assert left.count == expected.count
