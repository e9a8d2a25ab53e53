"""Small edits of a workflow that the grammar can still write.

An edit changes a value or a file, inserts an optional block on a link (a LoRA, a second pass, a
pixel operation, ...) or removes one. Edits are proposed freely and kept if the grammar accepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.codec import CodecError, Encoded
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Node, Workflow
from flowloom.workflow.steps import FILE, LINK, SEED, TEXT, VALUE, types_match

EDITS = {"value": 0.5, "file": 0.2, "insert": 0.15, "remove": 0.15}
_TRIES = 20


def mutate(
    workflow: Workflow | Encoded, grammar: Grammar, rng: np.random.Generator, edits: int = 1
) -> Workflow:
    """A workflow that differs from the given one by `edits` small edits.

    Args:
        workflow: A template that the grammar accepts.
        grammar: What is legal.
        rng: Source of chance.
        edits: How many edits, one after the other.

    Raises:
        CodecError: the grammar does not write the workflow: it is filled, or a value is off grid.
    """
    return mutate_all([workflow], grammar, rng, edits)[0]


def mutate_all(
    workflows: Sequence[Workflow | Encoded],
    grammar: Grammar,
    rng: np.random.Generator,
    edits: int = 1,
) -> list[Workflow]:
    """`mutate` each of many workflows; much faster than one by one.

    A workflow for which no acceptable edit is found in 20 proposals is returned as it is.
    """
    current = [
        grammar.codec.decode(w.tokens, w.texts or None, w.seeds or None)
        if isinstance(w, Encoded)
        else w.canonical(grammar.catalogue)
        for w in workflows
    ]
    accepted = grammar.accept_all([grammar.codec.encode(w).tokens for w in current])
    if not accepted.all():
        raise CodecError(
            f"workflow {int(np.argmin(accepted))}: the grammar does not write it; "
            "expected a template with values on the grids (fill it after mutating)"
        )
    for _ in range(edits):
        before = [workflow.fingerprint() for workflow in current]
        open_rows = list(range(len(current)))
        for _ in range(_TRIES):
            proposals: dict[int, Workflow] = {}
            codes: list[list[int]] = []
            for row in open_rows:
                proposal = _propose(current[row], grammar, rng)
                if proposal is not None and proposal.fingerprint() != before[row]:
                    try:
                        codes.append(grammar.codec.encode(proposal).tokens)
                    except CodecError:
                        continue
                    proposals[row] = proposal
            accepted = grammar.accept_all(codes)
            for (row, proposal), good in zip(proposals.items(), accepted, strict=True):
                if good:
                    current[row] = proposal.canonical(grammar.catalogue)
                    open_rows.remove(row)
            if not open_rows:
                break
    return current


def _propose(workflow: Workflow, grammar: Grammar, rng: np.random.Generator) -> Workflow | None:
    names = list(EDITS)
    edit = names[rng.choice(len(names), p=list(EDITS.values()))]
    if edit == "insert":
        return _insert(workflow, grammar, rng)
    if edit == "remove":
        return _remove(workflow, grammar, rng)
    return _swap(workflow, grammar, rng, FILE if edit == "file" else VALUE)


def _pick(items: Sequence, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))] if items else None


def _choices(grammar: Grammar, field: int) -> list:
    """Literals that the grammar may write into a field."""
    tokens = grammar.vocabulary.tokens
    found = (tokens[i] for i in np.flatnonzero(grammar.static[field]))
    return [t.value for t in found if t.group in ("value", "file")]


def _swap(
    workflow: Workflow, grammar: Grammar, rng: np.random.Generator, how: int
) -> Workflow | None:
    places = []
    for node_id, node in workflow.nodes.items():
        for step in grammar.codec.schema.steps[node.class_type]:
            if step.how == how and type(node.inputs.get(step.name)) is not Link:
                now = node.inputs.get(step.name)
                others = [v for v in _choices(grammar, step.field) if v != now]
                if others:
                    places.append((node_id, step.name, others))
    if not places:
        return None
    node_id, name, others = places[int(rng.integers(len(places)))]
    return workflow.replace(node_id, name, _pick(others, rng))


def _through(grammar: Grammar, class_type: str) -> list[tuple[str, int]]:
    """Inputs of a class that one of its own outputs could replace: (input name, slot)."""
    outputs = grammar.catalogue.nodes[class_type].outputs
    return [
        (step.name, slot)
        for slot, out in enumerate(outputs)
        for step in grammar.codec.schema.steps[class_type]
        if step.how == LINK and types_match(out, step.type)
    ]


def _insert(workflow: Workflow, grammar: Grammar, rng: np.random.Generator) -> Workflow | None:
    """Put a new node on a link, its other links taken from the nodes around."""
    outputs = grammar.catalogue.output_classes
    blocks = [c for c in grammar.class_names if _through(grammar, c) and c not in outputs]
    class_type = _pick(blocks, rng)
    if class_type is None:
        return None
    # Its main line: a LoRA goes on a MODEL link, and its CLIP is rerouted below.
    name, slot = _through(grammar, class_type)[0]
    steps = {step.name: step for step in grammar.codec.schema.steps[class_type]}
    edges = [
        (node_id, step.name, node.inputs[step.name])
        for node_id, node in workflow.nodes.items()
        for step in grammar.codec.schema.steps[node.class_type]
        if type(node.inputs.get(step.name)) is Link and step.type == steps[name].type
    ]
    edge = _pick(edges, rng)
    if edge is None:
        return None
    holder, holder_input, source = edge
    near = _near_links(workflow, grammar, holder, source.node)
    inputs = {}
    for step in steps.values():
        if step.name == name:
            inputs[step.name] = source
        elif step.how == LINK:
            link = near.get(f"{step.type}.{step.name}") or near.get(step.type)
            if link is None:
                return None
            inputs[step.name] = link
        elif step.how == SEED:
            inputs[step.name] = 0
        elif step.how == TEXT:
            inputs[step.name] = _pick([PROMPT, NEGATIVE], rng)
        elif step.required:
            value = _pick(_choices(grammar, step.field), rng)
            if value is None:
                return None
            inputs[step.name] = value
    new = str(len(workflow.nodes) + 1)
    nodes = {**workflow.nodes, new: Node(class_type, inputs)}
    edited = Workflow(nodes).replace(holder, holder_input, Link(new, slot))
    return _reroute_rest(edited, grammar, new, rng)


def _near_links(workflow: Workflow, grammar: Grammar, holder: str, below: str) -> dict[str, Link]:
    """A link for each type (and type.input name) from the nodes at a link, nearest ones first."""
    found: dict[str, Link] = {}
    queue, seen = [holder, below], {holder, below}
    for node_id in queue:
        node = workflow.nodes[node_id]
        for step in grammar.codec.schema.steps[node.class_type]:
            link = node.inputs.get(step.name)
            if type(link) is not Link:
                continue
            if not _reaches(workflow, link.node, holder):
                found.setdefault(step.type, link)
                found.setdefault(f"{step.type}.{step.name}", link)
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


def _reroute_rest(
    workflow: Workflow, grammar: Grammar, new: str, rng: np.random.Generator
) -> Workflow:
    """Let a new node's further outputs (a LoRA's CLIP) replace what it reads, mostly."""
    node = workflow.nodes[new]
    outputs = grammar.catalogue.nodes[node.class_type].outputs
    upstream = {v for v in node.inputs.values() if type(v) is Link}
    before = {source.node for source in upstream}
    if len(outputs) < 2 or rng.random() < 0.1:
        return workflow
    for slot, out in enumerate(outputs):
        read = next((link for link in upstream if _type_of(workflow, grammar, link) == out), None)
        for node_id, other in list(workflow.nodes.items()):
            if read is None or node_id == new or node_id in before:
                continue
            for name, value in other.inputs.items():
                if value == read and type(value) is Link and not _reaches(workflow, new, node_id):
                    workflow = workflow.replace(node_id, name, Link(new, slot))
    return workflow


def _type_of(workflow: Workflow, grammar: Grammar, link: Link) -> str:
    return grammar.catalogue.nodes[workflow.nodes[link.node].class_type].outputs[link.slot]


def _remove(workflow: Workflow, grammar: Grammar, rng: np.random.Generator) -> Workflow | None:
    """Take out a node whose used outputs its own inputs can stand in for."""
    candidates = []
    used: dict[str, Counter] = {}
    for node in workflow.nodes.values():
        for value in node.inputs.values():
            if type(value) is Link:
                used.setdefault(value.node, Counter())[value.slot] += 1
    for node_id, node in workflow.nodes.items():
        through = {slot: name for name, slot in reversed(_through(grammar, node.class_type))}
        if node_id in used and all(slot in through for slot in used[node_id]):
            candidates.append((node_id, through))
    chosen = _pick(candidates, rng)
    if chosen is None:
        return None
    gone, through = chosen
    nodes = {}
    for node_id, node in workflow.nodes.items():
        if node_id != gone:
            inputs = {
                name: workflow.nodes[gone].inputs[through[value.slot]]
                if type(value) is Link and value.node == gone
                else value
                for name, value in node.inputs.items()
            }
            nodes[node_id] = Node(node.class_type, inputs)
    edited = Workflow(nodes)
    # Without a sampler nothing is drawn; the grammar could write it, but no one would want it.
    samplers = [n for n in edited.nodes.values() if any(k in voc.SEED_INPUTS for k in n.inputs)]
    return edited if samplers else None
