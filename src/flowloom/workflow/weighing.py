"""How likely each legal token is when workflows are drawn at random.

A weights file (`data/weights*.json`) gives relative weights of tokens by field. Its parts:

- ``fields``: by ``Class.input``, by ``input`` (of any class) or ``*`` (the output node), several
  separated by spaces; value, file or token text -> weight, ``ref`` for any reference, ``*`` for
  all that are not named.
- ``recipes``: the same for workflows of some ``families`` or ``files``, from the file on.
- ``affinity``: classes that suit some families only, when they come before the model's file.
- ``pairs``: weights of an input's tokens after the token before it (a height after a width).
- ``context``: factors for what depends on the graph (roles, second passes, other loaders).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import DATA
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.pushdown import State

FLOOR = 1e-9  # keeps a legal token drawable where every weight is zero
_MODEL_ROLES = ("checkpoint", "diffusion_model")
_VALUED = ("value", "file")
_SLOTS = np.arange(voc.SLOT0, voc.SLOT0 + voc.NUM_SLOTS)
_REFS = np.arange(voc.REF0, voc.REF0 + voc.NUM_REFS)

Entries = dict[str, dict[str, float]]


@lru_cache(maxsize=2)
def shipped_weights(name: str) -> dict[str, Any]:
    """Weights that ship as package data: "weights" (embedded world) or "weights-t2i"."""
    return json.loads((DATA / f"{name}.json").read_text())


def weights_for(grammar: Grammar) -> dict[str, Any]:
    """Shipped weights for a grammar: those of the embedded world if they know all its classes."""
    embedded = shipped_weights("weights")
    return embedded if set(grammar.class_names) <= set(embedded["classes"]) else t2i_weights()


def t2i_weights() -> dict[str, Any]:
    """Shipped weights of text-to-image workflows on a ComfyUI server."""
    return shipped_weights("weights-t2i")


class Rows:
    """What is remembered of rows while they are drawn, beside their `State`.

    recipe [B]: what the last model file asks for; favour [B, F]: which families suit the classes
    so far; last [B]: the last token.
    """

    def __init__(self, batch: int, num_families: int) -> None:
        self.recipe = np.zeros(batch, np.int32)
        self.favour = np.ones((batch, num_families), np.float32)
        self.last = np.full(batch, voc.PAD, np.int64)

    def select(self, rows: np.ndarray) -> Rows:
        """Only these rows (a boolean [B])."""
        other = Rows(0, 0)
        other.recipe, other.favour, other.last = (
            self.recipe[rows],
            self.favour[rows],
            self.last[rows],
        )
        return other


class Weigher:
    """Weights of the tokens that a hole may take.

    Tables hold the tokens that may ever fill a field, its *support*, instead of the vocabulary.
    Shapes: B rows, H fields, S tokens of the largest support, F families.
    """

    def __init__(self, grammar: Grammar, weights: Mapping[str, Any] | None = None) -> None:
        """Read weights.

        Args:
            grammar: What is legal.
            weights: In the form of a shipped file; the one that suits the grammar if left out.

        Raises:
            ValueError: a token is named that the vocabulary does not have.
        """
        weights = weights_for(grammar) if weights is None else weights
        self.vocabulary, self.context = grammar.vocabulary, weights["context"]
        self.families = tuple(grammar.families)
        self.names = {token.text: k for k, token in enumerate(grammar.vocabulary.tokens)}
        self._known = {t for name in ("weights", "weights-t2i") for t in _texts_of(name)}
        self._found: dict[int, dict[str, int]] = {}
        self._index_support(grammar)
        self._fill_table(weights)
        self._mark_fields(grammar, weights)
        self._fill_affinity(grammar, weights.get("affinity", {}))
        self._fill_pairs(weights.get("pairs", {}))
        # Tokens that came later take no part in a race over the vocabulary, so that what a seed
        # draws stays as it was.
        later = weights.get("later_tokens")
        texts = [token.text for token in grammar.vocabulary.tokens]
        self.race = None if later is None else np.cumsum(~np.isin(texts, later)) - 1

    # -- tables ----------------------------------------------------------------------------------

    def _index_support(self, grammar: Grammar) -> None:
        legal = support(grammar)
        sizes = legal.sum(1)
        # Fields of classes that the grammar does not write have no row.
        self.columns = np.zeros((len(legal), int(sizes.max())), np.int64)
        for field in np.flatnonzero(sizes):
            self.columns[field, : sizes[field]] = np.flatnonzero(legal[field])
        self.inside = np.arange(self.columns.shape[1]) < sizes[:, None]
        self.used_fields = np.flatnonzero(sizes)

    def _fill_table(self, weights: Mapping[str, Any]) -> None:
        """`table[row_of[r, h]]` [S]: weights of field h under recipe r; recipe 0 is none."""
        tokens = self.vocabulary.tokens
        families = {t.family for t in tokens if t.group == "file"}
        age = np.float32(self.context["older_reference"]) ** np.arange(voc.NUM_REFS)
        base = np.ones((len(self.columns), self.columns.shape[1]), np.float32)
        self.age = np.ones_like(base)
        for field in self.used_fields:
            refs = np.isin(self.columns[field], _REFS) & self.inside[field]
            self.age[field, refs] = age[: refs.sum()]
        self._apply(base, weights["fields"])
        rows, recipes = [base], [np.arange(len(base), dtype=np.int32)]
        self.recipe_of = np.full(len(tokens), -1, np.int32)
        made: dict[tuple[int, ...], int] = {}
        for k, token in enumerate(tokens):
            found = _recipes(token, weights.get("recipes", ()))
            if not found or token.family not in families:
                continue
            if found not in made:
                made[found] = len(recipes)
                copy, offset = base.copy(), sum(map(len, rows))
                changed: set[int] = set()
                for r in found:
                    changed |= self._apply(copy, weights["recipes"][r]["fields"])
                kept = np.array(sorted(changed), int)
                row_of = recipes[0].copy()
                row_of[kept] = offset + np.arange(len(kept))
                rows.append(copy[kept])
                recipes.append(row_of)
            self.recipe_of[k] = made[found]
        self.table = np.concatenate(rows)
        self.table *= np.concatenate([self.age, *(self._age_of(r) for r in recipes[1:])])
        self.row_of = np.stack(recipes)

    def _age_of(self, row_of: np.ndarray) -> np.ndarray:
        return self.age[row_of >= len(self.columns)]

    def _apply(self, table: np.ndarray, fields: Mapping[str, Mapping[str, float]]) -> set[int]:
        """Write entries into `table`, from general names to particular ones; fields changed."""
        index = self.vocabulary.field_index
        inputs: dict[str, list[int]] = {}
        for field in self.used_fields.tolist():
            inputs.setdefault(self.vocabulary.fields[field][1], []).append(field)
        changed: set[int] = set()
        split = [(key, entries) for keys, entries in fields.items() for key in keys.split()]
        for particular in (False, True):
            for key, entries in split:
                if ("." in key or key == "*") != particular:
                    continue
                above, _, name = key.partition(".")
                place = index.get(("*", "end") if key == "*" else (above, name))
                places = [] if place is None else [place]
                for field in places if particular else inputs.get(key, []):
                    self._apply_one(table[field], field, key, entries)
                    changed.add(field)
        return changed

    def _apply_one(
        self, row: np.ndarray, field: int, key: str, entries: Mapping[str, float]
    ) -> None:
        columns = self.columns[field]
        refs = np.isin(columns, _REFS) & self.inside[field]
        if "*" in entries:
            row[~refs] = entries["*"]
        if "ref" in entries:
            row[refs] = entries["ref"]
        places = self._places(field)
        for text, weight in entries.items():
            if text in places:
                row[places[text]] = weight
            elif text not in ("*", "ref") and not (text in self.names or text in self._known):
                raise ValueError(f"weights of {key}: the vocabulary has no token {text!r}")

    def _places(self, field: int) -> dict[str, int]:
        """Where in the support of a field a token is, by its text and by its value."""
        if field not in self._found:
            tokens = [self.vocabulary.tokens[c] for c in self.columns[field]]
            tokens = tokens[: int(self.inside[field].sum())]
            by_value = {str(t.value): k for k, t in enumerate(tokens) if t.group in _VALUED}
            self._found[field] = by_value | {t.text: k for k, t in enumerate(tokens)}
        return self._found[field]

    def _mark_fields(self, g: Grammar, weights: Mapping[str, Any]) -> None:
        tokens = self.vocabulary.tokens
        self.first_pass = np.isin([*g.class_names, ""], weights["first_pass_latents"])
        kinds = np.array([t.kind for t in tokens])[self.columns]
        full = np.array([t.kind == "denoise" and t.value == 1.0 for t in tokens])[self.columns]
        self.full_noise = full & self.inside
        self.low_noise = (kinds == "denoise") & ~full & self.inside
        self.denoise = (self.full_noise | self.low_noise).any(1)
        self.zero_out = np.zeros(len(self.columns), bool)
        for field, pair in enumerate(self.vocabulary.fields):
            self.zero_out[field] = pair[0] == "ConditioningZeroOut"
        self.is_link = g.field_type >= 0
        prompts = (self.columns == voc.PROMPT_ID) & self.inside
        self.text = prompts.any(1)
        self.prompt_at = prompts.argmax(1)
        self.negative_at = (self.columns == voc.NEGATIVE_ID).argmax(1)
        self.ref_at = (self.columns == voc.REF0).argmax(1)
        self.slot_at = (self.columns == voc.SLOT0).argmax(1)
        # Classes that give a positive and a negative conditioning.
        nodes = (g.catalogue.nodes[c] for c in g.class_names)
        self.gives_pair = np.array([*(n.outputs.count("CONDITIONING") > 1 for n in nodes), False])

    def _fill_affinity(self, g: Grammar, affinity: Mapping[str, Any]) -> None:
        tokens = self.vocabulary.tokens
        family = {name: f for f, name in enumerate(g.families)}
        self.affinity = np.ones((len(tokens), len(g.families)), np.float32)
        for class_type, entry in affinity.items():
            token = self.vocabulary.class_ids.get(class_type)
            if token is not None:
                fits = np.array([name in entry["families"] for name in g.families])
                self.affinity[token] = np.where(fits, 1, entry["other"])
        self.model_file = np.zeros(len(self.columns), bool)
        self.family_at = np.full(self.columns.shape, -1, np.int32)
        for field in self.used_fields if affinity else ():
            found = [tokens[c] for c in self.columns[field][self.inside[field]]]
            self.model_file[field] = any(t.role in _MODEL_ROLES for t in found)
            self.family_at[field, : len(found)] = [family.get(t.family, -1) for t in found]

    def _fill_pairs(self, pairs: Mapping[str, Any]) -> None:
        tokens = self.vocabulary.tokens
        self.paired = np.zeros(len(self.columns), bool)
        self.pair_row = np.zeros(len(tokens), np.int32)
        rows = [np.ones(len(tokens), np.float32)]
        inputs = np.array([name for _, name in self.vocabulary.fields])
        texts = np.array([str(t.value) if t.group in _VALUED else t.text for t in tokens])
        for names, after in pairs.items():
            self.paired |= np.isin(inputs, names.split())
            for before, entries in after.items():
                self.pair_row[texts == before] = len(rows)
                row = np.full(len(tokens), entries.get("*", 1.0), np.float32)
                for text, weight in entries.items():
                    row[texts == text] = weight
                rows.append(row)
        self.pair_table = np.stack(rows)

    # -- use -------------------------------------------------------------------------------------

    def rows(self, batch: int) -> Rows:
        """What is remembered of `batch` rows before their first token."""
        return Rows(batch, len(self.families))

    def take(self, rows: Rows, tokens: np.ndarray) -> None:
        """Remember one token [B] per row."""
        recipe = self.recipe_of[tokens]
        rows.recipe = np.where(recipe >= 0, recipe, rows.recipe)
        rows.favour *= self.affinity[tokens]
        rows.last = tokens

    def weights_of(self, field: int, tokens: Sequence[int], recipe: int) -> np.ndarray:
        """Weights [N] of some tokens of one field's support under a recipe, without context."""
        places = np.searchsorted(self.columns[field][self.inside[field]], tokens)
        return np.maximum(self.table[self.row_of[recipe, field], places], FLOOR)

    def shares(self, field: int, recipe: int) -> dict[str, float]:
        """Weights in one field's support by token text, "ref" for the latest reference."""
        row, found = self.table[self.row_of[recipe, field]], {}
        for k, column in enumerate(self.columns[field][self.inside[field]].tolist()):
            if column in _SLOTS or (column in _REFS and column != voc.REF0):
                continue
            text = "ref" if column == voc.REF0 else self.vocabulary.tokens[column].text
            found[text] = float(row[k])
        return found

    def most_of(self, field: int, recipe: int) -> float:
        """The greatest weight in one field's support under a recipe."""
        return float(self.table[self.row_of[recipe, field]][self.inside[field]].max())

    def affinity_of(self, token: int, family: str) -> float:
        """How well a class token suits a family; 1 where nothing is known."""
        known = family in self.families
        return float(self.affinity[token, self.families.index(family)]) if known else 1.0

    def __call__(self, state: State, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Weights [B, S], float32, of the tokens in columns [B, S]; illegal ones weigh zero."""
        every = np.arange(len(state))
        field, _ = state.holes()
        role = state.roles()
        columns = self.columns[field]
        weights = self.table[self.row_of[rows.recipe, field]]
        self._weigh_texts(weights, field, role)
        links = np.flatnonzero(self.is_link[field])
        if len(links):
            self._weigh_references(weights, state, field, role, links)
        self._weigh_noise(weights, state, field)
        files = np.flatnonzero(self.model_file[field])
        if len(files):
            family = self.family_at[field[files]]
            favour = np.take_along_axis(rows.favour[files], np.maximum(family, 0), 1)
            weights[files] *= np.where(family >= 0, favour, 1)
        paired = np.flatnonzero(self.paired[field])
        if len(paired):
            after = self.pair_row[rows.last[paired]]
            weights[paired] *= self.pair_table[after[:, None], columns[paired]]
        legal = state.mask()[every[:, None], columns] & self.inside[field]
        return np.where(legal, np.maximum(weights, FLOOR), 0), columns

    def _weigh_texts(self, weights: np.ndarray, field: np.ndarray, role: np.ndarray) -> None:
        texts = np.flatnonzero(self.text[field])
        wrong = np.float32(self.context["wrong_role"])
        negative, positive = texts[role[texts] == 2], texts[role[texts] == 1]
        weights[negative, self.prompt_at[field[negative]]] *= wrong
        weights[positive, self.negative_at[field[positive]]] *= wrong
        neither = texts[role[texts] == 0]
        factor = np.float32(self.context.get("negative_without_role", 1.0))
        weights[neither, self.negative_at[field[neither]]] *= factor

    def _weigh_references(
        self,
        weights: np.ndarray,
        state: State,
        field: np.ndarray,
        role: np.ndarray,
        links: np.ndarray,
    ) -> None:
        g, context = state.grammar, self.context
        wrong = np.float32(context["wrong_role"])
        node = state.reference_nodes()[links]
        at = (links[:, None], node)
        # A zeroed conditioning is made from the positive one.
        wanted = np.where(self.zero_out[field[links]], 1, role[links])
        pair = self.gives_pair[state.done_class[at]]
        other_role = (wanted[:, None] > 0) & (state.done_role[at] != wanted[:, None]) & ~pair
        conditioning = g.field_role[field[links]] > 0
        other_role &= (conditioning | self.zero_out[field[links]])[:, None]
        origin = state.open_origin[links, state.depth[links] - 1][:, None]
        other = (origin >= 0) & (state.done_origin[at] != origin)
        factor = np.where(other_role, wrong, 1) * np.where(other, context["other_origin"], 1)
        pairs = pair & conditioning[:, None] & (wanted == 2)[:, None]
        if pairs.any():
            factor *= np.where(pairs, context.get("negative_of_pair", 1.0), 1)
        columns = self.ref_at[field[links]][:, None] + np.arange(voc.NUM_REFS)
        weights[links[:, None], columns] *= factor.astype(np.float32)
        # The second output is the negative conditioning, the rest of the sigmas, a preview.
        second = np.float32(context.get("second_output", 1.0))
        slots = self.slot_at[field[links]]
        weights[links, slots + 1] *= np.where(wanted == 2, 1, second)
        weights[links, slots] *= np.where((wanted == 2) & conditioning, second, 1)

    def _weigh_noise(self, weights: np.ndarray, state: State, field: np.ndarray) -> None:
        noise = np.flatnonzero(self.denoise[field])
        if not len(noise):
            return
        last = state.open_last[noise, state.depth[noise] - 1]
        first = self.first_pass[last]
        below = np.float32(self.context["first_pass_denoise_below_one"])
        one = np.float32(self.context["second_pass_denoise_one"])
        low, full = self.low_noise[field[noise]], self.full_noise[field[noise]]
        factor = np.where(first[:, None], np.where(low, below, 1), np.where(full, one, 1))
        weights[noise] *= factor


def support(grammar: Grammar) -> np.ndarray:
    """Tokens that may ever fill a field, [H, V]; none where the grammar does not write it."""
    legal = grammar.static.copy()
    links = np.flatnonzero(grammar.field_type >= 0)
    legal[np.ix_(links, _REFS)] = True
    legal[np.ix_(links, _SLOTS)] = True
    legal[voc.END_FIELD, voc.EOS] = True
    return legal


@lru_cache(maxsize=2)
def _texts_of(name: str) -> frozenset[str]:
    weights = shipped_weights(name)
    fields = [*weights["fields"].values()]
    for recipe in weights.get("recipes", ()):
        fields += recipe["fields"].values()
    return frozenset(text for entries in fields for text in entries)


def _recipes(token: voc.Token, recipes: Any) -> tuple[int, ...]:
    """Recipes, general ones first, that a file token calls for; a LoRA only where it is named."""
    if token.group != "file":
        return ()
    files = [k for k, r in enumerate(recipes) if token.text in r.get("files", ())]
    if token.role not in _MODEL_ROLES and not files:
        return ()
    families = [k for k, r in enumerate(recipes) if token.family in r.get("families", ())]
    return (*families, *files)
