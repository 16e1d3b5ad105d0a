"""Routers that never choose some experts: what a model without these must be equal to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.modules.evaluation import using
from pyprune.modules.undo import Before, undoing
from pyprune.structured.experts import Mixture
from pyprune.structured.passes import Outputs, all_outputs


class _Masked(TorchFunctionMode):
    """Sets the logits of some experts to minus infinity, where a product with the router's weight makes them."""

    def __init__(self, dropped: Mapping[Mixture, Sequence[int]]) -> None:
        super().__init__()
        # The weights, and what casts and transposes make of them: they are kept, so that an id is theirs.
        weights = {one: one.router[0].tensor for one in dropped}
        self.weights = {id(weights[one]): (one, weights[one], list(gone)) for one, gone in dropped.items()}
        self.reached: set[Mixture] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        known = next((self.weights[id(one)] for one in tensors if id(one) in self.weights), None)
        if known is None or not isinstance(output, Tensor):
            return output
        mixture, weight, gone = known
        if len(tensors) == 1 and output.numel() == weight.numel():
            self.weights[id(output)] = mixture, output, gone
        elif len(tensors) > 1 and output.dim() and output.shape[-1] == mixture.count:
            self.reached.add(mixture)
            output = output.clone()
            output[..., gone] = -torch.inf
        return output


def outputs_with_masked_routers(
    model: nn.Module, inputs: Sequence[Any], dropped: Mapping[Mixture, Sequence[int]]
) -> tuple[list[Outputs], set[Mixture]]:
    """Return the outputs if routers never choose some experts, and the mixtures for which that was seen to be done.

    Numbers that are added to their scores, as a bias or a correction, are minus infinity, too.
    """
    mode = _Masked(dropped)
    with undoing(Before(model).restore):
        for one, gone in dropped.items():
            for part in one.router[1:]:
                if part.tensor.shape == one.router[0].tensor.shape:  # of noise, which is none in evaluation
                    continue
                places = torch.tensor(list(gone), dtype=torch.int64, device=part.tensor.device)
                part.put(part.tensor.detach().clone().index_fill_(part.dim, places, -torch.inf))
        with using(mode):
            return all_outputs(model, inputs, may_be_nan=True), mode.reached
