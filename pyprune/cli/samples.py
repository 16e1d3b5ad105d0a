"""Text in a file, as a model takes it: samples of tokens, all of one length."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.checks import shown

_SAMPLES, _LENGTH = 128, 2048


def samples_of(
    path: str, tokenizer: Any, *, field: str, count: int | None, length: int | None, most: int | None, seed: int
) -> list[Tensor]:
    """Return samples (1, length) of a text: drawn by the seed from the pieces that it is cut into.

    Tokens that the tokenizer puts around a text are put around each sample.

    Args:
        path: of a text, or of JSON lines if it ends with ``.jsonl``.
        tokenizer: of transformers.
        field: of JSON lines: where the text is.
        count: how many samples; None for 128, or what there is.
        length: their tokens; None for 2048, or ``most`` if that is less.
        most: what the model takes, if it is known.
        seed: of the drawing.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such text, or has too little.
    """
    if length is not None and most is not None and length > most:
        raise ValueError(f"--length is {length}, and the model takes {most} tokens; give at most that")
    length = length or min(_LENGTH, most or _LENGTH)
    before, after = _around(tokenizer)
    inner = length - len(before) - len(after)
    if inner < 1:
        raise ValueError(f"--length is {length}, which the tokenizer fills with its own tokens; give more")
    tokens = [token for text in _texts(Path(path), field) for token in _plain(tokenizer, text)]
    pieces = len(tokens) // inner
    if pieces < (count or 1):
        raise ValueError(
            f"{path} has {len(tokens)} tokens, which is {pieces} samples of {length}; give more text, or a smaller "
            "--samples or --length"
        )
    drawn = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[: count or _SAMPLES]
    return [torch.tensor([[*before, *tokens[one * inner : (one + 1) * inner], *after]]) for one in drawn.tolist()]


def _texts(path: Path, field: str) -> Iterator[str]:
    """Yield the texts of a file: all of it, or a field of each line."""
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field(line, field, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _field(line: str, field: str, place: str) -> str:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON: {error!s:.200}") from error
    text = fields.get(field) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        there = f"has {', '.join(list(fields)[:5])}" if isinstance(fields, dict) else f"is {shown(fields)}"
        raise ValueError(f"{place}: it {there}, and no text in {field!r}; name its field by --field")
    return text


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before and after a text."""
    inner, whole = _plain(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    begin = next((one for one in range(len(whole)) if inner and whole[one : one + len(inner)] == inner), len(whole))
    return whole[:begin], whole[begin + len(inner) :]


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
