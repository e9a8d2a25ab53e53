"""Workflow <-> tokens, exactly.

The code is written top-down from the output nodes, depth first, inputs in schema order. A link is a
class token (a new node follows) or a reference to the k-th most recent finished node that has an
output of the type; a slot token follows where several outputs have it. A literal is one value token, a
file one file token. Seeds take no token and texts take one: their contents are kept beside. Anything
else is spelled behind an escape: <esc>, hex digits of its JSON, <esc>.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import NEGATIVE, PROMPT, Link, Node, Workflow, WorkflowError
from flowloom.workflow.vocabulary import Vocabulary

_LINK, _VALUE, _FILE, _TEXT, _SEED = range(5)
_TEMPLATE = {voc.PROMPT_ID: PROMPT, voc.NEGATIVE_ID: NEGATIVE}


class CodecError(ValueError):
    """A workflow cannot be written, or tokens cannot be read; says what, where, got, expected."""


@dataclass(frozen=True)
class Encoded:
    """A workflow as token ids (ending with <eos>, without <bos>), its texts and its seeds in order."""

    tokens: list[int]
    texts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


class Language(Protocol):
    """What a code is relative to; `Grammar` and `Codec` are languages."""

    @property
    def codec(self) -> Codec: ...


class _Step(NamedTuple):
    """One input of a class as the code walks it; `kind` is the value kind or the file folder."""

    name: str
    how: int
    type: str
    kind: str
    required: bool
    field: int


class _Open:
    """An open node while decoding."""

    __slots__ = ("class_type", "steps", "inputs", "at", "number", "slot")

    def __init__(self, class_type: str, steps: tuple[_Step, ...], number: int, slot: int) -> None:
        self.class_type, self.steps, self.inputs = class_type, steps, {}
        self.at, self.number, self.slot = 0, number, slot


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
        self.steps = {c: self._steps(c) for c in catalogue.nodes}
        types = {i.type for node in catalogue.nodes.values() for i in node.inputs}
        # Slots of a class that can feed an input of a type, and the types a class can feed.
        self.slots = {
            (c, t): tuple(s for s, out in enumerate(node.outputs) if types_match(out, t))
            for c, node in catalogue.nodes.items()
            for t in types
        }
        self.feeds = {c: tuple(t for t in types if self.slots[c, t]) for c in catalogue.nodes}
        self._values = {
            (t.kind, *_identity(t.value)): i
            for i, t in enumerate(vocabulary.tokens)
            if t.group == "value" and _identity(t.value) is not None
        }

    @property
    def codec(self) -> Codec:
        return self

    def _steps(self, class_type: str) -> tuple[_Step, ...]:
        steps = []
        for spec in self.catalogue.nodes[class_type].inputs:
            kind = ""
            if spec.is_link:
                how = _LINK
            elif voc.is_seed(spec):
                how = _SEED
            elif voc.is_text(spec):
                how = _TEXT
            elif spec.folder is not None:
                how, kind = _FILE, spec.folder
            else:
                how, kind = _VALUE, voc.rule_for(class_type, spec)["kind"]
            field = self.vocabulary.field_index.get((class_type, spec.name))
            if field is None:
                raise CodecError(
                    f"vocabulary has no field {class_type}.{spec.name}: built for another catalogue"
                )
            steps.append(_Step(spec.name, how, spec.type, kind, spec.required, field))
        return tuple(steps)

    # -- encode ----------------------------------------------------------------------------------

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
        tokens: list[int] = []
        texts: list[str] = []
        seeds: list[int] = []
        finished: dict[str, list[str]] = {}
        opened: dict[str, bool] = {}
        slots = self.slots
        roots = workflow.roots(self.catalogue.output_classes)
        if not roots:
            raise CodecError("workflow: no output node, expected one such as SaveImage")
        for root in roots:
            if root in opened:
                continue
            stack: list[tuple[str, Node, tuple[_Step, ...], int]] = []
            self._open(workflow, root, stack, tokens, opened)
            while stack:
                node_id, node, steps, at = stack.pop()
                child = None
                for at in range(at, len(steps)):
                    step = steps[at]
                    value = node.inputs.get(step.name)
                    if type(value) is Link:
                        child = self._link(workflow, node_id, step, value, tokens, finished, opened)
                        if child is not None:
                            break
                    elif value is None and step.name not in node.inputs:
                        if step.required:
                            raise CodecError(
                                f"node {node_id} ({node.class_type}): input {step.name} is missing"
                            )
                        if step.how != _SEED:
                            tokens.append(voc.NONE_ID)
                    elif step.how == _VALUE:
                        identity = _identity(value)
                        token = None
                        if identity is not None:
                            token = self._values.get((step.kind, *identity))
                        tokens.extend((token,) if token is not None else _spell(value))
                    elif step.how == _TEXT and isinstance(value, str):
                        tokens.append(_text_token(value, prompt, negative))
                        texts.append(value)
                    elif step.how == _SEED and type(value) is int:
                        seeds.append(value)
                    elif step.how == _FILE:
                        tokens.extend(self._file(step.kind, value))
                    elif step.how == _TEXT:
                        tokens.extend(_spell(value))
                    else:
                        want = "a link" if step.how == _LINK else "an integer"
                        raise CodecError(
                            f"node {node_id} ({node.class_type}), input {step.name}: "
                            f"got {str(value)[:40]!r}, expected {want}"
                        )
                if child is not None:
                    stack.append((node_id, node, steps, at + 1))
                    source, step = child
                    self._open(workflow, source, stack, tokens, opened)
                    matching = slots[workflow.nodes[source].class_type, step.type]
                    if len(matching) > 1:
                        slot = node.inputs[step.name].slot  # type: ignore[union-attr]
                        tokens.append(voc.SLOT0 + matching.index(slot))
                else:
                    opened[node_id] = False
                    for fed in self.feeds[node.class_type]:
                        finished.setdefault(fed, []).append(node_id)
        tokens.append(voc.EOS)
        return Encoded(tokens, tuple(texts), tuple(seeds))

    def _open(
        self, workflow: Workflow, node_id: str, stack: list, tokens: list[int], opened: dict
    ) -> None:
        node = workflow.nodes[node_id]
        steps = self.steps.get(node.class_type)
        token = self.vocabulary.class_ids.get(node.class_type)
        if steps is None or token is None:
            raise CodecError(f"node {node_id}: class {node.class_type} is not in the catalogue")
        known = self.catalogue.nodes[node.class_type].by_name
        for name in node.inputs:
            if name not in known:
                raise CodecError(
                    f"node {node_id} ({node.class_type}): input {name} is not in the catalogue"
                )
        opened[node_id] = True
        tokens.append(token)
        stack.append((node_id, node, steps, 0))

    def _link(
        self,
        workflow: Workflow,
        node_id: str,
        step: _Step,
        link: Link,
        tokens: list[int],
        finished: dict[str, list[str]],
        opened: dict[str, bool],
    ) -> tuple[str, _Step] | None:
        """Write a reference and return None, or return the node to be written next."""
        where = f"node {node_id}, input {step.name}"
        source = workflow.nodes.get(link.node)
        if source is None:
            raise CodecError(f"{where}: link to node {link.node}, which does not exist")
        matching = self.slots.get((source.class_type, step.type), ())
        if step.how == _SEED or link.slot not in matching or len(matching) > voc.NUM_SLOTS:
            raise CodecError(
                f"{where}: link to output {link.slot} of {source.class_type}, expected "
                f"{'a literal seed' if step.how == _SEED else f'an output of type {step.type}'}"
            )
        if link.node not in opened:
            return link.node, step
        if opened[link.node]:
            raise CodecError(f"{where}: link to node {link.node} closes a cycle")
        candidates = finished[step.type]
        k = next(k for k, other in enumerate(reversed(candidates)) if other == link.node)
        tokens.extend((voc.REF0 + k,) if k < voc.NUM_REFS else _spell(k))
        if len(matching) > 1:
            tokens.append(voc.SLOT0 + matching.index(link.slot))
        return None

    def _file(self, folder: str, name: Any) -> tuple[int, ...] | list[int]:
        file = self.catalogue.file(folder, name) if isinstance(name, str) else None
        token = None
        if file is not None:
            token = self.vocabulary.file_ids.get((folder, file.name, file.sha256))
        return (token,) if token is not None else _spell(name)

    # -- decode ----------------------------------------------------------------------------------

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
        return self._parse(tokens, texts, seeds)[0]

    def annotate(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What each token of one sequence fills.

        Returns:
            node_index [T], nodes numbered in order of opening, and field_index [T] into
            `Vocabulary.fields`. A class token belongs to the node it opens (field 0), a reference
            and a slot to the node that holds the link, <eos> to node 0 (field 1). A leading <bos>
            and what follows <eos> are (-1, -1).
        """
        _, nodes, fields = self._parse(tokens, None, None, any_text=True)
        lead = 1 if len(tokens) and tokens[0] == voc.BOS else 0
        out = np.full((2, len(tokens)), -1, np.int32)
        out[0, lead : lead + len(nodes)] = nodes
        out[1, lead : lead + len(nodes)] = fields
        return out[0], out[1]

    def _parse(
        self,
        tokens: Sequence[int],
        texts: Sequence[str] | None,
        seeds: Sequence[int] | None,
        any_text: bool = False,
    ) -> tuple[Workflow, list[int], list[int]]:
        if isinstance(tokens, np.ndarray):
            tokens = tokens.tolist()
        rows, size = self.vocabulary.tokens, self.vocabulary.size
        nodes: dict[str, Node] = {}
        finished: dict[str, list[str]] = {}
        classes: dict[str, str] = {}
        stack: list[_Open] = []
        numbers: list[int] = []
        fields: list[int] = []
        num_opened = num_texts = num_seeds = 0
        end = len(tokens)
        at = 1 if end and tokens[0] == voc.BOS else 0

        def fail(expected: str) -> CodecError:
            got = "the end"
            if at < end:
                known = 0 <= tokens[at] < size
                got = rows[tokens[at]].text if known else f"id {tokens[at]}"
            where = f"{stack[-1].class_type}.{step.name}" if stack else "the outputs"
            return CodecError(f"token {at}, {where}: got {got}, expected {expected}")

        step = _Step("", _LINK, "", "", True, voc.CLASS_FIELD)
        while True:
            top = stack[-1] if stack else None
            if top is not None and top.at == len(top.steps):
                stack.pop()
                node_id = str(len(nodes) + 1)
                nodes[node_id] = Node(top.class_type, top.inputs)
                classes[node_id] = top.class_type
                for fed in self.feeds[top.class_type]:
                    finished.setdefault(fed, []).append(node_id)
                if stack:
                    below = stack[-1]
                    below.inputs[below.steps[below.at].name] = Link(node_id, top.slot)
                    below.at += 1
                continue
            if top is not None:
                step = top.steps[top.at]
                if step.how == _SEED:
                    if seeds is not None and num_seeds >= len(seeds):
                        raise CodecError(f"seeds: got {len(seeds)}, expected more")
                    top.inputs[step.name] = 0 if seeds is None else seeds[num_seeds]
                    num_seeds += 1
                    top.at += 1
                    continue
            if at >= end or not 0 <= tokens[at] < size:
                raise fail("a token of the vocabulary")
            token = tokens[at]
            row = rows[token]
            group = row.group
            if top is None:
                if token == voc.EOS and nodes:
                    numbers.append(0)
                    fields.append(voc.END_FIELD)
                    break
                if group != "class" or row.value not in self.catalogue.output_classes:
                    raise fail("an output node" + (" or <eos>" if nodes else ""))
            numbers.append(top.number if top is not None else 0)
            fields.append(step.field)
            if group == "class":
                slot = 0
                if row.value not in self.steps:
                    raise fail("a class of the catalogue")
                if top is not None:
                    matching = self.slots[row.value, step.type]
                    if not matching:
                        raise fail(f"an output of type {step.type}")
                    numbers[-1], slot = num_opened, matching[0]
                else:
                    numbers[-1], matching = num_opened, ()
                fields[-1] = voc.CLASS_FIELD
                if len(matching) > 1:
                    at += 1
                    slot = self._slot(tokens, at, matching)
                    numbers.append(top.number)  # type: ignore[union-attr]
                    fields.append(step.field)
                stack.append(_Open(row.value, self.steps[row.value], num_opened, slot))
                num_opened += 1
                at += 1
                continue
            assert top is not None
            if group == "value" and step.how == _VALUE and row.kind == step.kind:
                top.inputs[step.name] = row.value
            elif group == "file" and step.how == _FILE and row.kind == step.kind:
                top.inputs[step.name] = row.value
            elif token in (voc.PROMPT_ID, voc.NEGATIVE_ID, voc.TEXT_ID) and step.how == _TEXT:
                if texts is not None:
                    if num_texts >= len(texts):
                        raise CodecError(f"texts: got {len(texts)}, expected more")
                    top.inputs[step.name] = texts[num_texts]
                elif token in _TEMPLATE or any_text:
                    top.inputs[step.name] = _TEMPLATE.get(token, "")
                else:
                    raise fail("<prompt> or <negative>: <text> needs its text beside the tokens")
                num_texts += 1
            elif token == voc.NONE_ID and not step.required:
                pass
            elif group == "ref" or (token == voc.ESCAPE and step.how == _LINK):
                k = row.value
                if token == voc.ESCAPE:
                    k, used = _unspell(tokens, at)
                    numbers.extend([top.number] * (used - 1))
                    fields.extend([step.field] * (used - 1))
                    at += used - 1
                candidates = finished.get(step.type, ())
                if type(k) is not int or not 0 <= k < len(candidates):
                    raise fail(f"one of {len(candidates)} finished nodes with a {step.type} output")
                source = candidates[-1 - k]
                matching = self.slots[classes[source], step.type]
                slot = matching[0]
                if len(matching) > 1:
                    at += 1
                    slot = self._slot(tokens, at, matching)
                    numbers.append(top.number)
                    fields.append(step.field)
                top.inputs[step.name] = Link(source, slot)
            elif token == voc.ESCAPE:
                value, used = _unspell(tokens, at)
                top.inputs[step.name] = value
                numbers.extend([top.number] * (used - 1))
                fields.extend([step.field] * (used - 1))
                at += used - 1
            else:
                raise fail(f"a token for an input of type {step.type}")
            top.at += 1
            at += 1
        return Workflow(nodes), numbers, fields

    def _slot(self, tokens: Sequence[int], at: int, matching: tuple[int, ...]) -> int:
        index = tokens[at] - voc.SLOT0 if at < len(tokens) else -1
        if not 0 <= index < len(matching):
            raise CodecError(f"token {at}: expected <slot0> to <slot{len(matching) - 1}>")
        return matching[index]


def types_match(output: str, wanted: str) -> bool:
    """ComfyUI's rule: equal, "*", or overlapping comma-separated sets."""
    if output == wanted or "*" in (output, wanted):
        return True
    if "," in output or "," in wanted:
        return bool(set(output.split(",")) & set(wanted.split(",")))
    return False


def _identity(value: Any) -> tuple[type, Any] | None:
    """A hashable that is equal for equal type and value only; None for lists and objects."""
    if isinstance(value, float):
        return float, value if value else repr(value)
    if isinstance(value, (str, int, bool)) or value is None:
        return type(value), value
    return None


def _text_token(text: str, prompt: str | None, negative: str | None) -> int:
    if text == PROMPT or (prompt is not None and text == prompt):
        return voc.PROMPT_ID
    if text in ("", NEGATIVE) or (negative is not None and text == negative):
        return voc.NEGATIVE_ID
    return voc.TEXT_ID


def _spell(value: Any) -> list[int]:
    try:
        digits = json.dumps(value).encode().hex()
    except (TypeError, ValueError, RecursionError) as error:
        raise WorkflowError(f"value {str(value)[:40]!r}: not JSON: {error}") from error
    return [voc.ESCAPE, *(voc.SPELL0 + int(digit, 16) for digit in digits), voc.ESCAPE]


def _unspell(tokens: Sequence[int], at: int) -> tuple[Any, int]:
    """The value spelled from position `at` (an <esc>) on, and how many tokens it took."""
    stop = at + 1
    while stop < len(tokens) and 0 <= tokens[stop] - voc.SPELL0 < voc.NUM_SPELL:
        stop += 1
    digits = "".join(f"{token - voc.SPELL0:x}" for token in tokens[at + 1 : stop])
    try:
        if stop >= len(tokens) or tokens[stop] != voc.ESCAPE:
            raise ValueError("no closing <esc>")
        return json.loads(bytes.fromhex(digits)), stop + 1 - at
    except (ValueError, RecursionError) as error:
        raise CodecError(f"token {at}: spelled value cannot be read: {error}") from error
