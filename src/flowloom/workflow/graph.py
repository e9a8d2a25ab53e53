"""Workflow graphs as ComfyUI's API format holds them, with an identity that does not depend on ids.

A *template* workflow holds the text ``"{prompt}"`` or ``"{negative}"`` in its text inputs and seed
0; `Workflow.fill` turns it into something a server can render.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

PROMPT = "{prompt}"
NEGATIVE = "{negative}"
SEED_INPUTS = frozenset({"seed", "noise_seed"})
TEXT_INPUTS = frozenset({"text", "text_g", "text_l", "clip_l", "t5xxl"})
SEED_RANGE = 1 << 64
# How deep lists and objects of one literal may lie in each other, how many values it may hold, and
# the longest integer: Python writes none beyond 4300 digits.
MAX_DEPTH, MAX_VALUES, MAX_BITS = 64, 1_000_000, 4096
MAX_SLOT_BITS = 64
# Outputs times nodes up to which identity is worked out from each output on its own.
MAX_WALKED = 1_000_000
OUTPUT_CLASSES = frozenset(
    {"SaveImage", "PreviewImage", "SaveImageWebsocket", "SaveAnimatedPNG", "SaveAnimatedWEBP"}
)

Literal = str | int | float | bool | list | dict | None
_MARKERS = re.compile(r"\{prompt\}|\{negative\}")


class WorkflowError(ValueError):
    """A workflow has a shape that cannot be read; the message says what, where, got, expected."""


class Link(NamedTuple):
    """Output `slot` (0-based) of the node with id `node`."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """One node: its class and its inputs by name. Inputs are never changed in place."""

    class_type: str
    inputs: Mapping[str, Literal | Link]


@dataclass(frozen=True)
class Workflow:
    """Nodes by id. Never changed in place: every edit returns a new workflow."""

    nodes: dict[str, Node]

    @staticmethod
    def from_api(api: Any) -> Workflow:
        """Read API JSON (already parsed).

        Raises:
            WorkflowError: a part does not have the shape of the API format. Whether links and
                values make sense is for `flowloom.workflow.validation`.
        """
        if not isinstance(api, dict):
            raise WorkflowError(f"workflow: got {_kind(api)}, expected an object of nodes by id")
        nodes: dict[str, Node] = {}
        for node_id, raw in api.items():
            where = f"node {str(node_id)[:40]!r}"
            if not isinstance(node_id, str):
                raise WorkflowError(f"{where}: id is {_kind(node_id)}, expected a string")
            if not isinstance(raw, dict):
                raise WorkflowError(
                    f"{where}: got {_kind(raw)}, expected an object with class_type"
                )
            class_type, inputs = raw.get("class_type"), raw.get("inputs", {})
            if not isinstance(class_type, str):
                raise WorkflowError(
                    f"{where}: class_type is {_kind(class_type)}, expected a string"
                )
            if not isinstance(inputs, dict):
                raise WorkflowError(f"{where}: inputs is {_kind(inputs)}, expected an object")
            nodes[node_id] = Node(
                class_type, {name: _read(value, where, name) for name, value in inputs.items()}
            )
        return Workflow(nodes)

    def to_api(self) -> dict[str, dict[str, Any]]:
        """Return API JSON as plain dicts, in this workflow's order."""
        return {
            node_id: {
                "class_type": node.class_type,
                "inputs": {name: _write(value) for name, value in node.inputs.items()},
            }
            for node_id, node in self.nodes.items()
        }

    def roots(self, output_classes: Iterable[str] | None = None) -> list[str]:
        """Ids of the output nodes, in an order that does not depend on ids.

        Without `output_classes` ComfyUI's image outputs are meant, and where there is none, every
        node that nothing else uses.
        """
        classes = OUTPUT_CLASSES if output_classes is None else frozenset(output_classes)
        found = [i for i, node in self.nodes.items() if node.class_type in classes]
        if not found and output_classes is None:
            used = {v.node for n in self.nodes.values() for v in n.inputs.values() if _is_link(v)}
            found = [i for i in self.nodes if i not in used]
        if len(found) < 2:
            return found
        digests = self._digests(found, False, None, None)
        return sorted(found, key=digests.__getitem__)

    def order(
        self, output_classes: Iterable[str] | None = None, catalogue: Any = None
    ) -> list[str]:
        """Ids of the nodes the outputs reach, each after the nodes it uses.

        Inputs are followed in the catalogue's order, or by name without one, so the order does not
        depend on ids or key order.
        """
        return self._order(self.roots(output_classes), catalogue)

    def _order(self, roots: Iterable[str], catalogue: Any = None) -> list[str]:
        done: dict[str, None] = {}
        opened: set[str] = set()
        for root in roots:
            stack: list[tuple[str, bool]] = [(root, False)]
            while stack:
                node_id, leaving = stack.pop()
                if leaving:
                    done[node_id] = None
                elif node_id not in opened:
                    opened.add(node_id)
                    stack.append((node_id, True))
                    sources = self._sources(node_id, catalogue)
                    stack.extend((source, False) for source in reversed(sources))
        return list(done)

    def canonical(self, catalogue: Any = None) -> Workflow:
        """The reachable part with ids "1", "2", ... in `order`; inputs by schema or name."""
        outputs = None if catalogue is None else catalogue.output_classes
        order = self.order(outputs, catalogue)
        ids = {old: str(new) for new, old in enumerate(order, start=1)}
        nodes = {}
        for old in order:
            node = self.nodes[old]
            inputs = {name: node.inputs[name] for name in input_order(node, catalogue)}
            for name, value in inputs.items():
                if _is_link(value):
                    inputs[name] = Link(ids.get(value.node, value.node), value.slot)
            nodes[ids[old]] = Node(node.class_type, inputs)
        return Workflow(nodes)

    def fingerprint(self, output_classes: Iterable[str] | None = None) -> str:
        """SHA-256 (hex) of the part that the outputs reach; see `roots` for what an output is.

        Equal for two workflows that differ only in ids, key order or unreachable nodes. Literals
        are compared by type and value (1, 1.0, true, "1" are four things); sharing counts (in a
        graph of a thousand outputs and more, only as the number of nodes of each class).
        """
        return self._hash(False, None, None, output_classes)

    def template_fingerprint(self, prompt: str | None = None, negative: str | None = None) -> str:
        """`fingerprint` with seeds and texts replaced by their slots.

        A text that equals `prompt` is a prompt slot; one that equals `negative`, "" or
        "{negative}" is a negative slot; any other is a prompt slot. So a template has the id of
        everything `fill` makes from it; pass `negative` where a non-empty one was filled in.
        """
        return self._hash(True, prompt, negative)

    def replace(self, node: str, input: str, value: Literal | Link) -> Workflow:
        """A copy in which one input of one node has another value.

        Raises:
            WorkflowError: there is no such node.
        """
        if node not in self.nodes:
            raise WorkflowError(f"replace: no node {node!r}; ids are {', '.join(self.nodes)[:80]}")
        old = self.nodes[node]
        changed = Node(old.class_type, {**old.inputs, input: value})
        return Workflow({**self.nodes, node: changed})

    def fill(self, prompt: str, negative: str = "", seed: int = 0) -> Workflow:
        """Put texts and seeds into a template.

        Each literal seed input becomes (seed + k) mod 2^64, k counting the seeded nodes in `order`,
        so that two samplers differ and adding a second pass leaves the first pass's noise alone.
        """
        texts = {PROMPT: prompt, NEGATIVE: negative}
        reached = self.order()
        rank = {node_id: k for k, node_id in enumerate(reached)}
        by_rank = sorted(self.nodes, key=lambda node_id: rank.get(node_id, len(rank)))
        nodes, k = dict(self.nodes), 0
        for node_id in by_rank:
            node = self.nodes[node_id]
            inputs: dict[str, Literal | Link] = {}
            for name, value in node.inputs.items():
                if name in SEED_INPUTS and not _is_link(value):
                    inputs[name] = (seed + k) % SEED_RANGE
                elif isinstance(value, str) and "{" in value:
                    filled = _MARKERS.sub(lambda match: texts[match.group()], value)
                    if filled != value:
                        inputs[name] = filled
            k += any(name in SEED_INPUTS for name in inputs)
            if inputs:
                nodes[node_id] = Node(node.class_type, {**node.inputs, **inputs})
        return Workflow(nodes)

    def _sources(self, node_id: str, catalogue: Any = None) -> list[str]:
        node = self.nodes[node_id]
        links = (node.inputs[name] for name in input_order(node, catalogue))
        return [v.node for v in links if _is_link(v) and v.node in self.nodes]

    def _digests(
        self, roots: list[str], slots: bool, prompt: str | None, negative: str | None
    ) -> dict[str, str]:
        """Digest of what each root reaches, by root.

        Of a graph too large to be walked from every root, digests are made of digests: nodes that
        are shared within one root are not told from copies.
        """
        if len(roots) * len(self.nodes) <= MAX_WALKED:
            return {root: _digest(self._serial(root, slots, prompt, negative)) for root in roots}
        digests: dict[str, str] = {}
        for node_id in self._order(roots):
            node, row = self.nodes[node_id], []
            for name in sorted(node.inputs):
                value = node.inputs[name]
                if _is_link(value):
                    row.append([name, digests.get(value.node, ""), value.slot])
                else:
                    row.append([name, *_literal(name, value, slots, prompt, negative)])
            digests[node_id] = _digest([node.class_type, row])
        return {root: digests[root] for root in roots}

    def _serial(self, root: str, slots: bool, prompt: str | None, negative: str | None) -> list:
        """Nodes below `root` as nested lists, numbered depth first by input name."""
        number: dict[str, int] = {}
        stack = [root]
        while stack:
            node_id = stack.pop()
            if node_id not in number:
                number[node_id] = len(number)
                stack.extend(reversed(self._sources(node_id)))
        rows = []
        for node_id in number:
            node, row = self.nodes[node_id], []
            for name in sorted(node.inputs):
                value = node.inputs[name]
                if _is_link(value):
                    row.append([name, number.get(value.node, -1), value.slot])
                else:
                    row.append([name, *_literal(name, value, slots, prompt, negative)])
            rows.append([node.class_type, row])
        return rows

    def _hash(
        self,
        slots: bool,
        prompt: str | None,
        negative: str | None,
        output_classes: Iterable[str] | None = None,
    ) -> str:
        roots = self.roots(output_classes)
        if len(roots) == 1:
            return _digest([self._serial(roots[0], slots, prompt, negative)])
        # Each root is written alone, so that no order among equal roots can matter; the class
        # counts then tell nodes shared between roots from copies.
        parts = sorted(self._digests(roots, slots, prompt, negative).values())
        counts: dict[str, int] = {}
        for node_id in self.order(output_classes):
            class_type = self.nodes[node_id].class_type
            counts[class_type] = counts.get(class_type, 0) + 1
        return _digest([parts, sorted(counts.items())])


def _literal(
    name: str, value: Any, slots: bool, prompt: str | None, negative: str | None
) -> tuple[str, Any]:
    """What a fingerprint holds of a literal; seeds and texts are slots where `slots` says so."""
    if slots and name in SEED_INPUTS:
        return "seed", None
    if slots and name in TEXT_INPUTS and isinstance(value, str):
        is_negative = value != prompt and value in ("", NEGATIVE, negative)
        return "negative" if is_negative else "prompt", None
    return "literal", value


def is_link_shape(value: Any) -> bool:
    """Whether API JSON reads `value` as a link: every list of two is one."""
    return isinstance(value, (list, tuple)) and len(value) == 2


def _is_link(value: Any) -> TypeGuard[Link]:
    return type(value) is Link


def input_order(node: Node, catalogue: Any) -> list[str]:
    """Names of a node's inputs as the catalogue orders them, the rest by name."""
    spec = None if catalogue is None else catalogue.nodes.get(node.class_type)
    if spec is None:
        return sorted(node.inputs)
    known = [i.name for i in spec.inputs if i.name in node.inputs]
    return known + sorted(set(node.inputs) - set(known))


def _read(value: Any, where: str, name: Any) -> Any:
    if not isinstance(name, str):
        raise WorkflowError(f"{where}: input name is {_kind(name)}, expected a string")
    if type(value) is Link:
        return value
    if is_link_shape(value):
        source, slot = value
        if not isinstance(source, str) or type(slot) is not int:
            raise WorkflowError(
                f"{where}, input {name[:40]!r}: link is [{_kind(source)}, {_kind(slot)}], "
                "expected [node id as a string, output slot as an integer]"
            )
        if slot.bit_length() > MAX_SLOT_BITS:
            raise WorkflowError(
                f"{where}, input {name[:40]!r}: link to a slot of {slot.bit_length()} bits, "
                f"expected at most {MAX_SLOT_BITS}"
            )
        return Link(source, slot)
    fault = json_fault(value)
    if fault:
        raise WorkflowError(f"{where}, input {name[:40]!r}: {fault}, expected JSON or a link")
    return value


def json_fault(value: Any) -> str:
    """What keeps a literal from being written as JSON again, or "" (see `MAX_DEPTH`)."""
    todo, num = [(value, 0)], 0
    while todo:
        value, depth = todo.pop()
        num += 1
        if num > MAX_VALUES:
            return f"got more than {MAX_VALUES} values"
        if value is None or isinstance(value, (str, float)):
            continue
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                return f"got a number of {value.bit_length()} bits"
        elif depth == MAX_DEPTH:
            return f"got lists or objects more than {MAX_DEPTH} deep"
        elif isinstance(value, (list, tuple)):
            todo.extend((inner, depth + 1) for inner in value)
        elif isinstance(value, dict):
            key = next((key for key in value if not isinstance(key, str)), None)
            if key is not None:
                return f"got an object with {_kind(key)} as a key"
            todo.extend((inner, depth + 1) for inner in value.values())
        else:
            return f"got {_kind(value)}"
    return ""


def _write(value: Any) -> Any:
    return [value.node, value.slot] if type(value) is Link else value


def _digest(rows: Any) -> str:
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
