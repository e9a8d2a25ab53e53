"""From the editor's sheets to plain nodes: subgraphs opened, stand-ins resolved.

The editor draws things that a server never sees: subgraphs, reroutes, primitives, notes, muted and
bypassed nodes. What is left is one `Leaf` per node that runs, with the source of each linked input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flowloom.workflow.editor_file import (
    BYPASSED,
    INSIDE,
    MUTED,
    Block,
    CanvasError,
    Sheet,
    Slot,
)
from flowloom.workflow.graph import Link
from flowloom.workflow.validation import MAX_NODES

REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
NOTES = frozenset({"Note", "MarkdownNote"})
EDITOR_CLASSES = NOTES | {REROUTE, PRIMITIVE}
"""Classes that exist in the editor only."""
MAX_SLOTS = 200_000
"""Inputs of all nodes together."""
MAX_DEPTH = 50
"""How deep subgraphs may lie in each other."""


@dataclass(frozen=True)
class Fixed:
    """A literal that reaches an input over a link: from a primitive or a subgraph's own value."""

    value: Any


@dataclass(frozen=True)
class Stored:
    """A literal that reaches an input from another node's own: both stand for one of a subgraph."""

    block: Block
    name: str


Source = Link | Fixed | Stored


@dataclass(frozen=True)
class Leaf:
    """A node that a server runs, and what feeds its linked inputs, by name."""

    id: str
    block: Block
    sources: dict[str, Source]


class _Book:
    """The subgraphs of a file by id, and what their nodes show."""

    def __init__(self, sheets: dict[str, Sheet]) -> None:
        self.sheets = sheets
        self._values: dict[int, dict[str, Any]] = {}

    def values_of(self, host: Block) -> dict[str, Any]:
        """Literals that a subgraph's node holds for its inputs, by input name."""
        if id(host) not in self._values:
            self._values[id(host)] = _values_of(host, self.sheets[host.type])
        return self._values[id(host)]


class _Scope:
    """One use of a sheet: the file itself, or a subgraph at the place of one of its nodes."""

    def __init__(
        self, sheet: Sheet, book: _Book, parent: _Scope | None, host: Block | None
    ) -> None:
        self.sheet, self.book, self.parent, self.host = sheet, book, parent, host
        self.prefix = "" if parent is None or host is None else f"{parent.prefix}{host.id}:"
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.inner: dict[str, _Scope] = {}
        self.found: dict[str, Source | None] = {}
        """Sources of links, once asked for."""

    @property
    def ancestors(self) -> Iterator[str]:
        scope: _Scope | None = self
        while scope is not None:
            yield scope.sheet.id
            scope = scope.parent


def flatten(root: Sheet, sheets: dict[str, Sheet]) -> list[Leaf]:
    """Every node that runs, in the file's order, a subgraph's where its node stands.

    Ids inside a subgraph are ``host:inner``, as the editor sends them.

    Raises:
        CanvasError: subgraphs contain themselves, lie too deep, or there are too many nodes; or
            reroutes, bypassed nodes and subgraphs go round in a circle.
    """
    placed: list[tuple[_Scope, Block]] = []
    todo: list[tuple[_Scope, Block]] = []
    count = slots = 0
    book = _Book(sheets)

    def enter(scope: _Scope) -> None:
        todo.extend((scope, block) for block in reversed(scope.sheet.blocks.values()))

    enter(_Scope(root, book, None, None))
    while todo:
        scope, block = todo.pop()
        count, slots = count + 1, slots + len(block.inputs)
        if count > MAX_NODES or slots > MAX_SLOTS:
            raise CanvasError(
                f"canvas: got more than {MAX_NODES} nodes or {MAX_SLOTS} inputs with subgraphs open"
            )
        if block.mode in (MUTED, BYPASSED):
            continue
        sheet = sheets.get(block.type)
        if sheet is not None:
            _check_nesting(scope, sheet)
            scope.inner[block.id] = _Scope(sheet, book, scope, block)
            enter(scope.inner[block.id])
        elif block.type not in EDITOR_CLASSES:
            placed.append((scope, block))
    return [Leaf(scope.prefix + b.id, b, dict(_sources(scope, b))) for scope, b in placed]


def _check_nesting(scope: _Scope, sheet: Sheet) -> None:
    if sheet.id in scope.ancestors:
        raise CanvasError(f"canvas: subgraph {_short(sheet)} contains itself")
    if scope.depth >= MAX_DEPTH:
        raise CanvasError(f"canvas: subgraphs lie deeper in each other than {MAX_DEPTH}")


def _short(sheet: Sheet) -> str:
    return repr((sheet.name or sheet.id)[:40])


def _sources(scope: _Scope, block: Block) -> Iterator[tuple[str, Source]]:
    for slot in block.inputs:
        if slot.link is not None:
            source = _resolve(scope, slot.link)
            if source is not None:
                yield slot.widget or slot.name, source


def _resolve(scope: _Scope, wire_id: str) -> Source | None:
    """The node or literal at the far end of a link; None where nothing is left of it.

    Walks over everything that is only drawn. On its way into a subgraph the walk passes the values
    that the subgraph's node shows; the outermost counts where the far end is empty.
    """
    path: list[tuple[_Scope, str, Source | None]] = []
    seen: set[tuple[int, str]] = set()
    at: tuple[_Scope, str] | None = (scope, wire_id)
    end: Source | None = None
    while at is not None:
        scope, wire_id = at
        if wire_id in scope.found:
            end = scope.found[wire_id]
            break
        if (id(scope), wire_id) in seen:
            raise CanvasError(
                f"canvas: link {wire_id}: reroutes, bypassed nodes or subgraphs form a circle"
            )
        seen.add((id(scope), wire_id))
        at, end, shown = _step(scope, wire_id)
        path.append((scope, wire_id, shown))
    for scope, wire_id, shown in reversed(path):
        end = shown if end is None else end
        scope.found[wire_id] = end
    return end


def _step(
    scope: _Scope, wire_id: str
) -> tuple[tuple[_Scope, str] | None, Source | None, Source | None]:
    """(next link to follow, or what was found, and the value of a subgraph's node passed by)."""
    wire = scope.sheet.wires.get(wire_id)
    if wire is None:
        return None, None, None
    if wire.origin == INSIDE and scope.parent is not None:
        own = scope.sheet.inputs[wire.origin_slot : wire.origin_slot + 1]
        if scope.host is None or wire.origin_slot < 0 or not own:
            return None, None, None
        slot = scope.host.input_named.get(own[0].name)
        return _follow(scope.parent, slot), None, _shown_value(scope, own[0].name)
    block = scope.sheet.blocks.get(wire.origin)
    if block is None or block.mode == MUTED or block.type in NOTES:
        return None, None, None
    if block.type == REROUTE:
        return _follow(scope, block.inputs[0] if block.inputs else None), None, None
    if block.mode == BYPASSED:
        return _follow(scope, _bypass(block, wire.origin_slot)), None, None
    if block.type == PRIMITIVE:
        return None, Fixed(block.values[0]) if block.values else None, None
    inner = scope.inner.get(block.id)
    if inner is not None:
        leaving = inner.sheet.leaving.get(wire.origin_slot)
        return (None if leaving is None else (inner, leaving)), None, None
    if wire.origin_slot < 0:
        return None, None, None
    return None, Link(scope.prefix + block.id, wire.origin_slot), None


def _follow(scope: _Scope, slot: Slot | None) -> tuple[_Scope, str] | None:
    return None if slot is None or slot.link is None else (scope, slot.link)


def _bypass(block: Block, output: int) -> Slot | None:
    """The input that stands in for an output: of equal type, first at the same place."""
    if not 0 <= output < len(block.outputs):
        return None
    wanted = block.outputs[output].type
    if output < len(block.inputs) and block.inputs[output].type == wanted:
        return block.inputs[output]
    return block.input_of_type.get(wanted)


def _shown_value(scope: _Scope, name: str) -> Source | None:
    """The literal that a subgraph's node shows for an input: its own, else one stored inside.

    It feeds everything that the input is linked to inside, sockets as well.
    """
    host = scope.host
    for _ in range(MAX_DEPTH):
        if host is None:
            return None
        values, sheet = scope.book.values_of(host), scope.book.sheets[host.type]
        if name in values:
            return Fixed(values[name])
        if name not in sheet.literals:
            return None
        host, slot = sheet.literals[name]
        if host.type not in scope.book.sheets:
            return Stored(host, slot.widget)
        name = slot.name
    return None


def _values_of(host: Block, sheet: Sheet) -> dict[str, Any]:
    """Literals that a subgraph's node holds for its inputs, by input name.

    The newest files keep them in the order of the inputs that stand for literals; before, in that
    of `proxyWidgets`; and files older still leave them to the nodes inside.
    """
    if host.named is not None:
        pairs = host.named.items()
    elif host.proxies:
        own = (name if node == "-1" else "" for node, name in host.proxies)
        pairs = zip(own, host.values, strict=False) if len(host.values) == len(host.proxies) else ()
    else:
        pairs = zip(sheet.literals, host.values, strict=False)
    return {name: value for name, value in pairs if value is not None}
