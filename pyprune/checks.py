"""What users give: checks of numbers, flags and names, before anything is changed.

Each takes the argument's name and its value, and returns the value as Python's own type. What is wrong is a TypeError
or ValueError that begins with the name, says what was given and what is allowed.
"""

import math
import numbers
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

# What C++ and tensors of int64 can hold.
LARGEST_INT = 2**63 - 1


def shown(value: object) -> str:
    """Return a value as it is written, cut to one line of a message.

    Example:
        >>> shown("no"), len(shown(10**400)), shown(10**5000)
        ("'no'", 80, 'an int of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > 4096:  # Python refuses to write more than 4300 digits
        return f"an int of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # whatever the __repr__ of a stranger does, the message is about the argument
        return f"a {type(value).__name__} (whose repr fails: {type(error).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


def check_bool(name: str, value: object) -> bool:
    """Return a flag.

    Raises:
        TypeError: for what is no bool; "no", 0 and 1 are none.

    Example:
        >>> check_bool("strip", True)
        True
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {shown(value)}; give True or False")
    return bool(value)


def check_number(
    name: str,
    value: object,
    *,
    what: str,
    least: float = -math.inf,
    most: float = math.inf,
    open_ends: bool = False,
    advice: str = "",
) -> float:
    """Return a finite real number in [least, most], or strictly between them.

    Args:
        name: of the argument.
        value: what was given; numbers of NumPy and fractions will do.
        what: is to be given, for the message.
        least, most: the ends of the range.
        open_ends: whether the ends do not belong to it.
        advice: what is said of a number out of range, in place of "give ...".

    Raises:
        TypeError: if it is no real number (a bool is none).
        ValueError: if it is NaN, infinite, larger than a float can be, or out of range.

    Example:
        >>> check_number("p", 2, what="a positive number", least=0, open_ends=True)
        2.0
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {shown(value)}; give {what}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    inside = least < number < most if open_ends else least <= number <= most
    if not inside or not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)}; {advice or 'give ' + what}")
    return number


def check_count(name: str, value: object, *, least: int = 0, most: int = LARGEST_INT, what: str = "") -> int:
    """Return an integer in [least, most].

    Raises:
        TypeError: if it is no integer (a bool is none).
        ValueError: if it is out of range.

    Example:
        >>> check_count("num_heads", 8, least=1)
        8
    """
    advice = what or f"an integer, {least} or more"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {shown(value)}; give {advice}")
    number = int(value)
    if not least <= number <= most:
        small = f", at most {most}" if number > most else ""
        raise ValueError(f"{name} is {shown(value)}; give {advice}{small}")
    return number


def check_choice(name: str, value: object, allowed: Collection[str]) -> str:
    """Return one of several names.

    Raises:
        TypeError: if it is no string.
        ValueError: if it is another one.

    Example:
        >>> check_choice("side", "out", ("out", "in"))
        'out'
    """
    *others, last = (f'"{one}"' for one in allowed)
    written = f"{', '.join(others)} and {last}" if others else last
    if not isinstance(value, str):
        raise TypeError(f"{name} is {shown(value)}; allowed are {written}")
    if value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; allowed are {written}")
    return str(value)


def check_path(name: str, value: object, *, optional: bool = False) -> None:
    """Raise unless a value is a path, or, if it is ``optional``, None.

    Raises:
        TypeError: for anything else.
        ValueError: for a string that no path can be.
    """
    if value is None and optional:
        return
    what = f"the path of a file{', or None' if optional else ''}"
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {shown(value)}; give {what}")
    if not value or "\0" in os.fspath(value):
        raise ValueError(f"{name} is {shown(value)}; give {what}")


def check_items(name: str, value: object, what: str) -> list[Any]:
    """Return what is in a list, or in anything that can be gone through once.

    Raises:
        TypeError: for what cannot, and for strings and dicts, which are none.

    Example:
        >>> check_items("ratios", (0.5, 0.9), "several ratios")
        [0.5, 0.9]
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"{name} is {shown(value)}; give {what}")
    try:
        return list(value)
    except TypeError as error:  # tensors without dimensions say that they are iterable
        raise TypeError(f"{name} is {shown(value)}; give {what}") from error


def check_names(name: str, value: object) -> tuple[str, ...]:
    """Return a list of strings as a tuple.

    Raises:
        TypeError: if it is none; a plain string is none, nor is a dict.

    Example:
        >>> check_names("names", ["fc"])
        ('fc',)
    """
    items = check_items(name, value, f"a list of strings, as in {name.split()[-1]}=['fc']")
    for one in items:
        if not isinstance(one, str):
            raise TypeError(f"{name} has {shown(one)} in it; every one of them must be a string")
    return tuple(items)
