"""The repeated blocks of a model, through which one-shot pruning goes one after the other."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from pyprune.checks import check_names
from pyprune.console import listed
from pyprune.methods.name_rules import plain_rules
from pyprune.modules.attachments import dense_modules

_NAME_THEM = (
    'name what is to be pruned one after the other: a list of layers, blocks="model.layers", or modules, '
    'blocks=["conv1", "conv2"]'
)


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a model that is pruned as one.

    Args:
        name: its first name in the model.
        module: itself.
        of: the name of the list that it is a member of; its own name if it is in none.
    """

    name: str
    module: nn.Module
    of: str


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | None = None) -> list[Block]:
    """Return the blocks of a model: the members of its largest lists, or what is named.

    By itself it takes the outermost ModuleLists and Sequentials of layers with parts (encoder and decoder are two),
    whose members are of one class or of a few that repeat; where there are none, those of single layers.

    Args:
        model: the model; names are those of the plain one.
        blocks: names of lists, of whose members each is a block, or of modules that are blocks themselves.

    Raises:
        TypeError, ValueError: if there is no such module, if one lies in another or has two names, if there are no
            weights in them, or if there are no lists.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(*(nn.TransformerEncoderLayer(4, 1) for _ in "ab")))
        >>> [block.name for block in find_blocks(model)]
        ['1.0', '1.1']
        >>> [block.name for block in find_blocks(model, ["0", "1"])]
        ['0', '1.0', '1.1']
    """
    modules = dict(dense_modules(model))
    if blocks is not None:
        return _named(modules, (blocks,) if isinstance(blocks, str) else check_names("blocks", blocks))
    found = _outermost([list(_members(modules, name)) for name in modules if _is_repeated(modules, name)])
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of repeated layers with weights in it; {_NAME_THEM}")
    return found


def _named(modules: dict[str, nn.Module], names: Sequence[str]) -> list[Block]:
    if not names:
        raise ValueError(f"blocks is empty; {_NAME_THEM}")
    found: list[Block] = []
    for given in names:
        name = next((one for one in plain_rules(given) if one in modules), None)
        if name is None or not name:
            near = listed(difflib.get_close_matches(given, [*filter(None, modules)], n=3, cutoff=0.0))
            raise ValueError(f"blocks has {given!r:.80} in it, which is no module of the model (nearest: {near})")
        is_list = isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)) or _is_repeated(modules, name)
        found += _members(modules, name) if is_list else [Block(name, modules[name], _list_of(modules, name))]
    weighted = [block for block in found if _has_weights(block.module)]
    if not weighted:
        raise ValueError(f"blocks names {listed(names)}, and there is no weight in them; {_NAME_THEM}")
    places: dict[nn.Module, str] = {}
    for block in weighted:
        for inner in block.module.modules():
            if inner in places and _has_weights(inner):
                raise ValueError(
                    f"blocks names {places[inner]} and {block.name}, which share a module; a block is one part of "
                    "the model, called once in a pass"
                )
            places[inner] = block.name
    return weighted


def _outermost(lists: list[list[Block]]) -> list[Block]:
    """Return the members of the lists that lie in no member of another; those with parts go before single layers."""
    lists = [members for members in lists if all(map(_has_parts, members))] or lists
    inner = {part for members in lists for one in members for part in one.module.modules() if part is not one.module}
    found: dict[nn.Module, Block] = {}
    for members in lists:
        if not any(one.module in inner for one in members):
            for one in members:
                found.setdefault(one.module, one)
    return list(found.values())


def _is_repeated(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module is a list whose members with weights are of one class, or of a few that repeat."""
    if not isinstance(modules[name], (nn.ModuleList, nn.Sequential)):
        return False
    members = list(_members(modules, name))
    classes = {type(member.module) for member in members}
    is_one = isinstance(modules[name], nn.ModuleList) and len(members) == 1
    return is_one or (len(members) > 1 and 2 * len(classes) <= len(members))


def _members(modules: dict[str, nn.Module], name: str) -> Iterator[Block]:
    """Yield the members of a list that have weights, and those of lists in it, which nobody calls."""
    for key in modules[name]._modules:
        member = f"{name}.{key}".lstrip(".")
        if member not in modules:
            continue
        if isinstance(modules[member], (nn.ModuleList, nn.ModuleDict)):
            yield from _members(modules, member)
        elif _has_weights(modules[member]):
            yield Block(member, modules[member], name)


def _list_of(modules: dict[str, nn.Module], name: str) -> str:
    above = name.rpartition(".")[0]
    return above if isinstance(modules.get(above), nn.ModuleList) else name


def _has_parts(block: Block) -> bool:
    return any(True for _ in block.module.children())


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
