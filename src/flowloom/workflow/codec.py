"""Workflow <-> tokens, exactly.

The code is written top-down from the output nodes, depth first, inputs in schema order. A link is
a class token (a new node follows) or a reference to the k-th most recent finished node that has an
output of the type; a slot token follows where several outputs have it. A literal is one value
token, a file one file token. Seeds take no token and texts take one: their contents are kept
beside. Anything else is spelled behind an escape: <esc>, hex digits of its JSON, <esc>.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Literal, Node, Workflow
from flowloom.workflow.reader import Reader
from flowloom.workflow.steps import (
    FILE,
    LINK,
    SEED,
    TEXT,
    VALUE,
    CodecError,
    Schema,
    Step,
    identity,
)
from flowloom.workflow.vocabulary import Vocabulary

__all__ = ["Codec", "CodecError", "Encoded", "Language", "decode", "encode"]


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
            CodecError: no output node, unknown class or input, missing input, cycle, wrong link.
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
        self.schema, self.workflow = schema, workflow
        self.prompt, self.negative = prompt, negative
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.seeds: list[int] = []
        self.finished: dict[str, list[str]] = {}
        self.is_open: dict[str, bool] = {}
        # Open nodes: id, node, its steps, position of the next step.
        self.stack: list[tuple[str, Node, tuple[Step, ...], int]] = []

    def write(self) -> Encoded:
        roots = self.workflow.roots(self.schema.catalogue.output_classes)
        if not roots:
            raise CodecError("workflow: no output node, expected one such as SaveImage")
        for root in roots:
            if root not in self.is_open:
                self._open(root)
            while self.stack:
                self._continue(*self.stack.pop())
        self.tokens.append(voc.EOS)
        return Encoded(self.tokens, tuple(self.texts), tuple(self.seeds))

    def _continue(self, node_id: str, node: Node, steps: tuple[Step, ...], at: int) -> None:
        """Write a node's inputs until one opens a node, or the node is finished."""
        for place in range(at, len(steps)):
            step = steps[place]
            value = node.inputs.get(step.name)
            if type(value) is Link:
                source = self._link(node_id, step, value)
                if source is not None:
                    self.stack.append((node_id, node, steps, place + 1))
                    self._open(source)
                    self._slot(source, step, value)
                    return
            elif value is None and step.name not in node.inputs:
                self._absent(node_id, node, step)
            else:
                self._literal(node_id, node, step, value)
        self.is_open[node_id] = False
        for fed in self.schema.feeds[node.class_type]:
            self.finished.setdefault(fed, []).append(node_id)

    def _open(self, node_id: str) -> None:
        node = self.workflow.nodes[node_id]
        steps = self.schema.steps.get(node.class_type)
        token = self.schema.vocabulary.class_ids.get(node.class_type)
        if steps is None or token is None:
            raise CodecError(f"node {node_id}: class {node.class_type} is not in the catalogue")
        known = self.schema.catalogue.nodes[node.class_type].by_name
        for name in node.inputs:
            if name not in known:
                raise CodecError(
                    f"node {node_id} ({node.class_type}): input {name} is not in the catalogue"
                )
        self.is_open[node_id] = True
        self.tokens.append(token)
        self.stack.append((node_id, node, steps, 0))

    def _link(self, node_id: str, step: Step, link: Link) -> str | None:
        """Write a reference and return None, or return the node to be written next."""
        where = f"node {node_id}, input {step.name}"
        source = self.workflow.nodes.get(link.node)
        if source is None:
            raise CodecError(f"{where}: link to node {link.node}, which does not exist")
        if source.class_type not in self.schema.steps:
            raise CodecError(f"node {link.node}: class {source.class_type} is not in the catalogue")
        matching = self.schema.slots[source.class_type, step.type]
        if step.how == SEED or link.slot not in matching or len(matching) > voc.NUM_SLOTS:
            want = "a literal seed" if step.how == SEED else f"an output of type {step.type}"
            raise CodecError(
                f"{where}: link to output {link.slot} of {source.class_type}, expected {want}"
            )
        if link.node not in self.is_open:
            return link.node
        if self.is_open[link.node]:
            raise CodecError(f"{where}: link to node {link.node} closes a cycle")
        recent = reversed(self.finished[step.type])
        k = next(k for k, other in enumerate(recent) if other == link.node)
        self.tokens.extend([voc.REF0 + k] if k < voc.NUM_REFS else _spell(k))
        self._slot(link.node, step, link)
        return None

    def _slot(self, source: str, step: Step, link: Link) -> None:
        matching = self.schema.slots[self.workflow.nodes[source].class_type, step.type]
        if len(matching) > 1:
            self.tokens.append(voc.SLOT0 + matching.index(link.slot))

    def _absent(self, node_id: str, node: Node, step: Step) -> None:
        # A seed has no token that could say it is absent.
        if step.required or step.how == SEED:
            raise CodecError(f"node {node_id} ({node.class_type}): input {step.name} is missing")
        self.tokens.append(voc.NONE_ID)

    def _literal(self, node_id: str, node: Node, step: Step, value: Literal | Link) -> None:
        if step.how == SEED and type(value) is int:
            self.seeds.append(value)
        elif step.how == TEXT and isinstance(value, str):
            self.tokens.append(self._text_token(value))
            self.texts.append(value)
        elif step.how in (LINK, SEED):
            want = "a link" if step.how == LINK else "an integer"
            raise CodecError(
                f"node {node_id} ({node.class_type}), input {step.name}: "
                f"got {str(value)[:40]!r}, expected {want}"
            )
        else:
            token = self._token(step, value)
            self.tokens.extend(_spell(value) if token is None else [token])

    def _token(self, step: Step, value: Literal | Link) -> int | None:
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

    def _text_token(self, text: str) -> int:
        if text == PROMPT or (self.prompt is not None and text == self.prompt):
            return voc.PROMPT_ID
        if text in ("", NEGATIVE) or (self.negative is not None and text == self.negative):
            return voc.NEGATIVE_ID
        return voc.TEXT_ID


def _spell(value: Any) -> list[int]:
    try:
        digits = json.dumps(value).encode().hex()
    except (TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"value {str(value)[:40]!r}: not JSON: {error}") from error
    return [voc.ESCAPE, *(voc.SPELL0 + int(digit, 16) for digit in digits), voc.ESCAPE]
