"""A model whose weights stay in the files of a checkpoint, and are in memory one block at a time."""

import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pyprune.checks import shown
from pyprune.console import listed
from pyprune.files import whole_file
from pyprune.modules.strip import strip
from pyprune.modules.undo import undoing
from pyprune.oneshot.find_blocks import Block
from pyprune.oneshot.shards import Entry, Mapped, NewShards, read_entries

# What is smaller than this, and made of what is in the files, stays in memory.
_SMALL = 2**16
# transformers says by this name that it is to load one tensor after the other.
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


class ModelInFiles:
    """A model that reads its weights from files whenever it needs them, and writes them to new ones.

    What is loaded as it is in the files stays there; what is made of it (experts fused, another dtype) goes to files
    of a work folder. Both are mapped, so they take no memory of their own.

    Args:
        source: folder of a checkpoint.
        destination: folder for the new one.
        model: on the meta device; None for the class of transformers that the config names.
        dtype: what the model is to compute in; None for what transformers takes.

    Attributes:
        model: the model.
        unexpected: names of tensors in the files that the model has not.

    Raises:
        ImportError: without transformers, if it is needed.
        ValueError: for files that are damaged, or do not fit the model.
    """

    def __init__(
        self, source: Path, destination: Path, model: nn.Module | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._entries = read_entries(source)
        self._mapped = Mapped()
        self._made = destination / "made"
        self._shards = NewShards(destination / "unfinished", destination, self._entries)
        tensors = {name: self._mapped.tensor(entry) for name, entry in self._entries.items()}
        self._in_files = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor.numel()}
        with _registering(self._spilled):
            if model is None or _is_pretrained(model):
                self.model, missing, unexpected = _pretrained(source, model, dtype, tensors)
            else:
                self.model, missing, unexpected = _plain(model, dtype, tensors)
        self.unexpected = tuple(sorted(unexpected))
        if missing:
            others = f", which have {listed(self.unexpected)} instead" if unexpected else ""
            raise ValueError(
                f"{type(self.model).__name__} has {listed(sorted(missing))}, which {source} lacks{others}; give "
                "model=, of the class that was saved, on the meta device"
            )
        lost = [name for name, one in _tensors_of(self.model) if one.is_meta]
        if lost:
            raise ValueError(
                f"{listed(lost)} of {type(self.model).__name__} is on the meta device, and is not in the files of "
                f"{source}; build the model with parameters on the meta device, and such buffers on the CPU"
            )
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.data_ptr() in self._in_files:
                    module._buffers[name] = buffer.clone()  # passes may write to it
        found = [(one, self._name_of(one)) for one in self.model.parameters()]
        self._names = {parameter: name for parameter, name in found if name is not None}

    @property
    def file_names(self) -> frozenset[str]:
        """The names of the files of the checkpoint."""
        return frozenset(entry.path.name for entry in self._entries.values())

    def load_outside(self, blocks: Sequence[Block]) -> None:
        """Load what lies outside of blocks but for embeddings, of which a pass needs a few rows."""
        stay = {parameter for block in blocks for parameter in block.module.parameters()}
        for module in self.model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                stay.update(module.parameters(recurse=False))
        for parameter in self.model.parameters():
            if parameter not in stay:
                parameter.data = parameter.data.clone()

    # ---- one block ----

    @contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Let the weights of a module be in memory; afterwards they are as in the files, without masks."""
        inside = [(one, one.data) for one in module.parameters()]

        def drop() -> None:
            strip(module)
            for parameter, in_file in inside:
                parameter.data = in_file
            self._mapped.forget()

        with undoing(drop):
            for parameter, in_file in inside:
                parameter.data = in_file.clone()
            self._mapped.forget()
            yield

    @contextmanager
    def reading(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Let what was read of a block in a pass of the whole model go when it is left."""
        handles: list[Any] = []

        def undo() -> None:
            for handle in handles:
                handle.remove()

        with undoing(undo):
            for block in blocks:
                handles.append(block.module.register_forward_hook(lambda *_: self._mapped.forget()))
            yield

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise ValueError unless what the blocks have can be written as what the files have."""
        for block in blocks:
            for name, parameter in block.module.named_parameters(prefix=block.name):
                self._as_in_files(name, parameter, torch.empty_like(parameter, device="meta"))

    def write(self, block: Block) -> None:
        """Write the weights of a block that is loaded into the new files; it may be done again."""
        for name, parameter in block.module.named_parameters(prefix=block.name):
            self._shards.write(self._as_in_files(name, parameter, parameter.detach()))

    def finish(self) -> None:
        """Let the new files be whole, and remove what is of no use then; it may be done again."""
        self._shards.finish()
        shutil.rmtree(self._made, ignore_errors=True)

    # ---- names ----

    def _name_of(self, parameter: nn.Parameter) -> str | None:
        """Return the name in the files of a weight that is there as it is; None if it was made of what is there."""
        name = self._in_files.get(parameter.data_ptr())
        if not name:
            return None
        entry = self._entries[name]
        is_same = parameter.shape == entry.shape and parameter.dtype == entry.dtype and parameter.is_contiguous()
        return name if is_same else None

    def _as_in_files(self, name: str, parameter: nn.Parameter, values: Tensor) -> dict[str, Tensor]:
        """Return what is to be in the files for values of a weight."""
        if parameter in self._names:
            return {self._names[parameter]: values}
        found = _reverted(self.model, name, values)
        shapes = {one: entry.shape for one, entry in self._entries.items()}
        wrong = [one for one, tensor in found.items() if tensor.shape != shapes.get(one)]
        if wrong:
            raise ValueError(
                f"{name} is made of what is in the files, and cannot be written as {listed(wrong)}, which they lack, "
                "or have in another shape; load the model, and call pyprune.prune_one_shot"
            )
        return found

    def _spilled(self, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        """Put a weight that was made of what is in the files into a file of its own, as soon as a module has it."""
        # What transformers loaded; what it makes up, because the files lack it, is written to later.
        is_loaded = getattr(parameter, "_is_hf_initialized", False)
        there = parameter.is_meta or parameter.untyped_storage().data_ptr() in self._in_files
        if not is_loaded or there or parameter.nbytes < _SMALL or not parameter.is_contiguous():
            return None
        self._made.mkdir(parents=True, exist_ok=True)
        path = self._made / f"{len(self._in_files):06d}"
        with whole_file(path) as unfinished:
            unfinished.write_bytes(parameter.detach().reshape(-1).view(torch.uint8).numpy().data)
        in_file = self._mapped.tensor(Entry(path, 0, parameter.dtype, tuple(parameter.shape)))
        made = nn.Parameter(in_file, parameter.requires_grad)
        vars(made).update(vars(parameter))
        self._in_files[made.data_ptr()] = ""
        return made


@contextmanager
def _registering(hook: Any) -> Iterator[None]:
    """Let a function see each parameter that a module gets."""
    handles: list[Any] = []

    def undo() -> None:
        for handle in handles:
            handle.remove()

    with undoing(undo):
        handles.append(register_module_parameter_registration_hook(hook))
        yield


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# ---- loading ----

_Loaded = tuple[nn.Module, set[str], set[str]]


def _plain(model: nn.Module, dtype: torch.dtype | None, tensors: Mapping[str, Tensor]) -> _Loaded:
    """Return a model with tensors in the place of what it has, and the names that it lacks, and has too many."""
    if dtype is not None:
        raise ValueError(f"dtype is {dtype}, and model is none of transformers; give it and its files the same dtype")
    model = copy.deepcopy(model)  # what was given stays without values
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    wrong = [
        name for name, one in _tensors_of(model) if name in tensors and (one.shape, one.dtype) != _kind(tensors[name])
    ]
    if wrong:
        raise ValueError(f"{listed(wrong)} of {type(model).__name__} has another shape or dtype in the files")
    found = model.load_state_dict(dict(tensors), strict=False, assign=True)
    missing = set(found.missing_keys)
    for names in tied.values():
        there = next((name for name in names if name not in missing), None)
        if there is not None and len(names) > 1:
            parameter = model.get_parameter(there)
            for name in names:
                home, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(home), attribute, parameter)
            missing.difference_update(names)
    return model, missing, set(found.unexpected_keys)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _is_pretrained(model: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__name__}" == _PRETRAINED for cls in type(model).__mro__)


_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"


def _pretrained(
    source: Path, model: nn.Module | None, dtype: torch.dtype | None, tensors: Mapping[str, Tensor]
) -> _Loaded:
    """Return a model of transformers, which loads it itself; see `_plain`."""
    try:
        import transformers
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pyprune.prune_checkpoint needs transformers 5, to build and load the model: pip install "
            "'transformers>=5'; without it give model=, on the meta device",
            name=error.name,
        ) from error
    config = model.config if model is not None else _config(transformers, source)
    cls: Any = type(model) if model is not None else _class_of(transformers, source, config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantised, by its config; give a checkpoint of floating point numbers")
    before = os.environ.get(_ONE_BY_ONE)

    def undo() -> None:
        os.environ.pop(_ONE_BY_ONE, None)
        if before is not None:
            os.environ[_ONE_BY_ONE] = before

    with undoing(undo):
        os.environ[_ONE_BY_ONE] = "1"
        try:
            loaded, said = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
            )
        except RuntimeError as error:  # for shapes that differ
            raise ValueError(f"{source} does not fit {cls.__name__}: {error!s:.500}") from error
    missing = {name if isinstance(name, str) else name[0] for name in said["missing_keys"]}
    return loaded, missing, set(said["unexpected_keys"])


def _config(transformers: Any, source: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"source_folder is {shown(str(source))}, whose config.json is missing, or of no model that transformers "
            f"has: {error!s:.200}. Give model=, on the meta device"
        ) from error


def _class_of(transformers: Any, source: Path, config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    found = next((cls for name in names if (cls := getattr(transformers, name, None)) is not None), None)
    if found is None:
        raise ValueError(
            f"the config in {source} names {listed(names) if names else 'no class'} as architectures, which "
            "transformers has not; give model=, on the meta device"
        )
    return found


def _reverted(model: nn.Module, name: str, values: Tensor) -> dict[str, Tensor]:
    """Return what transformers saves for a weight, by name."""
    if not _is_pretrained(model):
        return {name: values}
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, {name: values})
    return found
