"""The inputs of a node as `mutation` edits them: what fills each, and what else might.

Literals are drawn by the weights of random workflows under the recipe of the workflow's own model
files, flattened, so that edits stay sensible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.grammar import Grammar
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Node, Workflow
from flowloom.workflow.inputs import InputSpec, NodeSpec, active_inputs
from flowloom.workflow.steps import FILE, LINK, SEED, TEXT, VALUE, types_match
from flowloom.workflow.weighing import Weigher
from flowloom.workflow.weights import support

_FLATTEN = 0.5  # power that weights are raised to
_RARE = 1e-3  # of the usual weight: what is below it is never put anywhere
_ODD = 0.01  # of the usual value's weight: below it a value does not go with a model
_ODD_CLASS = 1e-3
_MAX_ROUNDS = 8  # depth of choices within choices

Literals = list[Any]


class Hole(NamedTuple):
    """One input that a node has: its spec with dotted name, what fills it, its field."""

    spec: InputSpec
    how: int
    field: int


class Context(NamedTuple):
    """What the model files of a workflow ask for: recipe of the weigher, and family."""

    recipe: int
    family: str


class Holes:
    """Inputs and candidates for one grammar; `Holes.of_grammar` keeps one for each."""

    _kept: ClassVar[WeakKeyDictionary[Grammar, Holes]] = WeakKeyDictionary()

    @staticmethod
    def of_grammar(grammar: Grammar) -> Holes:
        """The holes of a grammar, made once."""
        if grammar not in Holes._kept:
            Holes._kept[grammar] = Holes(grammar)
        return Holes._kept[grammar]

    def __init__(self, grammar: Grammar) -> None:
        self.catalogue, self.vocabulary = grammar.catalogue, grammar.vocabulary
        tokens = grammar.vocabulary.tokens
        legal = support(grammar)
        self._choices: dict[int, list[int]] = {
            field: [k for k in np.flatnonzero(row).tolist() if tokens[k].group in ("value", "file")]
            for field, row in enumerate(legal)
        }
        self._legal_classes = {
            field: {k for k in np.flatnonzero(row).tolist() if tokens[k].group == "class"}
            for field, row in enumerate(legal)
        }
        self._blocks_for: dict[int, list[str]] = {}
        self._of_class: dict[str, tuple[Hole, ...]] = {}
        self._through: dict[str, list[tuple[str, int]]] = {}
        self.class_names = grammar.class_names
        outputs = grammar.catalogue.output_classes
        self.blocks = [c for c in self.class_names if self.through(c) and c not in outputs]
        self.weigher = Weigher(grammar)
        self._has_recipes = bool((self.weigher.table.recipe_of >= 0).any())

    def of(self, node: Node) -> tuple[Hole, ...]:
        """What a node has, in schema order; values decide where the class is dynamic."""
        spec = self.catalogue.nodes[node.class_type]
        if spec.is_dynamic:
            return self._read(spec, node.inputs)
        if node.class_type not in self._of_class:
            self._of_class[node.class_type] = self._read(spec, {})
        return self._of_class[node.class_type]

    def _read(self, spec: NodeSpec, given: Mapping[str, Any]) -> tuple[Hole, ...]:
        growing = {n[:-2] for n, _ in voc.every_input(spec.inputs) if n.endswith(".*")}
        found = []
        for item in active_inputs(spec, given):
            above, dot, _ = item.name.rpartition(".")
            name = f"{above}.*" if dot and above in growing else item.name
            field = self.vocabulary.field_index[spec.class_type, name]
            found.append(Hole(item, _how(item), field))
        return tuple(found)

    def through(self, class_type: str) -> list[tuple[str, int]]:
        """Inputs of a class that one of its own outputs could replace: (input name, slot)."""
        if class_type not in self._through:
            outputs = self.catalogue.nodes[class_type].outputs
            holes = self.of(Node(class_type, {}))
            self._through[class_type] = [
                (hole.spec.name, slot)
                for slot, out in enumerate(outputs)
                for hole in holes
                if hole.how == LINK and types_match(out, hole.spec.type)
            ]
        return self._through[class_type]

    def blocks_for(self, hole: Hole) -> list[str]:
        """Blocks that can stand on a link into an input."""
        if hole.field not in self._blocks_for:
            types = {c: self.of(Node(c, {})) for c in self.blocks}
            main = {c: self.through(c)[0][0] for c in self.blocks}
            self._blocks_for[hole.field] = [
                c
                for c, of_class in types.items()
                if any(h.spec.name == main[c] and h.spec.type == hole.spec.type for h in of_class)
                and self.vocabulary.class_ids[c] in self._legal_classes[hole.field]
            ]
        return self._blocks_for[hole.field]

    def sources(self, wanted: str) -> list[str]:
        """Classes without links that give a type: loaders, empty latents, seeds."""
        return [
            c
            for c in self.class_names
            if any(types_match(out, wanted) for out in self.catalogue.nodes[c].outputs)
            and not any(hole.how == LINK for hole in self.of(Node(c, {})))
        ]

    def context(self, workflow: Workflow) -> Context:
        """Recipe and family by the model files of a workflow; the last one tells."""
        recipe, family = 0, ""
        if not self._has_recipes:
            return Context(recipe, family)
        for node in workflow.nodes.values():
            for hole in self.of(node):
                if hole.how != FILE:
                    continue
                file = self.catalogue.file(
                    hole.spec.folder or "", str(node.inputs.get(hole.spec.name))
                )
                if file is None:
                    continue
                token = self.vocabulary.file_ids.get((file.folder, file.name, file.sha256))
                if token is not None and self.weigher.table.recipe_of[token] >= 0:
                    recipe, family = int(self.weigher.table.recipe_of[token]), file.family
        return Context(recipe, family)

    def is_model(self, hole: Hole) -> bool:
        """Whether the hole takes the file of a model that recipes go by."""
        return bool(self.weigher.model_file[hole.field])

    def is_odd(self, hole: Hole, token: int, context: Context) -> bool:
        """Whether a file, value or class hardly goes with the model files of a context."""
        table, family = self.weigher.table, self.vocabulary.tokens[token].family
        if hole.how == FILE and family not in ("", context.family):
            return True
        recipe_row, row = table.row_of[[context.recipe, 0], hole.field]
        if hole.how == LINK and recipe_row == row:
            return False
        (weight,) = table.weights_of(hole.field, [token], context.recipe)
        odd = _ODD_CLASS if hole.how == LINK else _ODD
        return bool(weight < odd * table.most_of(hole.field, context.recipe))

    def token_of(self, hole: Hole, value: Any) -> int | None:
        """The token of a literal that the grammar may write there."""
        tokens = self.vocabulary.tokens
        return next((k for k in self._candidates(hole) if tokens[k].value == value), None)

    def replacement(self, hole: Hole, class_type: str, context: Context) -> str | None:
        """A class with the same inputs and outputs that goes with a context, or None."""
        spec = self.catalogue.nodes[class_type]
        for name in self.class_names:
            other = self.catalogue.nodes[name]
            token = self.vocabulary.class_ids[name]
            if (
                other.outputs == spec.outputs
                and other.by_name.keys() == spec.by_name.keys()
                and token in self._legal_classes[hole.field]
                and not self.is_odd(hole, token, context)
            ):
                return name
        return None

    def others(self, hole: Hole, now: Any) -> Literals:
        """Tokens of literals, other than the present one, that the grammar may write there."""
        tokens = self.vocabulary.tokens
        return [k for k in self._candidates(hole) if tokens[k].value != now]

    def _candidates(self, hole: Hole) -> Literals:
        """Tokens of literals; inputs of one name below several options share a field."""
        found, options = self._choices[hole.field], hole.spec.options
        if options is None or "." not in hole.spec.name:
            return found
        return [k for k in found if self.vocabulary.tokens[k].value in options]

    def draw(
        self,
        hole: Hole,
        tokens: Literals,
        context: Context,
        rng: np.random.Generator,
        flatten: float = _FLATTEN,
    ) -> Any:
        """One of some literals, given as tokens; None where none suits.

        `flatten` is a power of the weights; what is far less likely than usual is never drawn.
        """
        weights = self._weights(hole, tokens, context)
        if hole.how == FILE and context.family:
            families = [self.vocabulary.tokens[k].family for k in tokens]
            weights = weights * [f in ("", context.family) for f in families]
        at = _weighted(weights**flatten, rng)
        return None if at is None else self.vocabulary.tokens[tokens[at]].value

    def draw_block(
        self, hole: Hole, classes: list[str], context: Context, rng: np.random.Generator
    ) -> str | None:
        """One of some classes to stand before a link input, by the weights."""
        tokens = [self.vocabulary.class_ids[c] for c in classes]
        fits = [self.weigher.affinity_of(k, context.family) for k in tokens]
        weights = self._weights(hole, tokens, context, fits)
        at = _weighted(weights**_FLATTEN, rng)
        return None if at is None else classes[at]

    def _weights(
        self,
        hole: Hole,
        tokens: Sequence[int],
        context: Context,
        fits: Sequence[float] | float = 1.0,
    ) -> np.ndarray:
        """Weights [N], zero where rare."""
        table = self.weigher.table
        weights = table.weights_of(hole.field, tokens, context.recipe) * np.asarray(fits)
        usual = table.most_of(hole.field, context.recipe)
        return np.where(weights < _RARE * usual, 0, weights)

    def complete(
        self,
        class_type: str,
        inputs: dict[str, Any],
        near: Mapping[str, Link],
        context: Context,
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], list[str]] | None:
        """Fill what a node needs beside what is given; options bring their inputs along.

        Returns:
            All inputs, and the types of required links that nothing near gives (their inputs hold
            None); None where a literal cannot be filled.
        """
        inputs, lacking = dict(inputs), []
        for _ in range(_MAX_ROUNDS):
            fresh = [h for h in self.of(Node(class_type, inputs)) if h.spec.name not in inputs]
            if not any(hole.spec.required or hole.how == LINK for hole in fresh):
                break
            before = len(inputs)
            for hole in fresh:
                name = hole.spec.name
                if hole.how == LINK:
                    short = name.rpartition(".")[2]
                    link = near.get(f"{hole.spec.type}.{short}") or near.get(hole.spec.type)
                    if link is not None:
                        inputs[name] = link
                    elif hole.spec.required:
                        inputs[name] = None
                        lacking.append(hole.spec.type)
                elif hole.how == SEED:
                    inputs[name] = 0
                elif hole.how == TEXT:
                    inputs[name] = pick([PROMPT, NEGATIVE], rng)
                elif hole.spec.required:
                    value = self.draw(hole, self._candidates(hole), context, rng)
                    if value is None:
                        return None
                    inputs[name] = value
            if len(inputs) == before:
                break
        return inputs, lacking


def _how(spec: InputSpec) -> int:
    if spec.is_link:
        return LINK
    if voc.is_seed(spec):
        return SEED
    if voc.is_text(spec):
        return TEXT
    return FILE if spec.folder is not None else VALUE


def _weighted(weights: np.ndarray, rng: np.random.Generator) -> int | None:
    """An index in proportion to weights [N]; None where all are zero."""
    total = np.cumsum(weights)
    if not len(total) or total[-1] <= 0:
        return None
    return min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), len(total) - 1)


def pick(items: Sequence[Any], rng: np.random.Generator) -> Any:
    """One of the items with equal chances; None where there are none."""
    return items[int(rng.integers(len(items)))] if items else None
