"""Small edits of a workflow that the grammar can still write.

An edit changes a value, an option or a file, inserts an optional block on a link (a LoRA, a second
pass, a pixel operation, ...) or one more of a growing input, or removes one. Edits are proposed
freely and kept if the grammar accepts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowloom.workflow.blocks import insert_block, near_links, remove_block
from flowloom.workflow.codec import CodecError, Encoded
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.graph import Link, Node, Workflow
from flowloom.workflow.holes import Context, Holes
from flowloom.workflow.steps import FILE, LINK, VALUE

EDITS = {"value": 0.5, "file": 0.2, "insert": 0.15, "remove": 0.15}
_TRIES = 20
_ANY_FAMILY = 0.5  # share of model swaps that may leave the family


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
    holes = Holes.of_grammar(grammar)
    for _ in range(edits):
        before = [workflow.fingerprint() for workflow in current]
        open_rows = list(range(len(current)))
        for _ in range(_TRIES):
            proposals: dict[int, Workflow] = {}
            codes: list[list[int]] = []
            for row in open_rows:
                proposal = _propose(current[row], holes, rng)
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


def _propose(workflow: Workflow, holes: Holes, rng: np.random.Generator) -> Workflow | None:
    names = list(EDITS)
    edit = names[rng.choice(len(names), p=list(EDITS.values()))]
    if edit == "insert":
        return insert_block(workflow, holes, rng)
    if edit == "remove":
        return remove_block(workflow, holes, rng)
    return _swap(workflow, holes, rng, FILE if edit == "file" else VALUE)


def _swap(workflow: Workflow, holes: Holes, rng: np.random.Generator, how: int) -> Workflow | None:
    """Another literal in one input; another option of a choice brings its own inputs."""
    places = []
    for node_id, node in workflow.nodes.items():
        for hole in holes.of(node):
            now = node.inputs.get(hole.spec.name)
            if hole.how == how and type(now) is not Link:
                others = holes.others(hole, now)
                if others:
                    places.append((node_id, hole, others))
    if not places:
        return None
    node_id, hole, others = places[int(rng.integers(len(places)))]
    if holes.is_model(hole) and rng.random() < _ANY_FAMILY:
        value = holes.draw(hole, others, Context(0, ""), rng)
        return _adapt(workflow.replace(node_id, hole.spec.name, value), node_id, holes, rng)
    context = holes.context(workflow)
    value = holes.draw(hole, others, context, rng)
    if value is None:
        return None
    name = hole.spec.name
    if not hole.spec.branches:
        return workflow.replace(node_id, name, value)
    node = workflow.nodes[node_id]
    kept = {k: v for k, v in node.inputs.items() if not k.startswith(f"{name}.")}
    near = near_links(workflow, holes, node_id, node_id)
    filled = holes.complete(node.class_type, {**kept, name: value}, near, context, rng)
    if filled is None or filled[1]:
        return None
    return Workflow({**workflow.nodes, node_id: Node(node.class_type, filled[0])})


def _adapt(
    workflow: Workflow, loader: str, holes: Holes, rng: np.random.Generator
) -> Workflow | None:
    """Let what does not go with a new model follow it: encoder, latent, steps, size, ...

    None where that is not enough, such as for a LoRA where the new family has none.
    """
    context = holes.context(Workflow({loader: workflow.nodes[loader]}))
    for node_id, node in workflow.nodes.items():
        for hole in holes.of(node):
            now = node.inputs.get(hole.spec.name)
            if type(now) is Link and hole.how == LINK:
                source = workflow.nodes[now.node]
                token = holes.vocabulary.class_ids[source.class_type]
                if not holes.is_odd(hole, token, context):
                    continue
                better = holes.replacement(hole, source.class_type, context)
                if better is None:
                    return None
                renamed = Node(better, source.inputs)
                workflow = Workflow({**workflow.nodes, now.node: renamed})
            elif hole.how in (FILE, VALUE) and type(now) is not Link and node_id != loader:
                token = holes.token_of(hole, now)
                if token is None or not holes.is_odd(hole, token, context):
                    continue
                value = holes.draw(hole, holes.others(hole, now), context, rng, flatten=1.0)
                if value is None or hole.spec.branches:
                    return None
                workflow = workflow.replace(node_id, hole.spec.name, value)
    return workflow
