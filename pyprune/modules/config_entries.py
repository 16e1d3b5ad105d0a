"""What the entries of a config must be before one of them changes a model."""

from collections.abc import Mapping, Set
from typing import Any

from pyprune.checks import shown
from pyprune.methods.name_rules import plain_rules
from pyprune.modules.mask_states import check_state, is_size

VERSION = 2
_ADVICE = "give the dict that get_config returned"

Entry = dict[str, Any]


def entries_of(config: object, known: Set[str]) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of masks and those of gates, checked as far as they can be by names.

    Args:
        config: what was given.
        known: the names of the parameters of the model.

    Raises:
        TypeError, ValueError: if a config is no dict, of another version, damaged, or says two things of one weight.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; {_ADVICE}")
    version = config.get("version")
    if type(version) is int and version == 1:
        raise ValueError(
            "config was written by pyprune 0.1.0, whose checkpoints have the masks in the state_dict; bring both "
            "up to date first: state_dict, config = pyprune.upgrade_checkpoint(state_dict, config)"
        )
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"config has version {shown(version)}; this pyprune reads version {VERSION}: {_ADVICE}, or use the "
            "pyprune that wrote it"
        )
    masks, gates = _entries(config, "masks", known), _entries(config, "gates", known)
    seen: set[str] = set()
    for entry in (*masks, *gates):
        twice = seen.intersection(entry["names"])
        if twice:
            raise ValueError(
                f"config contradicts itself: it names {', '.join(sorted(twice))} more than once, and a weight "
                f"carries one mask or gate; {_ADVICE}"
            )
        seen.update(entry["names"])
    for entry in masks:
        _check_mask(entry, known)
    return masks, gates


def damaged(what: str) -> ValueError:
    """Return the error of a config that says something impossible."""
    return ValueError(f"config is damaged: {what}; {_ADVICE}")


def _entries(config: Mapping[str, Any], kind: str, known: Set[str]) -> list[Entry]:
    found = config.get(kind, () if kind == "gates" else None)
    if not isinstance(found, (list, tuple)):
        raise damaged(f"{kind} is {shown(found)}, no list")
    return [_entry(f"{kind}[{i}]", one, known) for i, one in enumerate(found)]


def _entry(where: str, entry: object, known: Set[str]) -> Entry:
    if not isinstance(entry, Mapping):
        raise damaged(f"{where} is {shown(entry)}, no dict")
    names, shape = entry.get("names"), entry.get("shape")
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise damaged(f"{where} has the names {shown(names)}; they are strings, one or more")
    if not isinstance(shape, (list, tuple)) or not all(map(is_size, shape)):
        raise damaged(f"{where} has the shape {shown(shape)}, which none of a weight is")
    return {**entry, "names": [_known_name(name, known) for name in names], "shape": list(shape)}


def _known_name(name: str, known: Set[str]) -> str:
    """Return the name of a model that was saved compiled or in parallel as that of the plain one."""
    return next((one for one in plain_rules(name) if one in known), name)


def _check_mask(entry: Entry, known: Set[str]) -> None:
    names = ", ".join(entry["names"])
    try:
        check_state(names, entry, entry["shape"])
    except ValueError as error:
        raise damaged(str(error)) from error
    for flag in ("parks", "on_target"):
        if not isinstance(entry.get(flag, True), bool):
            raise damaged(f"{flag} of {names} is {shown(entry[flag])}, no bool")
    if "follows" in entry:
        follows, groups, outputs = entry["follows"], entry.get("groups"), entry.get("outputs")
        if not isinstance(follows, str) or not is_size(groups) or not (outputs is None or is_size(outputs)):
            raise damaged(f"the mask of {names} follows {shown(follows)}, which has none, or other channels")
        entry["follows"] = _known_name(follows, known)
