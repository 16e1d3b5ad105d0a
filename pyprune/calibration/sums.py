"""Sums of gradients and activations, from which importances are computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyprune.console import listed, warn
from pyprune.methods.importance import Importance
from pyprune.modules.activations import but_channels, input_squares, recurrent_input
from pyprune.modules.masks import raw_weight
from pyprune.modules.targets import Target, output_layers
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

    def results(self, count: int) -> dict[Target, Tensor]:
        """Return all statistics, of ``count`` batches."""
        return {target: self.result(target, count) for target in self.sums}


class ActivationSums:
    """Norms of the inputs of layers in training, or figures of their outputs: one number for each channel.

    They are seen by hooks on the layers, because a training may be compiled. `UseSums` sees more.

    Args:
        rule: what the sums are for.
        targets: of whose layers.

    Raises:
        ValueError: if the activations of a target cannot be seen.
    """

    def __init__(self, rule: Importance, targets: list[Target]) -> None:
        self.rule = rule
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
                f"the activations of {listed(problems)} cannot be seen while a model trains, from outside of its "
                "layer; name it in ignored_scope, or use calibrate and prune, which see them inside"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationSums":
        # A copy of a model brings copies of its hooks, which nobody listens to.
        deaf = object.__new__(type(self))
        deaf.gathers = False
        return deaf

    def _visible(self, target: Target) -> list[tuple[nn.Module, str]]:
        layers = [(layer, "input") for layer in output_layers(target)]
        if not target.layout.is_clear:
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
        if not self.gathers or not layer.training or _is_recomputed():
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
            return mean_of_outputs(target, sums, self.counts[target])
        return norms_of_inputs(target, sums.reshape(target.layout.groups, 1, -1))


def without_tables(rule: Importance, targets: Sequence[Target]) -> list[Target]:
    """Leave out embeddings where an importance needs activations, and warn: nothing is multiplied with them."""
    tables = [target for target in targets if target.layout.is_table]
    if not tables or rule.needs not in ("input norm", "zero outputs", "mean output"):
        return list(targets)
    warn_of_tables(rule, tables)
    return [target for target in targets if target not in tables]


def warn_of_tables(rule: Importance, tables: Sequence[Target]) -> None:
    """Say that embeddings are left out."""
    warn(
        f"importance {rule.name} leaves out {listed([target.name for target in tables])}: rows are looked up there, "
        "and nothing is multiplied with them. To say so yourself, name it in ignored_scope"
    )


def norms_of_inputs(target: Target, squares: Tensor) -> Tensor:
    """Return the norms of the inputs of a weight, to be broadcast over it.

    Args:
        target: the weight.
        squares: their squares: (groups, outputs of one, or 1 if all have the same inputs, inputs of one).
    """
    layout, shape = target.layout, target.parameter.shape
    if len(shape) < 2:
        return squares.sqrt().reshape(-1).to(_wide(target))
    assert layout.outputs is not None
    assert layout.inputs is not None
    groups, outputs, inputs = squares.shape
    sizes = [groups] + [1] * len(shape)
    sizes[layout.outputs + 1], sizes[layout.inputs + 1] = outputs, inputs
    norms = (squares if layout.outputs < layout.inputs else squares.mT).sqrt().reshape(sizes)
    if groups > 1 and norms.shape[1] == 1:  # along the first dimension, each group has its own
        norms = norms.repeat_interleave(shape[0] // groups, dim=1)
    return norms.flatten(0, 1).to(_wide(target))


def mean_of_outputs(target: Target, sums: Tensor, counts: Tensor) -> Tensor:
    """Return the means of what the outputs of a weight were."""
    return (sums / counts.clamp(min=1)).to(_wide(target))


def _is_recomputed() -> bool:
    """Whether this forward pass is part of a backward pass, as that of checkpointed activations."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _wide(target: Target) -> torch.dtype:
    return torch.float64 if target.parameter.dtype == torch.float64 else torch.float32
