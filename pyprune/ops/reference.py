"""Every operator in plain torch: what the kernels must compute, written for reading and testing, not for speed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORM_BLOCK = 4096
NORM_LANES = 16
UNIT_STEPS = 256
UNIT_ROOM = 64


def threshold(
    weights: Sequence[Tensor],
    removed: int | Sequence[int],
    *,
    scales: Tensor | None = None,
    bases: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Sort all scores, drop the smallest; a stable sort makes the lowest (tensor, flat index) of equals go first.

    What a base lacks has a score below all others, and is never kept.
    """
    bases = [None] * len(weights) if bases is None else bases
    wide = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    scores = []
    for index, weight in enumerate(weights):
        score = weight.detach().abs().double()
        score = (score if scales is None else score * scales[index]).to(wide)
        base = bases[index]
        scores.append((score if base is None else torch.where(base, score, -1)).flatten())
    groups = [torch.cat(scores)] if isinstance(removed, int) else scores
    counts = [removed] if isinstance(removed, int) else removed
    kept = []
    for group, count in zip(groups, counts, strict=True):
        mask = torch.ones_like(group, dtype=torch.bool)
        mask[torch.sort(group, stable=True).indices[:count]] = False
        kept.append(mask)
    flat = torch.split(torch.cat(kept), [weight.numel() for weight in weights])
    masks = [mask.reshape(weight.shape) for mask, weight in zip(flat, weights, strict=True)]
    masks = [mask if base is None else mask & base for mask, base in zip(masks, bases, strict=True)]
    nonfinite = torch.stack([(~weight.isfinite()).sum() for weight in weights])
    return masks, nonfinite


def group_masks(
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    kept: Sequence[int],
    *,
    row_dims: Sequence[int],
    factors: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """Sort each group, drop its smallest; what the base drops sorts below all, what pads a row below that."""
    masks = []
    for index, weight in enumerate(weights):
        shape, dims, base, factor = weight.shape, row_dims[index], bases[index], factors[index]
        columns = shape[dims:].numel()
        score = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
        if factor is not None:
            usable = torch.where((factor >= 0) & factor.isfinite(), factor, 0)
            score = score * usable.view(shape[dims:])
        if base is not None:
            score = torch.where(base, score, -1)
        size = min(sizes[index], max(columns, 1))
        rows = score.reshape(shape[:dims].numel(), columns)
        padded = torch.nn.functional.pad(rows, (0, -columns % size), value=-2.0)
        groups = padded.view(len(rows), -(-columns // size), size)
        going = groups.sort(dim=2, stable=True).indices[..., : max(size - kept[index], 0)]
        mask = torch.ones_like(groups, dtype=torch.bool).scatter_(2, going, False)
        mask = mask.flatten(1)[:, :columns].reshape(shape)
        masks.append(mask if base is None else mask & base)
    return masks, torch.stack([(~weight.isfinite()).sum() for weight in weights])


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Root of the sum of squares in float64, with the order of additions that `ordered_sum` fixes.

    Squares of float64 values can overflow or underflow, so those are summed three times, as they are and scaled by
    2**-600 and 2**600, and the sum that stayed in range is taken. The root is `math.sqrt`, which
    rounds correctly; torch's own can be off in the last bit.
    """
    results = []
    for tensor in tensors:
        values = tensor.detach().double().flatten()
        factor = 1.0
        total = ordered_sum(values * values).item()
        if tensor.dtype == torch.float64 and not 2.0**-900 <= total < math.inf:
            factor = 2.0**600 if total < math.inf else 2.0**-600
            scaled = values * factor
            total = ordered_sum(scaled * scaled).item()
        results.append(math.sqrt(total) / factor)
    return torch.tensor(results, dtype=torch.float64)


def ordered_sum(values: Tensor) -> Tensor:
    """Sum a float64 vector in the kernels' order.

    Blocks of 4096 elements; in a block, lane j adds elements j, j + 16, j + 32, ... one after the other, starting
    from zero; the 16 lanes are added in halves (lane j + lane j+8, then j+4, j+2, j+1). The block sums are a vector
    again, summed in the same way until one number is left.
    """
    while True:
        blocks = max(1, -(-values.numel() // NORM_BLOCK))
        padded = values.new_zeros(blocks * NORM_BLOCK)
        padded[: values.numel()] = values
        rows = padded.view(blocks, NORM_BLOCK // NORM_LANES, NORM_LANES)
        lanes = values.new_zeros(blocks, NORM_LANES)
        for row in range(rows.shape[1]):
            lanes = lanes + rows[:, row]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        values = lanes[:, 0]
        if blocks == 1:
            return values[0]


def fold(weights: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Sequence[int]] | None = None) -> None:
    """Zero what the masks drop, in place."""
    if blocks is not None:
        units, masks = masks, [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
        expand(units, blocks, masks)
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight.masked_fill_(~mask, 0)


def mask_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """Take the weight where the mask is True."""
    return torch.where(mask, weight, 0)


def expand(unit_masks: Sequence[Tensor], blocks: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> None:
    """Repeat each unit over its block."""
    for units, block, mask in zip(unit_masks, blocks, masks, strict=True):
        for dim, size in enumerate(block):
            units = units.repeat_interleave(size, dim).narrow(dim, 0, mask.shape[dim])
        mask.copy_(units)


def unit_scores(
    tensors: Sequence[Tensor], blocks: Sequence[Sequence[int]], *, p: float | None = 1.0, reduction: str = "sum"
) -> list[Tensor]:
    """Reduce each unit in float64, dimension by dimension, the first one first; sums as `_sum_along` orders them.

    Dimensions from the third on that the block covers are taken as one, as the height and width of a kernel are. So
    no sum runs over channels and kernel positions at once: it is in order whichever of them is innermost in memory.
    """
    scores = []
    for tensor, block in zip(tensors, blocks, strict=True):
        values = tensor.detach().double()
        values = values if p is None else values.abs()
        if reduction == "max":
            for dim, size in enumerate(block):
                values = _tiles(values, dim, size, -math.inf).amax(dim + 1)
            values = _power(values, p)
        else:
            values = _power(values, p)
            shape, sizes = list(values.shape), list(block)
            for dim in range(values.dim() - 1, 2, -1):
                if all(sizes[d] >= shape[d] for d in (dim - 1, dim)):
                    shape[dim - 1 : dim + 1] = [shape[dim - 1] * shape[dim]]
                    sizes[dim - 1 : dim + 1] = [shape[dim - 1]]
            values = values.reshape(shape)
            for dim, size in enumerate(sizes):
                values = _sum_along(values, dim, size)
            values = values.reshape([-(-size // step) for size, step in zip(tensor.shape, block, strict=True)])
        if reduction == "mean":
            values = values / _elements_of_units(tensor, block)
        values = values if tensor.dtype in (torch.float64, torch.bool) else values.float()
        scores.append(torch.where(values.isnan(), math.nan, values + 0.0))
    return scores


def _elements_of_units(tensor: Tensor, block: Sequence[int]) -> Tensor:
    """Count the elements that each unit really has."""
    counts = torch.ones((), dtype=torch.float64, device=tensor.device)
    for size, step in zip(tensor.shape, block, strict=True):
        along = (size - torch.arange(0, size, step, device=tensor.device)).clamp(max=step)
        counts = counts.unsqueeze(-1) * along
    return counts


def _power(values: Tensor, p: float | None) -> Tensor:
    if p is None or p == 1:
        return values
    return values * values if p == 2 else values.pow(p)


def _tiles(values: Tensor, dim: int, size: int, fill: float = 0.0) -> Tensor:
    """Split a dimension into [tiles, size], filled up at the end."""
    missing = -values.shape[dim] % size
    padding = values.new_full((*values.shape[:dim], missing, *values.shape[dim + 1 :]), fill)
    whole = torch.cat([values, padding], dim)
    return whole.reshape(*values.shape[:dim], whole.shape[dim] // size, size, *values.shape[dim + 1 :])


def _sum_along(values: Tensor, dim: int, size: int) -> Tensor:
    """Sum the units of a dimension, which are of this size.

    Elements are shared by lanes: lane j adds elements j, j + lanes, ... one after the other, starting from zero, and
    the lanes are added in halves, as in `ordered_sum`. No lane adds more than 256: what has more elements is cut into
    pieces, whose sums are summed in the same way until one number is left. There are 16 lanes; but only one for up to
    16 elements, and where the later dimensions have 64 elements or more, which fill the lanes of a processor too.
    """
    behind = math.prod(values.shape[dim + 1 :])
    values = _tiles(values, dim, size)
    while values.shape[dim + 1] > 1:
        count = values.shape[dim + 1]
        lanes = 1 if count <= NORM_LANES or behind >= UNIT_ROOM else NORM_LANES
        steps = min(UNIT_STEPS, -(-count // lanes))
        pieces = _tiles(_tiles(values, dim + 1, steps * lanes), dim + 2, lanes)
        values = torch.zeros_like(pieces.select(dim + 2, 0))
        for step in range(steps):
            values = values + pieces.select(dim + 2, step)
        while values.shape[dim + 2] > 1:
            values = torch.add(*values.chunk(2, dim + 2))
        values = values.squeeze(dim + 2)
    return values.squeeze(dim + 1)


def count_zeros(tensors: Sequence[Tensor]) -> Tensor:
    """Count the elements equal to zero."""
    return torch.stack([(tensor == 0).sum() for tensor in tensors])


def philox(seed: int, stream: int, blocks: Tensor) -> Tensor:
    """Return the four 32-bit words of each block of Philox4x32-10, int64 of shape [len(blocks), 4].

    Paper: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    low = 0xFFFFFFFF
    a, b = blocks & low, blocks >> 32 & low
    c, d = torch.full_like(blocks, stream & low), torch.full_like(blocks, stream >> 32 & low)
    key0, key1 = seed & low, seed >> 32 & low
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, a)
        high1, low1 = _multiply(0xCD9E8D57, c)
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([a, b, c, d], dim=1)


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower half of the 64-bit product of 32-bit words."""
    lower, upper = (factor & 0xFFFF) * words, (factor >> 16) * words
    upper = upper + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def gate_noise(shape: Sequence[int], seed: Tensor, stream: int = 0) -> Tensor:
    """Take the upper 23 bits of each word, in the middle of their interval."""
    numel = math.prod(shape)
    words = philox(int(seed), stream, torch.arange(-(-numel // 4))).flatten()[:numel]
    return (((words >> 9) + 0.5) * 2.0**-23).to(torch.float32).reshape(tuple(shape)).to(seed.device)


def spread(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat each value over the block of neighbours that share a gate."""
    for dim, (gates, size) in enumerate(zip(values.shape, shape, strict=True)):
        sizes = list(values.shape)
        sizes.insert(dim + 1, size // gates if gates else 1)
        values = values.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)
    return values


def bernoulli_gate(weight: Tensor, logits: Tensor, noise: Tensor | None) -> Tensor:
    """Compare, and let autograd go straight through the comparison; in float64."""
    x = logits.double() if noise is None else logits.double() + torch.logit(noise.double())
    p = torch.sigmoid(x)
    gate = p + ((x > 0).double() - p).detach()
    return weight.double() * spread(gate, weight.shape)


def hard_concrete_gate(
    weight: Tensor,
    logits: Tensor,
    noise: Tensor | None,
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
    straight_through: bool = False,
) -> Tensor:
    """Stretch and clamp; in float64."""
    x = logits.double() if noise is None else (logits.double() + torch.logit(noise.double())) / beta
    soft = (torch.sigmoid(x) * (zeta - gamma) + gamma).clamp(0, 1)
    gate = soft + ((soft > 0).double() - soft).detach() if straight_through else soft
    return weight.double() * spread(gate, weight.shape)


def gate_penalty(logits: Sequence[Tensor], *, hard: bool = False, shift: float = 0.0) -> Tensor:
    """Sum the probabilities, or the decisions with the gradient of the probabilities; in float64."""
    sums = []
    for one in logits:
        p = torch.sigmoid(one.double() + shift)
        sums.append((p + ((one > 0).double() - p).detach() if hard else p).sum())
    return torch.stack(sums)


def pack(
    tensors: Sequence[Tensor], masks: Sequence[Tensor] | None = None, *, negative_zeros: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Look at the bytes of each element: it is kept if one of them is not 0, or by the mask."""
    bits, values = [], []
    for index, tensor in enumerate(tensors):
        flat = tensor.detach().contiguous().flatten()
        count, size = flat.numel(), flat.element_size()
        data = flat.view(torch.uint8).view(count, size).clone()
        signed = tensor.dtype.is_floating_point and not str(tensor.dtype).endswith("fnuz")
        if signed and not negative_zeros:
            data[:, -1] &= 0x7F
        kept = (data != 0).any(1) if masks is None else masks[index].flatten()
        padded = torch.nn.functional.pad(kept, (0, -count % 8)).view(-1, 8)
        places = 2 ** torch.arange(8, device=kept.device)
        bits.append((padded * places).sum(1).to(torch.uint8))
        values.append(flat.view(torch.uint8).view(count, size)[kept].flatten().view(tensor.dtype))
    return bits, values


def unpack(bits: Sequence[Tensor], values: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Write the bytes of the values where bits are set."""
    tensors = []
    for row, some, shape in zip(bits, values, shapes, strict=True):
        count, size = math.prod(shape), some.element_size()
        kept = ((row.unsqueeze(1) >> torch.arange(8, device=row.device)) & 1).flatten()[:count].bool()
        data = torch.zeros(count, size, dtype=torch.uint8, device=row.device)
        data[kept] = some.view(torch.uint8).view(-1, size)
        tensors.append(data.flatten().view(some.dtype).view(tuple(shape)))
    return tensors


def sparsegpt_block(
    weight: Tensor, sums: Tensor, factor: Tensor, mask: Tensor, *, keep: int = 0, of: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Column by column, from left to right; return what weight, sums and mask become."""
    weight, sums, mask = weight.clone(), sums.clone(), mask.clone()
    inverse = 1 / factor.diagonal()
    columns = range(weight.shape[1])
    for j in columns:
        if of and j % of == 0:
            group = slice(j, j + of)
            if_kept, scores = sums[:, group].clone(), torch.empty_like(sums[:, group])
            for k in range(if_kept.shape[1]):
                scores[:, k] = (weight[:, j + k] * factor[j + k, j + k] + if_kept[:, k]).abs()
                if_kept[:, k] = -(if_kept[:, k] * inverse[j + k])
                if_kept[:, k + 1 :] += if_kept[:, k : k + 1] * factor[j + k, j + k + 1 : j + if_kept.shape[1]]
            (chosen,), _ = group_masks([scores], [of], [keep], row_dims=[1], factors=[None], bases=[mask[:, group]])
            mask[:, group] = chosen
        kept = -(sums[:, j] * inverse[j])
        sums[:, j] = torch.where(mask[:, j], kept, weight[:, j])
        weight[:, j] = torch.where(mask[:, j], weight[:, j] - kept, 0)
        sums[:, j + 1 :] += sums[:, j : j + 1] * factor[j, j + 1 :]
    return weight, sums, mask


def pack_sparse(weight: Tensor, layout: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return what a packed weight stands for: the weight as its values are stored."""
    if dtype != torch.int8:
        return weight.to(dtype or weight.dtype)
    stored = weight.float()
    if weight.numel():
        scale = stored.abs().amax(1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        stored = (stored / scale).round().clamp(-127, 127) * scale
    return stored


def sparse_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, layout: str = "index"
) -> Tensor:
    """Add products in float64, of those weights only that are kept: not zero, or beside one in a column of four."""
    rows, columns = weight.shape
    kept = weight != 0
    if layout == "block4":
        padded = torch.nn.functional.pad(kept, (0, 0, 0, -rows % 4)).view(-1, 4, columns)
        kept = padded.any(1, keepdim=True).expand(-1, 4, -1).reshape(-1, columns)[:rows]
    flat = input.reshape(math.prod(input.shape[:-1]), 1, columns).double()
    result = torch.where(kept, weight.double() * flat, 0).sum(2)
    if bias is not None:
        result = result + bias.double()
    if activation == "relu":
        result = torch.relu(result)
    elif activation == "silu":
        result = torch.nn.functional.silu(result)
    elif activation is not None:
        result = torch.nn.functional.gelu(result, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result.view(*input.shape[:-1], rows)
