"""What a recipe says of a teacher."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from pyprune.recipes.stages import steps_of
from pyprune.recipes.yaml_source import Place
from pyprune.training.teacher import Distillation

_WEIGHTS = ("task_weight", "logits_weight", "hidden_weight")


@dataclass(frozen=True)
class Taught:
    """How a model learns from a teacher, and when.

    Args:
        start, end: in epochs; None for to the end of the training.
        module: the part of the model that the teacher stands for; "" for all of it.
        pairs, temperature, weights: as for `Distillation`.
        where: file, line and field, for messages.

    Example:
        >>> Taught(end=5.0).start
        0.0
    """

    start: float = 0.0
    end: float | None = None
    module: str = ""
    pairs: Sequence[str] | Mapping[str, str] = ()
    temperature: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    where: str = "teacher"

    def steps(self, steps_per_epoch: int) -> tuple[float, float]:
        """Return the step with which it begins, and the one before which it ends.

        Raises:
            ValueError: if there is none in between.

        Example:
            >>> Taught(end=5.0).steps(10)
            (0, 50)
        """
        start = steps_of(self.start, steps_per_epoch)
        if self.end is None:
            return start, math.inf
        end = steps_of(self.end, steps_per_epoch)
        if end <= start:
            raise ValueError(
                f"{self.where}: from epoch {self.start:g} to {self.end:g} there is no step, of {steps_per_epoch} per "
                "epoch; let it end later"
            )
        return start, end

    def begin(self, model: nn.Module, teacher: nn.Module) -> Distillation:
        """Put the teacher beside the model.

        Raises:
            ValueError: for one that does not fit; names file, line and field.
        """
        try:
            learner = model.get_submodule(self.module)
        except AttributeError as error:
            raise ValueError(
                f"{self.where}.module: {self.module!r} is no module of the model; see its named_modules()"
            ) from error
        try:
            return Distillation(learner, teacher, pairs=self.pairs, temperature=self.temperature, **self.weights)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {error}") from error


def read_taught(place: Place) -> Taught:
    """Read what a recipe says of a teacher.

    Raises:
        ValueError: for what is wrong, with the line where it stands.

    Example:
        >>> from pyprune.recipes.yaml_source import read
        >>> taught = read_taught(read("{pairs: [layers.5], temperature: 2, end: 8}", "recipe.yaml"))
        >>> taught.pairs, taught.temperature, taught.end
        (['layers.5'], 2.0, 8.0)
    """
    fields = place.fields(("start", "end", "module", "pairs", "temperature", *_WEIGHTS))
    start = fields["start"].number("a number of epochs") if "start" in fields else 0.0
    end = fields["end"].number("a number of epochs") if "end" in fields else None
    if end is not None and end <= start:
        raise fields["end"].error(f"the teacher ends at epoch {end:g}, but starts at {start:g}")
    pairs: Sequence[str] | Mapping[str, str] = ()
    if "pairs" in fields:
        named = fields["pairs"].node.id == "mapping"
        pairs = (
            {name: other.text() for name, other in fields["pairs"].pairs().items()}
            if named
            else fields["pairs"].texts()
        )
    temperature = 1.0
    if "temperature" in fields:
        temperature = fields["temperature"].number("a temperature", above=True)
    weights = {name: fields[name].number("a weight, at least 0") for name in _WEIGHTS if name in fields}
    module = fields["module"].text() if "module" in fields else ""
    return Taught(start, end, module, pairs, temperature, weights, str(place))
