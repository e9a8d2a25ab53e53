"""Which node of one workflow is which node of another, by what they are and where they stand.

Nodes get labels that say what lies below them (their sources) and above them (their readers), with
and without literals. Equal labels are matched, the telling ones first, in linear time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from flowloom.workflow.graph import Link, Workflow, input_order


class Side:
    """One of the two workflows: its reachable nodes, links both ways, and labels."""

    def __init__(self, workflow: Workflow, outputs: Iterable[str] | None, catalogue: Any) -> None:
        self.nodes, self._catalogue = workflow.nodes, catalogue
        self.order = workflow.order(outputs, catalogue)
        reached = set(self.order)
        self.sources: dict[str, dict[str, Link]] = {}
        """By node and input: the link, where it leads to a node of this workflow."""
        self.literals: dict[str, dict[str, str]] = {}
        """By node and input: the value as text that tells types apart; a dangling link as well."""
        self.readers: dict[str, list[tuple[str, str]]] = {node_id: [] for node_id in self.order}
        """By node: nodes that use it and their inputs."""
        for node_id in self.order:
            links, texts = {}, {}
            inputs = self.nodes[node_id].inputs
            for name in self.inputs(node_id):
                value = inputs[name]
                if type(value) is Link and value.node in reached:
                    links[name] = value
                    self.readers[value.node].append((node_id, name))
                else:
                    texts[name] = exact(value)
            self.sources[node_id], self.literals[node_id] = links, texts
        self.labels: dict[str, dict[str, int]] = {}

    def inputs(self, node_id: str) -> list[str]:
        """Names of a node's inputs, in the catalogue's order or by name."""
        return input_order(self.nodes[node_id], self._catalogue)

    def label(self, interned: dict[Any, int]) -> None:
        """Number what each node is by itself, below it and above it; equal means equal.

        Args:
            interned: Numbers given so far, shared by both sides.
        """

        def number(key: Any) -> int:
            return interned.setdefault(key, len(interned))

        own: dict[str, int] = {}
        kind: dict[str, int] = {}
        below: dict[str, int] = {}
        shape: dict[str, int] = {}
        above: dict[str, int] = {}
        for node_id in self.order:
            class_type = self.nodes[node_id].class_type
            kind[node_id] = number(class_type)
            own[node_id] = number(("own", class_type, *sorted(self.literals[node_id].items())))
            links = sorted(self.sources[node_id].items())
            full = [(name, below.get(link.node, -1), link.slot) for name, link in links]
            bare = [(name, shape.get(link.node, -1), link.slot) for name, link in links]
            below[node_id] = number(("below", own[node_id], *full))
            shape[node_id] = number(("shape", class_type, *bare))
        for node_id in reversed(self.order):
            uses = [
                (name, above.get(reader, -1), self.sources[reader][name].slot)
                for reader, name in self.readers[node_id]
            ]
            above[node_id] = number(("above", self.nodes[node_id].class_type, *sorted(uses)))
        self.labels = {"own": own, "below": below, "shape": shape, "above": above, "kind": kind}


# Labels that must agree, the telling ones first; and the label that neighbours must agree in.
_ROUNDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("below", "above"), "below"),
    (("below",), "own"),
    (("own", "above"), "own"),
    (("own", "shape"), "own"),
    (("shape", "above"), "shape"),
    (("above",), "kind"),
    (("shape",), "kind"),
    (("own",), "kind"),
    (("kind",), "kind"),
)


def match(old: Side, new: Side) -> dict[str, str]:
    """Ids of new nodes by ids of the old nodes that they are; each at most once."""
    interned: dict[Any, int] = {}
    old.label(interned)
    new.label(interned)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for names, neighbour in _ROUNDS:
        _pair(old, new, found, taken, names)
        _spread(old, new, found, taken, neighbour)
    return found


def _key(side: Side, node_id: str, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(side.labels[name][node_id] for name in names)


def _pair(
    old: Side, new: Side, found: dict[str, str], taken: set[str], names: tuple[str, ...]
) -> None:
    """Match free nodes of equal labels, in order."""
    free: dict[tuple[int, ...], list[str]] = {}
    for node_id in reversed(new.order):
        if node_id not in taken:
            free.setdefault(_key(new, node_id, names), []).append(node_id)
    for node_id in old.order:
        if node_id not in found:
            others = free.get(_key(old, node_id, names))
            if others:
                found[node_id] = others.pop()
                taken.add(found[node_id])


def _spread(old: Side, new: Side, found: dict[str, str], taken: set[str], name: str) -> None:
    """From matched nodes to sources and sole readers of one label, as far as it goes."""
    olds, news = old.labels[name], new.labels[name]
    todo = list(found.items())

    def add(a: str, b: str) -> None:
        if olds[a] == news[b] and a not in found and b not in taken:
            found[a] = b
            taken.add(b)
            todo.append((a, b))

    while todo:
        a, b = todo.pop()
        for key, link in old.sources[a].items():
            other = new.sources[b].get(key)
            if other is not None and link.slot == other.slot:
                add(link.node, other.node)
        if len(old.readers[a]) == len(new.readers[b]) == 1:
            (reader, key), (other_reader, other_key) = old.readers[a][0], new.readers[b][0]
            if key == other_key:
                add(reader, other_reader)


def exact(value: Any) -> str:
    """A literal as text; equal only for values of one type (1, 1.0, true and "1" are four)."""
    if isinstance(value, str):
        return f'"{value}"'
    if type(value) is Link:
        return f"dangling {value.slot}"
    return json.dumps(value, sort_keys=True, default=repr)
