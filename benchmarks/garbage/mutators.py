"""Cheap damage to parsed JSON, tokens and bytes; every function is one of its `random.Random`."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any


def nested(depth: int, inner: Any = 1) -> Any:
    """Lists and objects in each other, by turns."""
    for k in range(depth):
        inner = {"a": inner} if k % 3 == 0 else [inner]
    return inner


_SHALLOW, _DEEP = nested(70), nested(5000)
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**30, -(10**30), 10**400, 10**5000, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "1", "3", "-7.5e3 or so", "euler", "\ud800",
    "\0", "a\nb\r\n", "{prompt}", "{a|b} // c", "\u00e9" * 300, "9" * 5000, [], {}, [[]], [1, 2, 3],
    ["3", 0], ["3", -1], ["3", 10**30], [3, 0], ["nope", 0], ["3", "0"], ["3", 0, 0], [None, None],
    {"__value__": [1, 2]}, {"__value__": {"__value__": 1}}, {"__value__": None}, {"a": {"b": [1]}},
    "LoadImage", "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "*", "INT,FLOAT", _SHALLOW, _DEEP,
)  # fmt: skip
# What a person or a program may well write by mistake; it gets deeper into the checks.
MILD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 64, 1.5, "", "x", "euler", "a cat", "3", 10**19, 1e-9, [1, 2, 3],
    {"__value__": [1, 2]}, {"a": 1}, ["3", 0], ["4", 1], ["nope", 0], "SaveImage", "KSampler",
)  # fmt: skip
NAMES = (
    "class_type", "inputs", "", "model", "steps", "a.b.c", "images.image0", "..", "\0", "x" * 1000,
    "widgets_values", "links", "id", "type", "name", "options",
)  # fmt: skip


def junk(rng: random.Random) -> Any:
    """One wrong value; mostly a mild one."""
    if rng.random() < 0.7:
        return MILD[int(rng.random() * len(MILD))]
    return JUNK[int(rng.random() * len(JUNK))]


def damaged(tree: Any, rng: random.Random, edits: int = 1) -> Any:
    """A tree with some parts replaced, removed, renamed, repeated or wrapped; the old one stays."""
    for _ in range(edits):
        tree = _edit(tree, rng, 0.25)
    return tree


def _edit(tree: Any, rng: random.Random, stop: float) -> Any:
    if rng.random() >= stop:
        if type(tree) is dict and tree:
            key = _pick(list(tree), rng)
            return {**tree, key: _edit(tree[key], rng, stop + 0.05)}
        if type(tree) is list and tree:
            k = int(rng.random() * len(tree))
            return [*tree[:k], _edit(tree[k], rng, stop + 0.05), *tree[k + 1 :]]
    if type(tree) is dict and tree and rng.random() < 0.5:
        return _edit_object(tree, rng)
    if type(tree) is list and tree and rng.random() < 0.5:
        k = int(rng.random() * len(tree))
        return _pick(([*tree[:k], *tree[k + 1 :]], [*tree, tree[k]], tree[::-1], tree[:k]), rng)
    if rng.random() < 0.1:
        return _pick(([tree], {"a": tree}, {"__value__": tree}, [tree, tree]), rng)
    return junk(rng)


def _edit_object(tree: dict, rng: random.Random) -> dict:
    key, how = _pick(list(tree), rng), rng.random()
    tree = dict(tree)
    if how < 0.4:
        del tree[key]
    elif how < 0.6:
        tree[_pick(NAMES, rng)] = tree.pop(key)
    elif how < 0.8:
        tree[_pick(NAMES, rng)] = junk(rng)
    else:
        tree[key] = tree[_pick(list(tree), rng)]
    return tree


def relinked(api: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A workflow with one input linked to any node, also to itself or to a later one."""
    node_id, source = _pick(list(api), rng), _pick(list(api), rng)
    node = api[node_id]
    if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict) or not node["inputs"]:
        return api
    name = _pick(list(node["inputs"]), rng)
    inputs = {**node["inputs"], name: [source, int(rng.random() * 5) - 1]}
    return {**api, node_id: {**node, "inputs": inputs}}


def bent(api: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A workflow in which one input holds a mild junk value, another one's value, or is gone."""
    node_id = _pick(list(api), rng)
    node = api[node_id]
    if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict) or not node["inputs"]:
        return api
    inputs = dict(node["inputs"])
    name, how = _pick(list(inputs), rng), rng.random()
    if how < 0.2:
        del inputs[name]
    elif how < 0.5:
        inputs[name] = inputs[_pick(list(inputs), rng)]
    else:
        inputs[name] = _pick(MILD, rng)
    return {**api, node_id: {**node, "inputs": inputs}}


def broken_tokens(tokens: Sequence[int], size: int, rng: random.Random) -> list[int]:
    """A code with tokens changed, dropped, repeated or cut off; or no code at all."""
    if rng.random() < 0.1:
        return [int(rng.random() * size) for _ in range(int(rng.random() * 60))]
    found = list(tokens)
    for _ in range(1 + int(rng.random() * 4)):
        k, how = int(rng.random() * (len(found) + 1)), rng.random()
        if how < 0.5 and k < len(found):
            found[k] = int(rng.random() * size)
        elif how < 0.6:
            found.insert(k, int(rng.random() * size))
        elif how < 0.7:
            found[k : k + 1] = []
        elif how < 0.8:
            found = found[:k]
        elif how < 0.9:
            found[k:k] = found[k : k + 10]
        elif k < len(found):
            found[k] = _pick((-1, size, -size, 10**30), rng)
    return found


def broken_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file cut off, or with bytes changed, put in or repeated."""
    changed = bytearray(data)
    for _ in range(1 + int(rng.random() * 3)):
        k, how = int(rng.random() * (len(changed) + 1)), rng.random()
        if how < 0.4:
            del changed[k:]
        elif how < 0.7 and k < len(changed):
            changed[k] = int(rng.random() * 256)
        elif how < 0.8:
            changed[k:k] = _pick(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"[" * 3000, b"\x80", b'"'), rng
            )
        else:
            changed[k:k] = changed[k : k + 40]
    return bytes(changed)


def picture(texts: dict[str, bytes], rng: random.Random) -> bytes:
    """A one-pixel PNG with text chunks of all three kinds; some checksums and lengths are wrong."""
    rows = [_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))]
    for key, text in texts.items():
        name = key.encode("latin-1", "replace")
        kind = int(rng.random() * 4)
        if kind == 0:
            rows.append(_chunk(b"tEXt", name + b"\0" + text))
        elif kind == 1:
            rows.append(_chunk(b"zTXt", name + b"\0\0" + zlib.compress(text, 1)))
        elif kind == 2:
            rows.append(_chunk(b"iTXt", name + b"\0\0\0\0\0" + text))
        else:
            rows.append(_chunk(b"iTXt", name + b"\0\1\0\0\0" + zlib.compress(text, 1)))
    rows += [_chunk(b"IDAT", zlib.compress(b"\0\0")), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(rows)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _pick(items: Sequence[Any], rng: random.Random) -> Any:
    return items[int(rng.random() * len(items))]
