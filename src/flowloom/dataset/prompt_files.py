"""Prompts that a person brings: a text file, a CSV or a JSONL, read whole or refused in one line.

    .txt     one prompt per line; lines that start with # are comments
    .csv     a column `prompt`, optionally `kind`
    .jsonl   objects {"prompt": ..., "kind": ...}, one per line; `kind` may be left out

White space is narrowed to single blanks, repeats are dropped, the order is kept.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_CHARACTERS = 1000
_SHOWN = 40
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Tab, line feed, form feed, carriage return; no text has others.
_CONTROLS = bytes(set(range(32)) - {9, 10, 12, 13})


@dataclasses.dataclass(frozen=True)
class GivenPrompt:
    """A prompt of a file."""

    text: str
    """The prompt."""
    kind: str | None
    """What the file calls its kind, if it says so."""
    place: str
    """`FILE:LINE`, counted from 1."""


def read_prompts(path: str | Path) -> list[GivenPrompt]:
    """The different prompts of a file, in its order.

    Raises:
        ValueError: The file cannot be read as one of the formats, a row of it has no prompt or one
            of more than `MAX_CHARACTERS`, or there is no prompt; names file and line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: got suffix {suffix!r}, expected one of {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, expected a file of prompts")
    found: dict[str, GivenPrompt] = {}
    for line, prompt, kind in _READERS[suffix](_decoded(path), path):
        place = f"{path}:{line}"
        text = check_prompt(prompt, place)
        found.setdefault(text, GivenPrompt(text, kind, place))
    if not found:
        raise ValueError(f"{path}: got no prompts, expected at least one")
    return list(found.values())


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, with or without a mark at its front."""
    data = path.read_bytes()
    head = data[:4096]
    # Half of what UTF-16 holds of plain English is zeros, in every second place.
    zeros = {at % 2 for at, byte in enumerate(head) if byte == 0}
    if data.startswith(_UTF_16) or (len(zeros) == 1 and head.count(0) > len(head) // 4):
        raise ValueError(f"{path}: got text in UTF-16, expected UTF-8")
    if data.translate(None, _CONTROLS) != data:
        raise ValueError(f"{path}: got a binary file, expected text in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        byte = f"byte 0x{data[error.start]:02x}"
        raise ValueError(f"{path}:{line}: got {byte}, expected text in UTF-8") from None


def check_prompt(prompt: str, place: str) -> str:
    """A prompt with single blanks.

    Raises:
        ValueError: It is empty, longer than `MAX_CHARACTERS` or not Unicode; names `place`.
    """
    text = " ".join(prompt.split())
    if not text:
        raise ValueError(f"{place}: got an empty prompt, expected some words")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{place}: got a prompt of {len(text)} characters, expected at most {MAX_CHARACTERS}"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: got half a character (a lone surrogate), expected whole ones")
    return text


Row = tuple[int, str, str | None]


def _from_text(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line, None


def _from_csv(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    end = 0
    try:
        header = [name.strip() for name in next(reader, [])]
        if text.strip() and "prompt" not in header:
            got = ", ".join(header)[:_SHOWN]
            raise ValueError(f"{path}:1: got columns {got!r}, expected a column 'prompt'")
        end = reader.line_num
        for row in reader:
            # A quoted prompt may go over several lines; a row begins where the last one ended.
            start, end = end + 1, reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                got = f"{len(row)} values"
                raise ValueError(f"{path}:{start}: got {got}, expected {len(header)}")
            values = dict(zip(header, row, strict=True))
            yield start, values["prompt"], values.get("kind", "").strip() or None
    except csv.Error as error:
        raise ValueError(f"{path}:{end + 1}: got no CSV: {error}; expected quotes closed") from None


def _from_jsonl(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            cause = (
                error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too large"
            )
            shown = line.strip()[:_SHOWN]
            raise ValueError(
                f"{place}: got {shown!r} ({cause}), expected a JSON object with 'prompt'"
            ) from None
        values = row if isinstance(row, dict) else {}
        prompt, kind = values.get("prompt"), values.get("kind")
        if not isinstance(prompt, str):
            got = f"{type(prompt).__name__} as 'prompt'" if "prompt" in values else "no 'prompt'"
            raise ValueError(f"{place}: got {got}, expected an object with a text 'prompt'")
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f"{place}: got {type(kind).__name__} as 'kind', expected a text")
        yield number, prompt, kind or None


_READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".txt": _from_text,
    ".csv": _from_csv,
    ".jsonl": _from_jsonl,
}
