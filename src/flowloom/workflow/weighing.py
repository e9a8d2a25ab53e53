"""How likely each legal token of a state is: the table of a weights file, and what stands around.

Shapes: B rows, H fields, S tokens of the largest support, V tokens, F families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.pushdown import State
from flowloom.workflow.weights import FLOOR, MODEL_FOLDERS, VALUED, Table, weights_for


class Rows:
    """What is remembered of rows while they are drawn, beside their `State`.

    recipe [B]: what the last model file asks for; favour [B, F]: which families suit the classes
    so far; last [B]: the last token.
    """

    def __init__(self, recipe: np.ndarray, favour: np.ndarray, last: np.ndarray) -> None:
        self.recipe, self.favour, self.last = recipe, favour, last

    def select(self, rows: np.ndarray) -> Rows:
        """Only these rows (indices, or a boolean [B])."""
        return Rows(self.recipe[rows], self.favour[rows], self.last[rows])


class Weigher:
    """Weights of the tokens that a hole may take."""

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
        self.table = Table(grammar, weights)
        self._mark_fields(grammar, weights)
        self._fill_affinity(weights.get("affinity", {}))
        self._fill_pairs(weights.get("pairs", {}))
        # Tokens that came later take no part in a race over the vocabulary, so that what a seed
        # draws stays as it was.
        later = weights.get("later_tokens")
        texts = [token.text for token in grammar.vocabulary.tokens]
        self.race = None if later is None else np.cumsum(~np.isin(texts, later)) - 1

    def _mark_fields(self, g: Grammar, weights: Mapping[str, Any]) -> None:
        tokens, columns, inside = self.vocabulary.tokens, self.table.columns, self.table.inside
        self.first_pass = np.isin([*g.class_names, ""], weights["first_pass_latents"])
        draws = {
            c for c, n in g.catalogue.nodes.items() if any(i.type == "LATENT" for i in n.inputs)
        }
        from_latent = np.array([c in draws for c, _ in self.vocabulary.fields])
        noise = np.array([t.kind == "denoise" for t in tokens])[columns] & inside
        noise &= from_latent[:, None]
        full = np.array([t.value == 1.0 for t in tokens])[columns]
        self.full_noise, self.low_noise = noise & full, noise & ~full
        self.denoise = noise.any(1)
        self.zero_out = np.array([c == "ConditioningZeroOut" for c, _ in self.vocabulary.fields])
        self.is_link = g.field_type >= 0
        self.is_conditioning = g.field_role > 0
        prompts = (columns == voc.PROMPT_ID) & inside
        self.text = prompts.any(1)
        self.prompt_at = prompts.argmax(1)
        self.negative_at = (columns == voc.NEGATIVE_ID).argmax(1)
        self.ref_at = (columns == voc.REF0).argmax(1)
        self.slot_at = (columns == voc.SLOT0).argmax(1)
        # Classes that give a positive and a negative conditioning.
        nodes = (g.catalogue.nodes[c] for c in g.class_names)
        self.gives_pair = np.array([*(n.outputs.count("CONDITIONING") > 1 for n in nodes), False])

    def _fill_affinity(self, affinity: Mapping[str, Any]) -> None:
        tokens, table = self.vocabulary.tokens, self.table
        self.affinity = np.ones((len(tokens), len(self.families)), np.float32)
        for class_type, entry in affinity.items():
            token = self.vocabulary.class_ids.get(class_type)
            if token is not None:
                fits = np.isin(self.families, entry["families"])
                self.affinity[token] = np.where(fits, 1, entry["other"])
        family = {name: f for f, name in enumerate(self.families)}
        families = np.array([family.get(t.family, -1) for t in tokens], np.int32)
        models = np.array([t.group == "file" and t.kind in MODEL_FOLDERS for t in tokens])
        self.family_at = np.where(table.inside, families[table.columns], -1)
        self.model_file = (models[table.columns] & table.inside).any(1) & bool(affinity)

    def _fill_pairs(self, pairs: Mapping[str, Any]) -> None:
        tokens = self.vocabulary.tokens
        inputs = np.array([name for _, name in self.vocabulary.fields])
        texts = np.array([str(t.value) if t.group in VALUED else t.text for t in tokens])
        self.paired = np.zeros(len(inputs), bool)
        self.pair_row = np.zeros(len(tokens), np.int32)
        rows = [np.ones(len(tokens), np.float32)]
        for names, after in pairs.items():
            self.paired |= np.isin(inputs, names.split())
            for before, entries in after.items():
                self.pair_row[texts == before] = len(rows)
                row = np.full(len(tokens), entries.get("*", 1.0), np.float32)
                for text, weight in entries.items():
                    row[texts == text] = weight
                rows.append(row)
        self.pair_table = np.stack(rows)

    def affinity_of(self, token: int, family: str) -> float:
        """How well a class token suits a family; 1 where nothing is known."""
        known = family in self.families
        return float(self.affinity[token, self.families.index(family)]) if known else 1.0

    def rows(self, batch: int) -> Rows:
        """What is remembered of `batch` rows before their first token."""
        favour = np.ones((batch, len(self.families)), np.float32)
        return Rows(np.zeros(batch, np.int32), favour, np.full(batch, voc.PAD, np.int64))

    def take(self, rows: Rows, tokens: np.ndarray) -> None:
        """Remember one token [B] per row."""
        recipe = self.table.recipe_of[tokens]
        rows.recipe = np.where(recipe >= 0, recipe, rows.recipe)
        rows.favour *= self.affinity[tokens]
        rows.last = tokens

    def __call__(self, state: State, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Weights [B, S], float32, of the tokens in columns [B, S]; illegal ones weigh zero."""
        every, table = np.arange(len(state)), self.table
        field, _ = state.holes()
        role = state.roles()
        columns = table.columns[field]
        weights = table.values[table.row_of[rows.recipe, field]]
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
        legal = state.mask()[every[:, None], columns] & table.inside[field]
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
        context = self.context
        wrong = np.float32(context["wrong_role"])
        node = state.reference_nodes()[links]
        at = (links[:, None], node)
        # A zeroed conditioning is made from the positive one.
        wanted = np.where(self.zero_out[field[links]], 1, role[links])
        pair = self.gives_pair[state.done_class[at]]
        other_role = (wanted[:, None] > 0) & (state.done_role[at] != wanted[:, None]) & ~pair
        conditioning = self.is_conditioning[field[links]]
        other_role &= (conditioning | self.zero_out[field[links]])[:, None]
        origin = state.open_origin[links, state.depth[links] - 1][:, None]
        other = (origin >= 0) & (state.done_origin[at] != origin)
        factor = np.where(other_role, wrong, 1) * np.where(other, context["other_origin"], 1)
        pairs = pair & (conditioning & (wanted == 2))[:, None]
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
