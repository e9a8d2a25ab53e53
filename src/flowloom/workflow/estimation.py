"""Weights of random workflows from examples: draw more like these.

How often each token stands in each field is counted, with the shipped weights as a few examples
more, so that what the examples lack stays possible.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.graph import Link, Workflow, WorkflowError
from flowloom.workflow.holes import Holes
from flowloom.workflow.steps import FILE, SEED, TEXT
from flowloom.workflow.weights import Table, weights_for

SMOOTHING = 2.0

Counts = dict[int, Counter[str]]


class _Counted(NamedTuple):
    everywhere: Counts
    by_recipe: dict[int, Counts]


def estimate_weights(
    workflows: Iterable[Workflow], grammar: Grammar, smoothing: float = SMOOTHING
) -> dict[str, Any]:
    """Weights for `random_workflows` that follow example workflows.

    A token weighs how often the examples have it in a field, plus `smoothing` times its shipped
    share; below a model file, the same is done for its recipe. Other fields keep their weights.
    Values that have no token and classes that the grammar does not write are passed over.

    Args:
        workflows: Examples, filled or not.
        grammar: What is to be drawn.
        smoothing: How many examples the shipped weights count for in each field.

    Returns:
        Weights in the form of `data/weights-t2i.json`.

    Raises:
        WorkflowError: no example has an output node of the catalogue.
    """
    shipped = weights_for(grammar)
    table, holes = Table(grammar, shipped), Holes.of_grammar(grammar)
    counted, read = _Counted({}, {}), 0
    for workflow in workflows:
        recipe = 0
        for field, text, token in _walk(workflow, holes):
            counted.everywhere.setdefault(field, Counter())[text] += 1
            if recipe:
                below = counted.by_recipe.setdefault(recipe, {})
                below.setdefault(field, Counter())[text] += 1
            recipe = max(int(table.recipe_of[token]), 0) or recipe
            read += 1
    if not read:
        raise WorkflowError("examples: got none with an output node, expected at least one")
    weights = copy.deepcopy(shipped)
    weights["fields"].update(_entries(table, 0, counted.everywhere, smoothing))
    tokens = grammar.vocabulary.tokens
    for recipe, counts in counted.by_recipe.items():
        files = [tokens[k].text for k in np.flatnonzero(table.recipe_of == recipe)]
        fields = _entries(table, recipe, counts, smoothing)
        weights["recipes"].append({"files": files, "fields": fields})
    return weights


def _walk(workflow: Workflow, holes: Holes) -> Iterator[tuple[int, str, int]]:
    """Field, token text and token of what fills each hole, in the order of the code.

    A link to a node seen before is "ref".
    """
    vocabulary, seen = holes.vocabulary, set()
    outputs = holes.catalogue.output_classes
    for root in workflow.roots(outputs):
        stack: list[tuple[int, Any]] = [(voc.END_FIELD, Link(root, 0))]
        while stack:
            field, value = stack.pop()
            if type(value) is not Link:
                if value is not None:
                    yield field, vocabulary.tokens[value].text, value
                continue
            node = workflow.nodes.get(value.node)
            if value.node in seen:
                yield field, "ref", voc.REF0
                continue
            seen.add(value.node)
            if node is None or node.class_type not in holes.catalogue.nodes:
                continue
            token = vocabulary.class_ids[node.class_type]
            yield field, node.class_type, token
            below = [(hole.field, _token(holes, hole, node.inputs)) for hole in holes.of(node)]
            stack.extend(reversed(below))


def _token(holes: Holes, hole: Any, inputs: Any) -> Any:
    """The link in a hole, or the token of its literal; None for what has no token of its own."""
    vocabulary, spec = holes.vocabulary, hole.spec
    if spec.name not in inputs:
        return None if spec.required else voc.NONE_ID
    value = inputs[spec.name]
    if type(value) is Link:
        return value
    if hole.how in (TEXT, SEED):
        return None
    if hole.how == FILE:
        file = holes.catalogue.file(spec.folder or "", str(value))
        return file and vocabulary.file_ids.get((file.folder, file.name, file.sha256))
    return next((k for k in holes.others(hole, None) if _same(vocabulary.tokens[k], value)), None)


def _same(token: voc.Token, value: Any) -> bool:
    return type(token.value) is type(value) and token.value == value


def _entries(
    table: Table, recipe: int, counts: Counts, smoothing: float
) -> dict[str, dict[str, float]]:
    """Entries of a weights file: counts, and the shipped shares `smoothing` times."""
    found = {}
    for field, seen in counts.items():
        shares = table.shares(field, recipe)
        if not shares:
            continue
        total = sum(shares.values())
        above, name = table.vocabulary.fields[field]
        key = "*" if field == voc.END_FIELD else f"{above}.{name}"
        found[key] = {
            text: round(seen.get(text, 0) + smoothing * share / total, 6)
            for text, share in shares.items()
        }
    return found
