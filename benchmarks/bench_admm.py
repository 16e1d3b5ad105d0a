"""ADMM on one layer, beside ALPS as it was published, by eigenvectors."""

import torch
from measure import Way, with_floor
from peers import alps_by_eigenvectors
from shapes import MATRICES, Case

from pyprune import scope, solvers

MODELS = tuple(MATRICES)
DTYPES = ("float32",)
ADMM, ADMM_2_OF_4 = "ADMM, unstructured", "ADMM, 2:4"


def ways(case: Case) -> list[Way]:
    (weight,) = case.draw()
    columns = weight.shape[1]
    # Inputs that depend on each other, as those of real layers do.
    inputs = torch.randn(3 * columns, columns) @ (torch.randn(columns, columns) / columns**0.5 + torch.eye(columns))
    gram = inputs.T @ inputs
    solver, pattern = solvers.admm(), scope.n_of_m(keep=2, of=4)

    def floor() -> object:
        """Multiply as often as 30 iterations must."""
        return [weight @ gram for _ in range(30)]

    return with_floor(
        Way(ADMM, "floor: products of 30 iterations", floor),
        [
            Way(
                ADMM,
                "pyprune",
                lambda: solver.solve(weight, gram, scope=scope.tensor(), ratio=case.ratio, mask=None),
                returned=2 * weight.nbytes,
            ),
            Way(ADMM, "ALPS by eigenvectors", lambda: alps_by_eigenvectors(weight, gram, case.ratio), formula=True),
            Way(
                ADMM_2_OF_4,
                "pyprune",
                lambda: solver.solve(weight, gram, scope=pattern, ratio=None, mask=None),
                returned=2 * weight.nbytes,
            ),
            Way(ADMM_2_OF_4, "ALPS by eigenvectors", lambda: alps_by_eigenvectors(weight, gram), formula=True),
        ],
    )
