"""Prune in rounds with training between: iterative pruning, and lottery tickets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.calibration.calibrate import Calibration
from pyprune.calibration.training_statistics import needs_training
from pyprune.checks import check_bool
from pyprune.console import as_html, as_text, tracked
from pyprune.methods.allocation import Amount, check_ratio
from pyprune.methods.importance import magnitude
from pyprune.methods.method import Method, PruneMode, check_amount
from pyprune.methods.schedules import Ratio, Schedule, as_schedule, check_ratios, check_step, nothing_of
from pyprune.methods.tolerance import check_drop, worsening
from pyprune.modules.evaluation import check_callable, score_of
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.snapshots import Snapshot, check_rewindable, restored_on_failure, rewind
from pyprune.modules.statistics import pruning_statistic
from pyprune.modules.targets import attachments_of
from pyprune.selection.find_prunable import find_prunable
from pyprune.selection.prune import method_with_ratios, put_masks

_MAGNITUDE = Method(magnitude())
_MOST_STEPS = 10**6


@dataclass(frozen=True)
class PruningRound:
    """One round of pruning and training.

    Args:
        iteration: number of the round, from 1.
        ratio: what was asked for.
        sparsity: fraction of the weights with masks that is zero.
        score_before: the score once pruned, before training; None without ``eval_fn``.
        score: the score after training.
    """

    iteration: int
    ratio: Ratio
    sparsity: float
    score_before: float | None
    score: float | None


@dataclass(frozen=True)
class IterativeResult:
    """What `iterative_prune` and `lottery_ticket` did. ``str()`` is a table of the rounds.

    Args:
        baseline: the score of the dense model.
        history: all rounds that were run, also the one that lost too much.
        kept: the round whose weights and masks the model has now; None if it is as it was.
        dense: the state_dict of the model as it was, on the CPU.
    """

    baseline: float | None
    history: tuple[PruningRound, ...]
    kept: PruningRound | None
    dense: Mapping[str, Tensor] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON; without the weights."""
        rounds = [asdict(one) for one in self.history]
        return {
            "baseline": self.baseline,
            "history": rounds,
            "kept": None if self.kept is None else self.kept.iteration,
        }

    def __str__(self) -> str:
        # Imported here: `import pyprune` must cost little.
        from rich import box
        from rich.table import Table

        table = Table(title="Rounds of pruning", title_justify="left", box=box.SIMPLE)
        for name in ("round", "ratio", "sparsity", "score, pruned", "trained", ""):
            table.add_column(name, justify="right")
        table.add_row("dense", "", "", "", _number(self.baseline))
        for one in self.history:
            ratio = "by name" if isinstance(one.ratio, dict) else f"{one.ratio:.4g}"
            table.add_row(
                str(one.iteration),
                ratio,
                f"{one.sparsity:.2%}",
                _number(one.score_before),
                _number(one.score),
                "kept" if one is self.kept else "",
            )
        return as_text(table)

    def _repr_html_(self) -> str:
        return as_html(str(self))


@torch.inference_mode(False)
def iterative_prune(
    model: nn.Module,
    schedule: Schedule | Callable[[int], Ratio] | Sequence[Ratio],
    method: Method | PruneMode | str,
    finetune_fn: Callable[[nn.Module], object],
    eval_fn: Callable[[nn.Module], float],
    *,
    num_iterations: int | None = None,
    max_drop: float | None = None,
    higher_is_better: bool = True,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    calibrate_fn: Callable[[nn.Module], Calibration] | None = None,
    reintroduce: bool = False,
    zero_dead_channels: bool = False,
    progress: bool = True,
) -> IterativeResult:
    """Prune a little, evaluate, fine-tune, evaluate, and again, to the last ratio or to a tolerated drop.

    The model is left with the weights and masks of the last round, or with ``max_drop`` of the sparsest one whose
    score after training holds it. Call `strip` at the end. If one of your functions fails or is interrupted, the
    model is as it was at the call, with its gradients, buffers, flags, hooks and modules (a copy of its tensors is
    kept on the CPU): save in ``finetune_fn`` what you would not lose.

    Args:
        model: the model, trained.
        schedule: the ratios of all rounds; or a `Schedule` with an end, whose due steps are the rounds (those left
            out at which nothing more goes than before); or any function, called with 1 to ``num_iterations``. The
            ratios are of all units, not of those left.
        method: how units are chosen; not for gates.
        finetune_fn: trains the model in place. Masks are on, so a new optimizer each time is best: the moments of an
            old one would move weights that were just dropped.
        eval_fn: takes the model and returns its score. Called in evaluation mode, without gradients, with the same
            random numbers each time; buffers that it changes are given back.
        num_iterations: how many rounds, for a function or a schedule without an end.
        max_drop: stop once the score after training is worse than before pruning by more than this.
        higher_is_better: False if the score is a loss or an error.
        ignored_scope, examples_inputs, zero_dead_channels: as in `prune`.
        calibrate_fn: for an importance that needs it: takes the model before each pruning and returns what
            `calibrate` gathers.
        reintroduce: choose among all units each time, so that some can come back; else among those left.
        progress: whether to show a bar, on a terminal.

    Raises:
        TypeError, ValueError: for arguments that `prune` would refuse too, ratios that fall (unless units may come
            back), a number of rounds that is missing or too much, and a score that is no number.

    Paper: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(8, 2)
        >>> inputs, outputs = torch.randn(64, 8), torch.randn(64, 2)
        >>> def loss(model):
        ...     return nn.functional.mse_loss(model(inputs), outputs)
        >>> def finetune(model):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     loss(model).backward()
        ...     optimizer.step()
        >>> result = iterative_prune(
        ...     model, (0.25, 0.5), "UNSTRUCTURED_MAGNITUDE_LOCAL", finetune, loss, higher_is_better=False
        ... )
        >>> [one.sparsity for one in result.history], int((model.weight == 0).sum())
        ([0.25, 0.5], 8)
    """
    chosen = method_with_ratios(method)
    check_callable("finetune_fn", finetune_fn)
    check_callable("eval_fn", eval_fn)
    check_drop("max_drop", max_drop)
    for flag, value in (
        ("higher_is_better", higher_is_better),
        ("reintroduce", reintroduce),
        ("zero_dead_channels", zero_dead_channels),
        ("progress", progress),
    ):
        check_bool(flag, value)
    amounts = [
        check_amount(chosen, Amount(ratio, dropped_stay=not reintroduce))
        for ratio in _ratios(schedule, num_iterations)
    ]
    if not reintroduce:
        _check_rising(amounts)
    _check_model(model, chosen, calibrate_fn, ignored_scope, examples_inputs)
    prune_to = partial(_prune_to, model, chosen, calibrate_fn, ignored_scope, examples_inputs, zero_dead_channels)
    with restored_on_failure(model) as dense:
        baseline = score_of(model, eval_fn)
        history: list[PruningRound] = []
        kept: PruningRound | None = None
        best = dense
        for i, amount in enumerate(tracked(amounts, len(amounts), "Pruning", shown=progress), start=1):
            sparsity = prune_to(amount)
            before = score_of(model, eval_fn)
            finetune_fn(model)
            score = score_of(model, eval_fn)
            assert amount.ratio is not None
            history.append(PruningRound(i, _plain(amount.ratio), sparsity, before, score))
            if max_drop is None:
                kept = history[-1]
                continue
            if not worsening(baseline, score, higher_is_better) <= max_drop:
                break
            if kept is None or sparsity >= kept.sparsity:
                kept, best = history[-1], Snapshot.of(model)
        if max_drop is not None and kept is not history[-1]:
            best.restore(model)
    return IterativeResult(baseline, tuple(history), kept, dense.state)


@torch.inference_mode(False)
def lottery_ticket(
    model: nn.Module,
    train_fn: Callable[[nn.Module], object],
    ratio: float,
    *,
    iterations: int,
    method: Method | PruneMode | str = _MAGNITUDE,
    rewind_to: Mapping[str, Tensor] | None = None,
    eval_fn: Callable[[nn.Module], float] | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    calibrate_fn: Callable[[nn.Module], Calibration] | None = None,
    progress: bool = True,
) -> IterativeResult:
    """Find a sparse subnetwork that trains from its initial weights: train, prune, rewind, and again.

    Round i of n prunes what is left, by the trained weights, to a ratio of ``1 - (1 - ratio)^(i / n)`` in all: each
    takes the same share. Then weights and buffers go back to what they were (BatchNorm's too), the masks stay, and
    the subnetwork is trained. So the model is trained ``iterations + 1`` times, first dense; in the end it is the
    last ticket, trained, with its masks on. If one of your functions fails, the model is as it was at the call.

    Args:
        model: the model, dense and not trained, or hardly.
        train_fn: trains the model in place, from beginning to end, with an optimizer of its own.
        ratio: fraction of the units to remove in the end, in [0, 1).
        iterations: how many rounds of pruning.
        method: how units are chosen; not for gates.
        rewind_to: a state_dict of the dense model, from an early step of training; if None, the model at the call.
        eval_fn, ignored_scope, examples_inputs, calibrate_fn, progress: as in `iterative_prune`. Without ``eval_fn``
            the history has no scores.

    Returns:
        The history, whose ``score_before`` is that of the rewound ticket, ``score`` that of the trained one, and
        ``baseline`` that of the trained dense model.

    Raises:
        TypeError, ValueError: for arguments that `prune` would refuse too, a model with masks, and a ``rewind_to``
            that does not fit.

    Papers: Frankle & Carbin 2019, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks";
    Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (for ``rewind_to``).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, inputs, outputs = nn.Linear(50, 2), torch.randn(64, 50), torch.randn(64, 2)
        >>> def train(model):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     nn.functional.mse_loss(model(inputs), outputs).backward()
        ...     optimizer.step()
        >>> result = lottery_ticket(model, train, 0.8, iterations=4)
        >>> [one.sparsity for one in result.history]
        [0.33, 0.55, 0.7, 0.8]
    """
    chosen = method_with_ratios(method)
    check_callable("train_fn", train_fn)
    check_bool("progress", progress)
    final, rounds = check_ratio(ratio), check_step(iterations, "iterations", least=1)
    # The last is exactly what was asked for, not rounded by the formula.
    ratios = [*(1 - (1 - final) ** (i / rounds) for i in range(1, rounds)), final]
    amounts = [check_amount(chosen, Amount(ratio, dropped_stay=True)) for ratio in ratios]
    if eval_fn is not None:
        check_callable("eval_fn", eval_fn)
    _check_model(model, chosen, calibrate_fn, ignored_scope, examples_inputs)
    if attachments_of(model):
        raise ValueError(
            "the model carries masks or gates; a lottery ticket begins with a dense model: strip it first"
        )
    if rewind_to is not None:
        check_rewindable(model, rewind_to)

    prune_to = partial(_prune_to, model, chosen, calibrate_fn, ignored_scope, examples_inputs, False)

    def score() -> float | None:
        return None if eval_fn is None else score_of(model, eval_fn)

    with restored_on_failure(model) as dense:
        train_fn(model)
        baseline = score()
        history: list[PruningRound] = []
        for i, amount in enumerate(tracked(amounts, rounds, "Lottery ticket", shown=progress), start=1):
            sparsity = prune_to(amount)
            rewind(model, dense.state if rewind_to is None else rewind_to)
            before = score()
            train_fn(model)
            assert isinstance(amount.ratio, float)
            history.append(PruningRound(i, amount.ratio, sparsity, before, score()))
    return IterativeResult(baseline, tuple(history), history[-1], dense.state)


def _check_model(
    model: nn.Module, method: Method, calibrate_fn: object, ignored_scope: IgnoredScope | None, examples_inputs: Any
) -> None:
    """Raise for what pruning would refuse, before a model is trained for hours."""
    find_prunable(model, method, ignored_scope, examples_inputs)
    if needs_training(method.importance):
        if calibrate_fn is None:
            raise ValueError(
                f"importance {method.importance.name} needs statistics; give calibrate_fn=lambda model: "
                "pyprune.calibrate(model, dataset, importance, ...)"
            )
        check_callable("calibrate_fn", calibrate_fn)
    elif calibrate_fn is not None:
        raise ValueError(f"importance {method.importance.name} takes no calibration; leave calibrate_fn out")


def _prune_to(
    model: nn.Module,
    method: Method,
    calibrate_fn: Callable[[nn.Module], Calibration] | None,
    ignored_scope: IgnoredScope | None,
    examples_inputs: Any,
    zero_dead_channels: bool,
    amount: Amount,
) -> float:
    """Put masks on, and return how much of the weights that have masks is zero."""
    put_masks(
        model,
        method,
        amount,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
        calibration=None if calibrate_fn is None else calibrate_fn(model),
        zero_dead_channels=zero_dead_channels,
    )
    return pruning_statistic(model, ignored_scope=ignored_scope).pruning_ratio


def _ratios(schedule: object, num_iterations: int | None) -> list[Ratio]:
    """Return the ratio of each round."""
    rounds = None if num_iterations is None else check_step(num_iterations, "num_iterations", least=1)
    if isinstance(schedule, Sequence) and not isinstance(schedule, (str, bytes)):
        if not schedule or rounds not in (None, len(schedule)):
            raise ValueError(
                f"schedule has {len(schedule)} ratios and num_iterations is {rounds}; give one per round"
            )
        return [check_ratios(ratio, "a ratio of schedule") for ratio in schedule]
    if isinstance(schedule, Schedule) and schedule.end is not None:
        if rounds is not None:
            raise ValueError(
                f"num_iterations is {rounds}, but the rounds are the steps at which {schedule.name} is due; leave it "
                "out, or give the ratios themselves"
            )
        if schedule.end - schedule.start > _MOST_STEPS:
            raise ValueError(f"schedule has {schedule.end - schedule.start:,} steps; give the ratios of the rounds")
        due = [schedule(step) for step in range(schedule.start, schedule.end + 1) if schedule.is_due(step)]
        before: list[Ratio] = [nothing_of(due[0]), *due]
        ratios = [ratio for ratio, last in zip(due, before, strict=False) if ratio != last]
        if not ratios:
            raise ValueError(f"the ratio of schedule {schedule.name} is always 0; give one that prunes")
        return ratios
    planned = as_schedule(schedule)  # type: ignore[arg-type]
    if rounds is None:
        raise ValueError("the schedule has no end; say by num_iterations how many rounds there are to be")
    return [planned(step) for step in islice(filter(planned.is_due, count(1)), rounds)]


def _check_rising(amounts: Sequence[Amount]) -> None:
    ratios = [amount.ratio for amount in amounts]
    for before, after in pairwise(ratios):
        if isinstance(before, float) and isinstance(after, float) and after < before:
            raise ValueError(
                f"the ratio falls from {before:g} to {after:g}, and units that are dropped stay so; give ratios that "
                "rise, or reintroduce=True"
            )


def _plain(ratio: float | Mapping[str, float]) -> Ratio:
    return dict(ratio) if isinstance(ratio, Mapping) else float(ratio)


def _number(score: float | None) -> str:
    return "" if score is None or math.isnan(score) else f"{score:.4g}"
