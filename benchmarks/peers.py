"""What pyprune's kernels are measured beside: torch's own ways, and the formulas of NNCF in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

EPSILON = 1e-6
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
TARGET, P = 0.7, 0.05


def cat_scores(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.abs().flatten() for weight in weights])


def masks_above(weights: list[Tensor], bound: Tensor) -> list[Tensor]:
    return [weight.abs() > bound for weight in weights]


def cat_kthvalue(weights: list[Tensor], removed: int) -> list[Tensor]:
    return masks_above(weights, cat_scores(weights).kthvalue(removed).values)


def cat_topk(weights: list[Tensor], removed: int) -> list[Tensor]:
    """Take the fewer: those that go, or those that stay. They come unsorted, which is faster."""
    scores = cat_scores(weights)
    kept = scores.numel() - removed
    if removed <= kept:
        return masks_above(weights, scores.topk(removed, largest=False, sorted=False).values.max())
    bound = scores.topk(kept, sorted=False).values.min()
    return [weight.abs() >= bound for weight in weights]


def cat_sort(weights: list[Tensor], removed: int) -> list[Tensor]:
    return masks_above(weights, cat_scores(weights).sort().values[removed - 1])


def numpy_partition(weights: list[Tensor], removed: int) -> list[Tensor]:
    scores = cat_scores(weights).float().numpy()  # NumPy has no bfloat16
    scores.partition(removed - 1)  # in place
    return masks_above(weights, torch.tensor(scores[removed - 1]))


def nncf_formula(weights: list[Tensor], ratio: float) -> list[Tensor]:
    """Compute what NNCF 3's update_pruning_ratio computes for its global mode, without its hooks."""
    scores = torch.cat([(weight.abs() / weight.norm(2)).flatten() for weight in weights])
    bound = scores.kthvalue(int((scores.numel() - 1) * ratio) + 1).values
    return [weight.abs() / weight.norm(2) > bound for weight in weights]


def distance_sums_filter_by_filter(filters: Tensor) -> Tensor:
    """Compute what NNI's FPGM pruner scores filters by, as it does: one filter after the other."""
    return torch.stack([(filters - one).norm(2, dim=1).sum() for one in filters])


def sparsegpt_by_columns(
    weight: Tensor, gram: Tensor, *, ratio: float = 0.5, removed: int = 0, of: int = 0, block: int = 128
) -> Tensor:
    """Prune a layer by the algorithm of SparseGPT's authors: the inverse's factor, and a loop over the columns."""
    left, h = weight.clone(), gram.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    left[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    losses = torch.zeros(len(weight))
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part, square = left[:, start:end].clone(), factor[start:end, start:end]
        errors, costs, diagonal = torch.zeros_like(part), torch.zeros_like(part), square.diagonal()
        drop = torch.zeros_like(part, dtype=torch.bool)
        if not of:
            scores = part.square() / diagonal.square()
            drop = scores <= scores.flatten().sort().values[int(scores.numel() * ratio)]
        for j in range(end - start):
            if of and j % of == 0:
                scores = part[:, j : j + of].square() / diagonal[j : j + of].square()
                drop.scatter_(1, j + scores.topk(removed, dim=1, largest=False).indices, True)
            kept = part[:, j].clone()
            kept[drop[:, j]] = 0
            costs[:, j] = (part[:, j] - kept).square() / diagonal[j].square()
            error = (part[:, j] - kept) / diagonal[j]
            part[:, j:] -= error[:, None] @ square[j : j + 1, j:]
            errors[:, j] = error
            part[:, j] = kept
        left[:, start:end] = part
        losses += costs.sum(1) / 2
        left[:, end:] -= errors @ factor[start:end, end:]
    return left


def kthvalue_per_tensor(weights: list[Tensor], removed: list[int]) -> list[Tensor]:
    scores = [weight.abs() for weight in weights]
    bounds = [score.flatten().kthvalue(max(count, 1)).values for score, count in zip(scores, removed, strict=True)]
    return [score > bound for score, bound in zip(scores, bounds, strict=True)]


def groups_of(weight: Tensor, size: int) -> Tensor:
    """Return the magnitudes, a group in each row; the last dimension is filled up with zeros."""
    return pad(weight.abs(), (0, -weight.shape[-1] % size)).reshape(-1, size)


def without_padding(mask: Tensor, weight: Tensor) -> Tensor:
    return mask.view(*weight.shape[:-1], -1)[..., : weight.shape[-1]]


def topk_groups(weights: list[Tensor], kept: int, size: int) -> list[Tensor]:
    """Keep the largest of each group, as SparseML and torchao's masks do."""
    masks = []
    for weight in weights:
        groups = groups_of(weight, size)
        mask = torch.zeros_like(groups, dtype=torch.bool)
        masks.append(without_padding(mask.scatter_(1, groups.topk(kept, dim=1).indices, True), weight))
    return masks


def argsort_groups(weights: list[Tensor], kept: int, size: int) -> list[Tensor]:
    """Drop the smallest of each group, in the order of a sort."""
    masks = []
    for weight in weights:
        groups = groups_of(weight, size)
        mask = torch.ones_like(groups, dtype=torch.bool)
        going = groups.argsort(dim=1)[:, : size - kept]
        masks.append(without_padding(mask.scatter_(1, going, False), weight))
    return masks


def sort_rows(weights: list[Tensor], norms: list[Tensor], removed: list[int]) -> list[Tensor]:
    """Drop the smallest |w| * norm of each row, as Wanda does."""
    masks = []
    for weight, norm, count in zip(weights, norms, removed, strict=True):
        scores = weight.flatten(1).abs() * norm
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :count], False)
        masks.append(mask.view(weight.shape))
    return masks


def cat_kthvalue_of_remaining(weights: list[Tensor], bases: list[Tensor], removed: int) -> list[Tensor]:
    """Take the k-th of what is left, as torch.nn.utils.prune takes its topk."""
    left = torch.cat([weight[base].abs() for weight, base in zip(weights, bases, strict=True)])
    lacking = sum(weight.numel() for weight in weights) - left.numel()
    bound = left.kthvalue(removed - lacking).values
    return [(weight.abs() > bound) & base for weight, base in zip(weights, bases, strict=True)]


def nni_capped(weights: list[Tensor], removed: int, most: list[int]) -> list[Tensor]:
    """Let only as many of each tensor compete as it may lose; the global mode of NNI's pruners does that."""
    scores = [weight.abs().flatten().topk(cap, largest=False) for weight, cap in zip(weights, most, strict=True)]
    going = torch.cat([score.values for score in scores]).topk(removed, largest=False, sorted=False).indices
    goes = torch.zeros(sum(most), dtype=torch.bool)
    goes[going] = True
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    for mask, score, some in zip(masks, scores, goes.split(most), strict=True):
        mask.view(-1)[score.indices[some]] = False
    return masks


def lamp_kthvalue(weights: list[Tensor], removed: int) -> list[Tensor]:
    """Sort each tensor, divide each square by the sum of it and all behind it, and cut all scores at once."""
    scores = []
    for weight in weights:
        squares, order = weight.float().square().flatten().sort()
        score = torch.empty_like(squares)
        score[order] = squares / squares.flip(0).cumsum(0).flip(0)
        scores.append(score.view(weight.shape))
    bound = torch.cat([score.flatten() for score in scores]).kthvalue(removed).values
    return [score > bound for score in scores]


class Threshold(torch.autograd.Function):
    """Compare with 1/2; the gradient goes straight through."""

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return (p > 0.5).to(p.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def nncf_gate(weight: Tensor, logits: Tensor) -> Tensor:
    noise = torch.rand_like(logits).clamp(EPSILON, 1 - EPSILON)
    return weight * Threshold.apply(torch.sigmoid(logits + torch.logit(noise)))


def eager_hard_concrete(weight: Tensor, logits: Tensor) -> Tensor:
    noise = torch.rand_like(logits).clamp(EPSILON, 1 - EPSILON)
    s = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + logits) / BETA)
    return weight * (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def nncf_rb_loss(logits: list[Tensor]) -> Tensor:
    kept = sum(Threshold.apply(torch.sigmoid(one)).sum() for one in logits)
    count = sum(one.numel() for one in logits)
    return ((kept / count - (1 - TARGET)) / P) ** 2


def alps_by_eigenvectors(weight: Tensor, gram: Tensor, ratio: float | None = None) -> tuple[Tensor, int]:
    """Do what the code of ALPS does: ADMM with (H + rho)^-1 by eigenvectors, and ten steps of conjugate gradients.

    Without a ratio 2 of 4 stay.
    """
    gram = gram.clone()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    size = gram.diagonal().sqrt()
    gram = gram / size / size[:, None]
    wanted = (weight * size).T.contiguous()
    outputs = gram @ wanted
    removed = round((0.5 if ratio is None else ratio) * weight.numel())
    kept = weight.numel() - removed
    values, vectors = torch.linalg.eigh(gram.double())

    def inverse(rho: float) -> Tensor:
        return ((vectors / (values + rho)) @ vectors.T).to(gram.dtype)

    def project(tensor: Tensor) -> Tensor:
        if ratio is None:
            groups = tensor.T.reshape(-1, 4).clone()
            return groups.scatter(1, groups.square().topk(2, 1, largest=False).indices, 0).reshape(weight.shape).T
        flat = tensor.reshape(-1).clone()
        flat[flat.square().topk(removed, largest=False).indices] = 0
        return flat.view_as(tensor)

    def error(tensor: Tensor) -> Tensor:
        return ((tensor - wanted) * (gram @ tensor - outputs)).sum()

    rho, has_grown, count = 0.1, False, 0
    split = first = project(wanted)
    dual, support, solve = torch.zeros_like(wanted), first != 0, inverse(rho)
    for count in range(1, 301):
        pulled = solve @ (outputs - dual + rho * split)
        split = project(pulled + dual / rho)
        dual = dual + rho * (pulled - split)
        error(project(pulled))  # it is reported
        if count % 3:
            continue
        now = split != 0
        changed = float((now != support).sum()) / kept
        support = now
        if changed == 0 and has_grown:
            break
        if changed == 0:
            rho, split, dual, support = rho / 5, first, torch.zeros_like(wanted), first != 0
        else:
            rho, has_grown = rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), True
        if count > 30 and changed < 3e-4:
            break
        solve = inverse(rho)
    solved = project(pulled)
    mask = (solved != 0).to(gram.dtype)
    left = (outputs - gram @ solved) * mask
    direction, energy = left, left.square().sum(0)
    for _ in range(10):
        image = (gram @ direction) * mask
        length = energy / ((direction * image).sum(0) + 1e-8)
        solved, left = solved + length * direction, left - length * image
        energy, before = left.square().sum(0), energy
        direction = left + energy / (before + 1e-8) * direction
    return solved.T / size, count


def scores_of_channels(weight: Tensor, block: Sequence[int]) -> Tensor:
    """Sum magnitudes over all dimensions that the block covers, by torch's norm."""
    summed = [dim for dim, size in enumerate(block) if size > 1]
    return torch.linalg.vector_norm(weight, 1, summed, keepdim=True) if summed else weight.abs()


def scores_of_blocks(weight: Tensor, block: Sequence[int]) -> Tensor:
    """Sum magnitudes over a view of whole blocks; zeros fill up the last ones."""
    missing = [(0, -size % step) for size, step in zip(weight.shape, block, strict=True)]
    if any(after for _, after in missing):
        weight = torch.nn.functional.pad(weight, [size for pair in reversed(missing) for size in pair])
    view = weight
    for dim in reversed(range(weight.dim())):
        view = view.unflatten(dim, (-1, block[dim]))
    return view.abs().sum([2 * dim + 1 for dim in range(weight.dim())])


def spread_units(units: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    for dim, (step, size) in enumerate(zip(block, shape, strict=True)):
        if step > 1:
            units = units.repeat_interleave(step, dim).narrow(dim, 0, size)
    return units
