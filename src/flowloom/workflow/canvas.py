"""The editor's format (what people save and share) to a workflow and back.

`from_ui` opens subgraphs, resolves what is only drawn and names every literal; `to_ui` lays a
workflow out from left to right. From a file and back again gives the same workflow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowloom.workflow.catalogue import Catalogue, NodeSpec
from flowloom.workflow.drawing import to_ui
from flowloom.workflow.editor_file import Block, CanvasError, read_sheets
from flowloom.workflow.flattening import Fixed, Leaf, Stored, flatten
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Node, Workflow
from flowloom.workflow.inputs import active_inputs
from flowloom.workflow.literals import shown
from flowloom.workflow.widgets import conflict, default_literal, read_literals, to_literal, unread

__all__ = ["CanvasError", "Converted", "from_ui", "is_ui", "to_ui"]

_MAX_NAMED = 20
_BRACES = re.compile(r"(?<!\\)\{[^{}]*\}")
_COMMENT = re.compile(r"//|/\*")


@dataclass(frozen=True)
class Converted:
    """A workflow read from the editor's format."""

    workflow: Workflow
    warnings: tuple[str, ...] = ()
    """One line each: texts that the editor would have rewritten, links that could not be kept."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Titles that people gave to nodes, by node id."""


def is_ui(value: Any) -> bool:
    """Whether parsed JSON looks like the editor's format (a list `nodes`), not the API format."""
    return isinstance(value, dict) and isinstance(value.get("nodes"), list)


def from_ui(ui: Any, catalogue: Catalogue, known_only: bool = True) -> Converted:
    """Convert a workflow of the editor to one that a server takes.

    Random choices and comments in prompts, which the editor expands before it sends them, are kept
    as they are written and named in the warnings: no dice are rolled here.

    Args:
        ui: Parsed JSON.
        catalogue: Node facts.
        known_only: Refuse classes that the catalogue lacks. Else their nodes keep only their links,
            so that validation can say what else is wrong.

    Raises:
        CanvasError: `ui` is malformed, or has nodes of classes that the catalogue lacks; the
            message names the classes and `missing` all of the nodes.
    """
    leaves = flatten(*read_sheets(ui))
    missing = tuple(
        (leaf.id, leaf.block.type) for leaf in leaves if leaf.block.type not in catalogue.nodes
    )
    if missing and known_only:
        raise CanvasError(_missing_text(missing), missing)
    nodes: dict[str, Node] = {}
    warnings: list[str] = []
    literals: dict[int, dict[str, Any]] = {}

    def stored(block: Block) -> dict[str, Any]:
        if id(block) not in literals:
            spec = catalogue.nodes.get(block.type)
            literals[id(block)] = {} if spec is None else read_literals(spec, block)
        return literals[id(block)]

    for leaf in leaves:
        if leaf.id in nodes:
            raise CanvasError(
                f"canvas: node {shown(leaf.id)}: got two nodes with this id, expected one"
            )
        spec = catalogue.nodes.get(leaf.block.type)
        given = _links(leaf) if spec is None else _inputs(leaf, spec, stored, warnings)
        nodes[leaf.id] = Node(leaf.block.type, given)
    titles = {
        leaf.id: leaf.block.title
        for leaf in leaves
        if leaf.block.title and leaf.block.title != leaf.block.type
    }
    return Converted(Workflow(nodes), tuple(warnings), titles)


def _missing_text(missing: tuple[tuple[str, str], ...]) -> str:
    nodes: dict[str, list[str]] = {}
    for node_id, class_type in missing:
        nodes.setdefault(shown(class_type), []).append(shown(node_id))
    named = [f"{c} (node {', '.join(ids[:5])})" for c, ids in list(nodes.items())[:_MAX_NAMED]]
    more = f" and {len(nodes) - _MAX_NAMED} more" if len(nodes) > _MAX_NAMED else ""
    return f"canvas: classes that the catalogue lacks: {'; '.join(named)}{more}"


def _links(leaf: Leaf) -> dict[str, Any]:
    return {name: source for name, source in leaf.sources.items() if isinstance(source, Link)}


def _inputs(
    leaf: Leaf, spec: NodeSpec, stored: Callable[[Block], dict[str, Any]], warnings: list[str]
) -> dict[str, Any]:
    """A node's inputs in schema order: what is linked, else its literals."""
    links = _links(leaf)
    fixed: dict[str, Any] = {}
    for name, source in leaf.sources.items():
        if isinstance(source, Stored):
            source = Fixed(stored(source.block).get(source.name))
        if isinstance(source, Fixed) and source.value is not None:
            fixed[name] = source.value
    twice = conflict(spec, leaf.block)
    if twice is not None and twice[0] not in leaf.sources:
        name, placed, named = twice
        warnings.append(
            f"node {shown(leaf.id)} ({spec.class_type}), input {name!r}: the file holds "
            f"{shown(placed)} by position and {shown(named)} by name; took the latter"
        )
    lost = unread(spec, leaf.block)
    if lost:
        warnings.append(
            f"node {shown(leaf.id)} ({spec.class_type}): the catalogue knows no input for the "
            f"stored values {', '.join(lost[:5])}; left out"
        )
    given = {**fixed, **read_literals(spec, leaf.block, fixed), **links}
    for item in active_inputs(spec, given) if leaf.block.left_out else ():
        known = item.name in leaf.block.left_out and item.name in given
        if known and given[item.name] == default_literal(item):
            del given[item.name]
    inputs: dict[str, Any] = {}
    for item in active_inputs(spec, given):
        if item.name not in given:
            continue
        value = given[item.name]
        if item.name in fixed:
            value = to_literal(item, value)
        inputs[item.name] = value
        if item.dynamic_prompt and isinstance(value, str):
            warnings += _rewritten(leaf.id, item.name, value)
    warnings += (
        f"node {shown(leaf.id)} ({spec.class_type}): the catalogue knows no input {shown(name)!r}; "
        "its link is left out"
        for name in links
        if name not in inputs
    )
    return inputs


def _rewritten(node_id: str, name: str, text: str) -> Iterator[str]:
    found = next((m for m in _BRACES.findall(text) if m not in (PROMPT, NEGATIVE)), None)
    if found is not None:
        yield (
            f"node {shown(node_id)}, input {shown(name)!r}: the editor replaces {found[:40]!r} "
            "by one of its choices before it sends the text; kept as written"
        )
    if _COMMENT.search(text):
        yield (
            f"node {shown(node_id)}, input {shown(name)!r}: the editor strips // and /* */ "
            "comments before it sends the text; kept as written"
        )
