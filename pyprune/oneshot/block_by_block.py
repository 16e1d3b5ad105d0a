"""One-shot pruning of one block after the other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from pyprune.modules.targets import Target
from pyprune.modules.undo import Change
from pyprune.oneshot.digest import digest
from pyprune.oneshot.find_blocks import Block
from pyprune.oneshot.input_grams import InputGrams
from pyprune.oneshot.model_in_files import ModelInFiles
from pyprune.oneshot.reconstruct import Fit, Reconstruction
from pyprune.oneshot.rule import Rule
from pyprune.oneshot.run_folder import Done, RunFolder
from pyprune.oneshot.solve_block import Solved, solve_block, write_block
from pyprune.oneshot.stored import InMemory, Stored
from pyprune.oneshot.walk import Walk

# With fewer tokens than this share of its inputs a weight is measured badly.
_FEW = 0.1


@dataclass(eq=False)
class OneShot:
    """What is done to each block of a model, under `evaluating` and `untouched`.

    Args:
        model: the model.
        walk: through its blocks.
        targets: by block: the weights that are pruned.
        rule: how.
        ratios: how much goes of each weight.
        given: scores, of an importance that has them.
        propagate: whether inputs of a block are those that the pruned blocks before it make.
        reconstruct: what is done to a block at last; None for nothing.
        folder: where what is done is kept; None for nowhere.
        memory: bytes that the Gram of one input may take.
        files: what loads and writes blocks that are not in memory.
    """

    model: nn.Module
    walk: Walk
    targets: Mapping[str, Sequence[Target]]
    rule: Rule
    ratios: Mapping[Target, float | None]
    given: Mapping[Target, Tensor | None]
    propagate: bool
    reconstruct: Reconstruction | None
    folder: RunFolder | None
    memory: int
    files: ModelInFiles | None = None

    def __post_init__(self) -> None:
        self._dense: Stored = self.walk.stored
        if self.propagate and self.reconstruct is not None:
            self._dense = InMemory() if self.folder is None else self.folder.dense

    def prune(self, place: int) -> Done:
        """Prune a block; a failure leaves it as it was."""
        block = self.walk.blocks[place]
        with nullcontext() if self.files is None else self.files.loaded(block.module):
            return self._prune(place, block)

    def _prune(self, place: int, block: Block) -> Done:
        targets = self.targets[block.name]
        is_last = place == len(self.walk.blocks) - 1
        with Change(self.model, values=self._values(block, targets)):
            if not targets:
                self.walk.run(place, into=None if is_last else self.walk.stored)
                if self._dense is not self.walk.stored and not is_last:
                    self.walk.run(place, into=self._dense, over=self._dense)
                return self._finish(block, Done(block.name), {})
            if self._dense is not self.walk.stored:
                self.walk.run(place, into=self._dense, over=self._dense)
            keeps = not self.propagate and (not is_last or self.reconstruct is not None)
            grams = InputGrams(targets, memory=self.memory)
            with grams.watching(block.module, self.walk.padding):
                self.walk.run(place, into=self.walk.stored if keeps else None)
            unseen, inputs = grams.unseen(), grams.results()
            if inputs and not any(int(into.tokens.sum()) for into in inputs.values()):
                raise ValueError("data has no tokens: all positions of its batches are padding, or there are none")
            solved = solve_block(block.name, self.rule, inputs, self.ratios, self.given)
            notes = [(f"left as it is: {why}", target.name) for target, why in unseen.items()]
            for target, into in inputs.items():
                notes += [(what, target.name) for what in self._notes(into.note, target, solved[target])]
            del grams, inputs
            write_block(self.model, solved)
            fit = None
            if self.reconstruct is not None:
                found = self._reconstructed(place, block, solved)
                fit = found.before, found.after
                notes += [(what, block.name) for what in _failure(found)]
            if self.propagate and not is_last:
                self.walk.run(place, into=self.walk.stored)
            weights = tuple(one.said for one in solved.values())
            return self._finish(block, Done(block.name, weights, tuple(notes), fit), solved)

    def restore(self, place: int) -> Done:
        """Let a block that is done be what it has become."""
        assert self.folder is not None
        done, block = self.folder.done[place], self.walk.blocks[place]
        if self.files is not None:  # it has been written, and is not run again
            return done
        tensors = self.folder.tensors(place)
        targets = self.targets[block.name]
        with Change(self.model, values=self._values(block, targets)):
            solved: dict[Target, Solved] = {}
            said = {one.name: one for one in done.weights}
            for target in targets:
                if target.name in said:
                    device = target.parameter.device
                    values, mask = (tensors[f"{kind}:{target.name}"].to(device) for kind in ("values", "mask"))
                    solved[target] = Solved(values, mask, said[target.name])
            write_block(self.model, solved)
            known = {target.parameter for target in solved}
            for name, parameter in block.module.named_parameters():
                if parameter not in known and f"other:{name}" in tensors:
                    parameter.copy_(tensors[f"other:{name}"])
        return done

    def _values(self, block: Block, targets: Sequence[Target]) -> list[Tensor]:
        """Return what may be written to."""
        if self.reconstruct is not None:
            return list(block.module.parameters())
        return [target.parameter for target in targets]

    def _finish(self, block: Block, done: Done, solved: Mapping[Target, Solved]) -> Done:
        self.walk.stored.turn()
        if self._dense is not self.walk.stored:
            self._dense.turn()
        if self.folder is not None:
            tensors = None if self.files is not None else self._tensors(block.module, solved)
            if self.files is not None:
                self.files.write(block)
            self.folder.finish(done, tensors, weights_digest(block.module))
        return done

    def _tensors(self, module: nn.Module, solved: Mapping[Target, Solved]) -> dict[str, Tensor]:
        """Return what brings a block to what it has become."""
        tensors: dict[str, Tensor] = {}
        for target, one in solved.items():
            tensors[f"values:{target.name}"] = target.parameter
            tensors[f"mask:{target.name}"] = one.mask
        if self.reconstruct is not None:
            known = {target.parameter for target in solved}
            tensors |= {f"other:{name}": one for name, one in module.named_parameters() if one not in known}
        return tensors

    def digest(self, block: Block) -> str:
        """Return what says which weights a block has."""
        with nullcontext() if self.files is None else self.files.loaded(block.module):
            return weights_digest(block.module)

    def _reconstructed(self, place: int, block: Block, solved: Mapping[Target, Solved]) -> Fit:
        assert self.reconstruct is not None
        return self.reconstruct.fit(
            lambda number: self.walk.output(place, number),
            lambda number: self._dense.fresh(block.of, number),
            len(self.walk.batches),
            block.module.parameters(),
            {target.parameter: one.mask for target, one in solved.items()},
            padding=self.walk.padding.positions,
        )

    def _notes(self, note: str, target: Target, solved: Solved) -> Iterator[str]:
        said = solved.said
        if note:
            yield note
        if solved.lost_kept:
            yield "some inputs are zero in all data, and the solver made all weights zero that multiply them"
        columns = said.total // max(1, target.parameter.shape[target.layout.outputs or 0])
        if target.layout.groups == 1 and said.tokens[0] < _FEW * columns:
            yield f"measured on fewer tokens than a tenth of its inputs ({said.tokens[0]})"
        asked = getattr(self.rule.solver, "damping", None)
        if said.damping is not None and isinstance(asked, float) and said.damping > asked:
            yield f"solved with damping {said.damping:g}, because with {asked:g} its Gram has no factors"


def _failure(fit: Fit) -> Iterator[str]:
    """Say why a block is not reconstructed."""
    if fit.diverged:
        yield "not reconstructed, because that came to NaN or infinity; give a smaller lr"
    elif fit.before and fit.after >= fit.before:
        yield "not reconstructed, because that made it no better; give another lr, or more steps"


def weights_digest(module: nn.Module) -> str:
    """Return what says which weights a module has."""
    return digest(*module.parameters(), *module.buffers())
