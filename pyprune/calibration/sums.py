"""Sums of gradients and activations, from which importances are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyprune.methods.importance import Importance
from pyprune.modules.activations import but_channels, input_squares, recurrent_input
from pyprune.modules.masks import raw_weight
from pyprune.modules.targets import Target, channel_dims, is_transposed, output_layers
from pyprune.modules.undo import undoing


class GradientSums:
    """Sums of gradients or of their squares, or momentum of |w g|, in float32 or float64."""

    def __init__(self, rule: Importance, targets: list[Target]) -> None:
        self.rule = rule
        self.sums = {t: torch.zeros_like(t.parameter, dtype=_wide(t), requires_grad=False) for t in targets}

    @torch.no_grad()
    def add(self, target: Target, gradient: Tensor) -> None:
        """Take in the gradient of the weight that a batch used."""
        gradient = gradient.detach().to(_wide(target))
        self.sums[target] = self.sums[target].to(gradient)  # the model may have been moved or cast
        if self.rule.needs == "momentum":
            decay, scale = cast(tuple[float, float], self.rule.options)
            weight = raw_weight(target).to(gradient.dtype)
            self.sums[target].mul_(decay).add_((weight * gradient).abs_(), alpha=scale)
        elif self.rule.needs == "gradient":
            self.sums[target] += gradient
        else:
            self.sums[target].addcmul_(gradient, gradient)

    def add_nothing(self, target: Target) -> None:
        """Take in that a batch did not use the weight."""
        if self.rule.needs == "momentum":
            self.sums[target].mul_(cast(float, self.rule.options[0]))

    def result(self, target: Target, count: int) -> Tensor:
        """Return the statistic of a weight, of ``count`` batches."""
        return self.sums[target] if self.rule.needs == "momentum" else self.sums[target] / count


class ActivationSums:
    """Norms of the inputs of layers, or figures of their outputs: one number for each channel.

    Args:
        rule: what the sums are for.
        targets: of whose layers.
        only_training: whether layers in evaluation mode are not looked at.

    Raises:
        ValueError: if the activations of a target cannot be seen.
    """

    def __init__(self, rule: Importance, targets: list[Target], *, only_training: bool = False) -> None:
        self.rule = rule
        self.only_training = only_training
        self.gathers = True  # False: hooks look at nothing
        self.layers: dict[Target, list[tuple[nn.Module, str]]] = {}
        self.sums: dict[Target, Tensor] = {}
        # Tensors: numbers that change would let a compiled model be compiled again.
        self.counts: dict[Target, Tensor] = {}
        problems = []
        for target in targets:
            self.layers[target] = self._visible(target)
            if not self.layers[target]:
                problems.append(target.name)
        if problems:
            raise ValueError(
                f"the activations of {', '.join(problems)} cannot be seen from outside of its layer; name it in "
                "ignored_scope, here and in prune"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationSums":
        # A copy of a model brings copies of its hooks, which nobody listens to.
        deaf = object.__new__(type(self))
        deaf.gathers = False
        return deaf

    def _visible(self, target: Target) -> list[tuple[nn.Module, str]]:
        layers = [(layer, "input") for layer in output_layers(target)]
        if len({is_transposed(layer) for layer, _ in layers}) > 1:
            return []  # tied the other way round, it has channels of two kinds
        if self.rule.needs == "input norm" and not layers:
            for owner in target.owners:
                kind = recurrent_input(owner.module, owner.attribute)
                layers += [] if kind is None else [(owner.module, kind)]
        return layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what goes through the layers."""
        with undoing(self.start()):
            yield

    def start(self) -> Callable[[], None]:
        """Look at what goes through the layers from now on; return what ends that."""
        hooks = [
            layer.register_forward_hook(partial(self._see, target, kind), with_kwargs=True)
            for target, layers in self.layers.items()
            for layer, kind in layers
        ]

        def stop() -> None:
            for hook in hooks:
                hook.remove()

        return stop

    @torch.no_grad()
    def _see(
        self, target: Target, kind: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self.gathers or (self.only_training and (not layer.training or _is_recomputed())):
            return
        if self.rule.needs == "input norm":
            figures = input_squares(kind, layer, args, kwargs, output)
            self.counts.setdefault(target, torch.ones((), dtype=torch.float64, device=figures.device))
        else:
            activation = cast(Callable[[Tensor], Tensor], self.rule.options[0])
            seen, others = but_channels(layer, output)
            seen = activation(seen)
            figures = ((seen == 0) if self.rule.needs == "zero outputs" else seen).sum(others, dtype=torch.float64)
            count = torch.full((), seen.numel() // max(1, figures.numel()), dtype=torch.float64, device=seen.device)
            self.counts[target] = self.counts[target] + count if target in self.counts else count
        self.sums[target] = self.sums[target] + figures if target in self.sums else figures

    def result(self, target: Target, count: int) -> Tensor:
        """Return the statistic of a weight; how many batches it is from does not matter."""
        sums = self.sums.get(target)
        if sums is None:
            raise ValueError(f"no batch went through the layer of {target.name}; name it in ignored_scope")
        if self.rule.needs != "input norm":
            return (sums / self.counts[target].clamp(min=1)).to(_wide(target))
        out_dim, in_dim = channel_dims(target)
        shape = [1] * target.parameter.dim()
        shape[in_dim] = sums.shape[-1]
        if sums.dim() > 1:  # each group of outputs has inputs of its own
            shape[out_dim] = target.parameter.shape[out_dim]
            sums = sums.repeat_interleave(shape[out_dim] // len(sums), dim=0)
        return sums.sqrt().reshape(shape).to(_wide(target))


def _is_recomputed() -> bool:
    """Whether this forward pass is part of a backward pass, as that of checkpointed activations."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _wide(target: Target) -> torch.dtype:
    return torch.float64 if target.parameter.dtype == torch.float64 else torch.float32
