"""What may fill each position of a node class, and which position follows: tables of the grammar.

Positions are those of `steps.Schema.program`, seeds left out; position 0 is the place between
output nodes. Holes that take the same tokens share a row.

Shapes: C classes, V tokens, P positions, R rows, T link types.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.inputs import InputSpec
from flowloom.workflow.restrictions import did_you_mean, unknown_value
from flowloom.workflow.steps import DONE, FILE, LINK, SEED, TEXT, VALUE, Schema, Step
from flowloom.workflow.vocabulary import Vocabulary

ROLES = {"positive": 1, "negative": 2}
OUTSIDE = DONE
NO_SIZE, SIDE, SCALE = range(3)
_SIZES = {"width": SIDE, "height": SIDE, "scale_by": SCALE}
_COUNTED = ("batch_size", "steps", *_SIZES)


class GrammarError(ValueError):
    """A grammar cannot be built, or an illegal token was taken; says what, got, expected."""


class Hole(NamedTuple):
    """Where a row of tokens applies: the first position that has it."""

    class_type: str
    step: Step
    spec: InputSpec


class Tables:
    """Tables of some classes; `restrict` narrows them."""

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: Vocabulary,
        schema: Schema,
        class_names: Sequence[str],
    ) -> None:
        self.catalogue, self.vocabulary, self.schema = catalogue, vocabulary, schema
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.class_ids = np.array([vocabulary.class_ids[c] for c in self.class_names])
        self.is_output = np.isin(self.class_names, sorted(catalogue.output_classes))
        self._index_tokens()
        self._index_positions()
        self._index_types()
        self._fill_rows()

    def _index_tokens(self) -> None:
        self.families = self.catalogue.families or ("",)
        index = {family: k for k, family in enumerate(self.families)}
        tokens = self.vocabulary.tokens
        # Family of a file token, -1 where it fits any.
        self.token_family = np.array(
            [index[t.family] if t.family in index and t.family else -1 for t in tokens], np.int32
        )
        self.token_class = np.full(len(tokens), -1, np.int32)
        self.token_class[self.class_ids] = np.arange(self.num_classes)
        self.token_number = np.array([_number(t) for t in tokens], np.float64)
        self.file_ids = np.array([k for k, t in enumerate(tokens) if t.group == "file"], np.int64)

    def _index_positions(self) -> None:
        """Successors, rows and fields of the positions that the classes reach."""
        program, size = self.schema.program, len(self.schema.program)
        # The dummy class C stands for "no node": its first position is the place outside.
        self.first = np.full(self.num_classes + 1, OUTSIDE, np.int32)
        self.after = np.zeros(size, np.int32)
        self.stop = np.full(size, -1, np.int32)
        self.row = np.zeros(size, np.int32)
        self.field = np.full(size, voc.END_FIELD, np.int32)
        self.role = np.zeros(size, np.int32)
        self.size = np.zeros(size, np.int8)
        # Choices: index of the position, and the position after each token.
        self.choice = np.full(size, -1, np.int32)
        self.choices: list[int] = []
        self.holes: list[Hole] = [Hole("", program[OUTSIDE], InputSpec("", ""))]
        self.positions: list[int] = []
        self.owner = np.full(size, self.num_classes, np.int32)
        rows: dict[Any, int] = {}
        for c, name in enumerate(self.class_names):
            start = self.schema.start[name]
            self.first[c] = self._skip(start)
            for at in self._reached(start):
                spec = self.schema.specs[at]
                step = program[at]
                if step.how == SEED:
                    continue
                self.positions.append(at)
                self.owner[at] = c
                self.after[at] = self._skip(step.next)
                self.stop[at] = -1 if step.stop < 0 else self._skip(step.stop)
                self.field[at], self.role[at] = step.field, ROLES.get(step.name, 0)
                self.size[at] = _SIZES.get(step.name, NO_SIZE)
                key = (step.field, step.required, step.stop >= 0, id(spec))
                self.row[at] = rows.setdefault(key, len(self.holes))
                if self.row[at] == len(self.holes):
                    self.holes.append(Hole(name, step, spec))
                if step.branches:
                    self.choice[at] = len(self.choices)
                    self.choices.append(at)
        self.branch = np.zeros((len(self.choices), self.vocabulary.size), np.int32)
        for k, at in enumerate(self.choices):
            self.branch[k] = self.after[at]
            for token, to in program[at].branches.items():
                self.branch[k, token] = self._skip(to)
            if self.stop[at] >= 0:
                self.branch[k, voc.END] = self.stop[at]
        # Tokens of the options of each choice; shorter lists repeat their first one.
        lists = [list(program[at].branches) or [voc.NONE_ID] for at in self.choices]
        widest = max(map(len, lists), default=0)
        padded = [tokens + tokens[:1] * (widest - len(tokens)) for tokens in lists]
        self.option_tokens = np.array(padded, np.int64).reshape(len(lists), widest)

    def _skip(self, at: int) -> int:
        """The position itself, or the next one that takes a token."""
        while at != DONE and self.schema.program[at].how == SEED:
            at = self.schema.program[at].next
        return at

    def _reached(self, start: int) -> list[int]:
        """Positions that a class may come to, in the order in which they are written."""
        program, todo, found = self.schema.program, [start], set()
        while todo:
            at = todo.pop()
            if at != DONE and at not in found:
                found.add(at)
                todo += [program[at].next, *program[at].branches.values()]
        return sorted(found, reverse=True)

    def _index_types(self) -> None:
        """Types that links have, and which slots of a class can feed them."""
        schema, names = self.schema, self.class_names
        rules = voc.rules()
        sources = [c for c in names if c not in self.catalogue.output_classes]
        # A literal may be linked too, where some class gives its type.
        wanted = {
            _link_type(hole.step): hole.step.how == LINK
            for hole in self.holes[1:]
            if not hole.spec.branches
        }
        self.types = sorted(
            kind
            for kind, is_socket in wanted.items()
            if is_socket or any(schema.slots.get((c, kind[0])) for c in sources)
        )
        num_types = len(self.types)
        # The last type is none: a hole that takes no link, or no hole.
        shape = (num_types + 1, self.num_classes + 1)
        self.feeds = np.zeros(shape, bool)
        self.num_slots = np.zeros(shape, np.int32)
        self.bears, self.sized = np.zeros(shape, bool), np.zeros(shape, bool)
        family_types, sized_types = set(rules["family_types"]), set(rules["sized_types"])
        holds = [self._holds_number(name) for name in names]
        for t, (kind, is_size) in enumerate(self.types):
            for c, name in enumerate(names):
                slots = schema.slots.get((name, kind), ())
                if not slots:
                    continue
                outputs = {self.catalogue.nodes[name].outputs[slot] for slot in slots}
                self.feeds[t, c] = True
                if len(slots) <= voc.NUM_SLOTS and not (is_size and holds[c]):
                    self.num_slots[t, c] = len(slots)
                # Where some of the slots count and some do not, all of them count.
                self.bears[t, c] = not family_types.isdisjoint(outputs)
                self.sized[t, c] = not sized_types.isdisjoint(outputs)
        index = {kind: t for t, kind in enumerate(self.types)}
        self.row_type = np.array(
            [
                num_types if hole.spec.branches else index.get(_link_type(hole.step), num_types)
                for hole in self.holes
            ],
            np.int32,
        )
        self.type = self.row_type[self.row]
        # No new loader for these types while a reference can fill the hole.
        only = np.array([kind in rules["source_only"] for kind, _ in self.types], bool)
        loads = np.array([self._is_loader(c) for c in range(self.num_classes)], bool)
        self.reuse = np.zeros((num_types + 1, self.num_classes), bool)
        self.reuse[:-1] = only[:, None] & loads

    def _is_loader(self, c: int) -> bool:
        return not any(
            self.schema.program[at].how == LINK for at in self.positions if self.owner[at] == c
        )

    def _fill_rows(self) -> None:
        vocabulary = self.vocabulary
        self.allowed = np.zeros((len(self.holes), vocabulary.size), bool)
        refs = slice(voc.REF0, voc.REF0 + voc.NUM_REFS)
        links = np.zeros((len(self.types), vocabulary.size), bool)
        if len(self.types):
            # An output node may have outputs (SaveImage does), but is written where it ends.
            usable = (self.num_slots[:-1, :-1] > 0) & ~self.is_output
            links[:, self.class_ids] = usable
            links[:, refs] = np.any(usable, axis=1)[:, None]
        for r, (_, step, _) in enumerate(self.holes):
            if r == 0:
                self.allowed[r, self.class_ids[self.is_output]] = True
                continue
            kind = self.row_type[r]
            if kind < len(self.types):
                self.allowed[r] = links[kind]
            self.allowed[r, self._literals(self.holes[r])] = True
            self.allowed[r, voc.NONE_ID] = not step.required and step.stop < 0
            self.allowed[r, voc.END] = step.stop >= 0

    def _holds_number(self, class_type: str) -> bool:
        """Whether a link to the class may stand for a number above 1."""
        inputs = self.catalogue.nodes[class_type].inputs
        if [spec.name for spec in inputs] != ["value"]:
            return False
        values = voc.grid(class_type, inputs[0], self.catalogue.families, "value")
        return any(not isinstance(v, (int, float)) or v > 1 for v in values)

    def _literals(self, hole: Hole) -> list[int]:
        """Tokens of values, files and texts."""
        class_type, step, spec = hole
        vocabulary, catalogue = self.vocabulary, self.catalogue
        if step.how == TEXT:
            return [voc.PROMPT_ID, voc.NEGATIVE_ID]
        if step.how == FILE:
            files = catalogue.files_in(step.kind)
            found = (vocabulary.file_ids.get((f.folder, f.name, f.sha256)) for f in files)
        elif step.how == VALUE and spec.branches:
            found = iter(step.branches)
        elif step.how == VALUE:
            name = vocabulary.fields[step.field][1]
            values = voc.grid(class_type, spec, catalogue.families, name)
            if step.name == "batch_size":
                values = [value for value in values if value <= catalogue.limits.batch]
            # The server takes a bare list for a link.
            values = [value for value in values if not isinstance(value, list)]
            found = (vocabulary.value_ids.get(voc.value_key(step.kind, v)) for v in values)
        else:
            return []
        return [token for token in found if token is not None]

    def restrict(self, require: Mapping[str, Any] | Iterable[str], forbid: Iterable[str]) -> None:
        """Narrow the rows; see `Grammar`.

        Raises:
            GrammarError: a name is unknown.
        """
        if not isinstance(require, Mapping):
            require = dict(_split(item, "require") for item in require)
        for key, value in require.items():
            self._narrow(key, value, "require", keep=True)
        rows = self.vocabulary.tokens
        for name in forbid:
            files = [i for i in self.file_ids if name in (rows[i].value, rows[i].text)]
            if name in self.vocabulary.class_ids:
                self.allowed[:, self.vocabulary.class_ids[name]] = False
            elif files:
                self.allowed[:, files] = False
            elif "=" in name:
                self._narrow(*_split(name, "forbid"), "forbid", keep=False)
            else:
                known = [*self.class_names, *(str(rows[i].value) for i in self.file_ids)]
                raise GrammarError(
                    f"forbid: got {name!r}, expected input=value or the name of a class or file of "
                    f"the catalogue{did_you_mean(name, known)}"
                )

    def _narrow(self, key: str, value: Any, what: str, keep: bool) -> None:
        found, values = False, []
        tokens = self.vocabulary.tokens
        for r, (class_type, step, _) in enumerate(self.holes):
            if key not in (step.name, f"{class_type}.{step.name}"):
                continue
            legal = np.flatnonzero(self.allowed[r])
            values += [tokens[i].value for i in legal if tokens[i].group in ("file", "value")]
            hits = [i for i in legal if _same(tokens[i], value)]
            found |= bool(hits)
            if keep:
                kept = np.zeros(self.vocabulary.size, bool)
                kept[hits] = True
                self.allowed[r] &= kept
            else:
                self.allowed[r, hits] = False
        if not found:
            names = [step.name for _, step, _ in self.holes]
            raise GrammarError(unknown_value(what, key, value, names, values))

    @cached_property
    def has_files(self) -> np.ndarray:
        """Whether a row has file tokens. Shape: R."""
        return np.any(self.allowed[:, self.file_ids], axis=1)

    @cached_property
    def size_columns(self) -> np.ndarray:
        """Tokens that some size input may take."""
        rows = self.row[[at for at in self.positions if self.size[at]]]
        numbers = np.nan_to_num(self.token_number, nan=-1.0) > 0
        return np.flatnonzero(self.allowed[rows].any(0) & numbers)

    @cached_property
    def static(self) -> np.ndarray:
        """Tokens that a field may take anywhere. Shape: fields, V."""
        found = np.zeros((len(self.vocabulary.fields), self.vocabulary.size), bool)
        for r, hole in enumerate(self.holes):
            found[voc.END_FIELD if r == 0 else hole.step.field] |= self.allowed[r]
        return found

    @cached_property
    def field_type(self) -> np.ndarray:
        """Link type of each field, -1 where it takes no link. Shape: fields."""
        found = np.full(len(self.vocabulary.fields), -1, np.int32)
        for r, hole in enumerate(self.holes):
            if self.row_type[r] < len(self.types):
                found[hole.step.field] = self.row_type[r]
        return found

    @cached_property
    def field_role(self) -> np.ndarray:
        """1 for a positive input, 2 for a negative one, else 0. Shape: fields."""
        found = np.zeros(len(self.vocabulary.fields), np.int32)
        found[self.field[self.positions]] = self.role[self.positions]
        return found


def _link_type(step: Step) -> tuple[str, bool]:
    """Type of a hole's link, and whether it is a size or a count.

    A size is not linked to a node that holds a number: what it is would have to be known.
    """
    return step.type, step.how != LINK and step.name in _COUNTED


def _number(token: voc.Token) -> float:
    value = token.value
    is_number = token.group == "value" and isinstance(value, (int, float))
    return float(value) if is_number and not isinstance(value, bool) else np.nan


def _split(item: str, what: str) -> tuple[str, Any]:
    key, equals, text = str(item).partition("=")
    if not equals or not key:
        raise GrammarError(f"{what}: got {item!r}, expected input=value")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def _same(token: voc.Token, value: Any) -> bool:
    if token.group == "file":
        return str(value) in (token.value, token.text, str(token.value).rsplit(".", 1)[0])
    return token.group == "value" and (token.value == value or str(token.value) == str(value))
