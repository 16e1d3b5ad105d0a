"""Write element masks from masks of units, for a list of tensors in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.ops._blocks import check_blocks
from pyprune.ops._library import check_tensors, check_unit_masks, register_fake
from pyprune.ops._memory import check_memory


@torch.no_grad()
def expand(unit_masks: Sequence[Tensor], blocks: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> None:
    """Write True into ``masks[i]`` where the unit of an element is kept, False elsewhere.

    Args:
        unit_masks: one bool tensor per mask, of shape ``ceil(size / block)``, any strides.
        blocks: for each mask, the sizes of its units, one per dimension (see `unit_scores`).
        masks: the bool tensors to write, any strides without overlap.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, shapes that disagree, or masks that share memory.

    Example:
        >>> mask = torch.empty(2, 3, dtype=torch.bool)
        >>> expand([torch.tensor([[True, False]])], [(2, 2)], [mask])
        >>> mask.tolist()
        [[True, True, False], [True, True, False]]
    """
    check_tensors(masks, "masks", (torch.bool,))
    checked = check_blocks(blocks, masks, "masks")
    check_unit_masks(unit_masks, "unit_masks", checked, masks)
    check_memory({"masks": masks}, {"unit_masks": unit_masks})
    if masks:
        sizes = [size for block in checked for size in block]
        torch.ops.pyprune.expand(list(unit_masks), sizes, list(masks))
        torch.autograd.graph.increment_version(list(masks))


def _fake(unit_masks: list[Tensor], blocks: list[int], masks: list[Tensor]) -> None:
    return None


register_fake("pyprune::expand", _fake)
