"""Tests of SparseGPT: values of the authors' code, and their algorithm in float64, column by column."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyprune import scope, solvers
from pyprune.methods.scope import Scope

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
F32, F64 = torch.float32, torch.float64


def problem(rows: int, columns: int, *, kind: str = "correlated", seed: int = 0, dtype=F64) -> tuple[Tensor, Tensor]:
    """Return a weight and the Gram of its inputs."""
    torch.manual_seed(seed)
    inputs = torch.randn(3 * columns + 5, columns, dtype=F64)
    weight = torch.randn(rows, columns, dtype=F64)
    if kind == "correlated":
        inputs = inputs @ (torch.randn(columns, columns, dtype=F64) / math.sqrt(columns) + torch.eye(columns))
        inputs = inputs * torch.randn(columns, dtype=F64).exp()
    elif kind == "few tokens":
        inputs = inputs[: columns // 3 + 1]
    elif kind == "dead":
        inputs[:, ::3] = 0
    elif kind == "equal":
        weight = torch.ones(rows, columns, dtype=F64)
        inputs = torch.eye(columns, dtype=F64)
    return weight.to(dtype), (inputs.T @ inputs).to(dtype)


def exact_count(n: int, ratio: float) -> int:
    return max(0, min(math.floor(ratio * n + 0.5), n - 1))


def dropped(scores: np.ndarray, count: int) -> np.ndarray:
    """Say which are the smallest, of equal ones the first."""
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.argsort(scores.flatten(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def by_columns(
    weight: Tensor, gram: Tensor, among: Scope, ratio: float | None, base: Tensor | None, *, damping=0.01, block=128
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and mask as the authors' algorithm makes them: one column at a time, by the inverse's factor."""
    w, h = weight.double().numpy().copy(), gram.double().numpy().copy()
    rows, n = w.shape
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * np.diag(h).mean() * np.eye(n)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    there = np.ones(w.shape, dtype=bool) if base is None else base.numpy()
    mask = there.copy()

    def drop(scores: np.ndarray, count: int, part: np.ndarray) -> np.ndarray:
        gone = int((~part).sum())
        return ~dropped(np.where(part, scores, -1), max(count, gone))

    def costs(start: int, end: int) -> np.ndarray:
        return np.abs(w[:, start:end]) / np.diag(u)[start:end]

    size = {"columns": among.width, "n_of_m": among.of}.get(among.name, block)
    first = costs(0, n)
    if among.name == "tensor":
        plan = drop(first, exact_count(w.size, ratio), there)
    if among.name == "row":
        plan = np.stack([drop(s, exact_count(n, ratio), p) for s, p in zip(first, there, strict=True)])
    for start in range(0, n, size):
        end = min(start + size, n)
        scores, part = costs(start, end), there[:, start:end]
        if among.name == "columns":
            mask[:, start:end] = drop(scores, exact_count(part.size, ratio), part)
        elif among.name == "tensor":
            mask[:, start:end] = drop(scores, int((~plan[:, start:end]).sum()), part)
        else:
            for row in range(rows):
                gone = (~plan[row, start:end]).sum() if among.name == "row" else end - start - among.keep
                mask[row, start:end] = drop(scores[row], max(0, int(gone)), part[row])
        for j in range(start, end):
            error = np.where(mask[:, j], 0, w[:, j]) / u[j, j]
            w[:, j:] -= np.outer(error, u[j, j:])
            w[~mask[:, j], j] = 0
    return w, mask


def solve(weight, gram, among=None, ratio=None, mask=None, **options):
    return solvers.sparsegpt(**options).solve(weight, gram, scope=among, ratio=ratio, mask=mask)


def golden_problem(dtype: torch.dtype, dead: int | None = None) -> tuple[Tensor, Tensor]:
    weight, inputs = torch.tensor(GOLDEN["W"], dtype=dtype), torch.tensor(GOLDEN["X"], dtype=dtype)
    if dead is not None:
        inputs[:, dead] = 0
    return weight, inputs.T @ inputs


# The authors remove a few more than they are asked for: those with `<=` are asked for as many here.
GOLDENS = [
    ("sparsegpt_unstructured_.5_block8", scope.columns(8), 17 / 32),
    ("sparsegpt_unstructured_.5_block4", scope.columns(4), 9 / 16),
    ("sparsegpt_unstructured_.5_block8_exact_count", scope.columns(8), 0.5),
    ("sparsegpt_unstructured_.5_block4_exact_count", scope.columns(4), 0.5),
    ("sparsegpt_unstructured_.5_block8_exact_count", scope.tensor(), 0.5),
    ("sparsegpt_2of4_block8", scope.n_of_m(keep=2, of=4), None),
    ("sparsegpt_prune1of4_block8", scope.n_of_m(keep=3, of=4), None),
    ("sparsegpt_prune3of4_block8", scope.n_of_m(keep=1, of=4), None),
    ("sparsegpt_4of8_block8", scope.n_of_m(keep=4, of=8), 0.5),
    ("sparsegpt_dead_column_2_exact_count", scope.columns(8), 0.5),
]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("name", "among", "ratio"), GOLDENS)
def test_sparsegpt_gives_what_the_authors_code_gave(name, among, ratio, dtype):
    golden = GOLDEN[name]
    weight, gram = golden_problem(dtype, 2 if "dead" in name else None)
    found = solve(weight, gram, among, ratio)
    assert found.damping == 0.01
    assert (~found.mask).tolist() == golden["mask_pruned"]
    np.testing.assert_allclose(found.weight.numpy(), golden["weight"], rtol=1e-5, atol=1e-5)
    if "sum_losses" in golden:  # half of the damped objective
        lost = found.weight - weight
        h = gram + 0.01 * gram.diagonal().mean() * torch.eye(8, dtype=dtype)
        assert float(((lost @ h) * lost).sum()) == pytest.approx(2 * golden["sum_losses"], rel=1e-5)


def test_every_golden_value_of_sparsegpt_is_in_the_table():
    assert {name for name in GOLDEN if name.startswith("sparsegpt_")} == {name for name, _, _ in GOLDENS}


SCOPES = [
    (None, 0.5), (scope.columns(1), 0.3), (scope.columns(16), 0.7), (scope.columns(1000), 0.5), (scope.tensor(), 0.5),
    (scope.row(), 0.7), (scope.n_of_m(keep=2, of=4), None), (scope.n_of_m(keep=1, of=4), None),
    (scope.n_of_m(keep=3, of=4), 0.25), (scope.n_of_m(keep=4, of=8), None), (scope.n_of_m(keep=2, of=3), None),
    (scope.n_of_m(keep=20, of=64), None),
]  # fmt: skip
SHAPES = [(70, 200), (1, 33), (5, 1), (33, 5), (3, 300)]


@pytest.mark.parametrize("kind", ["correlated", "few tokens", "dead"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("among", "ratio"), SCOPES)
@pytest.mark.parametrize("with_base", [False, True])
def test_sparsegpt_is_the_authors_algorithm(among, ratio, shape, kind, with_base):
    weight, gram = problem(*shape, kind=kind)
    base = torch.rand(shape) < 0.8 if with_base else None
    given = weight.clone(), gram.clone(), None if base is None else base.clone()
    found = solve(weight, gram, among, ratio, base, block=32)
    expected, mask = by_columns(weight, gram, among or scope.columns(32), ratio, base, block=32)
    assert torch.equal(weight, given[0])
    assert torch.equal(gram, given[1])
    assert base is None or torch.equal(base, given[2])
    assert found.mask.tolist() == mask.tolist()
    if mask.all():
        assert torch.equal(found.weight, weight)
    else:
        np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("block", [1, 7, 64, 500])
@pytest.mark.parametrize(
    ("among", "ratio"),
    [(scope.columns(48), 0.5), (scope.n_of_m(keep=2, of=4), None), (scope.n_of_m(keep=3, of=6), None)],
)
def test_sparsegpt_does_not_depend_on_its_block_where_the_scope_says_what_competes(among, ratio, block):
    weight, gram = problem(20, 150)
    found, other = solve(weight, gram, among, ratio), solve(weight, gram, among, ratio, block=block)
    assert torch.equal(found.mask, other.mask)
    torch.testing.assert_close(found.weight, other.weight)


@pytest.mark.parametrize(("among", "ratio"), SCOPES)
def test_sparsegpt_in_float32_loses_no_more_than_in_float64(among, ratio):
    weight, gram = problem(64, 256)
    found, wide = solve(weight.float(), gram.float(), among, ratio), solve(weight, gram, among, ratio)
    assert found.weight.dtype == F32
    lost = [
        float((((w.double() - weight) @ gram) * (w.double() - weight)).sum()) for w in (found.weight, wide.weight)
    ]
    assert lost[0] == pytest.approx(lost[1], rel=2e-3)
    assert int(found.mask.sum()) == int(wide.mask.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparsegpt_solves_half_types_in_float32(dtype):
    weight, gram = problem(8, 40, dtype=F32)
    found, same = (solve(w, gram, scope.row(), 0.5) for w in (weight.to(dtype), weight.to(dtype).float()))
    assert found.weight.dtype == F32
    assert torch.equal(found.weight, same.weight)


def test_sparsegpt_is_not_rounded_by_autocast():
    weight, gram = problem(8, 150, dtype=F32)
    plain = solve(weight, gram, scope.tensor(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(solve(weight, gram, scope.tensor(), 0.5).weight, plain.weight)


@pytest.mark.parametrize("ratio", [0.01, 0.33, 0.5, 0.77, 0.999])
@pytest.mark.parametrize(
    ("among", "sets"),
    [
        (scope.tensor(), lambda mask: [mask]),
        (scope.row(), lambda mask: mask.unbind(0)),
        (scope.columns(24), lambda mask: mask.split(24, dim=1)),
    ],
)
@pytest.mark.parametrize("kind", ["correlated", "equal", "dead"])
def test_sparsegpt_drops_exact_counts(among, sets, ratio, kind):
    weight, gram = problem(13, 130, kind=kind, dtype=F32)
    mask = solve(weight, gram, among, ratio, block=32).mask
    for part in sets(mask):
        assert int((~part).sum()) == exact_count(part.numel(), ratio)


def test_sparsegpt_drops_the_first_of_equals():
    weight, gram = problem(3, 8, kind="equal")
    found = solve(weight, gram, scope.columns(4), 0.5)
    assert found.mask.tolist() == [[False] * 8, [False, False, True, True] * 2, [True] * 8]
    found = solve(weight, gram, scope.n_of_m(keep=1, of=4))
    assert found.mask.tolist() == [[False, False, False, True] * 2] * 3


@pytest.mark.parametrize("among", [scope.tensor(), scope.row(), scope.columns(16), None])
def test_sparsegpt_of_ratio_zero_leaves_every_bit(among):
    weight, gram = problem(6, 40, kind="dead", dtype=F32)
    weight[0, :3] = -0.0
    found = solve(weight, gram, among, 0.0)
    assert found.mask.all()
    assert torch.equal(found.weight.view(torch.int32), weight.view(torch.int32))
    assert found.weight.data_ptr() != weight.data_ptr()


def test_sparsegpt_of_a_mask_and_ratio_zero_solves_for_what_it_keeps():
    weight, gram = problem(6, 40)
    mask = torch.rand(6, 40) < 0.5
    found = solve(weight, gram, scope.row(), 0.0, mask)
    assert torch.equal(found.mask, mask)

    def error(new: Tensor) -> float:
        return float((((new - weight) @ gram) * (new - weight)).sum())

    assert error(found.weight) < 0.8 * error(torch.where(mask, weight, 0))


@pytest.mark.parametrize("dim", ["out", "both"])
def test_sparsegpt_takes_other_n_of_m_by_what_it_knows_before(dim):
    weight, gram = problem(8, 12)
    found = solve(weight, gram, scope.n_of_m(keep=2, of=4, dim=dim))
    counts = found.mask.view(2, 4, 12).sum(1)
    assert (counts == 2).all()
    half = solve(weight, gram, scope.n_of_m(keep=2, of=4), 0.25)
    assert int((~half.mask).sum()) == 24
    assert set(half.mask.view(-1, 4).sum(1).tolist()) == {2, 4}


@pytest.mark.parametrize("kind", ["correlated", "few tokens"])
def test_sparsegpt_by_tensor_loses_less_than_by_columns(kind):
    weight, gram = problem(128, 512, kind=kind)
    errors = []
    for among in (scope.tensor(), scope.columns(128)):
        lost = solve(weight, gram, among, 0.6).weight - weight
        errors.append(float(((lost @ gram) * lost).sum()))
    assert errors[0] < errors[1]


def test_sparsegpt_takes_more_damping_where_the_gram_cannot_be_factorised():
    weight = torch.tensor([[1.0, 2.0]])
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    found = solve(weight, gram, scope.tensor(), 0.5)
    assert found.damping == 0.1
    expected, _ = by_columns(weight, gram, scope.tensor(), 0.5, None, damping=0.1)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="gram"):
        solve(weight, torch.tensor([[1.0, 1e9], [1e9, 1.0]]), scope.tensor(), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block": 0}, ValueError, "block"),
        ({"block": 1.5}, TypeError, "block"),
        ({"damping": -1}, ValueError, "damping"),
        ({"damping": "much"}, TypeError, "damping"),
    ],
)
def test_sparsegpt_refuses_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        solvers.sparsegpt(**options)


WRONG = {
    "a scope of models": ({"scope": scope.model()}, ValueError, "scope"),
    "a scope of groups": ({"scope": scope.group({"a": ["b"]})}, ValueError, "scope"),
    "a word": ({"scope": "row"}, TypeError, "scope"),
    "no ratio": ({"ratio": None}, (TypeError, ValueError), "ratio"),
    "a ratio of one": ({"ratio": 1.0}, ValueError, "ratio"),
    "a ratio beyond N:M": ({"scope": scope.n_of_m(keep=2, of=4), "ratio": 0.75}, ValueError, "ratio"),
    "a weight with NaN": ({"weight": torch.full((3, 4), math.nan)}, ValueError, "weight"),
    "a vector": ({"weight": torch.ones(4)}, ValueError, "weight"),
    "a gram with infinity": ({"gram": torch.full((4, 4), math.inf)}, ValueError, "gram"),
    "another gram": ({"gram": torch.eye(3)}, ValueError, "gram"),
    "a gram of halves": ({"gram": torch.eye(4).half()}, TypeError, "gram"),
    "another mask": ({"mask": torch.ones(4, 3) > 0}, ValueError, "mask"),
    "a mask of numbers": ({"mask": torch.ones(3, 4)}, TypeError, "mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_sparsegpt_refuses_what_does_not_fit(name):
    change, error, words = WRONG[name]
    given = {"weight": torch.ones(3, 4), "gram": torch.eye(4), "scope": scope.row(), "ratio": 0.5, "mask": None}
    with pytest.raises(error, match=words):
        solvers.sparsegpt().solve(**{**given, **change})


@pytest.mark.parametrize(
    ("kind", "among", "ratio", "has_base"),
    [
        ("correlated", None, 0.5, False),
        ("correlated", scope.tensor(), 0.7, True),
        ("few tokens", scope.row(), 0.5, False),
        ("dead", scope.n_of_m(keep=2, of=4), None, False),
        ("correlated", scope.tensor(), 0.0, False),
    ],
)
def test_sparsegpt_polished_is_least_squares_on_its_mask(kind, among, ratio, has_base):
    weight, gram = problem(8, 48, kind=kind)
    base = torch.rand(8, 48) > 0.2 if has_base else None
    asked = {"scope": among, "ratio": ratio, "mask": base}
    plain = solvers.sparsegpt().solve(weight, gram, **asked)
    polished = solvers.sparsegpt(polish=True).solve(weight, gram, **asked)
    assert torch.equal(polished.mask, plain.mask)
    expected = solvers.least_squares().solve(weight, gram, scope=None, ratio=None, mask=plain.mask)
    torch.testing.assert_close(polished.weight, expected.weight, rtol=1e-6, atol=1e-6)
    if ratio != 0:
        assert not torch.allclose(polished.weight, plain.weight, rtol=1e-3)
