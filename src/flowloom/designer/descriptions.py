"""What workflow tokens mean, in words: where a language model's rows for them start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from flowloom.workflow import Catalogue, Vocabulary
from flowloom.workflow.vocabulary import Token

START = "start of the workflow"
_SPECIALS = {
    "<pad>": "nothing",
    "<bos>": START,
    "<eos>": "end of the workflow",
    "<prompt>": "the prompt text",
    "<negative>": "the negative prompt text",
    "<text>": "another text",
    "<none>": "no input",
    "<esc>": "a spelled out value",
    "<num>": "a spelled out number",
    "<end>": "end of the value",
    "<seed>": "the random seed",
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+(?:\.\d+)?")


def describe(vocabulary: Vocabulary, catalogue: Catalogue) -> tuple[str, ...]:
    """One line of words per token.

    Args:
        vocabulary: The tokens.
        catalogue: Where the cards of files are; a file it lacks is described by its name.
    """
    cards = {(file.folder, file.name, file.sha256): file.card for file in catalogue.files}
    return tuple(
        _describe(token, cards.get((token.kind, token.value, token.sha256), ""))
        for token in vocabulary.tokens
    )


def _describe(token: Token, card: str) -> str:
    if token.group == "class":
        return _joined("node", _words(token.value))
    if token.group == "file":
        stem = _words(PurePosixPath(str(token.value)).stem)
        return _joined(token.family, token.role, card, stem)
    if token.group == "value":
        return _joined(_words(token.kind), _value(token.value))
    if token.group == "ref":
        return f"result of earlier node {token.value + 1}"
    if token.group == "slot":
        return f"output {token.value + 1} of the node"
    if token.group == "spell":
        return f"digit {token.value:x}"
    if token.group == "reserved":
        return "a model file"
    return _SPECIALS[token.text]


def _words(name: Any) -> str:
    """A name as words: CheckpointLoaderSimple is Checkpoint Loader Simple, sampler_name two."""
    return " ".join(_WORD.findall(str(name))) or str(name)


def _value(value: Any) -> str:
    """A literal as a person would say it; a name keeps its parts."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return _words(value) if isinstance(value, str) else str(value)


def _joined(*parts: str) -> str:
    return " ".join(_unrepeated(" ".join(part for part in parts if part).split()))


def _unrepeated(words: Sequence[str]) -> list[str]:
    """Words without one that repeats the word before it."""
    return [w for i, w in enumerate(words) if i == 0 or w.lower() != words[i - 1].lower()]
