"""SparseGPT on one layer, beside the authors' algorithm in torch; and the Gram of its inputs beside all of X^T X."""

import torch
from measure import Way, with_floor
from peers import sparsegpt_by_columns
from shapes import MATRICES, Case

from pyprune import scope, solvers
from pyprune.oneshot.grams import add_gram

MODELS = tuple(MATRICES)
DTYPES = ("float32",)
UNSTRUCTURED, TWO_OF_FOUR, GRAM = "SparseGPT, unstructured", "SparseGPT, 2:4", "Gram of 2,048 tokens"
TOKENS = 2048


def ways(case: Case) -> list[Way]:
    (weight,) = case.draw()
    columns = weight.shape[1]
    # Inputs that depend on each other, as those of real layers do.
    inputs = torch.randn(columns + TOKENS, columns) @ (
        torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    )
    gram = inputs.T @ inputs
    inputs = inputs[:TOKENS].contiguous()
    solver, room = solvers.sparsegpt(), torch.zeros_like(gram)
    pattern = scope.n_of_m(keep=2, of=4)

    def floor() -> object:
        """Multiply as often as Cholesky (columns^3 / 3) and the updates (rows columns^2) must."""
        return weight @ gram[:, : columns // 2], gram @ gram[:, : columns // 6]

    result = 2 * weight.nbytes
    solved = with_floor(
        Way(UNSTRUCTURED, "floor: products of matrices", floor),
        [
            Way(
                UNSTRUCTURED,
                "pyprune",
                lambda: solver.solve(weight, gram, scope=None, ratio=case.ratio, mask=None),
                returned=result,
            ),
            Way(
                UNSTRUCTURED,
                "pyprune, by tensor",
                lambda: solver.solve(weight, gram, scope=scope.tensor(), ratio=case.ratio, mask=None),
                returned=result,
            ),
            Way(
                UNSTRUCTURED,
                "the authors' algorithm",
                lambda: sparsegpt_by_columns(weight, gram, ratio=case.ratio),
                formula=True,
            ),
            Way(
                TWO_OF_FOUR,
                "pyprune",
                lambda: solver.solve(weight, gram, scope=pattern, ratio=None, mask=None),
                returned=result,
            ),
            Way(
                TWO_OF_FOUR,
                "the authors' algorithm",
                lambda: sparsegpt_by_columns(weight, gram, removed=2, of=4),
                formula=True,
            ),
        ],
    )
    summed = with_floor(
        Way(GRAM, "floor: half of the product", lambda: inputs.T[: columns // 2] @ inputs),
        [
            Way(GRAM, "pyprune", lambda: add_gram(room, inputs)),
            Way(GRAM, "torch, all of X^T X", lambda: room.addmm_(inputs.T, inputs)),
        ],
    )
    return [*solved, *summed]
