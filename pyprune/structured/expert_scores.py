"""How much an expert matters: scores, of which the lowest go."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyprune.calibration.padding import Padding
from pyprune.checks import check_choice, check_number
from pyprune.console import listed, warn
from pyprune.modules.evaluation import forward
from pyprune.structured.experts import Mixture, mixtures_of
from pyprune.structured.passes import all_outputs, check_examples, check_removable, hooked

# What an expert adds to a token counts if it is more than this share of the whole.
_SMALL = 1e-6


@torch.inference_mode(False)
def expert_scores(model: nn.Module, examples: Any, *, importance: str = "output") -> dict[str, float]:
    """Score the experts of all mixtures of a model, as `drop_experts` does before it removes any.

    Args:
        model, examples: as for `drop_experts`; the model is only run.
        importance: ``"output"``, the mean norm of what the expert adds to the tokens that are routed to it, its
            output times its weight (REAP); or ``"use"``, the share of tokens that are. Padding does not count.

    Returns:
        A score for each expert by its name (higher = keep), such as a later
        ``drop_experts(..., importance=lambda name, module, number: scores[name])`` goes by. A warning names mixtures
        that the examples do not call, whose experts are missing.

    Raises:
        TypeError, ValueError: for wrong arguments, if there is no mixture of experts, or none is called.

    Paper: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression".

    Example:
        >>> class MoE(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(4, 3)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...
        ...     def forward(self, x):
        ...         weights = self.gate(x).softmax(-1)
        ...         return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        >>> expert_scores(MoE(), torch.randn(5, 4), importance="use")
        {'experts.0': 1.0, 'experts.1': 1.0, 'experts.2': 1.0}
    """
    check_removable(model)
    inputs = check_examples(examples)
    check_choice("importance", importance, ("use", "output"))
    mixtures = mixtures_of(model)
    all_outputs(model, inputs)  # they fit, and are numbers
    use, output = use_and_output(model, inputs, mixtures)
    idle = [one.name for one in mixtures if one.experts[0] not in use]
    if not use:
        raise ValueError(f"the examples do not call {listed(idle)}, so there are no scores; give others")
    if idle:
        warn(f"the examples do not call {listed(idle)}, so their experts have no scores")
    return use if importance == "use" else output


class _Tally:
    """Of each expert of a mixture: how many tokens it got, and the sum of the norms of what it added to them."""

    def __init__(self, mixture: Mixture, padding: Padding) -> None:
        self.mixture = mixture
        self.padding = padding
        self.tokens = 0
        self.routed = torch.zeros(mixture.count, dtype=torch.float64)
        self.added = torch.zeros(mixture.count, dtype=torch.float64)
        self.is_done = False  # in this call of the block
        self.is_inside = False  # calls in here are none of the model's

    def note(self, expert: Tensor, norms: Tensor) -> None:
        expert, norms = expert.flatten().cpu(), norms.flatten().double().cpu()
        self.routed.index_add_(0, expert, torch.ones_like(norms))
        self.added.index_add_(0, expert, norms)

    def after_experts(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        """Note what fused experts do that are told the experts of each token, and their weights."""
        found = _routing([*args, *keywords.values()], self.mixture.count)
        if found is None or self.is_done:
            return
        self.is_done = True
        index, weights = found
        real = self._count(len(index), index.device)
        for slot in range(index.shape[1]):
            one = {id(index): index[:, slot : slot + 1], id(weights): torch.ones_like(weights[:, :1])}
            alone = module.forward(
                *(one.get(id(x), x) for x in args), **{key: one.get(id(x), x) for key, x in keywords.items()}
            )
            norms = _tensor(alone).reshape(len(index), -1).norm(dim=-1) * weights[:, slot].abs()
            is_expert = real & (index[:, slot] < self.mixture.count)  # other numbers are none
            self.note(index[is_expert, slot], norms[is_expert])

    def after_block(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        """Note what the output of the block loses without each expert, if nothing said what that is."""
        if self.is_done or self.is_inside:
            self.is_done = False
            return
        self.is_inside = True
        whole = _tensor(output)
        whole_norms = whole.norm(dim=-1).flatten()
        real = self._count(len(whole_norms), whole.device)
        for expert in range(self.mixture.count):
            norms = (whole - _tensor(self._without(expert, args, keywords))).norm(dim=-1).flatten()
            is_routed = real & (norms > _SMALL * whole_norms)
            self.note(torch.full_like(norms[is_routed], expert, dtype=torch.int64), norms[is_routed])
        self.is_inside = False

    def _count(self, tokens: int, device: torch.device) -> Tensor:
        """Count tokens, and return which are no padding."""
        real = self.padding.tokens(tokens)
        real = torch.ones(tokens, dtype=torch.bool) if real is None else real
        self.tokens += int(real.sum())
        return real.to(device)

    def _without(self, expert: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        one = self.mixture
        if one.members:
            handle = one.module.get_submodule(one.members[expert]).register_forward_hook(_zeros)
            try:
                return one.block.forward(*args, **keywords)
            finally:
                handle.remove()
        tensors = {}
        for part in one.fused:
            tensor = part.tensor.detach().clone()
            tensor[expert * part.rows : (expert + 1) * part.rows] = 0
            tensors[part.name.removeprefix(one.block_name).lstrip(".")] = tensor
        return functional_call(one.block, tensors, args, keywords)


def _zeros(module: nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor):
        raise TypeError(f"a block of experts returns a {type(found).__name__}, no tensor, so they have no scores")
    return found.detach()


def _routing(arguments: Sequence[Any], count: int) -> tuple[Tensor, Tensor] | None:
    """Return the experts of each token and their weights, if they are among the arguments: (tokens, k) both."""
    tensors = [one for one in arguments if isinstance(one, Tensor) and one.dim() == 2]
    for index in tensors:
        if index.dtype not in (torch.int64, torch.int32):
            continue
        for weights in tensors[::-1]:
            if weights.is_floating_point() and weights.shape == index.shape:
                return index, weights
    return None


def use_and_output(
    model: nn.Module, examples: Iterable[Any], mixtures: Sequence[Mixture]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return of each expert the share of tokens that are routed to it, and the mean of what it adds to these.

    What it adds is the norm of its output times its weight; 0 if no token is routed to it. Those of mixtures that the
    examples do not reach, or that are not called as modules, are missing.

    Paper: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (the second).
    """
    padding = Padding(model)
    tallies = [_Tally(one, padding) for one in mixtures]
    after = [(one.mixture.module, one.after_experts) for one in tallies if one.mixture.fused]
    after += [(one.mixture.block, one.after_block) for one in tallies]
    with hooked(model, after=after):
        for inputs in examples:
            padding.begin(inputs)
            forward(model, inputs, "examples")
    use: dict[str, float] = {}
    output: dict[str, float] = {}
    for one in [one for one in tallies if one.tokens]:
        use |= zip(one.mixture.experts, (one.routed / one.tokens).tolist(), strict=True)
        output |= zip(one.mixture.experts, (one.added / one.routed.clamp_min(1)).tolist(), strict=True)
    return use, output


def given_by(function: Callable[[str, nn.Module, int], object], mixtures: Iterable[Mixture]) -> dict[str, float]:
    """Return what a function of the user makes of each expert: its name, the module it is in, and its number."""
    return {
        name: check_number(
            f"the score that importance gave {name}", function(name, one.module, number), what="a finite number"
        )
        for one in mixtures
        for number, name in enumerate(one.experts)
    }
