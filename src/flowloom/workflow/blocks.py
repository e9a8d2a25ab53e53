"""Edits of a workflow's shape: a block put on a link or taken out, one more or less of an input."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.graph import Link, Node, Workflow
from flowloom.workflow.holes import Context, Hole, Holes, pick
from flowloom.workflow.inputs import InputSpec
from flowloom.workflow.steps import LINK, types_match

Edge = tuple[str, Hole, Link]  # holder, its input, source
_KEEPS_OTHER_LINKS = 0.1  # share of insertions that leave a LoRA's second output unused


def insert_block(workflow: Workflow, holes: Holes, rng: np.random.Generator) -> Workflow | None:
    """Put a new node on a link, its other links taken from the nodes around.

    Where a growing input has room, one more of it is as likely.
    """
    room = _growing(workflow, holes, full=False)
    if room and rng.random() < 0.5:
        node_id, grown, spec = pick(room, rng)
        return _grow(workflow, holes, node_id, grown, spec, rng)
    context = holes.context(workflow)
    place = _place_block(workflow, holes, context, rng)
    if place is None:
        return None
    class_type, (holder, hole, source) = place
    name, slot = holes.through(class_type)[0]
    near = near_links(workflow, holes, holder, source.node)
    filled = holes.complete(class_type, {name: source}, near, context, rng)
    if filled is None:
        return None
    inputs, lacking = filled
    nodes = dict(workflow.nodes)
    if lacking and not _add_sources(nodes, inputs, lacking, holes, context, rng):
        return None
    new = _new_id(nodes)
    nodes[new] = Node(class_type, inputs)
    edited = Workflow(nodes).replace(holder, hole.spec.name, Link(new, slot))
    return _reroute_rest(edited, holes, new, rng)


def remove_block(workflow: Workflow, holes: Holes, rng: np.random.Generator) -> Workflow | None:
    """Take out a node whose used outputs its own inputs can stand in for.

    Where a growing input has more than it needs, one less of it is as likely.
    """
    spare = _growing(workflow, holes, full=True)
    if spare and rng.random() < 0.5:
        return _shrink(workflow, *pick(spare, rng))
    candidates = []
    used: dict[str, Counter] = {}
    for node in workflow.nodes.values():
        for value in node.inputs.values():
            if type(value) is Link:
                used.setdefault(value.node, Counter())[value.slot] += 1
    for node_id, node in workflow.nodes.items():
        through = {slot: name for name, slot in reversed(holes.through(node.class_type))}
        if node_id in used and all(slot in through for slot in used[node_id]):
            candidates.append((node_id, through))
    chosen = pick(candidates, rng)
    if chosen is None:
        return None
    gone, through = chosen
    nodes = {}
    for node_id, node in workflow.nodes.items():
        if node_id != gone:
            inputs = {
                name: workflow.nodes[gone].inputs.get(through[value.slot])
                if type(value) is Link and value.node == gone
                else value
                for name, value in node.inputs.items()
            }
            nodes[node_id] = Node(node.class_type, inputs)
    edited = Workflow(nodes)
    # Without a sampler nothing is drawn; the grammar could write it, but no one would want it.
    reached = (edited.nodes[i] for i in edited.order(holes.catalogue.output_classes))
    return edited if any(voc.SEED_INPUTS & n.inputs.keys() for n in reached) else None


def _place_block(
    workflow: Workflow, holes: Holes, context: Context, rng: np.random.Generator
) -> tuple[str, Edge] | None:
    """A class and the link to put it on, which is the main line of the class.

    Types of links are as likely as each other: there are more conditionings than models.

    The main line is its first output and what that stands for: a LoRA goes on a MODEL link, and
    its CLIP is rerouted afterwards.
    """
    edges: dict[str, list[Edge]] = {}
    for edge in _edges(workflow, holes):
        if holes.blocks_for(edge[1]):
            edges.setdefault(edge[1].spec.type, []).append(edge)
    edge = pick(pick(list(edges.values()), rng) or [], rng)
    chosen = edge and holes.draw_block(edge[1], holes.blocks_for(edge[1]), context, rng)
    return (chosen, edge) if edge and chosen else None


def _edges(workflow: Workflow, holes: Holes) -> list[Edge]:
    """Links into sockets."""
    return [
        (node_id, hole, link)
        for node_id, node in workflow.nodes.items()
        for hole in holes.of(node)
        if hole.how == LINK and type(link := node.inputs.get(hole.spec.name)) is Link
    ]


def _add_sources(
    nodes: dict[str, Node],
    inputs: dict[str, Any],
    lacking: list[str],
    holes: Holes,
    context: Context,
    rng: np.random.Generator,
) -> bool:
    """Give links that nothing near could give a new loader each; False where there is none."""
    empty = [name for name, value in inputs.items() if value is None]
    for name, wanted in zip(empty, lacking, strict=True):
        class_type = pick(holes.sources(wanted), rng)
        filled = class_type and holes.complete(class_type, {}, {}, context, rng)
        if not filled:
            return False
        outputs = holes.catalogue.nodes[class_type].outputs
        slot = next(k for k, out in enumerate(outputs) if types_match(out, wanted))
        new = _new_id(nodes)
        nodes[new] = Node(class_type, filled[0])
        inputs[name] = Link(new, slot)
    return True


def _new_id(nodes: dict[str, Node]) -> str:
    new = len(nodes) + 1
    while str(new) in nodes:
        new += 1
    return str(new)


def near_links(workflow: Workflow, holes: Holes, holder: str, below: str) -> dict[str, Link]:
    """A link for each type (and type.input name) from the nodes at a link, nearest ones first."""
    found: dict[str, Link] = {}
    queue, seen = [holder, below], {holder, below}
    for node_id in queue:
        node = workflow.nodes[node_id]
        for hole in holes.of(node):
            link = node.inputs.get(hole.spec.name)
            if type(link) is not Link or hole.how != LINK:
                continue
            if not _reaches(workflow, link.node, holder):
                found.setdefault(hole.spec.type, link)
                found.setdefault(f"{hole.spec.type}.{hole.spec.name}", link)
            if link.node not in seen:
                seen.add(link.node)
                queue.append(link.node)
    return found


def _reaches(workflow: Workflow, start: str, goal: str) -> bool:
    queue, seen = [start], {start}
    for node_id in queue:
        if node_id == goal:
            return True
        for value in workflow.nodes[node_id].inputs.values():
            if type(value) is Link and value.node not in seen:
                seen.add(value.node)
                queue.append(value.node)
    return False


def _reroute_rest(workflow: Workflow, holes: Holes, new: str, rng: np.random.Generator) -> Workflow:
    """Let a new node's further outputs (a LoRA's CLIP) replace what it reads, mostly."""
    node = workflow.nodes[new]
    outputs = holes.catalogue.nodes[node.class_type].outputs
    upstream = {v for v in node.inputs.values() if type(v) is Link}
    before = {source.node for source in upstream}
    if len(outputs) < 2 or rng.random() < _KEEPS_OTHER_LINKS:
        return workflow
    for slot, out in enumerate(outputs):
        read = next((link for link in upstream if _type_of(workflow, holes, link) == out), None)
        for node_id, other in list(workflow.nodes.items()):
            if read is None or node_id == new or node_id in before:
                continue
            for name, value in other.inputs.items():
                if value == read and type(value) is Link and not _reaches(workflow, new, node_id):
                    workflow = workflow.replace(node_id, name, Link(new, slot))
    return workflow


def _type_of(workflow: Workflow, holes: Holes, link: Link) -> str:
    return holes.catalogue.nodes[workflow.nodes[link.node].class_type].outputs[link.slot]


def _growing(workflow: Workflow, holes: Holes, full: bool) -> list[tuple[str, str, InputSpec]]:
    """Growing inputs that can lose (`full`) or gain one: node, dotted name, spec."""
    found = []
    for node_id, node in workflow.nodes.items():
        spec = holes.catalogue.nodes[node.class_type]
        if not spec.is_dynamic:
            continue
        for name, item in _growing_of(spec.inputs, node.inputs, ""):
            count = sum(f"{name}.{short}" in node.inputs for short in item.names)
            if (count > max(item.min_count, 0)) if full else (0 < count < len(item.names)):
                found.append((node_id, name, item))
    return found


def _growing_of(
    specs: tuple[InputSpec, ...], given: Any, prefix: str
) -> list[tuple[str, InputSpec]]:
    """Growing inputs, with dotted names, of the branches that are open."""
    found = []
    for spec in specs:
        name = prefix + spec.name
        if spec.element is not None:
            found.append((name, spec))
        for key, inner in spec.branches:
            if given.get(name) == key:
                found += _growing_of(inner, given, f"{name}.")
    return found


def _grow(
    workflow: Workflow,
    holes: Holes,
    node_id: str,
    name: str,
    spec: InputSpec,
    rng: np.random.Generator,
) -> Workflow | None:
    node = workflow.nodes[node_id]
    free = next(short for short in spec.names if f"{name}.{short}" not in node.inputs)
    last = [short for short in spec.names if f"{name}.{short}" in node.inputs][-1]
    dotted, value = f"{name}.{free}", node.inputs[f"{name}.{last}"]
    assert spec.element is not None
    if spec.element.is_link:
        # A link of the same type from anywhere above, the last one's own if there is no other.
        near = near_links(workflow, holes, node_id, node_id)
        links = [v for k, v in near.items() if "." not in k and types_match(k, spec.element.type)]
        value = pick([*links, value], rng)
    else:
        hole = next(h for h in holes.of(node) if h.spec.name == f"{name}.{last}")
        others = holes.others(hole, None)
        value = holes.draw(hole, others, holes.context(workflow), rng) if others else value
    return workflow.replace(node_id, dotted, value)


def _shrink(workflow: Workflow, node_id: str, name: str, spec: InputSpec) -> Workflow:
    node = workflow.nodes[node_id]
    last = [f"{name}.{short}" for short in spec.names if f"{name}.{short}" in node.inputs][-1]
    inputs = {key: value for key, value in node.inputs.items() if key != last}
    return Workflow({**workflow.nodes, node_id: Node(node.class_type, inputs)})
