"""A workflow as a file that the editor opens: nodes with slots, literals and links, laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowloom.workflow.catalogue import Catalogue, InputSpec, NodeSpec
from flowloom.workflow.editor_file import ALWAYS, LEFT_OUT, CanvasError
from flowloom.workflow.flattening import PRIMITIVE
from flowloom.workflow.graph import Link, Workflow
from flowloom.workflow.inputs import MATCH, active_inputs
from flowloom.workflow.layout import (
    BORDER,
    LETTER,
    PREVIEW,
    SLOT,
    TEXT,
    WIDGET,
    Box,
    place,
    topological,
)
from flowloom.workflow.literals import shown, unwrapped
from flowloom.workflow.widgets import KEEP_SEED, is_shown, write_literals

_VERSION = 0.4
_OPTIONAL = 7
"""The editor's shape for the slot of an optional input."""
_TYPES = {str: "STRING", bool: "BOOLEAN", int: "INT", float: "FLOAT"}
_WIDTH, _TEXT_WIDTH, _MAX_WIDTH = 270.0, 400.0, 460.0


@dataclass
class _Drawn:
    """One node on its way into the file."""

    id: int
    class_type: str
    spec: NodeSpec | None
    slots: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    values: list[Any]
    named: dict[str, Any]
    title: str = ""
    sources: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def to_ui(
    workflow: Workflow, catalogue: Catalogue, titles: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Lay a workflow out as a file that the editor opens.

    Ids that are small whole numbers are kept, others such as ``57:8`` get new ones. Literals that
    the workflow lacks are drawn with their defaults, and named, so that `from_ui` leaves them out
    again unless a person has changed them; inputs that the class does not have are not drawn, as
    the server ignores them. A literal given to a socket is drawn as a primitive node.

    Args:
        workflow: Every class must be in the catalogue and every link must lead to an output.
        catalogue: Node facts: which inputs are sockets and which literals, and their order.
        titles: Node titles by id, where they differ from the class name.

    Raises:
        CanvasError: a class is not in the catalogue, a link leads nowhere, or links form a circle.
    """
    missing = tuple(
        (i, n.class_type) for i, n in workflow.nodes.items() if n.class_type not in catalogue.nodes
    )
    if missing:
        names = ", ".join(sorted({shown(class_type) for _, class_type in missing})[:20])
        raise CanvasError(f"canvas: classes that the catalogue lacks: {names}", missing)
    sheet = _Sheet(workflow, catalogue, titles or {})
    return sheet.to_json()


class _Sheet:
    """The file in the making: nodes by their old ids, and the links drawn so far."""

    def __init__(self, workflow: Workflow, catalogue: Catalogue, titles: Mapping[str, str]) -> None:
        self.workflow, self.catalogue = workflow, catalogue
        self.ids = _integer_ids(workflow)
        self.drawn: dict[str, _Drawn] = {}
        self.links: list[list[Any]] = []
        self.primitives: dict[str, _Drawn] = {}
        sources = {node_id: self._check_links(node_id) for node_id in workflow.nodes}
        self.order = topological(sources)
        for node_id in self.order:
            self.drawn[node_id] = self._open(node_id, titles.get(node_id, ""), sources[node_id])
        for node_id in workflow.nodes:
            self._connect(node_id)

    def to_json(self) -> dict[str, Any]:
        nodes = {node_id: self.drawn[node_id] for node_id in self.workflow.nodes} | self.primitives
        boxes = place(
            {node_id: _box(node) for node_id, node in nodes.items()},
            {node_id: node.sources for node_id, node in nodes.items()},
        )
        run = {node_id: k for k, node_id in enumerate([*self.primitives, *self.order])}
        return {
            "revision": 0,
            "last_node_id": max((node.id for node in nodes.values()), default=0),
            "last_link_id": len(self.links),
            "nodes": [_node_json(node, boxes[i], run[i]) for i, node in nodes.items()],
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": _VERSION,
        }

    def _check_links(self, node_id: str) -> tuple[str, ...]:
        """Ids of the nodes that a node uses."""
        node = self.workflow.nodes[node_id]
        for name, value in node.inputs.items():
            if type(value) is Link:
                source = self.workflow.nodes.get(value.node)
                outputs = () if source is None else self.catalogue.nodes[source.class_type].outputs
                if not 0 <= value.slot < len(outputs):
                    raise CanvasError(
                        f"canvas: node {shown(node_id)}, input {shown(name)!r}: link to output "
                        f"{value.slot} of node {shown(value.node)}, which has {len(outputs)}"
                    )
        active = active_inputs(self.catalogue.nodes[node.class_type], node.inputs)
        linked = [node.inputs[i.name] for i in active if i.name in node.inputs]
        return tuple(dict.fromkeys(v.node for v in linked if type(v) is Link))

    def _open(self, node_id: str, title: str, sources: tuple[str, ...]) -> _Drawn:
        """A node with its outputs and literals, its sources being drawn already."""
        node = self.workflow.nodes[node_id]
        spec = self.catalogue.nodes[node.class_type]
        values, named = write_literals(spec, node.inputs)
        names = spec.output_names or spec.outputs
        match = self._matched(spec, node.inputs)
        outputs = [
            {"name": name, "type": match if type_ == MATCH else type_, "links": None}
            for name, type_ in zip(names, spec.outputs, strict=True)
        ]
        absent = tuple(k for k, v in named.items() if v is not None and k not in node.inputs)
        return _Drawn(
            self.ids[node_id],
            spec.class_type,
            spec,
            [],
            outputs,
            values,
            named,
            title,
            sources,
            absent,
        )

    def _matched(self, spec: NodeSpec, inputs: Mapping[str, Any]) -> str:
        """What an output of the type of its inputs gives."""
        for item in active_inputs(spec, inputs):
            value = inputs.get(item.name)
            if item.type == MATCH and type(value) is Link:
                return self.drawn[value.node].outputs[value.slot]["type"]
        return "*"

    def _connect(self, node_id: str) -> None:
        """Draw a node's slots, sockets before linked literals, and the links into them."""
        node, drawn = self.workflow.nodes[node_id], self.drawn[node_id]
        spec = self.catalogue.nodes[node.class_type]
        active = [*active_inputs(spec, node.inputs), *_spares(spec, node.inputs)]
        for item in sorted(active, key=is_shown):
            value = node.inputs.get(item.name)
            linked = type(value) is Link
            # Slots of literals below a choice say in which order their values lie.
            if is_shown(item) and not linked and "." not in item.name:
                continue
            slot: dict[str, Any] = {"name": item.name, "type": item.type, "link": None}
            if is_shown(item):
                slot["widget"] = {"name": item.name}
            elif not item.required:
                slot["shape"] = _OPTIONAL
            drawn.slots.append(slot)
            if linked:
                self._link(self.drawn[value.node], value.slot, drawn, slot)
            elif value is not None and not is_shown(item):
                self._primitive(node_id, item, unwrapped(value), slot)
            if slot["type"] == MATCH:
                slot["type"] = "*"

    def _link(self, source: _Drawn, output: int, target: _Drawn, slot: dict[str, Any]) -> None:
        link_id, type_ = len(self.links) + 1, source.outputs[output]["type"]
        slot["link"] = link_id
        if slot["type"] == MATCH:
            slot["type"] = type_
        source.outputs[output]["links"] = [*(source.outputs[output]["links"] or ()), link_id]
        self.links.append([link_id, source.id, output, target.id, len(target.slots) - 1, type_])

    def _primitive(self, node_id: str, item: InputSpec, value: Any, slot: dict[str, Any]) -> None:
        number = max(self.ids.values()) + len(self.primitives) + 1
        type_ = _TYPES.get(type(value), item.type)
        output: dict[str, Any] = {"name": type_, "type": type_, "links": None}
        output["widget"] = {"name": item.name}
        primitive = _Drawn(
            number, PRIMITIVE, None, [], [output], [value, KEEP_SEED], {}, item.name.split(".")[-1]
        )
        key = f"primitive {number}"
        while key in self.drawn:
            key += "'"
        self.primitives[key] = primitive
        drawn = self.drawn[node_id]
        drawn.sources += (key,)
        self._link(primitive, 0, drawn, slot)


def _spares(spec: NodeSpec, inputs: Mapping[str, Any]) -> list[InputSpec]:
    """The next free slot of each growing input, for people to link."""
    spares = []
    for item in spec.inputs:
        if item.element is None or is_shown(item.element):
            continue
        taken = [k for k, short in enumerate(item.names) if f"{item.name}.{short}" in inputs]
        k = max([item.min_count, *(place + 1 for place in taken)])
        if k < len(item.names):
            name = f"{item.name}.{item.names[k]}"
            spares.append(InputSpec(name, item.element.type, required=False))
    return spares


def _integer_ids(workflow: Workflow) -> dict[str, int]:
    """Ids as the editor has them: whole numbers, kept where they are small ones already."""
    ids = {
        node_id: int(node_id)
        for node_id in workflow.nodes
        if node_id.isascii() and node_id.isdecimal() and len(node_id) < 10 and node_id[0] != "0"
    }
    last = max(ids.values(), default=0)
    fresh = (node_id for node_id in workflow.nodes if node_id not in ids)
    ids.update((node_id, last + k) for k, node_id in enumerate(fresh, start=1))
    return ids


def _box(node: _Drawn) -> Box:
    """How large the editor will draw a node, rather too large than too small."""
    sockets = [slot for slot in node.slots if "widget" not in slot]
    height = BORDER + SLOT * max(len(sockets), len(node.outputs)) + WIDGET * len(node.values)
    width, label = _WIDTH, node.title or node.class_type
    if node.spec is not None:
        texts = sum(item.multiline and is_shown(item) for item in node.spec.inputs)
        height += TEXT * texts
        width = _TEXT_WIDTH if texts else width
        if node.spec.output_node or any(item.upload for item in node.spec.inputs):
            height += PREVIEW
    longest = max((len(slot["name"]) for slot in sockets), default=0)
    longest += max((len(output["name"]) for output in node.outputs), default=0)
    wanted = LETTER * max(longest, len(label)) + 2 * SLOT
    return Box(min(max(width, wanted), _MAX_WIDTH), height)


def _node_json(node: _Drawn, box: Box, order: int) -> dict[str, Any]:
    drawn: dict[str, Any] = {
        "id": node.id,
        "type": node.class_type,
        "pos": [round(box.x), round(box.y)],
        "size": [round(box.width), round(box.height)],
        "flags": {},
        "order": order,
        "mode": ALWAYS,
        "inputs": node.slots,
        "outputs": node.outputs,
        "properties": {"Node name for S&R": node.class_type},
        "widgets_values": node.values,
    }
    if node.left_out:
        drawn["properties"][LEFT_OUT] = list(node.left_out)
    if node.title:
        drawn["title"] = node.title
    if node.spec is not None and node.spec.is_dynamic:
        drawn["widgets_values_named"] = node.named
    return drawn
