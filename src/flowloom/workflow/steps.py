"""How the code walks a node class: each input in schema order, and what may fill it.

Shared by the two directions of `codec` and by the tables of `grammar`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.vocabulary import Vocabulary

LINK, VALUE, FILE, TEXT, SEED = range(5)


class CodecError(ValueError):
    """A workflow cannot be written, or tokens cannot be read; says what, where, got, expected."""


class Step(NamedTuple):
    """One input of a class; `kind` is the value kind of a VALUE and the folder of a FILE."""

    name: str
    how: int
    type: str
    kind: str
    required: bool
    field: int


class Schema:
    """Steps of every class, and which outputs can feed which inputs."""

    def __init__(self, catalogue: Catalogue, vocabulary: Vocabulary) -> None:
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.steps = {c: self._steps(c) for c in catalogue.nodes}
        types = {i.type for node in catalogue.nodes.values() for i in node.inputs}
        # Slots of a class that can feed an input of a type, and the types a class can feed.
        self.slots = {
            (c, t): tuple(s for s, out in enumerate(node.outputs) if types_match(out, t))
            for c, node in catalogue.nodes.items()
            for t in types
        }
        self.feeds = {c: tuple(t for t in types if self.slots[c, t]) for c in catalogue.nodes}
        self.value_ids = {
            (t.kind, *key): i
            for i, t in enumerate(vocabulary.tokens)
            if t.group == "value" and (key := identity(t.value)) is not None
        }

    def _steps(self, class_type: str) -> tuple[Step, ...]:
        steps = []
        for spec in self.catalogue.nodes[class_type].inputs:
            kind = ""
            if spec.is_link:
                how = LINK
            elif voc.is_seed(spec):
                how = SEED
            elif voc.is_text(spec):
                how = TEXT
            elif spec.folder is not None:
                how, kind = FILE, spec.folder
            else:
                how, kind = VALUE, voc.rule_for(class_type, spec)["kind"]
            field = self.vocabulary.field_index.get((class_type, spec.name))
            if field is None:
                raise CodecError(
                    f"vocabulary has no field {class_type}.{spec.name}: built for another catalogue"
                )
            steps.append(Step(spec.name, how, spec.type, kind, spec.required, field))
        return tuple(steps)


def types_match(output: str, wanted: str) -> bool:
    """ComfyUI's rule: equal, "*", or overlapping comma-separated sets."""
    if output == wanted or "*" in (output, wanted):
        return True
    if "," in output or "," in wanted:
        return bool(set(output.split(",")) & set(wanted.split(",")))
    return False


def identity(value: Any) -> tuple[type, Any] | None:
    """A hashable that is equal for equal type and value only; None for lists and objects."""
    if isinstance(value, float):
        return float, value if value else repr(value)
    if isinstance(value, (str, int, bool)) or value is None:
        return type(value), value
    return None
