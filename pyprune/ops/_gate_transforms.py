"""A gate under the transforms of `torch.func`, which take neither registered derivatives nor a context in forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _each(apply: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], *inputs: Any) -> list[Any]:
    """Call a function for each index of the dimension that `torch.vmap` adds."""
    return [
        apply(*(x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)))
        for index in range(size)
    ]


class TransformedGate(torch.autograd.Function):
    """The operator ``gate``, with the derivative that it has elsewhere."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """Multiply by the gates."""
        out: Tensor = torch.ops.pyprune.gate.default(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivative needs."""
        weight, logits, seed, *ctx.rule = inputs
        ctx.save_for_backward(weight, logits, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        wanted = ctx.needs_input_grad[:2]
        found: Any = _TransformedGradient.apply(grad, *ctx.saved_tensors, *ctx.rule, *wanted)  # type: ignore[no-untyped-call]
        rest = (None,) * (1 + len(ctx.rule))
        return (*(one if wants else None for one, wants in zip(found, wanted, strict=True)), *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        """Refuse: nothing would say that tangents are lost."""
        raise NotImplementedError("gates have no forward-mode derivative; differentiate in reverse mode")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Go through the models, or samples, one by one."""
        return torch.stack(_each(TransformedGate.apply, info.batch_size, in_dims, *inputs)), 0


class _TransformedGradient(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        weight, logits = torch.ops.pyprune.gate_backward.default(*inputs)
        return weight, logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "pyprune::gate_backward has no derivative: gates can be differentiated once, not twice"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        _TransformedGradient.backward(ctx, *tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        weights, logits = zip(*_each(_TransformedGradient.apply, info.batch_size, in_dims, *inputs), strict=True)
        return (torch.stack(weights), torch.stack(logits)), (0, 0)
