"""How one-shot pruning chooses and solves: a method, a scope and a solver that fit each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyprune.checks import shown
from pyprune.methods.allocation import Amount
from pyprune.methods.importance import magnitude
from pyprune.methods.method import Method, PruneMode, check_amount
from pyprune.methods.scope import Scope
from pyprune.methods.scope import tensor as each_tensor
from pyprune.oneshot.allocations import BlockAllocation
from pyprune.oneshot.solution import Solver
from pyprune.selection.prune import method_with_ratios

# What an importance may need: nothing, scores that are given, or what goes into the weights.
_MEASURED = ("none", "given", "input norm")


@dataclass(frozen=True)
class Rule:
    """What is done to each weight.

    Args:
        method: chooses the masks; None if the solver does, or takes those that are there.
        scope: what competes; None for the solver's own.
        solver: None if weights that are kept stay as they are.
        amount: how much goes of each weight.
    """

    method: Method | None
    scope: Scope | None
    solver: Solver | None
    amount: Amount

    @property
    def takes_masks(self) -> bool:
        """Whether it solves for masks that are there already."""
        return self.method is None and self.solver is not None and not self.solver.chooses

    def __str__(self) -> str:
        """Say all that results depend on, the same in every process."""
        method = "" if self.method is None else _text(self.method)
        return f"{method}; {self.scope}; {self.solver!r}; {self.amount}"


def rule_of(
    method: Method | Scope | PruneMode | str | None,
    solver: Solver | None,
    ratio: float | Mapping[str, float] | None,
    allocation: str | BlockAllocation,
) -> Rule:
    """Return how weights are chosen and solved.

    Raises:
        TypeError, ValueError: for arguments that are no such, or do not fit each other.
    """
    _check_solver(solver)
    scope: Scope | None = method if isinstance(method, Scope) else None
    found: Method | None = None if method is None or isinstance(method, Scope) else method_with_ratios(method)
    if solver is not None and solver.chooses:
        if found is not None:
            _check_ignored(found, solver)
            scope, found = found.scope, None
    elif solver is None and found is None:
        what = "None" if scope is None else "a scope"
        raise ValueError(f"method is {what}, and there is no solver; give a Method, or a solver that chooses")
    elif found is not None:
        scope = found.scope
    if found is not None:
        _check_measured(found)
    if scope is not None and scope.weights_compete:
        raise ValueError(
            f"method has scope {scope.name}, in which weights of different blocks compete, and blocks are pruned "
            "one after the other; give scope.tensor(), scope.row() or scope.n_of_m(), and ratios by name"
        )
    return Rule(found, scope, solver, _amount(found, scope, solver, ratio, allocation))


def _amount(
    method: Method | None,
    competing: Scope | None,
    solver: Solver | None,
    ratio: float | Mapping[str, float] | None,
    allocation: str | BlockAllocation,
) -> Amount:
    if isinstance(allocation, BlockAllocation):
        if isinstance(ratio, Mapping):
            raise ValueError(f"ratio is a dict, and allocation {allocation.name} shares one ratio out; give a number")
    elif not isinstance(allocation, str) or allocation != "uniform":  # what is no string may not even compare
        raise ValueError(
            f'allocation is {shown(allocation)}; give "uniform", or what a function of pyprune.allocations returns'
        )
    if solver is not None and not solver.chooses and method is None:
        if ratio is not None:
            raise ValueError(
                f"ratio is {shown(ratio)}, and solver {solver.name} without a method solves for the masks that are "
                "there; leave ratio out, or give a Method"
            )
        if isinstance(allocation, BlockAllocation):
            raise ValueError(
                f"allocation is {allocation.name}, and solver {solver.name} without a method solves for the masks "
                "that are there; leave it out, or give a Method"
            )
        return Amount()
    stands_for = method or Method(magnitude(), scope=competing or each_tensor())
    return check_amount(stands_for, Amount(ratio, dropped_stay=True))


def _check_solver(solver: object) -> None:
    if solver is None:
        return
    if isinstance(solver, type) or not all(hasattr(solver, part) for part in ("name", "chooses", "solve")):
        raise TypeError(f"solver is {shown(solver)}; give what a function of pyprune.solvers returns, or None")


def _check_ignored(method: Method, solver: Solver) -> None:
    if method.importance.needs != "gram":
        raise ValueError(
            f"method has importance {method.importance.name}, which solver {solver.name} would ignore: it chooses "
            "the masks by itself. Give importance.obs(), a scope or None; or a solver for masks (least_squares)"
        )
    if method.granularity.name != "element":
        raise ValueError(
            f"method has granularity {method.granularity.name}, and solver {solver.name} removes single elements"
        )


def _check_measured(method: Method) -> None:
    rule = method.importance
    if rule.needs == "gram":
        raise ValueError(f"method has importance {rule.name}, by which a solver chooses; give one, such as sparsegpt")
    if rule.needs not in _MEASURED:
        raise ValueError(
            f"method has importance {rule.name}, which needs {rule.needs}; here weights are scored by their values "
            "and inputs. Give importance.magnitude() or wanda(); or prune first, and solve for the masks: method=None"
        )
    if method.granularity.coupled is not None:
        raise ValueError(
            "method has granularity coupled, whose units lie in several blocks; prune first, and solve for the masks "
            "with method=None"
        )


def _text(method: Method) -> str:
    rule = method.importance
    cut = method.granularity
    return f"{rule.name} {rule.normalize} {rule.options!r} {cut.name} {cut.reduction} {method.scope}"
