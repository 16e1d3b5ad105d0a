"""Which tensors a forward pass uses as weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.calibration import evaluating, forward, untouched

# Where the weights are: positions and keywords of the arguments of a torch function, by the function's name.
_SECOND = ((1,), ("weight",))
_FIRST_TWO = ((0, 1), ("weight", "input", "other", "mat2", "vec"))
_AFTER_ADDEND = ((1, 2), ("mat1", "mat2", "mat", "vec", "batch1", "batch2"))
_WEIGHT_ARGUMENTS = {
    "linear": _SECOND,
    **{f"conv{transpose}{dims}d": _SECOND for transpose in ("", "_transpose") for dims in (1, 2, 3)},
    # torch.embedding takes the weight first, torch.nn.functional.embedding second; indices are no parameters.
    **dict.fromkeys(("embedding", "embedding_bag"), _FIRST_TWO),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "tensordot"), _FIRST_TWO),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm"), _AFTER_ADDEND),
    "einsum": ((1, 2, 3, 4, 5, 6, 7, 8), ()),
    "multi_head_attention_forward": (
        (5, 11),
        ("in_proj_weight", "out_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
}


class _WeightRecorder(TorchFunctionMode):
    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters: set[Tensor] = set(parameters)
        self.used: set[Tensor] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        positions, keywords = _WEIGHT_ARGUMENTS.get(getattr(func, "__name__", ""), ((), ()))
        arguments = [args[position] for position in positions if position < len(args)]
        for tensor in _tensors([*arguments, *(kwargs[name] for name in keywords if name in kwargs)]):
            # A view (a transpose, a reshape, an expand) knows the parameter it looks at.
            for parameter in (tensor, tensor._base):
                if parameter is not None and parameter in self.parameters:
                    self.used.add(parameter)
        return func(*args, **kwargs)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def used_as_weights(model: nn.Module, inputs: Any) -> set[Tensor]:
    """Run the model once; return the parameters that a linear, convolution, matmul or embedding takes as its weight.

    Both sides of a matrix product count; views of a parameter count as the parameter. The pass runs in
    evaluation mode without gradients; buffers, training flags and torch's random state are given back.

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2)
        >>> used_as_weights(linear, torch.ones(1, 2)) == {linear.weight}
        True
    """
    recorder = _WeightRecorder(model.parameters())
    with evaluating(model), untouched(model), recorder:
        forward(model, inputs)
    return recorder.used
