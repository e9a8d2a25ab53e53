"""Random valid workflows: the grammar's mask, weighted toward sane text-to-image flows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.codec import Encoded
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.graph import NEGATIVE, PROMPT
from flowloom.workflow.weighing import Rows, Weigher

BATCH = 256
_COMPACT = 0.75  # share of live rows below which ended ones are dropped from the state


def random_workflows(
    grammar: Grammar, n: int, seed: int, weights: Mapping[str, Any] | None = None
) -> list[Encoded]:
    """Draw `n` random valid workflows (templates).

    The first m of n workflows do not depend on n.

    Args:
        grammar: What is legal.
        n: How many.
        seed: Any non-negative integer.
        weights: In the form of `data/weights*.json`; the shipped ones that suit the grammar if left
            out (see `weights.weights_for`).
    """
    return list(islice(stream(grammar, seed, weights), n))


def stream(
    grammar: Grammar, seed: int, weights: Mapping[str, Any] | None = None
) -> Iterator[Encoded]:
    """Random valid workflows without end; the first n are those of `random_workflows`."""
    weigher, nested = Weigher(grammar, weights), _with_nested_seeds(grammar)
    for batch in count():
        rng = np.random.default_rng([seed, batch])
        for tokens in draw(weigher, grammar, BATCH, rng):
            yield as_encoded(tokens, grammar, nested)


def draw(
    weigher: Weigher, grammar: Grammar, batch: int, rng: np.random.Generator
) -> list[list[int]]:
    """Token lists of one batch, each token drawn in proportion to its weight."""
    state, rows, alive = grammar.start(batch), weigher.rows(batch), np.arange(batch)
    written = np.zeros((batch, grammar.budget), np.int32)
    lengths = np.zeros(batch, np.int64)
    for step in range(grammar.budget):
        live = np.flatnonzero(~state.done)
        if not len(live):
            break
        if len(live) < _COMPACT * len(state):
            state, rows, alive = state.select(live), rows.select(live), alive[live]
            live = np.arange(len(live))
        tokens = np.full(len(state), voc.PAD, np.int64)
        tokens[live] = _draw_tokens(weigher, state, rows, live, rng)
        state.advance(tokens)
        weigher.take(rows, tokens)
        written[alive[live], step] = tokens[live]
        lengths[alive[live[state.done[live]]]] = step + 1
    found = written.tolist()
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


def _draw_tokens(
    weigher: Weigher, state: Any, rows: Rows, live: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """One token for each live row.

    The least of exponential variables divided by their weights is drawn in proportion to them. In
    single precision it can be 0, which must not meet a weight of 0.
    """
    weights, columns = weigher(state, rows)
    weights, columns = weights[live], columns[live]
    if weigher.race is None:
        race = rng.standard_exponential(weights.shape, np.float32)
    else:
        every = rng.standard_exponential((len(live), int(weigher.race[-1]) + 1), np.float32)
        race = every[np.arange(len(live))[:, None], weigher.race[columns]]
    np.maximum(race, 1e-30, out=race)
    best = np.divide(weights, race, out=race).argmax(1)
    return columns[np.arange(len(live)), best]


def as_encoded(tokens: list[int], grammar: Grammar, nested: frozenset[int]) -> Encoded:
    """Sampled tokens with the template's texts and seeds beside them.

    Args:
        tokens: Token ids up to <eos>.
        grammar: What drew them.
        nested: Tokens of classes with seeds that depend on an option.
    """
    if not nested.isdisjoint(tokens):
        return grammar.codec.encode(grammar.codec.decode(tokens))
    texts = {voc.PROMPT_ID: PROMPT, voc.NEGATIVE_ID: NEGATIVE}
    num_seeds = sum(grammar.seeds_opened.get(token, 0) for token in tokens)
    return Encoded(list(tokens), tuple(texts[t] for t in tokens if t in texts), (0,) * num_seeds)


def _with_nested_seeds(grammar: Grammar) -> frozenset[int]:
    nodes, ids = grammar.catalogue.nodes, grammar.vocabulary.class_ids
    inputs = ((c, voc.every_input(nodes[c].inputs)) for c in grammar.class_names)
    return frozenset(
        ids[c] for c, found in inputs if any("." in name and voc.is_seed(s) for name, s in found)
    )
