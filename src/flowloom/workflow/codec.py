"""Workflow <-> tokens, exactly.

The code is written top-down from the output nodes, depth first, each class by its program of holes
(`steps`). A link is a class token (a new node follows) or a reference to the k-th most recent
finished node that has an output of the type; a slot token follows where several outputs have it. A
literal is one value token, a file one file token; <end> ends a growing input, <none> is an input
left out (a required one too: the code holds faulty workflows as well). Contents that are the user's
are kept beside: a seed takes no token, a text (any string that has no token of its own) takes one.
Other numbers are spelled by <num>, their characters, <num>; the rest by <esc>, hex digits of its
JSON, <esc>.

<seed> before a class says that a seed of that node is no plain integer; every seed of it is then a
hole, in which <seed> is an integer kept beside and <end> takes the place of <seed> before a class.
A reference too far for the reference tokens is the number k in a socket and the escaped list
[k, slot] where a literal could stand; a socket that takes literals escapes them all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Literal, Node, Workflow
from flowloom.workflow.inputs import active_inputs
from flowloom.workflow.literals import shown
from flowloom.workflow.reader import Reader
from flowloom.workflow.steps import (
    FILE,
    LINK,
    NUMERALS,
    SEED,
    TEXT,
    VALUE,
    CodecError,
    Schema,
    Step,
    identity,
    shifted,
)
from flowloom.workflow.vocabulary import Vocabulary

__all__ = ["Codec", "CodecError", "Encoded", "Language", "decode", "encode"]

_ABSENT = object()


@dataclass(frozen=True)
class Encoded:
    """A workflow as token ids (ending with <eos>, without <bos>), its texts and seeds in order."""

    tokens: list[int]
    texts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


class Language(Protocol):
    """What a code is relative to; `Grammar` and `Codec` are languages."""

    @property
    def codec(self) -> Codec:
        """Both directions of the code."""
        ...


def encode(
    workflow: Workflow, language: Language, prompt: str | None = None, negative: str | None = None
) -> Encoded:
    """Write the part of a workflow that its outputs reach; see `Codec.encode`."""
    return language.codec.encode(workflow, prompt, negative)


def decode(
    tokens: Sequence[int],
    language: Language,
    texts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    prompt: str | None = None,
    negative: str = "",
    seed: int = 0,
) -> Workflow:
    """Read tokens; with `prompt` the template is filled at once. See `Codec.decode`."""
    workflow = language.codec.decode(tokens, texts, seeds)
    return workflow if prompt is None else workflow.fill(prompt, negative, seed)


class Codec:
    """Both directions of the code for one catalogue and vocabulary."""

    def __init__(self, catalogue: Catalogue, vocabulary: Vocabulary) -> None:
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.schema = Schema(catalogue, vocabulary)

    @property
    def codec(self) -> Codec:
        """Itself: a codec is a language."""
        return self

    def encode(
        self, workflow: Workflow, prompt: str | None = None, negative: str | None = None
    ) -> Encoded:
        """Write a workflow.

        Args:
            workflow: A template, or a filled workflow.
            prompt: A text equal to this is a prompt slot, as "{prompt}" is.
            negative: A text equal to this is a negative slot, as "" and "{negative}" are.

        Raises:
            CodecError: no output node, unknown class or input, cycle, wrong link.
        """
        return _Writer(self.schema, workflow, prompt, negative).write()

    def decode(
        self,
        tokens: Sequence[int],
        texts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Workflow:
        """Read tokens up to <eos>; ids are "1", "2", ... in the order in which nodes finish.

        Args:
            tokens: Token ids; a leading <bos> and anything after <eos> is ignored.
            texts: Contents of the text slots in order; without it, the template markers.
            seeds: Values of the seeds in order; without it, 0.

        Raises:
            CodecError: the tokens are no code of this vocabulary, or texts or seeds are too few.
        """
        return Reader(self.schema, tokens, texts, seeds).read().workflow

    def annotate(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What each token of one sequence fills.

        Returns:
            node_index [T], nodes numbered in order of opening, and field_index [T] into
            `Vocabulary.fields`. A class token belongs to the node it opens (field 0), a reference
            and a slot to the node that holds the link, <eos> to node 0 (field 1). A leading <bos>
            and what follows <eos> are (-1, -1).
        """
        parsed = Reader(self.schema, tokens, any_text=True).read()
        lead = 1 if tokens[0] == voc.BOS else 0
        out = np.full((2, len(tokens)), -1, np.int32)
        out[0, lead : lead + len(parsed.nodes)] = parsed.nodes
        out[1, lead : lead + len(parsed.fields)] = parsed.fields
        return out[0], out[1]


class _Writer:
    """Writes one workflow; use once."""

    def __init__(
        self, schema: Schema, workflow: Workflow, prompt: str | None, negative: str | None
    ) -> None:
        self.schema, self.nodes = schema, workflow.nodes
        self.roots = workflow.roots(schema.catalogue.output_classes)
        self.prompt, self.negative = prompt, negative
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.seeds: list[int] = []
        self.finished: list[tuple[str, str]] = []  # id and class
        self.is_open: dict[str, bool] = {}
        # Open nodes: id, node, position of the next step, inputs written so far.
        self.stack: list[tuple[str, Node, int, int]] = []

    def write(self) -> Encoded:
        if not self.roots:
            raise CodecError("workflow: no output node, expected one such as SaveImage")
        for root in self.roots:
            if root not in self.is_open:
                self._open(root, None, None)
            while self.stack:
                self._continue(*self.stack.pop())
        self.tokens.append(voc.EOS)
        return Encoded(self.tokens, tuple(self.texts), tuple(self.seeds))

    def _continue(self, node_id: str, node: Node, at: int, written: int) -> None:
        """Write a node's inputs until one opens a node, or the node is finished."""
        program, inputs = self.schema.program, node.inputs
        while at:
            step = program[at]
            value: Any = inputs.get(step.name, _ABSENT)
            if value is _ABSENT:
                at = self._absent(node, at)
                continue
            written += 1
            if type(value) is not Link:
                at = self._literal(node_id, node, step, value)
                continue
            at = step.next
            if self._link(node_id, step, value):
                self.stack.append((node_id, node, at, written))
                self._open(value.node, step, value)
                return
        if written < len(inputs):
            raise self._unknown(node_id, node)
        self.is_open[node_id] = False
        self.finished.append((node_id, node.class_type))

    def _open(self, node_id: str, step: Step | None, link: Link | None) -> None:
        """Open a node: an output node, or what a link of a step leads to."""
        node = self.nodes[node_id]
        at = self.schema.start.get(node.class_type, -1)
        if at < 0:
            raise CodecError(
                f"node {shown(node_id)}: class {shown(node.class_type)} is not in the catalogue"
            )
        if node.class_type in self.schema.start_linked and not self._plain_seeds(node, at):
            at = self.schema.start_linked[node.class_type]
            in_seed = step is not None and step.opens_seed
            self.tokens.append(voc.END if in_seed else voc.SEED_LINK)
        self.is_open[node_id] = True
        self.tokens.append(self.schema.vocabulary.class_ids[node.class_type])
        if step is not None and link is not None:
            self._slot(node.class_type, step, link)
        self.stack.append((node_id, node, at, 0))

    def _plain_seeds(self, node: Node, at: int) -> bool:
        """Whether every seed of a node is an integer."""
        while at:
            step = self.schema.program[at]
            if step.how == SEED and type(node.inputs.get(step.name)) is not int:
                return False
            at = step.next
            if step.branches:
                token = self._token(step, node.inputs.get(step.name))
                at = step.branches.get(-1 if token is None else token, at)
        return True

    def _link(self, node_id: str, step: Step, link: Link) -> bool:
        """Write a reference, or return whether the source is still to be written."""
        source = self.nodes.get(link.node)
        if source is None:
            raise CodecError(
                f"node {shown(node_id)}, input {step.name}: link to node {shown(link.node)}, "
                "which does not exist"
            )
        if source.class_type not in self.schema.start:
            raise CodecError(
                f"node {shown(link.node)}: class {shown(source.class_type)} is not in the catalogue"
            )
        if link.slot not in self.schema.slots[source.class_type, step.type]:
            raise CodecError(
                f"node {shown(node_id)}, input {step.name}: link to output {link.slot} of "
                f"{source.class_type}, expected an output of type {step.type}"
            )
        is_open = self.is_open.get(link.node)
        if is_open is None:
            return True
        if is_open:
            raise CodecError(
                f"node {shown(node_id)}, input {step.name}: link to node {shown(link.node)} closes "
                "a cycle"
            )
        k = self._age(link.node, step.type)
        if k < voc.NUM_REFS:
            self.tokens.append(voc.REF0 + k)
        elif step.how == LINK:
            self.tokens.extend(_spell(k))
        else:
            # A number would be a literal here; a list of two never is one.
            self.tokens.extend(_spell([k, link.slot]))
            return False
        self._slot(source.class_type, step, link)
        return False

    def _age(self, node_id: str, wanted: str) -> int:
        """How many nodes with an output of a type have finished after this one."""
        slots, k = self.schema.slots, 0
        for other, class_type in reversed(self.finished):
            if other == node_id:
                break
            k += bool(slots[class_type, wanted])
        return k

    def _slot(self, class_type: str, step: Step, link: Link) -> None:
        matching = self.schema.slots[class_type, step.type]
        if len(matching) > 1:
            index = matching.index(link.slot)
            few = index < voc.NUM_SLOTS
            self.tokens.extend([voc.SLOT0 + index] if few else _spell(index))

    def _absent(self, node: Node, at: int) -> int:
        """Write that an input is left out, or that a growing input ends; returns the position."""
        step = self.schema.program[at]
        if step.stop >= 0 and not self._grows_on(node, at):
            self.tokens.append(voc.END)
            return step.stop
        self.tokens.append(voc.NONE_ID)
        return step.next

    def _grows_on(self, node: Node, at: int) -> bool:
        """Whether a growing input has a part behind this position."""
        stop = self.schema.program[at].stop
        while at != stop:
            step = self.schema.program[at]
            if step.name in node.inputs:
                return True
            at = step.next
        return False

    def _literal(self, node_id: str, node: Node, step: Step, value: Literal) -> int:
        """Write a literal; returns the position that follows."""
        tokens, how = self.tokens, step.how
        if how == SEED and type(value) is int:
            self.seeds.append(value)
            if step.opens_seed:
                tokens.append(voc.SEED_LINK)
            return step.next
        if how == LINK and not step.takes_literal:
            raise CodecError(
                f"node {shown(node_id)} ({node.class_type}), input {step.name}: "
                f"got {shown(value)!r}, expected a link"
            )
        token = self._token(step, value)
        if token is not None:
            tokens.append(token)
            return step.branches.get(token, step.next)
        if isinstance(value, str) and step.takes_text:
            tokens.append(self._text_token(step, value))
            self.texts.append(value)
        else:
            tokens.extend(_escape(value) if how == LINK else _spell(value))
        return step.next

    def _token(self, step: Step, value: Any) -> int | None:
        """The token of a value or file, if it has one."""
        schema = self.schema
        if step.how == VALUE:
            key = identity(value)
            return None if key is None else schema.value_ids.get((step.kind, *key))
        if step.how == FILE and isinstance(value, str):
            file = schema.catalogue.file(step.kind, value)
            key = file and (file.folder, file.name, file.sha256)
            return None if key is None else schema.vocabulary.file_ids.get(key)
        return None

    def _text_token(self, step: Step, text: str) -> int:
        if text == PROMPT or (self.prompt is not None and text == self.prompt):
            return voc.PROMPT_ID
        if text == NEGATIVE or (self.negative is not None and text == self.negative):
            return voc.NEGATIVE_ID
        # An empty line is content, but an empty text of several lines is no negative prompt.
        return voc.NEGATIVE_ID if text == "" and step.how == TEXT else voc.TEXT_ID

    def _unknown(self, node_id: str, node: Node) -> CodecError:
        """The error of a node that has an input which its class has not."""
        spec = self.schema.catalogue.nodes[node.class_type]
        known = {item.name for item in active_inputs(spec, node.inputs)}
        name = next(name for name in node.inputs if name not in known)
        return CodecError(
            f"node {shown(node_id)} ({node.class_type}): input {shown(name)} is not in the "
            "catalogue"
        )


def _spell(value: Any) -> list[int]:
    """A number by its characters, anything else as an escape."""
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        try:
            spelled = [voc.SPELL0 + NUMERALS.index(c) for c in _numeral(value)]
        except ValueError as error:
            raise CodecError(f"value: {error}") from error
        return [voc.NUMBER, *spelled, voc.NUMBER]
    return _escape(value)


def _numeral(value: int | float) -> str:
    """A number as JSON has it; what rounding errors left, as its distance from a short number.

    Editors add steps to a float, so that 3.1000000000000005, the next float after 3.1, is common:
    "3.1+1".
    """
    text = repr(value)
    if isinstance(value, int):
        return text
    near = float(f"{value:.12g}")
    steps = round((value - near) / math.ulp(near))
    short = f"{near!r}{steps:+d}"
    fits = 0 < abs(steps) < 10_000 and shifted(near, steps) == value
    return short if fits and len(short) < len(text) else text


def _escape(value: Any) -> list[int]:
    try:
        digits = json.dumps(value).encode().hex()
    except (TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"value {shown(value)!r}: not JSON: {error}") from error
    return [voc.ESCAPE, *(voc.SPELL0 + int(digit, 16) for digit in digits), voc.ESCAPE]
