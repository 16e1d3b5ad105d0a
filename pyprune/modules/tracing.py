"""Which tensors a forward pass uses as weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyprune.modules.evaluation import evaluating, forward, untouched, using

# Where the weights are: positions and keywords of the arguments of a torch function, by the function's plain name.
_SECOND = ((1,), ("weight",))
_FIRST_TWO = ((0, 1), ("weight", "input", "other", "mat2", "vec", "tensor", "tensors"))
_AFTER_ADDEND = ((1, 2), ("mat1", "mat2", "mat", "vec", "batch1", "batch2"))
_WEIGHT_ARGUMENTS = {
    **dict.fromkeys(("linear", "convolution"), _SECOND),
    **{f"conv{transpose}{dims}d": _SECOND for transpose in ("", "_transpose") for dims in (1, 2, 3)},
    # torch.embedding takes the weight first, torch.nn.functional.embedding second; indices are no parameters.
    **dict.fromkeys(("embedding", "embedding_bag"), _FIRST_TWO),
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm", "mv", "dot", "inner", "multi_dot", "tensordot"), _FIRST_TWO),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm"), _AFTER_ADDEND),
    "einsum": ((1, 2, 3, 4, 5, 6, 7, 8), ()),
    "multi_head_attention_forward": (
        (5, 11),
        ("in_proj_weight", "out_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
}
# A weight in another dtype or layout is still that weight.
_COPIES = {"to", "type", "type_as", "bfloat16", "half", "float", "double", "clone", "contiguous", "detach", "to_copy"}


class _WeightRecorder(TorchFunctionMode):
    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters: dict[Tensor, Tensor] = {parameter: parameter for parameter in parameters}
        self.used: set[Tensor] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _plain_name(func)
        positions, keywords = _WEIGHT_ARGUMENTS.get(name, ((), ()))
        arguments = [args[position] for position in positions if position < len(args)]
        for tensor in _tensors([*arguments, *(kwargs[keyword] for keyword in keywords if keyword in kwargs)]):
            self.used.update(self._parameters_of(tensor))
        result = func(*args, **kwargs)
        if name in _COPIES and isinstance(result, Tensor):
            for tensor in _tensors(args[:1]):
                self.parameters.update((result, parameter) for parameter in self._parameters_of(tensor))
        return result

    def _parameters_of(self, tensor: Tensor) -> list[Tensor]:
        # A view (a transpose, a reshape, an expand) knows the tensor it looks at.
        return [self.parameters[known] for known in (tensor, tensor._base) if known in self.parameters]


def _plain_name(func: Callable[..., Any]) -> str:
    """Return "matmul" for ``__matmul__``, ``linalg.matmul`` and ``aten.matmul.default``, "addmm" for ``addmm_``."""
    return getattr(func, "__name__", "").split(".")[0].strip("_").removeprefix("linalg_")


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def used_as_weights(model: nn.Module, inputs: Any) -> set[Tensor]:
    """Run the model once; return the parameters that a linear, convolution, matmul or embedding takes as its weight.

    Both sides of a matrix product count; views and copies (casts, ``contiguous``) of a parameter count as the
    parameter. The pass runs in evaluation mode without gradients; buffers, training flags and torch's random state
    are given back.

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2)
        >>> used_as_weights(linear, torch.ones(1, 2)) == {linear.weight}
        True
    """
    recorder = _WeightRecorder(model.parameters())
    with evaluating(model), untouched(model), using(recorder):
        forward(model, inputs)
    return recorder.used
