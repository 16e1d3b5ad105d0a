"""How a forward pass uses the weights of a model: which products they are in, and what they multiply.

Products are seen below autograd, where there are few kinds of them: a linear layer, ``x @ w``, einsum, attention and
recurrent layers all come down to `mm` and the like, with views of the weights whose strides say which of their
dimensions count inputs.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.methods.layout import Layout
from pyprune.modules.evaluation import recurrence_unfused, using
from pyprune.modules.origins import Origins, Part, tensors_in
from pyprune.modules.products import PRODUCTS, Operand, Window
from pyprune.modules.undo import undoing

MOVED = "its entries are moved before it is used"
# Arguments of functions that are inputs, and no weights, even where they are parameters (learned queries).
_ATTENTION = "multi_head_attention_forward"
_INPUTS = {"linear": 1, "scaled_dot_product_attention": 3, _ATTENTION: 3}


@dataclass(frozen=True, eq=False)
class Use:
    """One product of a weight.

    Args:
        part: the weight, and what of it was used.
        layout: what the dimensions of the weight count by this.
        given: what it multiplies: (entries, positions, channels), where entries are groups of a convolution, or
            matrices that are multiplied one by one; None if it was a table, or that cannot be said.
        made: what came out, likewise, with the bias.
        entries: to which group each entry belongs; None for all in order, or the one that ``part`` has.
        window: how a convolution moves over what it multiplies.
        dims: the dimensions before the last that this had when it was given to a linear layer or attention of torch.
        is_length_first: whether attention of torch gave these another order, positions before examples.
    """

    part: Part
    layout: Layout
    given: Tensor | None = None
    made: Tensor | None = None
    entries: Tensor | None = None
    window: Window | None = None
    dims: tuple[int, ...] | None = None
    is_length_first: bool = False


@contextmanager
def watching_uses(
    model: nn.Module, on_use: Callable[[Use], None], *, in_recurrent_layers: bool = True
) -> Iterator[None]:
    """Call a function with each use of a parameter of a model while this is on; compiled models run uncompiled.

    To see products in recurrent layers takes many times as long as what runs these as one.

    Example:
        >>> linear = nn.Linear(3, 2)
        >>> seen = []
        >>> with watching_uses(linear, seen.append):
        ...     _ = linear(torch.ones(5, 3))
        >>> seen[0].layout.inputs, tuple(seen[0].given.shape)
        (1, (1, 5, 3))
    """
    products = _Products(Origins(model), on_use)
    stack = ExitStack()
    with undoing(stack.close):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if in_recurrent_layers and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(recurrence_unfused())
        stack.enter_context(using(_Inputs(products)))
        stack.enter_context(using(products))
        yield
        products.settle()


# After these a linear layer may add its bias.
_BEFORE_BIAS = {"mm", "mv", "bmm", "_trilinear"}
_VIEWS = {"view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand"}


class _Inputs(TorchFunctionMode):
    """Tells which parameters a function takes as its input."""

    def __init__(self, products: "_Products") -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        count = _INPUTS.get(getattr(func, "__name__", "").strip("_"), 0)
        kwargs = kwargs or {}
        if not count:
            return func(*args, **kwargs)
        before = self.products.inputs, self.products.leading
        origins = self.products.origins
        named = [kwargs[name] for name in ("input", "query", "key", "value") if name in kwargs]
        tensors = list(tensors_in([*args[:count], *named]))
        self.products.inputs = before[0] | {part.parameter for one in tensors for part in origins.parts(one)}
        is_attention = func.__name__ == _ATTENTION
        self.products.leading = is_attention, [tuple(one.shape[:-1]) for one in tensors]
        try:
            return func(*args, **kwargs)
        finally:
            self.products.inputs, self.products.leading = before


class _Products(TorchDispatchMode):
    """Sees products with weights."""

    supports_higher_order_operators = True

    def __init__(self, origins: Origins, on_use: Callable[[Use], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins = origins
        self.inputs: set[nn.Parameter] = set()
        # Of the inputs of the function that runs: whether it is attention, and their dimensions before the last.
        self.leading: tuple[bool, list[tuple[int, ...]]] = (False, [])
        self._on_use = on_use
        self._waiting: list[Use] = []  # for a bias

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # flex_attention and the like
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        product = PRODUCTS.get(name)
        if product is None:
            with self:  # under inference_mode linear and matmul arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._settle_before(name, args)
        result = func(*args, **kwargs)
        if product is None:
            self.origins.follow(func, (*args, *kwargs.values()), result)
            return result
        operands = product(args, result)
        self._waiting = [use for operand in operands for use in self._uses_of(operand, operands)]
        if name not in _BEFORE_BIAS:
            self.settle()
        return result

    def _uses_of(self, operand: Operand, operands: list[Operand]) -> Iterator[Use]:
        parts = [part for part in self.origins.parts(operand.weight) if part.parameter not in self.inputs]
        others = [part for one in operands if one is not operand for part in self.origins.parts(one.weight)]
        for part in parts:
            if any(other.parameter not in self.inputs for other in others):
                yield Use(part, Layout(None, None, problem="it is multiplied with another parameter"))
            else:
                use = _use(operand, part)
                rows = None if use.given is None else use.given.shape[:-1].numel()
                dims = next((dims for dims in self.leading[1] if math.prod(dims) == rows), None)
                yield replace(use, dims=dims, is_length_first=self.leading[0])

    def _settle_before(self, name: str, args: tuple[Any, ...]) -> None:
        """Report what waits for a bias, unless this operation only looks at what was made."""
        if not self._waiting:
            return
        made = self._waiting[0].made
        tensors = list(tensors_in(args))
        if made is None or not tensors or tensors[0].untyped_storage()._cdata != made.untyped_storage()._cdata:
            self.settle()
        elif name in ("add", "add_") and len(tensors) > 1 and self.origins.is_known(tensors[1]):
            bias = tensors[1]
            self._waiting = [
                replace(use, made=use.made + bias)
                if use.made is not None and bias.shape == use.made.shape[-1:]
                else use
                for use in self._waiting
            ]
            self.settle()
        elif name not in _VIEWS:
            self.settle()

    def settle(self) -> None:
        """Report what waits for a bias."""
        waiting, self._waiting = self._waiting, []
        for use in waiting:
            self._on_use(use)


def _use(operand: Operand, part: Part) -> Use:
    if operand.is_table:
        return Use(part, Layout(is_table=True))
    if part.is_moved:
        return Use(part, Layout(None, None, problem=MOVED))
    layout = _layout(operand, part)
    given, made, entries = operand.given, operand.made, operand.entries
    if operand.batch is not None and given is not None:
        picked = _entries(operand, part)
        if picked is None and part.dims[operand.batch]:
            given = None  # several dimensions went into one
        entries = picked
    return Use(part, layout, given, made, entries, operand.window)


def _entries(operand: Operand, part: Part) -> Tensor | None:
    """Return to which group of a weight each entry of a batch of products belongs."""
    assert operand.batch is not None
    count, device = operand.weight.shape[operand.batch], operand.weight.device
    there = torch.tensor(part.ranges[0], device=device) if part.entries is None else part.entries
    if part.dims[operand.batch] not in ({0}, set()) or (part.dims[operand.batch] and len(there) != count):
        return None
    if operand.entries is not None:
        return there[operand.entries]
    return there if part.dims[operand.batch] else None


def _layout(operand: Operand, part: Part) -> Layout:
    shape = tuple(part.parameter.shape)
    if len(shape) < 2:
        return Layout()

    def dims_of(dim: int | None) -> frozenset[int]:
        return frozenset() if dim is None else part.dims[dim]

    outputs, inputs, batch = dims_of(operand.outputs), dims_of(operand.inputs), dims_of(operand.batch)
    if outputs & inputs or len(outputs) > 1 or len(inputs) > 1:
        return Layout(None, None, problem="its outputs or inputs lie along several dimensions")
    used = {dim for dims in part.dims for dim in dims}
    # What a product does not move along: an expert was picked, or there is only one entry.
    others = {dim for dim in range(len(shape)) if dim not in used and shape[dim] > 1} | batch
    free = [dim for dim in range(len(shape)) if shape[dim] == 1]
    out_dim, in_dim = (min(dims) if dims else None for dims in (outputs, inputs))
    is_kernel = operand.batch is None and operand.weight.dim() == len(shape) > 2
    if is_kernel and all(dims <= {dim} for dim, dims in enumerate(part.dims)):
        # As the convolution has it; dimensions of size 1 say nothing by themselves.
        out_dim, in_dim = operand.outputs, operand.inputs
    if out_dim is None and free:
        out_dim = free.pop(0)
    if in_dim is None and free and not operand.problem:
        in_dim = free.pop(0)
    if others - {0} or (others and 0 in (out_dim, in_dim)):
        return Layout(None, None, problem="only a part of it is used at once, and not along its first dimension")
    problem = operand.problem
    if not problem and (out_dim is None or in_dim is None):
        problem = "it has no dimension for both outputs and inputs"
    groups = shape[0] if others else operand.groups
    return Layout(out_dim, in_dim, groups, problem)
