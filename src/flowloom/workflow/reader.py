"""Tokens -> workflow: the reading half of `codec`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Node, Workflow
from flowloom.workflow.steps import FILE, LINK, SEED, TEXT, VALUE, CodecError, Schema, Step

TEMPLATE = {voc.PROMPT_ID: PROMPT, voc.NEGATIVE_ID: NEGATIVE, voc.TEXT_ID: ""}
_OUTSIDE = Step("", LINK, "", "", True, voc.END_FIELD)


class Parsed(NamedTuple):
    """A workflow, and per token from the first after <bos>: its node, its field."""

    workflow: Workflow
    nodes: list[int]
    fields: list[int]


class _Open:
    """An open node: `number` in order of opening, `slot` of it that its holder links to."""

    __slots__ = ("at", "class_type", "inputs", "number", "slot", "steps")

    def __init__(self, class_type: str, steps: tuple[Step, ...], number: int, slot: int) -> None:
        self.class_type, self.steps, self.number, self.slot = class_type, steps, number, slot
        self.at = 0
        self.inputs: dict[str, Any] = {}


class Reader:
    """Reads one token sequence; use once."""

    def __init__(
        self,
        schema: Schema,
        tokens: Sequence[int],
        texts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        any_text: bool = False,
    ) -> None:
        """`any_text` reads a <text> slot whose text is not given as an empty one."""
        self.schema = schema
        self.tokens: Sequence[int] = tokens.tolist() if isinstance(tokens, np.ndarray) else tokens
        self.texts, self.seeds, self.any_text = texts, seeds, any_text
        self.rows = schema.vocabulary.tokens
        self.at = 1 if len(self.tokens) and self.tokens[0] == voc.BOS else 0
        self.stack: list[_Open] = []
        self.nodes: dict[str, Node] = {}
        self.finished: dict[str, list[str]] = {}
        self.num_opened = self.num_texts = self.num_seeds = 0
        self.numbers: list[int] = []
        self.fields: list[int] = []
        self.step = _OUTSIDE

    def read(self) -> Parsed:
        """Read up to <eos>.

        Raises:
            CodecError: the tokens are no code, or texts or seeds are too few.
        """
        stack, tokens, size = self.stack, self.tokens, len(self.rows)
        while True:
            top = stack[-1] if stack else None
            if top is None:
                self.step = _OUTSIDE
            elif top.at == len(top.steps):
                self._finish(stack.pop())
                continue
            else:
                self.step = top.steps[top.at]
                if self.step.how == SEED:
                    self._seed(top)
                    continue
            if self.at >= len(tokens) or not 0 <= tokens[self.at] < size:
                raise self._error("a token of the vocabulary")
            token = tokens[self.at]
            self.numbers.append(0 if top is None else top.number)
            self.fields.append(self.step.field)
            if top is None:
                if token == voc.EOS and self.nodes:
                    return Parsed(Workflow(self.nodes), self.numbers, self.fields)
                self._open_root()
            elif self.rows[token].group == "class":
                self._open_child(top)
            else:
                self._fill(top, token)
                top.at += 1
            self.at += 1

    def _finish(self, node: _Open) -> None:
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = Node(node.class_type, node.inputs)
        for fed in self.schema.feeds[node.class_type]:
            self.finished.setdefault(fed, []).append(node_id)
        if self.stack:
            holder = self.stack[-1]
            holder.inputs[holder.steps[holder.at].name] = Link(node_id, node.slot)
            holder.at += 1

    def _seed(self, top: _Open) -> None:
        if self.seeds is not None and self.num_seeds >= len(self.seeds):
            raise CodecError(f"seeds: got {len(self.seeds)}, expected more")
        top.inputs[self.step.name] = 0 if self.seeds is None else self.seeds[self.num_seeds]
        self.num_seeds += 1
        top.at += 1

    def _open_root(self) -> None:
        class_type = self.rows[self.tokens[self.at]].value
        if class_type not in self.schema.catalogue.output_classes:
            raise self._error("an output node" + (" or <eos>" if self.nodes else ""))
        self._push(class_type, 0)

    def _open_child(self, top: _Open) -> None:
        class_type = self.rows[self.tokens[self.at]].value
        matching = self.schema.slots.get((class_type, self.step.type))
        if not matching:
            raise self._error(f"a node with an output of type {self.step.type}")
        self._push(class_type, matching[0])
        if len(matching) > 1:
            self.stack[-1].slot = self._slot(top, matching)

    def _push(self, class_type: str, slot: int) -> None:
        self.numbers[-1], self.fields[-1] = self.num_opened, voc.CLASS_FIELD
        self.stack.append(_Open(class_type, self.schema.steps[class_type], self.num_opened, slot))
        self.num_opened += 1

    def _fill(self, top: _Open, token: int) -> None:
        step, row = self.step, self.rows[token]
        if (row.group == "value" and step.how == VALUE) or (
            row.group == "file" and step.how == FILE
        ):
            if row.kind != step.kind:
                raise self._error(f"a value of kind {step.kind}")
            top.inputs[step.name] = row.value
        elif token in TEMPLATE and step.how == TEXT:
            top.inputs[step.name] = self._text(token)
        elif row.group == "ref":
            top.inputs[step.name] = self._reference(top, row.value)
        elif token == voc.ESCAPE:
            value = self._spelled(top)
            top.inputs[step.name] = self._reference(top, value) if step.how == LINK else value
        elif token != voc.NONE_ID or step.required:
            raise self._error(f"a token for an input of type {step.type}")

    def _text(self, token: int) -> str:
        self.num_texts += 1
        if self.texts is None:
            if token == voc.TEXT_ID and not self.any_text:
                raise self._error("<prompt> or <negative>: the text of <text> is not given")
            return TEMPLATE[token]
        if self.num_texts > len(self.texts):
            raise CodecError(f"texts: got {len(self.texts)}, expected more")
        return self.texts[self.num_texts - 1]

    def _reference(self, top: _Open, k: Any) -> Link:
        candidates = self.finished.get(self.step.type, ())
        if type(k) is not int or not 0 <= k < len(candidates):
            raise self._error(
                f"one of {len(candidates)} finished nodes with a {self.step.type} output"
            )
        source = candidates[-1 - k]
        matching = self.schema.slots[self.nodes[source].class_type, self.step.type]
        return Link(source, matching[0] if len(matching) == 1 else self._slot(top, matching))

    def _slot(self, top: _Open, matching: tuple[int, ...]) -> int:
        self._mark(top, 1)
        index = self.tokens[self.at] - voc.SLOT0 if self.at < len(self.tokens) else -1
        if not 0 <= index < len(matching):
            raise self._error(f"<slot0> to <slot{len(matching) - 1}>")
        return matching[index]

    def _spelled(self, top: _Open) -> Any:
        """The value spelled from the present <esc> on; moves to its closing <esc>."""
        tokens, start, stop = self.tokens, self.at + 1, self.at + 1
        while stop < len(tokens) and 0 <= tokens[stop] - voc.SPELL0 < voc.NUM_SPELL:
            stop += 1
        digits = "".join(f"{token - voc.SPELL0:x}" for token in tokens[start:stop])
        if stop >= len(tokens) or tokens[stop] != voc.ESCAPE:
            raise self._error("a closing <esc>")
        try:
            value = json.loads(bytes.fromhex(digits))
        except (ValueError, RecursionError) as error:
            raise self._error(f"the hex digits of JSON ({error})") from error
        self._mark(top, stop - self.at)
        return value

    def _mark(self, top: _Open, count: int) -> None:
        """Move on by tokens that fill the same hole as the present one."""
        self.at += count
        self.numbers.extend([top.number] * count)
        self.fields.extend([self.step.field] * count)

    def _error(self, expected: str) -> CodecError:
        got = "the end"
        if self.at < len(self.tokens):
            token = self.tokens[self.at]
            got = self.rows[token].text if 0 <= token < len(self.rows) else f"id {token}"
        where = f"{self.stack[-1].class_type}.{self.step.name}" if self.stack else "the outputs"
        return CodecError(f"token {self.at}, {where}: got {got}, expected {expected}")
