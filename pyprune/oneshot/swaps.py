"""A mask made better by swaps: one weight of a row goes, another comes back, whenever that loses less."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.checks import check_bool, check_count
from pyprune.methods.scope import Scope
from pyprune.oneshot.least_squares import solve_kept
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_asked, check_damping, damped, system_of

# In a row: how many weights on either side are tried with each other, those that look best by themselves.
_TRIED = 16
# Columns that are brought up to date together.
_BLOCK = 128
# What a swap must gain, as a share of the row's output, to be more than rounding.
_GAIN = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Swaps:
    """What `swaps` returns."""

    rounds: int
    polish: bool
    damping: float
    name: str = "swaps"
    chooses: bool = False

    def solve(
        self, weight: Tensor, gram: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Swap within a mask, as `Solver` says; the scope is the one that the mask was made for."""
        if mask is None:
            raise ValueError("mask is None; swaps make a mask better, so give one")
        if scope is None:
            raise ValueError("scope is None; give the one that the mask was made for, because swaps stay within it")
        check_asked(scope, 0.0)
        if scope.name == "n_of_m" and scope.dim != "in":
            raise ValueError(f'scope is N:M with dim="{scope.dim}"; swaps stay within a row, so give dim="in"')
        system = system_of(weight, gram, mask)
        size = scope.of or scope.width or weight.shape[1]

        def attempt(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
            better = swapped(system.weight, matrix, mask, size, self.rounds)
            if not self.polish:
                return system.weight, better
            solved = solve_kept(system.weight, matrix, better)
            return None if solved is None else (solved, better)

        (solved, better), damping = damped(system.gram, self.damping, attempt)
        return system.solution(solved, better, damping)


def swaps(*, rounds: int = 100, polish: bool = True, damping: float = 0.01) -> Swaps:
    """Make a mask better: swap a weight that is kept for one that is dropped, as long as the output loses less.

    With E = W where the mask drops, and 0 elsewhere, what is lost of a row is E H E^T. Dropping w_u and keeping w_p
    in its place adds ``2 w_u c_u + w_u^2 H_uu - 2 w_p c_p + w_p^2 H_pp - 2 w_u w_p H_up`` with c = E H. Swaps are
    within a group for N:M, and within a row for other scopes, so each row keeps as many as before (and of each
    ``width`` columns, if that is the scope). It takes any mask,
    such as Wanda's, and returns another: the only solver that does so without choosing from nothing. What is zero in
    the weight never comes back. For N:M a round goes once over the groups, and costs about what Wanda does;
    for rows it is one swap per row, and takes many more.

    Args:
        rounds: how many there are at most; it ends when no swap gains.
        polish: whether the weights that are kept are solved by least squares in the end; otherwise they stay.
        damping: as for `least_squares`.

    Raises:
        TypeError, ValueError: for other values, and when it solves without a mask or its scope, or for N:M along
            outputs.

    Paper: Zimmer et al. 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale".

    Example:
        >>> from pyprune import scope, solvers
        >>> weight, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, False, False, True]])
        >>> pairs = scope.n_of_m(keep=2, of=4)
        >>> solvers.swaps().solve(weight, torch.eye(4), scope=pairs, ratio=None, mask=mask).mask.tolist()
        [[False, False, True, True]]
    """
    return Swaps(check_count("rounds", rounds), check_bool("polish", polish), check_damping(damping))


def swapped(weight: Tensor, gram: Tensor, mask: Tensor, size: int, rounds: int) -> Tensor:
    """Return a mask that keeps as many of each ``size`` neighbours, and loses no more of the output.

    Args:
        weight, gram: of one dtype, the Gram with damping.
        mask: bool, True = kept.
        size: of a group; all columns for rows.
        rounds: how many there are at most.
    """
    least = ((weight @ gram) * weight).sum(1).clamp_(min=0).mul_(_GAIN[gram.dtype])
    mask = mask.clone()
    if size == weight.shape[1]:
        _swap_in_rows(weight, gram, mask, least, rounds)
        return mask
    for _ in range(rounds):
        if not _swap_in_groups(weight, gram, mask, size, least):
            break
    return mask


def _swap_in_groups(weight: Tensor, gram: Tensor, mask: Tensor, size: int, least: Tensor) -> bool:
    """Go once over the groups of all rows, and swap the best pair in each, in place; say if there was any."""
    columns = weight.shape[1]
    moved = torch.zeros((), dtype=torch.bool, device=weight.device)
    slopes = (weight * ~mask) @ gram
    for start in range(0, columns, max(1, _BLOCK // size) * size):
        stop = min(columns, start + max(1, _BLOCK // size) * size)
        before = mask[:, start:stop].clone()
        for first in range(start, stop, size):
            last = min(columns, first + size)
            w, kept, square = weight[:, first:last], mask[:, first:last], gram[first:last, first:last]
            out, back = _alone(w, slopes[:, first:last], square.diagonal(), kept)
            change = out[:, :, None] + back[:, None, :] - 2 * square * (w[:, :, None] * w[:, None, :])
            best, pair = change.flatten(1).min(1)
            gains = (best < -least)[:, None]
            places = torch.stack([pair // (last - first), pair % (last - first)], 1)
            flips = torch.zeros_like(kept).scatter_(1, places, gains.expand(-1, 2))
            # What comes back leaves E, and what goes comes into it.
            step = torch.where(flips, torch.where(kept, w, -w), torch.zeros_like(w))
            kept ^= flips
            slopes[:, last:stop] += step @ gram[first:last, last:stop]
            moved |= gains.any()
        now = mask[:, start:stop]
        step = (before.to(weight.dtype) - now.to(weight.dtype)) * weight[:, start:stop]
        slopes[:, stop:].addmm_(step, gram[start:stop, stop:])
    return bool(moved)


def _swap_in_rows(weight: Tensor, gram: Tensor, mask: Tensor, least: Tensor, rounds: int) -> None:
    """Swap one pair in each row and round, in place: the best of those that look best by themselves."""
    rows = torch.arange(len(weight), device=weight.device)
    slopes, kept, tried = (weight * ~mask) @ gram, mask.clone(), min(_TRIED, weight.shape[1])
    for _ in range(rounds):
        out, back = _alone(weight, slopes, gram.diagonal(), kept)
        (out, u), (back, p) = out.topk(tried, largest=False), back.topk(tried, largest=False)
        both = weight.gather(1, u)[:, :, None] * weight.gather(1, p)[:, None, :]
        change = out[:, :, None] + back[:, None, :] - 2 * gram[u[:, :, None], p[:, None, :]] * both
        best, pair = change.flatten(1).min(1)
        u, p = u.gather(1, pair[:, None] // tried), p.gather(1, pair[:, None] % tried)
        goes_on = best < -least
        if not bool(goes_on.all()):
            rows, weight, slopes, kept = rows[goes_on], weight[goes_on], slopes[goes_on], kept[goes_on]
            least, u, p = least[goes_on], u[goes_on], p[goes_on]
            if not len(rows):
                return
        kept.scatter_(1, u, False).scatter_(1, p, True)
        slopes += weight.gather(1, u) * gram[u[:, 0]] - weight.gather(1, p) * gram[p[:, 0]]
        mask[rows] = kept


def _alone(weight: Tensor, slopes: Tensor, diagonal: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return what it costs to drop each weight, and to keep it, by itself; infinite if it is not there to do so."""
    squares, slopes = weight.square() * diagonal, 2 * weight * slopes
    never = torch.full_like(weight, torch.inf)
    comes = ~kept & (weight != 0)
    return torch.where(kept, squares + slopes, never), torch.where(comes, squares - slopes, never)
