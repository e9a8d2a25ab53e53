"""Random valid workflows: the grammar's mask, weighted toward sane text-to-image flows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import DATA
from flowloom.workflow.codec import Encoded
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.graph import NEGATIVE, PROMPT
from flowloom.workflow.pushdown import State

BATCH = 256
_FLOOR = 1e-9  # keeps a legal token drawable where every weight is zero


@lru_cache(maxsize=1)
def default_weights() -> dict[str, Any]:
    """The shipped weights (`data/weights.json`)."""
    return json.loads((DATA / "weights.json").read_text())


class Weigher:
    """Weights [B, V] of the legal tokens of a state; illegal ones weigh zero."""

    def __init__(self, grammar: Grammar, weights: Mapping[str, Any] | None = None) -> None:
        """Read weights.

        Args:
            grammar: What is legal.
            weights: In the form of `data/weights.json`, which is the default.

        Raises:
            ValueError: a token is named that the vocabulary does not have.
        """
        shipped = default_weights()
        weights = shipped if weights is None else weights
        vocabulary = grammar.vocabulary
        self.context = weights["context"]
        self.table = np.ones((len(vocabulary.fields), vocabulary.size), np.float32)
        names = {token.text: k for k, token in enumerate(vocabulary.tokens)}
        refs = slice(voc.REF0, voc.REF0 + voc.NUM_REFS)
        age = np.float32(self.context["older_reference"]) ** np.arange(voc.NUM_REFS)
        self.table[:, refs] = age
        for field, entries in weights["fields"].items():
            pair = ("*", "end") if field == "*" else tuple(field.split(".", 1))
            index = vocabulary.field_index.get(pair)
            for text, weight in entries.items() if index is not None else ():
                if text == "ref":
                    self.table[index, refs] = weight * age
                elif text in names:
                    self.table[index, names[text]] = weight
                elif text not in shipped["fields"].get(field, {}):
                    raise ValueError(f"weights of {field}: the vocabulary has no token {text!r}")
        firsts = weights["first_pass_latents"]
        self.first_pass = np.isin([*grammar.class_names, ""], firsts)
        self.denoise = np.zeros(len(vocabulary.fields), bool)
        self.text = np.zeros(len(vocabulary.fields), bool)
        self.zero_out = np.zeros(len(vocabulary.fields), bool)
        for field, (name, step, spec) in grammar.field_step.items():
            self.denoise[field] = step.kind == "denoise"
            self.text[field] = voc.is_text(spec)
            self.zero_out[field] = name == "ConditioningZeroOut"
        self.low_noise = np.flatnonzero(
            [t.kind == "denoise" and t.value < 1.0 for t in vocabulary.tokens]
        )
        self.full_noise = np.flatnonzero(
            [t.kind == "denoise" and t.value == 1.0 for t in vocabulary.tokens]
        )

    def __call__(self, state: State) -> np.ndarray:
        """Weights [B, V], float32: positive exactly where a token is legal."""
        context, rows = self.context, np.arange(len(state))
        field, _ = state.holes()
        role = state.roles()
        weights = self.table[field]

        texts = np.flatnonzero(self.text[field])
        wrong = np.float32(context["wrong_role"])
        weights[texts[role[texts] == 2], voc.PROMPT_ID] *= wrong
        weights[texts[role[texts] == 1], voc.NEGATIVE_ID] *= wrong

        links = np.flatnonzero(state.grammar.field_type[field] >= 0)
        if len(links):
            node = state.reference_nodes()[links]
            at = (links[:, None], node)
            # A zeroed conditioning is made from the positive one.
            wanted = np.where(self.zero_out[field[links]], 1, role[links])
            other_role = (wanted[:, None] > 0) & (state.done_role[at] != wanted[:, None])
            conditioning = state.grammar.field_role[field[links]] > 0
            other_role &= (conditioning | self.zero_out[field[links]])[:, None]
            origin = state.open_origin[links, state.depth[links] - 1][:, None]
            other = (origin >= 0) & (state.done_origin[at] != origin)
            factor = np.where(other_role, wrong, 1) * np.where(other, context["other_origin"], 1)
            columns = voc.REF0 + np.arange(voc.NUM_REFS)
            weights[links[:, None], columns] *= factor.astype(np.float32)

        noise = np.flatnonzero(self.denoise[field])
        if len(noise):
            last = state.open_last[noise, state.depth[noise] - 1]
            first = self.first_pass[last]
            below, one = context["first_pass_denoise_below_one"], context["second_pass_denoise_one"]
            weights[np.ix_(noise[first], self.low_noise)] *= np.float32(below)
            weights[np.ix_(noise[~first], self.full_noise)] *= np.float32(one)
        return np.where(state.mask(), np.maximum(weights[rows], _FLOOR), 0)


def random_workflows(
    grammar: Grammar, n: int, seed: int, weights: Mapping[str, Any] | None = None
) -> list[Encoded]:
    """Draw `n` random valid workflows (templates).

    The first m of n workflows do not depend on n.

    Args:
        grammar: What is legal.
        n: How many.
        seed: Any non-negative integer.
        weights: As `data/weights.json`, which is the default.
    """
    weigher = Weigher(grammar, weights)
    found: list[Encoded] = []
    for batch in range(-(-n // BATCH)):
        rng = np.random.default_rng([seed, batch])
        found.extend(as_encoded(tokens, grammar) for tokens in draw(weigher, grammar, BATCH, rng))
    return found[:n]


def draw(
    weigher: Weigher, grammar: Grammar, batch: int, rng: np.random.Generator
) -> list[list[int]]:
    """Token lists of one batch, each token drawn in proportion to its weight."""
    state, alive = grammar.start(batch), np.arange(batch)
    written = np.zeros((batch, grammar.budget), np.int32)
    lengths = np.zeros(batch, np.int64)
    for step in range(grammar.budget):
        weights = weigher(state)
        # The least of exponential variables divided by their weights is drawn in proportion to
        # them. In single precision it can be 0, which must not meet a weight of 0.
        race = np.maximum(rng.standard_exponential(weights.shape, np.float32), 1e-30)
        tokens = np.divide(weights, race, out=race).argmax(1)
        state.advance(tokens)
        written[alive, step] = tokens
        ended = state.done
        if ended.any():
            lengths[alive[ended]] = step + 1
            alive = alive[~ended]
            if not len(alive):
                break
            state = state.select(~ended)
    rows = written.tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def as_encoded(tokens: list[int], grammar: Grammar) -> Encoded:
    """Sampled tokens with the template's texts and seeds beside them."""
    texts = {voc.PROMPT_ID: PROMPT, voc.NEGATIVE_ID: NEGATIVE}
    num_seeds = sum(grammar.seeds_opened.get(token, 0) for token in tokens)
    return Encoded(list(tokens), tuple(texts[t] for t in tokens if t in texts), (0,) * num_seeds)
