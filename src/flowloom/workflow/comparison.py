"""What changed between two workflows, in words that a person who knows ComfyUI reads.

Nodes are matched by what they are and where they stand, never by their ids (see `matching`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import Link, Workflow
from flowloom.workflow.literals import shown
from flowloom.workflow.matching import Side, exact, match

# How many neighbours are named, and how far a chain of unmatched nodes is followed.
_MAX_NEIGHBOURS, _MAX_WALK = 3, 200


def differences(old: Workflow, new: Workflow, catalogue: Catalogue | None = None) -> list[str]:
    """Say what makes one workflow into the other, one change a line.

    Only what the outputs reach counts. There is no line if and only if the fingerprints are equal.

    Args:
        old: The workflow as it was.
        new: The workflow as it is now.
        catalogue: Says which classes are outputs and in which order inputs stand; without one,
            ComfyUI's image outputs and alphabetical order are taken.
    """
    outputs = None if catalogue is None else catalogue.output_classes
    if old.fingerprint(outputs) == new.fingerprint(outputs):
        return []
    return list(_Comparison(Side(old, outputs, catalogue), Side(new, outputs, catalogue)).lines())


class _Comparison:
    def __init__(self, old: Side, new: Side) -> None:
        self.old, self.new = old, new
        self.match = match(old, new)
        self.back = {b: a for a, b in self.match.items()}
        self.replaced: dict[str, str] = {}
        """Old nodes whose place a node of another class took, by new node."""
        self._old_names, self._new_names = _names(old), _names(new)
        for a, b in list(self.match.items()):
            for name in old.sources[a].keys() & new.sources[b].keys():
                self._replace(old.sources[a][name].node, new.sources[b][name].node)
        gone = [a for a in old.order if a not in self.match and not old.readers[a]]
        come = [b for b in new.order if b not in self.back and not new.readers[b]]
        for a, b in zip(gone, come, strict=False):
            self._replace(a, b)

    def _replace(self, a: str, b: str) -> None:
        """Take one node for the other's successor, if neither is anything else."""
        free = a not in self.match and b not in self.back and a not in self.replaced.values()
        if free and b not in self.replaced:
            self.replaced[b] = a

    def lines(self) -> Iterator[str]:
        """Changes in the order of the new graph, then nodes that are gone."""
        for b in self.new.order:
            if b in self.back:
                yield from self._changes(self.back[b], b)
            elif b in self.replaced:
                yield f"{self._old_names[self.replaced[b]]} replaced by {self._new_names[b]}"
            else:
                place = _place(self.new, b, self._new_names, self.back, self.old, self.match)
                yield f"{self._new_names[b]} inserted{place}"
        gone = set(self.old.order) - self.match.keys() - set(self.replaced.values())
        for a in self.old.order:
            if a in gone:
                place = _place(self.old, a, self._old_names, self.match, self.new, self.back)
                yield f"{self._old_names[a]} removed{place}"

    def _changes(self, a: str, b: str) -> Iterator[str]:
        """Inputs of one node that differ."""
        old, new = self.old.nodes[a].inputs, self.new.nodes[b].inputs
        name = self._new_names[b]
        for key in dict.fromkeys([*self.new.inputs(b), *self.old.inputs(a)]):
            if key not in new:
                yield f"{name}: {key} removed (was {self._value(self.old, a, key)})"
            elif key not in old:
                yield f"{name}: {key} {self._value(self.new, b, key)} added"
            elif key in self.old.sources[a] or key in self.new.sources[b]:
                if not self._same_source(a, b, key):
                    was, now = self._value(self.old, a, key), self._value(self.new, b, key)
                    yield f"{name}.{key} now {now} (was {was.removeprefix('from ')})"
            elif self.old.literals[a][key] != self.new.literals[b][key]:
                # A node called by its file is not called by the very thing that changes.
                plain = name.removesuffix(f" ({shown(new[key])})")
                yield f"{plain}: {key} {_change(old[key], new[key])}"

    def _same_source(self, a: str, b: str, key: str) -> bool:
        """Whether an input's link is as it was, or its change is told by an inserted node."""
        was, now = self.old.sources[a].get(key), self.new.sources[b].get(key)
        if was is None or now is None:
            return False
        if was.node in self.match and now.node in self.back:
            return self.match[was.node] == now.node and was.slot == now.slot
        if self.replaced.get(now.node) == was.node:
            return was.slot == now.slot
        below_new = _through(self.new, now.node, self.back)
        below_old = _through(self.old, was.node, self.match)
        return bool(below_new & {self.match[node_id] for node_id in below_old})

    def _value(self, side: Side, node_id: str, key: str) -> str:
        """What an input holds: "from" a node, or the literal."""
        link = side.sources[node_id].get(key)
        if link is None:
            value = side.nodes[node_id].inputs[key]
            return "a missing node" if type(value) is Link else shown(value)
        names = self._old_names if side is self.old else self._new_names
        slot = f" output {link.slot}" if link.slot else ""
        return f"from {names[link.node]}{slot}"


def _through(side: Side, node_id: str, kept: dict[str, str]) -> set[str]:
    """The first matched nodes below a node, itself included, past unmatched ones only."""
    found: set[str] = set()
    seen, todo = {node_id}, [node_id]
    while todo and len(seen) < _MAX_WALK:
        one = todo.pop()
        if one in kept:
            found.add(one)
            continue
        for link in side.sources[one].values():
            if link.node not in seen:
                seen.add(link.node)
                todo.append(link.node)
    return found


def _place(
    side: Side,
    node_id: str,
    names: dict[str, str],
    kept: dict[str, str],
    other: Side,
    back: dict[str, str],
) -> str:
    """Where an unmatched node stands: " between these and those".

    Of its sources those are named which its readers used before, if there are any.

    Args:
        side: The graph it stands in.
        node_id: The node.
        names: What to call the nodes of this graph.
        kept: Nodes of the other graph by the matched nodes of this one.
        other: The graph without it.
        back: Inverse of `kept`.
    """
    before: set[str] = set()
    seen, todo = {node_id}, [node_id]
    while todo and len(seen) < _MAX_WALK:
        for reader, name in side.readers[todo.pop()]:
            if reader in kept:
                link = other.sources[kept[reader]].get(name)
                before.update(_through(other, link.node, back) if link is not None else ())
            elif reader not in seen:
                seen.add(reader)
                todo.append(reader)
    used = {back[one] for one in before}
    links = [link.node for link in side.sources[node_id].values()]
    main = [source for source in links if used & _through(side, source, kept)]
    below = [names[source] for source in main or links]
    above = [names[reader] for reader, _ in side.readers[node_id]]
    if below and above:
        return f" between {_listed(below)} and {_listed(above)}"
    if above:
        return f" before {_listed(above)}"
    return f" after {_listed(below)}" if below else ""


def _listed(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    rest = len(distinct) - _MAX_NEIGHBOURS
    more = [f"{rest} more"] if rest > 0 else []
    return ", ".join(distinct[:_MAX_NEIGHBOURS] + more)


def _names(side: Side) -> dict[str, str]:
    """What to call each node: its class, with its file, its use or its number where need be."""
    counts = Counter(side.nodes[node_id].class_type for node_id in side.order)
    names: dict[str, str] = {}
    for node_id in side.order:
        node = side.nodes[node_id]
        class_type = shown(node.class_type)
        files = [v for k, v in node.inputs.items() if k.endswith("_name") and _is_file(v)]
        if files:
            names[node_id] = f"{class_type} ({shown(files[0])})"
        elif counts[node.class_type] > 1 and side.readers[node_id]:
            reader, name = side.readers[node_id][0]
            names[node_id] = f"{class_type} ({shown(side.nodes[reader].class_type)}.{shown(name)})"
        else:
            names[node_id] = class_type
    repeated = Counter(names.values())
    rank: Counter[str] = Counter()
    for node_id, name in names.items():
        if repeated[name] > 1:
            rank[name] += 1
            names[node_id] = f"{name} #{rank[name]}"
    return names


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and "." in value


def _change(old: Any, new: Any) -> str:
    """A literal before and after, in at most a line, so that the difference can be seen."""
    was, now = shown(old), shown(new)
    if was == now and isinstance(old, str) and isinstance(new, str):
        at = next((k for k, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), 0)
        at = at or min(len(old), len(new))
        start = max(0, at - 20)
        return f"...{shown(old[start : at + 40])} -> ...{shown(new[start : at + 40])}"
    if was == now:
        was, now = shown(exact(old)), shown(exact(new))
    return f"{was} -> {now}" if was != now else f"{was} changed in depth"
