"""How the code walks a node class: each input in schema order, and what may fill it.

A class is a small program: `Schema.start` is the position of its first hole, each hole (`Step`)
names the position that follows, and position 0 is the end of the node. What follows a choice
depends on its option; a growing input goes on until <end>. Shared by the two directions of `codec`
and by the tables of `grammar`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.inputs import LITERAL_TYPES, MATCH, InputSpec
from flowloom.workflow.vocabulary import Vocabulary

LINK, VALUE, FILE, TEXT, SEED = range(5)
_CLOSED = frozenset({"INT", "FLOAT", "BOOLEAN", "COMBO"})  # types of a literal that is no text
_ANY = frozenset({"*", MATCH})
_OPEN = LITERAL_TYPES | _ANY
NUMERALS = "0123456789.-+e"  # what the first spell tokens stand for between two <num>
DONE = 0  # the position behind a node's last hole


class CodecError(ValueError):
    """A workflow cannot be written, or tokens cannot be read; says what, where, got, expected."""


class Step(NamedTuple):
    """One hole of a class.

    A SEED takes no token, unless <seed> stood before the class: then it is a hole like others (a
    link, <none>, an escape), in which <seed> stands for an integer kept beside, and <end> goes
    before a class that has such seeds itself.
    """

    name: str
    """Input name, dotted below a choice or a growing input."""
    how: int
    type: str
    """Type that a link must have; "COMBO" for a choice."""
    kind: str
    """Value kind of a VALUE, folder of a FILE."""
    required: bool
    field: int
    """Index into `Vocabulary.fields`."""
    next: int = DONE
    """Position after this hole; of a choice, where its option brings no inputs or is absent."""
    branches: Mapping[int, int] = MappingProxyType({})
    """Of a choice: token of an option -> position of the first input it brings."""
    stop: int = -1
    """Of a growing input: position after <end>; -1 where <end> is not legal."""
    opens_seed: bool = False
    """Of a SEED: whether it is a hole (the class stood behind <seed>)."""
    takes_text: bool = False
    """Whether a string without a token of its own is a text, kept beside."""
    takes_literal: bool = True
    """Of a LINK: whether an escaped literal may stand there, as the server has it."""


class Schema:
    """Steps of every class, and which outputs can feed which inputs."""

    def __init__(self, catalogue: Catalogue, vocabulary: Vocabulary) -> None:
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.program: list[Step] = [Step("", LINK, "", "", True, voc.END_FIELD)]
        self.specs: list[InputSpec] = [InputSpec("", "")]
        """The input behind each step of `program`, with its undotted name."""
        self.start: dict[str, int] = {}
        self.start_linked: dict[str, int] = {}
        self._write_programs()
        types = dict.fromkeys(["COMBO", *sorted({step.type for step in self.program[1:]})])
        # Slots of a class that can feed an input of a type.
        by_outputs = {
            outputs: {
                t: tuple(s for s, out in enumerate(outputs) if types_match(out, t)) for t in types
            }
            for outputs in {node.outputs for node in catalogue.nodes.values()}
        }
        self.slots = {
            (c, t): slots
            for c, node in catalogue.nodes.items()
            for t, slots in by_outputs[node.outputs].items()
        }
        self.value_ids = {
            (t.kind, *key): i
            for i, t in enumerate(vocabulary.tokens)
            if t.group == "value" and (key := identity(t.value)) is not None
        }

    def _write_programs(self) -> None:
        for class_type, node in self.catalogue.nodes.items():
            self.start[class_type] = _Compiler(self, class_type, False).write(node.inputs, DONE)
            if any(voc.is_seed(spec) for _, spec in voc.every_input(node.inputs)):
                linked = _Compiler(self, class_type, True)
                self.start_linked[class_type] = linked.write(node.inputs, DONE)

    def holes(self, class_type: str) -> Iterator[Step]:
        """One step for each field of a class, in schema order, those of all branches included."""
        visited, fields = {DONE}, set[int]()
        todo = [self.start[class_type]]
        while todo:
            at = todo.pop()
            if at in visited:
                continue
            visited.add(at)
            step = self.program[at]
            todo += [step.next, *reversed(list(step.branches.values()))]
            if step.field not in fields:
                fields.add(step.field)
                yield step

    def active(self, class_type: str, inputs: Mapping[str, Any]) -> Iterator[Step]:
        """The steps that a node with these inputs takes, in order."""
        at = self.start[class_type]
        while at != DONE:
            step = self.program[at]
            value = inputs.get(step.name)
            if step.stop >= 0 and step.name not in inputs:
                at = step.stop
                continue
            yield step
            at = step.next
            if step.branches and isinstance(value, str):
                token = self.value_ids.get((step.kind, str, value), -1)
                at = step.branches.get(token, at)

    def how_to_fill(self, class_type: str, spec: InputSpec, field_name: str) -> tuple[int, str]:
        """What fills an input, by its dotted name, and its value kind or folder."""
        if spec.is_link:
            return LINK, ""
        if voc.is_seed(spec):
            return SEED, ""
        if voc.is_text(spec):
            return TEXT, ""
        if spec.folder is not None:
            return FILE, spec.folder
        return VALUE, voc.rule_for(class_type, spec, field_name)["kind"]

    def field(self, class_type: str, field_name: str) -> int:
        """Index of a field.

        Raises:
            CodecError: the vocabulary was built for another catalogue.
        """
        field = self.vocabulary.field_index.get((class_type, field_name))
        if field is None:
            raise CodecError(
                f"vocabulary has no field {class_type}.{field_name}: built for another catalogue"
            )
        return field


class _Compiler:
    """Adds the program of one class to a schema; `opens_seeds` makes every seed a hole."""

    def __init__(self, schema: Schema, class_type: str, opens_seeds: bool) -> None:
        self.schema, self.class_type, self.opens_seeds = schema, class_type, opens_seeds

    def write(
        self,
        inputs: Sequence[InputSpec],
        after: int,
        prefix: str = "",
        field_prefix: str = "",
        required: bool = True,
    ) -> int:
        """Add the holes of some inputs, last one first; returns the position of the first."""
        for spec in reversed(inputs):
            name, field_name = prefix + spec.name, field_prefix + spec.name
            needed = spec.required and required
            if spec.element is None:
                after = self._add(spec, name, field_name, after, needed)
                continue
            behind, element = after, replace(spec.element, name="*")
            for k in reversed(range(len(spec.names))):
                must = needed and k < spec.min_count
                after = self._add(
                    element,
                    f"{name}.{spec.names[k]}",
                    f"{field_name}.*",
                    after,
                    must and element.required,
                    stop=-1 if must else behind,
                )
        return after

    def _add(
        self,
        spec: InputSpec,
        name: str,
        field_name: str,
        after: int,
        required: bool,
        stop: int = -1,
    ) -> int:
        schema = self.schema
        how, kind = schema.how_to_fill(self.class_type, spec, field_name)
        branches: dict[int, int] = {}
        for key, inner in spec.branches:
            token = schema.vocabulary.value_ids.get(voc.value_key(kind, key))
            if token is not None:
                start = self.write(inner, after, f"{name}.", f"{field_name}.", required)
                branches[token] = start
        types = {"COMBO"} if spec.branches else set(spec.type.split(","))
        # A list of options that is empty binds nothing.
        closed = types & _CLOSED - (set() if spec.options else {"COMBO"})
        step = Step(
            name,
            how,
            "COMBO" if spec.branches else spec.type,
            kind,
            required,
            schema.field(self.class_type, field_name),
            next=after,
            branches=MappingProxyType(branches),
            stop=stop,
            opens_seed=self.opens_seeds and how == SEED,
            takes_text=how == TEXT or (how == VALUE and not closed),
            takes_literal=how != LINK or bool(types & _OPEN),
        )
        schema.program.append(step)
        schema.specs.append(spec)
        return len(schema.program) - 1


def types_match(output: str, wanted: str) -> bool:
    """ComfyUI's rule: equal, "*", a type that follows another one, or overlapping sets."""
    if output == wanted or output in _ANY or wanted in _ANY:
        return True
    if "," in output or "," in wanted:
        return bool(set(output.split(",")) & set(wanted.split(",")))
    return False


def shifted(value: float, steps: int) -> float:
    """The float that many units in the last place away (exact below the next power of two)."""
    return value + steps * math.ulp(value)


def identity(value: Any) -> tuple[type, Any] | None:
    """A hashable that is equal for equal type and value only; None for what is not JSON."""
    if isinstance(value, float):
        return float, value if value else repr(value)
    if isinstance(value, (str, int, bool)) or value is None:
        return type(value), value
    try:
        return type(value), json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
