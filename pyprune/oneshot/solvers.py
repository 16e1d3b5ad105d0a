"""Solvers of one-shot pruning: rules for the weights that are kept, in pure tensors (`pyprune.solvers`)."""

from pyprune.oneshot.admm import admm
from pyprune.oneshot.least_squares import least_squares
from pyprune.oneshot.reconstruct import reconstruct
from pyprune.oneshot.swaps import swaps

__all__ = ["admm", "least_squares", "reconstruct", "swaps"]
