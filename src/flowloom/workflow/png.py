"""Text chunks of PNG files, where ComfyUI keeps the workflow that made a picture.

Chunk `prompt` holds API JSON, chunk `workflow` the editor's format. Needs no imaging
library. Reading is bounded, for files come from strangers: a small chunk can unpack to gigabytes.
Chunks: PNG specification, third edition, 5 and 11.3.3.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 32 << 20
"""Bytes of one text, and of all texts of a file together, unpacked or not."""
_MAX_CHUNKS = 100_000
_MAX_KEY = 79
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class PngError(ValueError):
    """A file is no PNG, or breaks a bound; the message says what, where, got, expected."""


class _Chunk(NamedTuple):
    kind: bytes
    start: int
    """Where the chunk begins in the file, with its length."""
    data: bytes
    """Of a text chunk; empty for others, which are not read."""
    end: int


def read_chunks(source: str | Path | bytes) -> dict[str, str]:
    """Texts by key (tEXt, zTXt, iTXt) of a PNG file or of its bytes; the first of equal keys.

    Raises:
        PngError: it is no PNG, is cut off, or a text is larger than `MAX_TEXT`.
        OSError: the file cannot be opened.
    """
    if isinstance(source, bytes):
        return _texts(io.BytesIO(source), "PNG")
    with Path(source).open("rb") as file:
        return _texts(file, str(source))


def write_chunks(path: str | Path, texts: Mapping[str, str]) -> None:
    """Put texts into an existing PNG file, in place of those with equal keys; whole or not at all.

    Texts outside Latin-1 are written as iTXt, others as tEXt.

    Raises:
        PngError: the file is no PNG, a text is larger than `MAX_TEXT`, or a key is not 1 to 79
            Latin-1 characters.
        OSError: the file cannot be read or written.
    """
    path = Path(path)
    added = b"".join(_packed(key, text) for key, text in texts.items())
    partial = path.with_name(path.name + ".partial")
    try:
        with path.open("rb") as old, partial.open("wb") as new:
            new.write(SIGNATURE)
            for chunk in _chunks(old, str(path)):
                if chunk.kind in _TEXTS and _split(chunk, str(path))[0] in texts:
                    continue
                _copy(old, new, chunk.start, chunk.end)
                if chunk.kind == b"IHDR":
                    new.write(added)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _texts(file: BinaryIO, where: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    total = 0
    for chunk in _chunks(file, where):
        if chunk.kind in _TEXTS:
            key, text = _split(chunk, where, MAX_TEXT - total)
            total += len(text)
            texts.setdefault(key, text)
    return texts


def _chunks(file: BinaryIO, where: str) -> Iterator[_Chunk]:
    """Chunks up to IEND; only text chunks are read, the rest is skipped."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise PngError(f"{where}: expected a PNG file, got another signature")
    start = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        file.seek(start)
        head = file.read(8)
        length = int.from_bytes(head[:4])
        end = start + 12 + length
        if len(head) < 8 or end > size:
            raise PngError(f"{where}: the file is cut off at byte {size}, expected a chunk IEND")
        kind, data = head[4:], b""
        if start == len(SIGNATURE) and kind != b"IHDR":
            raise PngError(f"{where}: first chunk is {kind!r}, expected IHDR")
        if kind in _TEXTS:
            if length > MAX_TEXT:
                raise PngError(f"{where}: got a text of {length} bytes, expected <= {MAX_TEXT}")
            data = file.read(length)
            if zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(file.read(4)):
                raise PngError(f"{where}: the text chunk at byte {start} has a wrong checksum")
        yield _Chunk(kind, start, data, end)
        if kind == b"IEND":
            return
        start = end
    raise PngError(f"{where}: got more than {_MAX_CHUNKS} chunks")


def _split(chunk: _Chunk, where: str, most: int = MAX_TEXT) -> tuple[str, str]:
    """Key and text of a text chunk, unpacked to at most `most` bytes."""
    key, found, rest = chunk.data.partition(b"\0")
    packed, encoding = chunk.kind == b"zTXt", "latin-1"
    if not found:
        raise PngError(f"{where}: a text chunk has no key")
    if chunk.kind == b"zTXt":
        rest = rest[1:]  # the method of compression; there is one
    elif chunk.kind == b"iTXt":
        packed, encoding = rest[:1] == b"\1", "utf-8"
        rest = rest[2:].split(b"\0", 2)[-1]  # behind the language and the translated key
    if packed:
        try:
            rest = zlib.decompressobj().decompress(rest, most + 1)
        except zlib.error as error:
            raise PngError(f"{where}: text {key[:40]!r} cannot be unpacked: {error}") from error
    if len(rest) > most:
        raise PngError(f"{where}: text {key[:40]!r}: got over {most} bytes, expected fewer")
    try:
        return key.decode("latin-1"), rest.decode(encoding)
    except UnicodeDecodeError as error:
        raise PngError(f"{where}: text {key[:40]!r} is not {encoding}") from error


def _packed(key: str, text: str) -> bytes:
    """A text as a chunk."""
    try:
        name = key.encode("latin-1")
    except UnicodeEncodeError as error:
        raise PngError(f"text {key[:40]!r}: the key is not Latin-1") from error
    if not 0 < len(name) <= _MAX_KEY or b"\0" in name:
        raise PngError(f"text {key[:40]!r}: got a key of {len(name)}, expected 1 to {_MAX_KEY}")
    if "\0" not in text and max(text, default="") < "\u0100":
        kind, data = b"tEXt", name + b"\0" + text.encode("latin-1")
    else:
        kind, data = b"iTXt", name + b"\0" * 5 + text.encode("utf-8", "replace")
    if len(data) > MAX_TEXT:
        raise PngError(f"text {key[:40]!r}: got {len(data)} bytes, expected <= {MAX_TEXT}")
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _copy(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    while start < end:
        block = old.read(min(1 << 20, end - start))
        new.write(block)
        start += len(block)
