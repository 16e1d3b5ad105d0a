"""Solvers of one-shot pruning: rules for the weights that are kept, in pure tensors (`pyprune.solvers`)."""

from pyprune.oneshot.admm import admm
from pyprune.oneshot.block_fisher import block_fisher
from pyprune.oneshot.grids import grid
from pyprune.oneshot.least_squares import least_squares
from pyprune.oneshot.m_fac import m_fac
from pyprune.oneshot.reconstruct import reconstruct
from pyprune.oneshot.sparsegpt import sparsegpt
from pyprune.oneshot.swaps import swaps

__all__ = ["admm", "block_fisher", "grid", "least_squares", "m_fac", "reconstruct", "sparsegpt", "swaps"]
