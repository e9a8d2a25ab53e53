"""Weights files: how likely each token is in each field when workflows are drawn at random.

A file (`data/weights*.json`) gives relative weights. Its parts:

- ``fields``: by ``Class.input``, by ``input`` (of any class) or ``*`` (the output node), several
  separated by spaces; value, file or token text -> weight, ``ref`` for any reference, ``*`` for
  all that are not named.
- ``recipes``: the same for workflows of some ``families`` or ``files``, from the file on.
- ``affinity``: classes that suit some families only, when they come before the model's file.
- ``pairs``: weights of an input's tokens after the token before it (a height after a width).
- ``context``: factors for what depends on the graph (roles, second passes, other loaders).
- ``defaults``: of tokens that no entry names: a factor for each link that a class needs, the
  weight of all links together where a literal can stand, and that of absence for each 1 of others.
- ``first_pass_latents``: classes whose latent is drawn on from pure noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import DATA, base_name
from flowloom.workflow.grammar import Grammar

FLOOR = 1e-9  # keeps a legal token drawable where every weight is zero
MODEL_FOLDERS = ("checkpoints", "diffusion_models")
VALUED = ("value", "file")
REFS = np.arange(voc.REF0, voc.REF0 + voc.NUM_REFS)
SLOTS = np.arange(voc.SLOT0, voc.SLOT0 + voc.NUM_SLOTS)

Fields = Mapping[str, Mapping[str, float]]


@lru_cache(maxsize=2)
def shipped_weights(name: str) -> dict[str, Any]:
    """Weights that ship as package data: "weights" (embedded world) or "weights-t2i"."""
    return json.loads((DATA / f"{name}.json").read_text())


def embedded_weights() -> dict[str, Any]:
    """Shipped weights of the embedded world."""
    return shipped_weights("weights")


def t2i_weights() -> dict[str, Any]:
    """Shipped weights of text-to-image workflows on a ComfyUI server."""
    return shipped_weights("weights-t2i")


def weights_for(grammar: Grammar) -> dict[str, Any]:
    """Shipped weights for a grammar: those of the embedded world if they know all its classes."""
    embedded = embedded_weights()
    return embedded if set(grammar.class_names) <= set(embedded["classes"]) else t2i_weights()


def support(grammar: Grammar) -> np.ndarray:
    """Tokens that may ever fill a field, [H, V]; none where the grammar does not write it."""
    legal = grammar.static.copy()
    links = np.flatnonzero(grammar.field_type >= 0)
    legal[np.ix_(links, REFS)] = True
    legal[np.ix_(links, SLOTS)] = True
    legal[voc.END_FIELD, voc.EOS] = True
    return legal


class Table:
    """Weights by field and recipe, for the tokens that may ever fill a field: its *support*.

    A recipe is what the model file of a workflow asks for; recipe 0 is none. Shapes: H fields,
    S tokens of the largest support, R recipes, K distinct rows.
    """

    def __init__(self, grammar: Grammar, weights: Mapping[str, Any]) -> None:
        """Read weights.

        Raises:
            ValueError: a token is named that the vocabulary does not have.
        """
        self.catalogue, self.vocabulary = grammar.catalogue, grammar.vocabulary
        self._texts = {token.text for token in grammar.vocabulary.tokens}
        self._texts |= {t for name in ("weights", "weights-t2i") for t in _texts_of(name)}
        self._found: dict[int, dict[str, int]] = {}
        legal = support(grammar)
        sizes = legal.sum(1)
        # Fields of classes that the grammar does not write have no token.
        self.columns = np.zeros((len(legal), int(sizes.max())), np.int64)
        self.fields = np.flatnonzero(sizes)
        for field in self.fields:
            self.columns[field, : sizes[field]] = np.flatnonzero(legal[field])
        self.inside = np.arange(self.columns.shape[1]) < sizes[:, None]
        self.is_ref = np.isin(self.columns, REFS) & self.inside
        groups = np.array([t.group for t in self.vocabulary.tokens])[self.columns]
        written = np.isin(groups, VALUED) | (self.columns == voc.PROMPT_ID)
        links = (groups == "class") | (self.columns == voc.SEED_LINK) | self.is_ref
        # Links where a literal can stand.
        self.for_literal = links & self.inside & (written & self.inside).any(1, keepdims=True)
        self._of_input: dict[str, list[int]] = {}
        for field in self.fields.tolist():
            self._of_input.setdefault(self.vocabulary.fields[field][1], []).append(field)
        self._fill(weights)

    def _fill(self, weights: Mapping[str, Any]) -> None:
        """`values[row_of[r, h]]` [S]: weights of field h under recipe r."""
        older = np.float32(weights["context"]["older_reference"])
        age = np.where(self.is_ref, older ** (self.columns - voc.REF0), 1).astype(np.float32)
        base = self._defaults(weights.get("defaults", {}))
        self._apply(base, weights["fields"])
        rows, ages = [base], [age]
        row_of = [np.arange(len(base), dtype=np.int32)]
        self.recipe_of = np.full(self.vocabulary.size, -1, np.int32)
        made: dict[tuple[int, ...], int] = {}
        entries = weights.get("recipes", ())
        for token_id, token in enumerate(self.vocabulary.tokens):
            found = _recipes(token, entries)
            if not found:
                continue
            if found not in made:
                made[found] = len(row_of)
                own, changed = base.copy(), set()
                for r in found:
                    changed |= self._apply(own, entries[r]["fields"])
                kept = np.array(sorted(changed), int)
                row_of.append(row_of[0].copy())
                row_of[-1][kept] = sum(map(len, rows)) + np.arange(len(kept))
                rows.append(own[kept])
                ages.append(age[kept])
            self.recipe_of[token_id] = made[found]
        self.values = np.concatenate(rows) * np.concatenate(ages)
        self.row_of = np.stack(row_of)

    def _defaults(self, defaults: Mapping[str, float]) -> np.ndarray:
        """Weights before any entry; a growing input is as likely to end as to go on."""
        tokens, columns = self.vocabulary.tokens, self.columns
        per_link = np.float32(defaults.get("per_link", 1.0))
        token_weight = np.ones(len(tokens), np.float32)
        for name, token in self.vocabulary.class_ids.items():
            inputs = self.catalogue.nodes[name].inputs if name in self.catalogue.nodes else ()
            token_weight[token] = per_link ** sum(i.is_link and i.required for i in inputs)
        base = np.where(self.inside, token_weight[columns], 1)
        share = np.float32(defaults.get("linked_literal", 1.0))
        num_links = np.maximum(self.for_literal.sum(1, keepdims=True), 1)
        base = np.where(self.for_literal, share / num_links, base).astype(np.float32)
        # Of references the latest alone: how many there will be is not known.
        counted = self.inside & ~np.isin(columns, [*SLOTS, *REFS[1:]])
        for token, factor in ((voc.END, 1.0), (voc.NONE_ID, defaults.get("absent"))):
            here = (columns == token) & self.inside
            if factor is not None:
                others = (base * (counted & ~here)).sum(1)
                base[here] = factor * others[here.any(1)]
        return base

    def _apply(self, table: np.ndarray, fields: Fields) -> set[int]:
        """Write entries into `table`, from general names to particular ones; fields changed."""
        index = self.vocabulary.field_index
        changed: set[int] = set()
        split = [(key, entries) for keys, entries in fields.items() for key in keys.split()]
        for particular in (False, True):
            for key, entries in split:
                if ("." in key or key == "*") != particular:
                    continue
                above, _, name = key.partition(".")
                place = index.get(("*", "end") if key == "*" else (above, name))
                places = [] if place is None else [place]
                for field in places if particular else self._of_input.get(key, []):
                    self._apply_one(table[field], field, key, entries)
                    changed.add(field)
        return changed

    def _apply_one(
        self, row: np.ndarray, field: int, key: str, entries: Mapping[str, float]
    ) -> None:
        if "*" in entries:
            row[~(self.is_ref[field] | self.for_literal[field])] = entries["*"]
        if "ref" in entries:
            row[self.is_ref[field]] = entries["ref"]
        places = self._places(field)
        for text, weight in entries.items():
            if text in places:
                row[places[text]] = weight
            elif text not in ("*", "ref") and text not in self._texts:
                raise ValueError(f"weights of {key}: the vocabulary has no token {text!r}")

    def _places(self, field: int) -> dict[str, int]:
        """Where in the support of a field a token is: by text, value, or name without folders."""
        if field not in self._found:
            columns = self.columns[field][self.inside[field]].tolist()
            tokens = [self.vocabulary.tokens[c] for c in columns]
            places = {base_name(t.value): k for k, t in enumerate(tokens) if t.group == "file"}
            places |= {str(t.value): k for k, t in enumerate(tokens) if t.group in VALUED}
            self._found[field] = places | {t.text: k for k, t in enumerate(tokens)}
        return self._found[field]

    def weights_of(self, field: int, tokens: Sequence[int], recipe: int) -> np.ndarray:
        """Weights [N] of some tokens of one field's support under a recipe."""
        places = np.searchsorted(self.columns[field][self.inside[field]], tokens)
        return np.maximum(self.values[self.row_of[recipe, field], places], FLOOR)

    def shares(self, field: int, recipe: int) -> dict[str, float]:
        """Weights in one field's support by token text, "ref" for the latest reference."""
        row, found = self.values[self.row_of[recipe, field]], {}
        for k, column in enumerate(self.columns[field][self.inside[field]].tolist()):
            if column in SLOTS or (column in REFS and column != voc.REF0):
                continue
            text = "ref" if column == voc.REF0 else self.vocabulary.tokens[column].text
            found[text] = float(row[k])
        return found

    def most_of(self, field: int, recipe: int) -> float:
        """The greatest weight in one field's support under a recipe, references apart."""
        new = self.inside[field] & ~self.is_ref[field]
        return float(self.values[self.row_of[recipe, field]][new].max())


@lru_cache(maxsize=2)
def _texts_of(name: str) -> frozenset[str]:
    weights = shipped_weights(name)
    fields = [*weights["fields"].values()]
    for recipe in weights.get("recipes", ()):
        fields += recipe["fields"].values()
    return frozenset(text for entries in fields for text in entries)


def _recipes(token: voc.Token, recipes: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Recipes, general ones first, that a file token calls for; a LoRA only where it is named."""
    if token.group != "file":
        return ()
    names = {token.text, f"{token.kind}/{base_name(token.value)}"}
    files = [k for k, r in enumerate(recipes) if not names.isdisjoint(r.get("files", ()))]
    if token.kind not in MODEL_FOLDERS and not files:
        return ()
    families = [k for k, r in enumerate(recipes) if token.family in r.get("families", ())]
    return (*families, *files)
