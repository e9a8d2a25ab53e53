"""Tokens -> workflow: the reading half of `codec`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Node, Workflow
from flowloom.workflow.steps import (
    DONE,
    FILE,
    LINK,
    NUMERALS,
    SEED,
    VALUE,
    CodecError,
    Schema,
    Step,
    shifted,
)

TEMPLATE = {voc.PROMPT_ID: PROMPT, voc.NEGATIVE_ID: NEGATIVE, voc.TEXT_ID: ""}
_SHIFTED = re.compile(r"(.*[0-9])([+-][0-9]{1,4})")
_OUTSIDE = Step("", LINK, "", "", True, voc.END_FIELD)


class Parsed(NamedTuple):
    """A workflow, and per token from the first after <bos>: its node, its field."""

    workflow: Workflow
    nodes: list[int]
    fields: list[int]


class _Open:
    """An open node: `number` in order of opening, `slot` of it that its holder links to."""

    __slots__ = ("at", "class_type", "inputs", "number", "slot")

    def __init__(self, class_type: str, at: int, number: int, slot: int) -> None:
        self.class_type, self.at, self.number, self.slot = class_type, at, number, slot
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
        self.finished: list[tuple[str, str]] = []  # id and class
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
        program = self.schema.program
        while True:
            top = stack[-1] if stack else None
            if top is None:
                step = self.step = _OUTSIDE
            elif top.at == DONE:
                self._finish(stack.pop())
                continue
            else:
                step = self.step = program[top.at]
                if step.how == SEED and not step.opens_seed:
                    top.inputs[step.name] = self._seed()
                    top.at = step.next
                    continue
            if self.at >= len(tokens) or not 0 <= tokens[self.at] < size:
                raise self._error("a token of the vocabulary")
            token = tokens[self.at]
            self.numbers.append(0 if top is None else top.number)
            self.fields.append(step.field)
            if top is None and token == voc.EOS and self.nodes:
                return Parsed(Workflow(self.nodes), self.numbers, self.fields)
            if self.rows[token].group == "class":
                self._open(top, linked=False)
            elif token == (voc.END if step.opens_seed else voc.SEED_LINK):
                self.numbers[-1], self.fields[-1] = self.num_opened, voc.CLASS_FIELD
                self._mark(0 if top is None else top.number, 1)
                self._open(top, linked=True)
            elif top is None:
                raise self._error("an output node" + (" or <eos>" if self.nodes else ""))
            else:
                top.at = self._fill(top, token)
            self.at += 1

    def _finish(self, node: _Open) -> None:
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = Node(node.class_type, node.inputs)
        self.finished.append((node_id, node.class_type))
        if self.stack:
            holder = self.stack[-1]
            step = self.schema.program[holder.at]
            holder.inputs[step.name] = Link(node_id, node.slot)
            holder.at = step.next

    def _seed(self) -> int:
        if self.seeds is not None and self.num_seeds >= len(self.seeds):
            raise CodecError(f"seeds: got {len(self.seeds)}, expected more")
        self.num_seeds += 1
        return 0 if self.seeds is None else self.seeds[self.num_seeds - 1]

    def _open(self, top: _Open | None, linked: bool) -> None:
        """Open the node of the present class token; `linked` says that <seed> stood before it."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else -1
        row = self.rows[token] if 0 <= token < len(self.rows) else self.rows[voc.PAD]
        class_type: str = row.value if row.group == "class" else ""
        starts = self.schema.start_linked if linked else self.schema.start
        if class_type not in starts:
            raise self._error("a class with a seed" if linked else "a class of the catalogue")
        matching: tuple[int, ...] = (0,)
        if top is not None:
            matching = self.schema.slots[class_type, self.step.type]
            if not matching:
                raise self._error(f"a node with an output of type {self.step.type}")
        elif class_type not in self.schema.catalogue.output_classes:
            raise self._error("an output node" + (" or <eos>" if self.nodes else ""))
        self.numbers[-1], self.fields[-1] = self.num_opened, voc.CLASS_FIELD
        node = _Open(class_type, starts[class_type], self.num_opened, matching[0])
        self.num_opened += 1
        if top is not None and len(matching) > 1:
            node.slot = self._slot(top, matching)
        self.stack.append(node)

    def _fill(self, top: _Open, token: int) -> int:
        """Fill the present hole by a token that opens no node; returns the position after it."""
        step, row = self.step, self.rows[token]
        value: Any
        if row.group == "value" or row.group == "file":
            if step.how != (VALUE if row.group == "value" else FILE) or row.kind != step.kind:
                raise self._error(self._wanted())
            top.inputs[step.name] = row.value
            return step.branches.get(token, step.next)
        if row.group == "ref":
            value = self._reference(top, row.value)
        elif token in TEMPLATE and step.takes_text:
            value = self._text(token)
        elif token == voc.SEED_LINK:
            value = self._seed()
        elif token == voc.END and step.stop >= 0:
            return step.stop
        elif token == voc.NONE_ID:
            return step.next
        elif token == voc.NUMBER:
            value = self._number(top)
            if step.how == LINK:
                value = self._reference(top, value)
        elif token == voc.ESCAPE and step.takes_literal:
            value = self._escaped(top)
        else:
            raise self._error(self._wanted())
        top.inputs[step.name] = value
        return step.next

    def _text(self, token: int) -> str:
        self.num_texts += 1
        if self.texts is None:
            if token == voc.TEXT_ID and not self.any_text:
                raise self._error("<prompt> or <negative>: the text of <text> is not given")
            return TEMPLATE[token]
        if self.num_texts > len(self.texts):
            raise CodecError(f"texts: got {len(self.texts)}, expected more")
        return self.texts[self.num_texts - 1]

    def _reference(self, top: _Open, k: Any, slot: int | None = None) -> Link:
        """The k-th most recent node that fits; its slot is given or read."""
        slots, wanted = self.schema.slots, self.step.type
        fitting = ((i, c) for i, c in reversed(self.finished) if slots[c, wanted])
        known = type(k) is int and 0 <= k < len(self.finished)
        found = next(islice(fitting, k, None), None) if known else None
        if found is None:
            count = sum(bool(slots[c, wanted]) for _, c in self.finished)
            raise self._error(f"one of {count} finished nodes with a {wanted} output")
        source, class_type = found
        matching = slots[class_type, wanted]
        if slot is None:
            slot = matching[0] if len(matching) == 1 else self._slot(top, matching)
        elif slot not in matching:
            raise self._error(f"a reference to an output of type {self.step.type}")
        return Link(source, slot)

    def _slot(self, top: _Open, matching: tuple[int, ...]) -> int:
        self._mark(top.number, 1)
        token = self.tokens[self.at] if self.at < len(self.tokens) else -1
        index = self._number(top) if token == voc.NUMBER else token - voc.SLOT0
        if type(index) is not int or not 0 <= index < len(matching):
            raise self._error(f"<slot0> to <slot{len(matching) - 1}>")
        return matching[index]

    def _number(self, top: _Open) -> int | float:
        """The number spelled from the present <num> on; moves to its closing <num>."""
        spelled = self._spelled(voc.NUMBER, len(NUMERALS))
        text = "".join(NUMERALS[k] for k in spelled)
        shift = _SHIFTED.fullmatch(text)
        try:
            value = json.loads(text if shift is None else shift[1])
            if shift is not None:
                value = shifted(float(value), int(shift[2]))
        except (ValueError, OverflowError) as error:
            raise self._error(f"a number, got {text[:40]!r}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"a finite number, got {text[:40]}")
        self._mark(top.number, len(spelled) + 1)
        return value

    def _escaped(self, top: _Open) -> Any:
        """The value spelled from the present <esc> on; moves to its closing <esc>."""
        spelled = self._spelled(voc.ESCAPE, voc.NUM_SPELL)
        try:
            value = json.loads(bytes.fromhex("".join(f"{k:x}" for k in spelled)))
        except (ValueError, RecursionError) as error:
            raise self._error(f"the hex digits of JSON ({error})") from error
        self._mark(top.number, len(spelled) + 1)
        if isinstance(value, list) and len(value) == 2:
            k, slot = value
            return self._reference(top, k, slot if type(slot) is int else -1)
        return value

    def _spelled(self, mark: int, num_symbols: int) -> list[int]:
        """Symbols between the present token and the same token again."""
        tokens, stop = self.tokens, self.at + 1
        while stop < len(tokens) and 0 <= tokens[stop] - voc.SPELL0 < num_symbols:
            stop += 1
        if stop >= len(tokens) or tokens[stop] != mark:
            raise self._error(f"a closing {self.rows[mark].text}")
        return [token - voc.SPELL0 for token in tokens[self.at + 1 : stop]]

    def _mark(self, number: int, count: int) -> None:
        """Move on by tokens that fill the same hole as the present one."""
        self.at += count
        self.numbers.extend([number] * count)
        self.fields.extend([self.step.field] * count)

    def _wanted(self) -> str:
        step = self.step
        if step.how == VALUE or step.how == FILE:
            return f"a value of kind {step.kind}"
        return f"a token for an input of type {step.type}"

    def _error(self, expected: str) -> CodecError:
        got = "the end"
        if self.at < len(self.tokens):
            token = self.tokens[self.at]
            got = self.rows[token].text if 0 <= token < len(self.rows) else f"id {token}"
        where = f"{self.stack[-1].class_type}.{self.step.name}" if self.stack else "the outputs"
        return CodecError(f"token {self.at}, {where}: got {got}, expected {expected}")
