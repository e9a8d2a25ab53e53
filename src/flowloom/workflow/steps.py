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
        self.steps = {c: self._steps(c) for c in catalogue.nodes}
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

    def _nested(self, class_type: str) -> Iterator[tuple[str, InputSpec]]:
        return voc.every_input(self.catalogue.nodes[class_type].inputs)

    def _write_programs(self) -> None:
        for class_type, node in self.catalogue.nodes.items():
            self.start[class_type] = self._write(class_type, node.inputs, DONE, "", "", False)
            if any(voc.is_seed(spec) for _, spec in self._nested(class_type)):
                self.start_linked[class_type] = self._write(
                    class_type, node.inputs, DONE, "", "", True
                )

    def _write(
        self,
        class_type: str,
        inputs: Sequence[InputSpec],
        after: int,
        prefix: str,
        field_prefix: str,
        seeds: bool,
        required: bool = True,
    ) -> int:
        """Add the holes of some inputs, last one first; returns the position of the first."""
        for spec in reversed(inputs):
            name, field_name = prefix + spec.name, field_prefix + spec.name
            needed = spec.required and required
            if spec.element is None:
                after = self._add(class_type, spec, name, field_name, after, seeds, needed)
                continue
            behind, element = after, replace(spec.element, name="*")
            for k in reversed(range(len(spec.names))):
                must = needed and k < spec.min_count
                after = self._add(
                    class_type,
                    element,
                    f"{name}.{spec.names[k]}",
                    f"{field_name}.*",
                    after,
                    seeds,
                    must and element.required,
                    -1 if must else behind,
                )
        return after

    def _add(
        self,
        class_type: str,
        spec: InputSpec,
        name: str,
        field_name: str,
        after: int,
        seeds: bool,
        required: bool,
        stop: int = -1,
    ) -> int:
        how, kind = self._how(class_type, spec, field_name)
        branches: dict[int, int] = {}
        for key, inner in spec.branches:
            token = self.vocabulary.value_ids.get(voc.value_key(kind, key))
            if token is not None:
                dotted = f"{name}.", f"{field_name}."
                branches[token] = self._write(class_type, inner, after, *dotted, seeds, required)
        field = self._field(class_type, field_name)
        type_ = "COMBO" if spec.branches else spec.type
        self.program.append(
            Step(
                name,
                how,
                type_,
                kind,
                required,
                field,
                after,
                MappingProxyType(branches),
                stop,
                seeds and how == SEED,
                self._takes_text(how, type_, spec),
                how != LINK or not _OPEN.isdisjoint(type_.split(",")),
            )
        )
        self.specs.append(spec)
        return len(self.program) - 1

    def _takes_text(self, how: int, type_: str, spec: InputSpec) -> bool:
        """Whether any string may fill an input; a list of options that is empty binds nothing."""
        closed = _CLOSED.intersection(type_.split(",")) - (set() if spec.options else {"COMBO"})
        return how == TEXT or (how == VALUE and not closed)

    def _how(self, class_type: str, spec: InputSpec, field_name: str) -> tuple[int, str]:
        """What fills an input, and its value kind or folder."""
        if spec.is_link:
            return LINK, ""
        if voc.is_seed(spec):
            return SEED, ""
        if voc.is_text(spec):
            return TEXT, ""
        if spec.folder is not None:
            return FILE, spec.folder
        return VALUE, voc.rule_for(class_type, spec, field_name)["kind"]

    def _field(self, class_type: str, field_name: str) -> int:
        field = self.vocabulary.field_index.get((class_type, field_name))
        if field is None:
            raise CodecError(
                f"vocabulary has no field {class_type}.{field_name}: built for another catalogue"
            )
        return field

    def _steps(self, class_type: str) -> tuple[Step, ...]:
        """Flat steps of a class without choices and growing inputs."""
        steps = []
        for spec in self.catalogue.nodes[class_type].inputs:
            if spec.element is None:
                how, kind = self._how(class_type, spec, spec.name)
                field = self._field(class_type, spec.name)
                steps.append(Step(spec.name, how, spec.type, kind, spec.required, field))
        return tuple(steps)


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
