"""Judge what shrink makes of one model: equal, smaller, trainable, exportable, rebuilt from its plan."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import pyprune
from pyprune.modules.evaluation import forward
from zoo.case import Case, draw
from zoo.masking import choose_half, expected_sizes, mask_units, tensors_of
from zoo.shake import numbers_in, outputs_of, shake

TOLERANCE = 1e-4
NEW_TOKENS = 8


def judge(case: Case, *, folder: Path | None = None, seed: int = 0, export: bool = True) -> dict[str, Any]:
    """Mask half of the units of each group, shrink, and compare with the masked model.

    Args:
        case: the model.
        folder: where plan, weights and output are left for another process to rebuild the model from.
        seed: of weights, examples and units.
        export: also export the result, which takes longest.

    Returns:
        What was seen, ready for JSON. A step that raised stands as "step": its error; what follows it is missing.
    """
    seen: dict[str, Any] = {}
    model, examples = draw(case.build, seed), draw(case.examples, seed + 1)
    others = draw(case.examples, seed + 2)  # which shrink does not see
    shake(model, examples, seed=seed)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    step(model, examples, optimizer)
    model.eval()
    seen["forward_s"] = seconds(lambda: outputs_of(model, examples), repeats=3)
    dense = outputs_of(model, examples)
    seen["finite"] = all(bool(out.isfinite().all()) for out in dense)

    seen["operations"] = operations(model, examples)
    groups = pyprune.coupled_groups(model, examples)
    seen["trace_s"] = seconds(lambda: pyprune.coupled_groups(model, examples), repeats=2)
    chosen = choose_half(groups, seed=seed)
    mask_units(model, chosen)
    sizes = expected_sizes(model, chosen)
    seen.update(groups=len(groups), exact=len(chosen), parameters=count(model))
    wanted = [outputs_of(model, one) for one in (examples, others)]
    seen["moved"] = difference(wanted[0], dense)  # by the zeros: were it nothing, being equal would tell nothing
    masked = copy.deepcopy(model) if case.decodes else None

    start = time.perf_counter()
    shrunk = pyprune.shrink(model, examples, optimizer=optimizer)
    seen["shrink_s"] = time.perf_counter() - start
    seen["held"] = [f"{one.groups} groups of {one.kind} stay: {one.why}" for one in shrunk.held]
    seen["stale"], seen["guessed"] = [str(one) for one in shrunk.stale], [str(one) for one in shrunk.guessed]
    seen["left"] = count(model) / seen["parameters"]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    seen["kept"] = sorted(name for name, shape in sizes.items() if shapes[name] != shape)
    seen["reasons"] = list(shrunk.kept)
    seen["error"] = max(difference(outputs_of(model, x), y) for x, y in zip((examples, others), wanted, strict=True))
    seen["equal"] = seen["error"] < TOLERANCE

    plan, small = shrunk.plan.to_json(), outputs_of(model, examples)
    if folder is not None:
        leave(folder, model, plan, small)
    if masked is not None:
        seen["tokens"] = attempt(lambda: torch.equal(tokens(model, examples), tokens(masked, examples)))
    if export:
        seen["export"] = attempt(lambda: exported(model, examples))
        if seen["export"] is not True:
            seen["dense_export"] = attempt(lambda: exported(draw(case.build, seed).eval(), examples))
    seen["rebuilt"] = attempt(lambda: rebuilds(case, plan, model.state_dict(), small, seed=seed))
    seen["trains"] = attempt(lambda: step(model, examples, optimizer))
    return seen


def attempt(do: Callable[[], bool]) -> bool | str:
    """Return what it says, or its error."""
    try:
        return do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]


def seconds(do: Callable[[], object], *, repeats: int) -> float:
    """Return the shortest of some times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return min(times)


def operations(model: nn.Module, examples: Any) -> int:
    """Return how many operations below autograd one forward pass is."""

    class Counter(TorchDispatchMode):
        """Count them."""

        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += 1
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        outputs_of(model, examples)
    return counter.total


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference of an output beside its own largest value; infinity if shapes differ."""
    if [tuple(one.shape) for one in got] != [tuple(one.shape) for one in wanted]:
        return float("inf")
    pairs = zip(got, wanted, strict=True)
    differences = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs if b.numel()]
    return max(float("inf") if one != one else one for one in differences)


def step(model: nn.Module, examples: Any, optimizer: Optimizer) -> bool:
    """Do one training step towards zero; True if all that has a gradient is finite after it, and something moved."""
    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    loss = sum(out.square().mean() for out in numbers_in(forward(model, examples)))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    model.eval()
    after = list(model.parameters())
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    shaped = all(
        value.shape == parameter.shape
        for parameter in after
        for name, value in optimizer.state.get(parameter, {}).items()
        if name != "step"
    )
    return moved and shaped and all(bool(parameter.isfinite().all()) for parameter in after)


def tokens(model: nn.Module, examples: dict[str, Any]) -> Tensor:
    """Return what the model writes greedily, with its cache."""
    words = examples["input_ids"]
    with torch.no_grad():
        return model.generate(  # type: ignore[operator]
            words, attention_mask=torch.ones_like(words), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        )


def exported(model: nn.Module, examples: Any) -> bool:
    """Export the model; True if what comes out computes the same."""
    args = examples if isinstance(examples, tuple) else () if isinstance(examples, dict) else (examples,)
    keywords = examples if isinstance(examples, dict) else {}
    wanted = outputs_of(model, examples)
    with torch.no_grad():
        program = torch.export.export(model, args, keywords, strict=False)
        return difference(numbers_in(program.module()(*args, **keywords)), wanted) < TOLERANCE


def rebuilds(case: Case, plan: str, state: dict[str, Tensor], output: list[Tensor], *, seed: int = 0) -> bool:
    """Rebuild the model from a fresh one, the text of its plan and its weights; True if the bits are the same."""
    fresh = pyprune.rebuild(draw(case.build, seed + 1).eval(), pyprune.Plan.from_json(plan))
    fresh.load_state_dict(state)
    got = outputs_of(fresh, draw(case.examples, seed + 1))
    return all(torch.equal(a, b) for a, b in zip(got, output, strict=True))


def leave(folder: Path, model: nn.Module, plan: str, output: list[Tensor]) -> None:
    """Write what another process needs to rebuild the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan)
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(output, folder / "output.pt")


def rebuilds_what_was_left(case: Case, folder: Path) -> bool:
    """Rebuild the model that another process left, as :func:`rebuilds` does."""
    plan = (folder / "plan.json").read_text()
    return rebuilds(case, plan, torch.load(folder / "state.pt"), torch.load(folder / "output.pt"))
