"""Text chunks of PNG files against an imaging library, and files made to harm.

Facts: tEXt, zTXt and iTXt are read as Pillow reads them, what is written Pillow reads, and the
picture stays as it was; the first of equal keys counts. A file that is no PNG, is cut off, or
unpacks beyond 32 MiB raises `PngError` before it takes the memory.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowloom.workflow.png import MAX_TEXT, SIGNATURE, PngError, read_chunks, write_chunks

PROMPT = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 5}}})


def picture(info: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    plain = picture()
    return plain[:33] + chunk(kind, data) + plain[33:]


def test_texts_are_read_as_pillow_reads_them(tmp_path):
    info = PngInfo()
    info.add_text("prompt", PROMPT)
    info.add_text("workflow", "x" * 5000, zip=True)
    info.add_itxt("note", "grün 林", lang="de", tkey="Notiz")
    info.add_itxt("packed", "林" * 999, zip=True)
    path = tmp_path / "a.png"
    path.write_bytes(picture(info))
    with Image.open(path) as image:
        expected = {key: str(text) for key, text in image.text.items()}
    assert len(expected) == 4
    assert read_chunks(path) == read_chunks(path.read_bytes()) == expected


def test_what_is_written_pillow_reads_and_pixels_stay(tmp_path):
    info = PngInfo()
    info.add_text("prompt", "old")
    info.add_text("author", "someone")
    path = tmp_path / "a.png"
    path.write_bytes(picture(info))
    with Image.open(path) as image:
        pixels = image.tobytes()
    texts = {"prompt": PROMPT, "workflow": '{"nodes": []}', "title": "林"}
    write_chunks(path, texts)
    with Image.open(path) as image:
        assert image.tobytes() == pixels
        assert {k: str(v) for k, v in image.text.items()} == {**texts, "author": "someone"}
    assert read_chunks(path) == {**texts, "author": "someone"}
    assert b"tEXtprompt\0" in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_the_first_of_equal_keys_counts():
    data = with_chunk(b"tEXt", b"prompt\0second")
    data = data[:33] + chunk(b"tEXt", b"prompt\0first") + data[33:]
    assert read_chunks(data) == {"prompt": "first"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "signature"),
        (b"GIF89a", "signature"),
        (SIGNATURE, "cut off"),
        (picture()[:-5], "cut off"),
        (SIGNATURE + chunk(b"IDAT", b""), "expected IHDR"),
        (picture()[:33] + struct.pack(">I", 1 << 31) + b"tEXt", "cut off"),
        (with_chunk(b"tEXt", b"no key"), "no key"),
        (with_chunk(b"tEXt", b"a\0b")[:45] + b"!" + with_chunk(b"tEXt", b"a\0b")[46:], "checksum"),
        (with_chunk(b"zTXt", b"a\0\0garbage"), "unpacked"),
        (with_chunk(b"iTXt", b"a\0\0\0\0\0\xff"), "utf-8"),
        (picture()[:33] + chunk(b"aaAa", b"") * 100_001, "100000 chunks"),
    ],
)
def test_broken_files_raise_one_error(data, message):
    with pytest.raises(PngError, match=message):
        read_chunks(data)


@pytest.mark.parametrize(("kind", "head"), [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")])
def test_a_text_that_unpacks_beyond_the_bound_is_refused_within_the_bound(kind, head):
    packer = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    bomb = b"".join(packer.compress(zeros) for _ in range(MAX_TEXT // len(zeros) * 4))
    data = with_chunk(kind, head + bomb + packer.flush())
    assert len(data) < MAX_TEXT // 100
    tracemalloc.start()
    try:
        with pytest.raises(PngError, match="expected fewer"):
            read_chunks(data)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_TEXT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", ["", "k" * 80, "林", "a\0b"])
def test_keys_are_checked_and_nothing_is_touched(tmp_path, key):
    path = tmp_path / "a.png"
    path.write_bytes(before := picture())
    with pytest.raises(PngError, match="key"):
        write_chunks(path, {key: "text"})
    assert path.read_bytes() == before


def test_a_file_that_is_no_picture_is_left_alone(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"hello")
    with pytest.raises(PngError, match="signature"):
        write_chunks(path, {"prompt": "text"})
    assert path.read_bytes() == b"hello"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
