"""Padding: which rows of what weights multiply are of positions that only fill a batch up, and say nothing.

A batch says it by its masks. A tensor whose rows are as many as a mask has positions has these rows, in the order of
its dimensions. Rows that a router picked are found by their values among those of the last tensor of all positions,
and what is computed of them keeps their order.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.console import listed, warn
from pyprune.modules.attachments import unwrapped
from pyprune.modules.targets import Target
from pyprune.modules.uses import Use

# Arguments with one value for each position, and what has this many positions; True or 1 is real in those of
# transformers, padding in those of torch.
_MASKS = {
    "attention_mask": ("input_ids", "inputs_embeds", "encoder_outputs"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
    "src_key_padding_mask": ("src",),
    "tgt_key_padding_mask": ("tgt",),
    "memory_key_padding_mask": ("memory",),
    "key_padding_mask": ("key",),
}


class Padding:
    """The padding of the batch that goes through a model.

    Args:
        model: the model that takes the batches.

    Example:
        >>> padding = Padding(nn.Linear(2, 2))
        >>> padding.begin({"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])})
        >>> [real.tolist() for real in padding.real]
        [[[True, True, False]]]
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrapped(model)
        self._model = model
        attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        # In the order of torch's attention, unless it says otherwise.
        self._length_first = any(not module.batch_first for module in attentions)
        # They go through the positions one by one, or in another order.
        recurrent = [module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.RNNCellBase))]
        self._of_recurrent = {parameter for module in recurrent for parameter in module.parameters()}
        self.real: list[Tensor] = []  # (examples, positions), bool; nothing if nothing is padded
        self.unknown: dict[nn.Parameter, None] = {}  # whose rows are kept because it cannot be said which are real
        self._whole: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by columns: the last rows of all positions, which are real
        self._picked: Tensor | None = None  # which are real of the rows that were picked last

    def begin(self, batch: Any) -> None:
        """Say which batch goes through the model next."""
        given = _by_name(self._model, batch)
        self.real = list(_masks(given, self._length_first)) if any(name in given for name in _MASKS) else []
        if all(bool(one.all()) for one in self.real):
            self.real = []
        self._whole.clear()
        self._picked = None

    def positions(self, output: Tensor) -> Tensor | None:
        """Return which positions of what a layer gives are real, (examples, positions); None if all are or may be.

        Args:
            output: (examples, positions, channels...).
        """
        found = [real for real in self.real if output.dim() > 2 and output.shape[:2] == real.shape]
        return found[0].to(output.device) if found and _are_equal(found) else None

    def tokens(self, count: int) -> Tensor | None:
        """Return which of so many tokens, the batch's positions in their order, are real; None as `positions`."""
        found = [real.flatten() for real in self.real if real.numel() == count]
        return found[0] if found and _are_equal(found) else None

    def rows(self, use: Use) -> Tensor | None:
        """Return which entries and positions of a use are real, flat; None if all are, or nobody can tell.

        Those of a convolution are positions of its input.
        """
        if not self.real or use.given is None or use.layout.is_table:
            return None
        if use.part.parameter in self._of_recurrent:
            self.unknown[use.part.parameter] = None
            return None
        shape, device = tuple(use.given.shape[:-1]), use.given.device
        if use.window is not None:
            # Of (groups, examples, positions); all groups have the same. Images have no padding.
            found = self._by_shape(shape[1:], None, None) if len(shape) == 3 else []
            found = [one.repeat(shape[0]) for one in found]
            if len(shape) > 3:
                return None
        elif use.entries is not None:
            found = []  # picked
        else:
            found = self._by_shape(shape, use.dims, use.is_length_first or None)
        if found and _are_equal(found):
            real = found[0].to(device)
            if use.window is None and len(real) == math.prod(shape):
                self._whole[use.given.shape[-1]] = use.given.detach().flatten(0, -2).clone(), real
            return real
        if not found and use.window is None:
            picked = self._by_values(use.given.detach().flatten(0, -2))
            if picked is not None:
                self._picked = picked
                return picked
            if len(shape) <= 2 and math.prod(shape) in {len(one) for one in self.real}:
                return None  # one for each example
        self.unknown[use.part.parameter] = None
        return None

    def warn(self, targets: Iterable[Target]) -> None:
        """Say which weights were measured with padding, if there are any."""
        names = [target.name for target in targets if target.parameter in self.unknown]
        if names:
            warn(
                f"batches are padded, and which rows of the inputs of {listed(names)} are padding cannot be told "
                "from their number, so all rows count there; give batches without padding"
            )

    def _by_shape(
        self, shape: tuple[int, ...], dims: tuple[int, ...] | None, length_first: bool | None
    ) -> list[Tensor]:
        """Return what the masks say of rows: (rows) each."""
        count = math.prod(shape)
        order = self._length_first if length_first is None else length_first
        at = tuple(size for size in dims or shape if size > 1)
        found = []
        for real in self.real:
            sizes = tuple(size for size in real.shape if size > 1)
            two = len(sizes) == 2
            rest = count // max(1, real.numel())
            if at[: len(sizes)] == sizes and not (two and sizes[0] == sizes[1] and order):
                found.append(real.reshape(-1).repeat_interleave(rest))
            elif two and at[:2] == sizes[::-1]:
                found.append(real.T.reshape(-1).repeat_interleave(rest))
            elif at[1:] == (real.numel(),):  # each group has all
                found.append(real.reshape(-1).repeat(at[0]))
            elif count == real.numel():
                found.append((real.T if order else real).reshape(-1))
        return found

    def _by_values(self, rows: Tensor) -> Tensor | None:
        """Return which rows are real of those that were picked from others, or computed of rows that were."""
        if rows.shape[-1] in self._whole:
            whole, real = self._whole[rows.shape[-1]]
            keys, known = _keys(rows), _keys(whole)
            is_real, is_padding = torch.isin(keys, known[real]), torch.isin(keys, known[~real])
            if bool((is_real | is_padding).all()):
                return is_real
        return self._picked if self._picked is not None and len(self._picked) == len(rows) else None


def _keys(rows: Tensor) -> Tensor:
    """Return a number for each row, the same for the same bits in any floating type."""
    bits = rows.double().contiguous().view(torch.int64)
    # Odd factors, so that no bit of the sum is lost.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator).mul_(2).add_(1)
    mixed = (bits ^ (bits >> 32)) * factors.to(bits.device)
    return (mixed ^ (mixed >> 29)).sum(-1)


def _by_name(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return what a model is called with, by the names of its arguments."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if isinstance(name, str)}
    args = batch if isinstance(batch, tuple) else (batch,)
    try:
        return dict(inspect.signature(model.forward).bind(*args).arguments)
    except (TypeError, ValueError):  # the call will say so
        return {}


def _masks(given: Mapping[str, Any], length_first: bool) -> Iterable[Tensor]:
    """Yield which positions are real: of each mask, and all where there is none for what has positions, too."""
    for name, of in _MASKS.items():
        mask = given.get(name)
        inputs = [one for key in of if isinstance(one := given.get(key), Tensor) and one.dim() > 1]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            shape = tuple(mask.shape)
            orders = [slice(2), slice(1, None, -1)] if "padding" in name else [slice(2)]
            if not inputs or any(tuple(one.shape[order]) == shape for one in inputs for order in orders):
                yield _real(name, mask)
        elif inputs and name.startswith(("decoder", "tgt")):
            yield _all_real(inputs[0], length_first and name.startswith("tgt"))
    query = given.get("query")
    if isinstance(query, Tensor) and query.dim() > 1 and query is not given.get("key"):
        yield _all_real(query, length_first)


def _are_equal(masks: list[Tensor]) -> bool:
    return all(torch.equal(masks[0], one) for one in masks)


def _all_real(tensor: Tensor, length_first: bool) -> Tensor:
    first, second = tensor.shape[:2]
    return torch.ones((second, first) if length_first else (first, second), dtype=torch.bool, device=tensor.device)


def _real(name: str, mask: Tensor) -> Tensor:
    is_padding = "padding" in name
    if mask.is_floating_point() and (is_padding or bool((mask < 0).any())):
        return mask >= 0  # it is added to scores of attention
    return ~mask.bool() if is_padding else mask.bool()
