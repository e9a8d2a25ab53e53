"""The editor's file as it stands: nodes, links and subgraphs, read and bounded, nothing resolved.

Files come from strangers, so every part is checked for its type and nothing here recurses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ALWAYS, MUTED, BYPASSED = 0, 2, 4
"""Modes of a node; the editor runs nodes of any other mode as if it were `ALWAYS`."""
INSIDE, OUTSIDE = "-10", "-20"
"""Ids of the nodes that stand for a subgraph's inputs and outputs within it."""
LEFT_OUT = "flowloom_left_out"
"""Property of a node that names its literals which the workflow did not have."""
_MAX_ID_CHARS = 100
_MAX_SLOT = 1 << 20


class CanvasError(ValueError):
    """A file of the editor cannot be converted; the message says what, where, got, expected."""

    def __init__(self, message: str, missing: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        """(node id, class) of every node whose class the catalogue lacks."""


@dataclass(frozen=True)
class Slot:
    """An input or output of a node. `widget` names the literal that an input stands for, or ""."""

    name: str
    type: str
    link: str | None = None
    widget: str = ""
    wires: tuple[str, ...] = ()
    """Of a subgraph's own input: its links inside, in order."""


@dataclass(frozen=True)
class Block:
    """One node as the file has it: `type` is a class, the id of a subgraph, or an editor's own."""

    id: str
    type: str
    mode: int
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    values: tuple[Any, ...]
    """Literals by position."""
    named: Mapping[str, Any] | None
    """Literals by name; newer files have both."""
    title: str
    proxies: tuple[tuple[str, str], ...]
    """(inner node id, literal) that a subgraph's node shows, in order; id -1 is its own input."""
    left_out: frozenset[str] = frozenset()
    """Literals that hold their default only because the editor has no way to leave them out."""

    @cached_property
    def input_named(self) -> dict[str, Slot]:
        """Inputs by name; the first of equal names."""
        return {slot.name: slot for slot in reversed(self.inputs)}

    @cached_property
    def input_of_type(self) -> dict[str, Slot]:
        """The first input of each type."""
        return {slot.type: slot for slot in reversed(self.inputs)}


@dataclass(frozen=True)
class Wire:
    """One link: output `origin_slot` of node `origin` to input `target_slot` of node `target`."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class Sheet:
    """The nodes and links of the file or of one subgraph, whose own `inputs` feed them."""

    id: str
    name: str
    blocks: dict[str, Block]
    wires: dict[str, Wire]
    inputs: tuple[Slot, ...] = ()

    @cached_property
    def leaving(self) -> dict[int, str]:
        """Id of the link that feeds each of the subgraph's outputs."""
        return {w.target_slot: i for i, w in self.wires.items() if w.target == OUTSIDE}

    @cached_property
    def literals(self) -> dict[str, tuple[Block, Slot]]:
        """Of the subgraph's inputs that stand for a literal: its first node inside, in order."""
        entering: dict[int, list[str]] = {}
        for wire_id, wire in self.wires.items():
            if wire.origin == INSIDE:
                entering.setdefault(wire.origin_slot, []).append(wire_id)
        found: dict[str, tuple[Block, Slot]] = {}
        for k, own in enumerate(self.inputs):
            for wire_id in own.wires or entering.get(k, ()):
                target = self._target(wire_id)
                if target is not None and target[1].widget:
                    found.setdefault(own.name, target)
        return found

    def _target(self, wire_id: str) -> tuple[Block, Slot] | None:
        wire = self.wires.get(wire_id)
        block = None if wire is None else self.blocks.get(wire.target)
        if wire is None or block is None or not 0 <= wire.target_slot < len(block.inputs):
            return None
        return block, block.inputs[wire.target_slot]


def read_sheets(ui: Any) -> tuple[Sheet, dict[str, Sheet]]:
    """The file's own sheet, and its subgraphs by id.

    Raises:
        CanvasError: a part is not shaped as the editor writes it.
    """
    if not isinstance(ui, dict) or not isinstance(ui.get("nodes"), list):
        raise CanvasError(f"canvas: got {_kind(ui)}, expected an object with a list 'nodes'")
    definitions = ui.get("definitions")
    raw = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    sheets = {}
    for entry in _list(raw, "canvas: definitions.subgraphs"):
        where = "canvas: subgraph"
        if not isinstance(entry, dict):
            raise CanvasError(f"{where}: got {_kind(entry)}, expected an object")
        sheet = _read_sheet(entry, _id(entry.get("id"), where))
        sheets[sheet.id] = sheet
    return _read_sheet(ui, ""), sheets


def _read_sheet(raw: dict[str, Any], sheet_id: str) -> Sheet:
    name = raw.get("name") if isinstance(raw.get("name"), str) else ""
    where = f"canvas: subgraph {(name or sheet_id)[:40]!r}" if sheet_id else "canvas"
    blocks: dict[str, Block] = {}
    for entry in _list(raw.get("nodes"), f"{where}: nodes"):
        block = _read_block(entry, where)
        if block.id in blocks:
            raise CanvasError(f"{where}: node {block.id}: got two nodes with this id, expected one")
        blocks[block.id] = block
    wires: dict[str, Wire] = {}
    links = raw.get("links")
    rows = list(links.values()) if isinstance(links, dict) else _list(links, f"{where}: links")
    for k, row in enumerate(rows):
        if row is not None:  # the editor leaves holes where links were removed
            wire_id, wire = _read_wire(row, f"{where}: links[{k}]")
            wires[wire_id] = wire
    inputs = _read_slots(raw.get("inputs"), f"{where}: inputs") if sheet_id else ()
    return Sheet(sheet_id, name or "", blocks, wires, inputs)


def _read_block(raw: Any, where: str) -> Block:
    if not isinstance(raw, dict):
        raise CanvasError(f"{where}: node: got {_kind(raw)}, expected an object")
    block_id = _id(raw.get("id"), f"{where}: node")
    where = f"{where}: node {block_id}"
    type_, mode = raw.get("type"), raw.get("mode", ALWAYS)
    if not isinstance(type_, str):
        raise CanvasError(f"{where}: type is {_kind(type_)}, expected the name of a class")
    if mode is None:
        mode = ALWAYS
    if type(mode) is not int:
        raise CanvasError(f"{where}: mode is {_kind(mode)}, expected an integer")
    values = raw.get("widgets_values")
    named = raw.get("widgets_values_named")
    if isinstance(values, dict):  # some extensions write names here
        values, named = [], named if isinstance(named, dict) else values
    if named is not None and not isinstance(named, dict):
        raise CanvasError(f"{where}: widgets_values_named is {_kind(named)}, expected an object")
    properties = raw.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    proxies, left_out = properties.get("proxyWidgets"), properties.get(LEFT_OUT)
    title = raw.get("title")
    return Block(
        block_id,
        type_,
        mode,
        _read_slots(raw.get("inputs"), f"{where}: inputs"),
        _read_slots(raw.get("outputs"), f"{where}: outputs"),
        tuple(_list(values, f"{where}: widgets_values")),
        named,
        title if isinstance(title, str) else "",
        tuple(
            (str(entry[0]), str(entry[1]))
            for entry in (proxies if isinstance(proxies, list) else ())
            if isinstance(entry, list)
            and len(entry) >= 2
            and all(isinstance(part, str) for part in entry[:2])
        ),
        frozenset(
            name
            for name in (left_out if isinstance(left_out, list) else ())
            if isinstance(name, str)
        ),
    )


def _read_slots(raw: Any, where: str) -> tuple[Slot, ...]:
    slots = []
    for entry in _list(raw, where):
        if not isinstance(entry, dict):
            raise CanvasError(f"{where}: got {_kind(entry)}, expected an object")
        name, type_, link = entry.get("name"), entry.get("type"), entry.get("link")
        if not isinstance(name, str):
            raise CanvasError(f"{where}: name is {_kind(name)}, expected a string")
        widget = entry.get("widget")
        shown = widget.get("name", name) if isinstance(widget, dict) else ""
        wires = _list(entry.get("linkIds"), f"{where}: linkIds")
        slots.append(
            Slot(
                name,
                type_ if isinstance(type_, str) else "*",
                None if link is None else _id(link, f"{where}: link"),
                shown if isinstance(shown, str) else name,
                tuple(_id(wire, f"{where}: linkIds") for wire in wires),
            )
        )
    return tuple(slots)


def _read_wire(raw: Any, where: str) -> tuple[str, Wire]:
    if isinstance(raw, dict):
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
        parts = [raw.get(key) for key in keys]
    elif isinstance(raw, list) and len(raw) >= 5:
        parts = raw[:5]
    else:
        raise CanvasError(
            f"{where}: got {_kind(raw)}, expected [id, from, output, to, input, type]"
        )
    wire_id, origin, origin_slot, target, target_slot = parts
    return _id(wire_id, where), Wire(
        _id(origin, where), _slot(origin_slot, where), _id(target, where), _slot(target_slot, where)
    )


def _id(value: Any, where: str) -> str:
    if type(value) is int and abs(value) < 1 << 63:
        return str(value)
    if isinstance(value, str) and 0 < len(value) <= _MAX_ID_CHARS:
        return value
    raise CanvasError(f"{where}: id is {_kind(value)}, expected a 64-bit integer or a short string")


def _slot(value: Any, where: str) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 8:
        value = int(value)
    if type(value) is not int or not -1 <= value < _MAX_SLOT:
        raise CanvasError(f"{where}: slot is {_kind(value)}, expected an index")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise CanvasError(f"{where} is {_kind(value)}, expected a list")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
