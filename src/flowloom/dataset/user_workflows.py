"""Workflows that a person brings, made into templates that the grammar writes."""

from __future__ import annotations

from collections.abc import Iterator

from flowloom.dataset.sources import Inputs
from flowloom.workflow import Catalogue, CodecError, Grammar, Workflow, validate
from flowloom.workflow.graph import NEGATIVE, PROMPT, SEED_INPUTS, TEXT_INPUTS, Link
from flowloom.workflow.validation import Problem
from flowloom.workflow.vocabulary import grid, rule_for

_NAMED = 3
_OTHER_ROLE = {"positive": "negative", "negative": "positive"}


def read_templates(path: str, grammar: Grammar) -> tuple[list[Workflow], list[str]]:
    """Templates of the workflows under a path, and what is wrong with the others.

    Texts become slots, seeds 0, numbers the nearest value that the grammar writes, and file name
    prefixes its first; of workflows that are then the same the first one is kept.

    Args:
        path: A file or folder, see `sources.Inputs`.
        grammar: What can be learned and edited.

    Returns:
        Templates in canonical form, in the order of the files; one line per workflow that cannot be
        used, `FILE: what is wrong`.
    """
    catalogue = grammar.catalogue
    found: dict[str, Workflow] = {}
    problems: list[str] = []
    for source in Inputs([path]):
        try:
            workflow = source.workflow(catalogue)
            errors = [p for p in validate(workflow, catalogue) if p.severity == "error"]
            if errors:
                raise ValueError(_shown(errors))
            flow = on_grid(as_template(workflow), catalogue).canonical(catalogue)
            if not grammar.accept_all([grammar.codec.encode(flow).tokens])[0]:
                raise ValueError(
                    "got a workflow that the grammar does not write, expected one of at most "
                    f"{grammar.budget} tokens with values on the grids"
                )
        except (ValueError, CodecError) as error:
            problems.append(f"{source.path}: {' '.join(str(error).split())}")
        else:
            found.setdefault(flow.template_fingerprint(), flow)
    return list(found.values()), problems


def as_template(workflow: Workflow) -> Workflow:
    """The workflow with slots for its texts and seed 0.

    A text is the negative slot if only inputs called "negative" lead to it, else the prompt slot.
    """
    negative = _reached(workflow, "negative") - _reached(workflow, "positive")
    for node_id, node in list(workflow.nodes.items()):
        for name, value in node.inputs.items():
            if name in TEXT_INPUTS and isinstance(value, str):
                slot = NEGATIVE if node_id in negative else PROMPT
                workflow = workflow.replace(node_id, name, slot)
            elif name in SEED_INPUTS and type(value) is int:
                workflow = workflow.replace(node_id, name, 0)
    return workflow


def on_grid(workflow: Workflow, catalogue: Catalogue) -> Workflow:
    """The workflow with every number moved to the nearest value that has a token."""
    for node_id, node in list(workflow.nodes.items()):
        spec = catalogue.nodes[node.class_type]
        for name, value in node.inputs.items():
            item = spec.by_name.get(name)
            if item is None or item.options is not None or name in SEED_INPUTS:
                continue
            if rule_for(node.class_type, item)["kind"] == "prefix":
                workflow = workflow.replace(
                    node_id, name, grid(node.class_type, item, catalogue.families)[0]
                )
            elif type(value) in (int, float) and item.type in ("INT", "FLOAT"):
                values = grid(node.class_type, item, catalogue.families)
                if values:
                    # Of two that are as near, the lower one.
                    near = min(values, key=lambda other: (abs(other - value), other))
                    workflow = workflow.replace(node_id, name, near)
    return workflow


def summary(problems: list[str]) -> str:
    """The first few problems on one line."""
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(problems[:_NAMED]) + more


def _shown(errors: list[Problem]) -> str:
    first = errors[0]
    where = f"node {first.node_id} ({first.class_type}): " if first.node_id else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}{first.message}{more}"


def _reached(workflow: Workflow, role: str) -> set[str]:
    """Nodes that inputs of a role lead to.

    A node with inputs of both roles hands each of them on.
    """
    todo = list(_starts(workflow, role))
    reached: set[str] = set()
    while todo:
        node_id = todo.pop()
        if node_id in reached or node_id not in workflow.nodes:
            continue
        reached.add(node_id)
        for name, value in workflow.nodes[node_id].inputs.items():
            if type(value) is Link and name != _OTHER_ROLE[role]:
                todo.append(value.node)
    return reached


def _starts(workflow: Workflow, role: str) -> Iterator[str]:
    for node in workflow.nodes.values():
        for name, value in node.inputs.items():
            if type(value) is Link and name == role:
                yield value.node
