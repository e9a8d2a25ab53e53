"""The shared vocabulary: one token per class, literal value, file, reference and slot.

A function of the node facts, the shipped value grids by input kind, and the file list. Ids are
append-only: a file that comes later takes a reserved row, bound to its sha256 (to its folder and
name where a server tells no hash). Strings that have no token are contents, kept beside the code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from flowloom.workflow.catalogue import DATA, Catalogue, InputSpec
from flowloom.workflow.graph import SEED_INPUTS, json_fault

SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<prompt>", "<negative>", "<text>", "<none>",
    "<esc>", "<num>", "<end>", "<seed>",
)  # fmt: skip
PAD, BOS, EOS, PROMPT_ID, NEGATIVE_ID, TEXT_ID, NONE_ID, ESCAPE, NUMBER, END, SEED_LINK = range(
    len(SPECIALS)
)
NUM_REFS, NUM_SLOTS, NUM_SPELL = 8, 8, 16
REF0 = len(SPECIALS)
SLOT0 = REF0 + NUM_REFS
SPELL0 = SLOT0 + NUM_SLOTS
NUM_RESERVED_FILES = 16
CLASS_FIELD, END_FIELD = 0, 1


class VocabularyError(ValueError):
    """A vocabulary cannot be built, read or extended; the message says what, got, expected."""


@dataclass(frozen=True)
class Token:
    """One row. `group` is special, ref, slot, spell, class, value, file or reserved.

    For a value, `kind` is the input kind and `value` the literal itself. For a file, `kind` is the
    folder, `value` the name and `sha256` what the row is bound to.
    """

    group: str
    text: str
    kind: str = ""
    value: Any = None
    sha256: str = ""
    family: str = ""
    role: str = ""


@lru_cache(maxsize=1)
def rules() -> dict[str, Any]:
    """The shipped rules (`data/grids.json`)."""
    return json.loads((DATA / "grids.json").read_text())


def every_input(inputs: Iterable[InputSpec], prefix: str = "") -> Iterator[tuple[str, InputSpec]]:
    """All inputs with dotted names, those of choices too; ``growing.*`` is each growing one.

    Branches of a choice may share a dotted name, which then comes once for each.
    """
    for spec in inputs:
        name = prefix + spec.name
        if spec.element is not None:
            yield from every_input([replace(spec.element, name="*")], f"{name}.")
            continue
        yield name, spec
        for _, inner in spec.branches:
            yield from every_input(inner, f"{name}.")


@lru_cache(maxsize=1)
def _rules_by_input() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rules by class ("" for any), undotted input ("." for any name that ends so) and type."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for rule in rules()["rules"]:
        names = rule["input"] if isinstance(rule["input"], list) else [rule["input"]]
        for name in names:
            found.setdefault((rule.get("class", ""), name, rule["type"]), rule)
    return found


def rule_for(class_type: str, spec: InputSpec, name: str | None = None) -> dict[str, Any]:
    """The rule of a literal input: its class's own, or the input's.

    Without a shipped one, inputs of one name share a kind (`name` is dotted), and so do booleans.
    """
    short = _undotted(name or spec.name)
    last = "." if short.endswith(".") else short
    by_input = _rules_by_input()
    rule = by_input.get((class_type, last, spec.type)) or by_input.get(("", last, spec.type))
    return rule or {"kind": "boolean" if spec.type == "BOOLEAN" else short}


def _undotted(name: str) -> str:
    """The last part of a dotted name: `method` of ``resize.method``, `images` of ``images.*``."""
    if name.endswith("."):
        return name
    *above, last = name.split(".")
    return above[-1] if last == "*" and above else last


def is_text(spec: InputSpec) -> bool:
    """Whether an input is a text slot (kept beside the tokens)."""
    return spec.type == "STRING" and spec.multiline


def is_seed(spec: InputSpec) -> bool:
    """Whether an input is a seed (kept beside the tokens, and no token at all)."""
    return spec.type == "INT" and spec.name in SEED_INPUTS


def grid(
    class_type: str, spec: InputSpec, families: Iterable[str], name: str | None = None
) -> list[Any]:
    """Values of one literal input that have a token, as the types they have in API JSON.

    A family has its own grid or the default one; the default one goes with the schema's default.
    """
    if spec.type == "BOOLEAN":
        return [True, False]
    if spec.options is not None:
        return [[option] for option in spec.options] if spec.multiselect else list(spec.options)
    rule = rule_for(class_type, spec, name)
    grids = rules()["grids"].get(rule["kind"], {"default": []})
    chosen = dict.fromkeys(f if f in grids else "default" for f in families) or ["default"]
    kept = rule.get("only", {})
    values = [v for entry in chosen for v in grids[entry] if v in kept.get(entry, grids[entry])]
    if "default" in chosen and spec.default is not None:
        values.append(spec.default)
    if spec.type in ("INT", "FLOAT"):
        cast = int if spec.type == "INT" else float
        numbers = [v for v in values if _is_number(v) and in_range(spec, v)]
        return list(dict.fromkeys(cast(v) for v in numbers if cast(v) == v))
    return list({value_key("", v): v for v in values}.values())


def _is_number(value: Any) -> bool:
    """Whether a default is a number at all; packs of nodes give strings and worse."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def in_range(spec: InputSpec, value: float) -> bool:
    """Whether a number lies within an input's bounds (both inclusive)."""
    low = spec.min is None or value >= spec.min
    return low and (spec.max is None or value <= spec.max)


def value_key(kind: str, value: Any) -> str:
    """Key of a literal by kind, type and value: 1, 1.0 and true differ."""
    return f"{kind}={json.dumps(value, sort_keys=True)}"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and the fields (class, input) that tokens fill.

    Field 0 is ("*", "class"), which class a node has; field 1 is ("*", "end"), the end of the code.
    """

    tokens: tuple[Token, ...]
    fields: tuple[tuple[str, str], ...]
    catalogue_hash: str = ""

    @staticmethod
    def build(catalogue: Catalogue, reserved: int = NUM_RESERVED_FILES) -> Vocabulary:
        """The vocabulary of a catalogue, with `reserved` rows for files yet to come."""
        tokens = [Token("special", text) for text in SPECIALS]
        tokens += [Token("ref", f"<ref{k}>", value=k) for k in range(NUM_REFS)]
        tokens += [Token("slot", f"<slot{k}>", value=k) for k in range(NUM_SLOTS)]
        tokens += [Token("spell", f"<x{k:x}>", value=k) for k in range(NUM_SPELL)]
        tokens += [Token("class", c, value=c) for c in catalogue.nodes]
        fields = {("*", "class"): None, ("*", "end"): None}
        values: dict[str, Token] = {}
        families = catalogue.families
        for class_type, node in catalogue.nodes.items():
            for name, spec in every_input(node.inputs):
                fields[class_type, name] = None
                if spec.is_link or is_text(spec) or is_seed(spec) or spec.folder is not None:
                    continue
                kind = rule_for(class_type, spec, name)["kind"]
                for value in grid(class_type, spec, families, name):
                    key = value_key(kind, value)
                    text = f"{kind}={value}" if isinstance(value, str) else key
                    values.setdefault(key, Token("value", text, kind, value))
        by_kind: dict[str, list[Token]] = {}
        for token in values.values():
            by_kind.setdefault(token.kind, []).append(token)
        tokens += [token for group in by_kind.values() for token in _ascending(group)]
        tokens += [_file_token(file) for file in catalogue.files]
        tokens += [Token("reserved", f"<file+{k}>", value=k) for k in range(reserved)]
        return Vocabulary(tuple(tokens), tuple(fields), catalogue.hash)

    def extend(self, catalogue: Catalogue) -> Vocabulary:
        """The vocabulary after files came: each new sha256 takes the next reserved row.

        Rows of files that went away stay bound, so no id ever changes its meaning.

        Raises:
            VocabularyError: more files came than rows are reserved.
        """
        bound = {(t.kind, t.value, t.sha256) for t in self.tokens if t.group == "file"}
        coming = [f for f in catalogue.files if (f.folder, f.name, f.sha256) not in bound]
        free = [i for i, token in enumerate(self.tokens) if token.group == "reserved"]
        if len(coming) > len(free):
            raise VocabularyError(
                f"vocabulary: {len(coming)} new files, but only {len(free)} reserved rows are left"
            )
        tokens = list(self.tokens)
        for row, file in zip(free, coming, strict=False):
            tokens[row] = _file_token(file)
        return replace(self, tokens=tuple(tokens), catalogue_hash=catalogue.hash)

    @property
    def size(self) -> int:
        """Number of rows V."""
        return len(self.tokens)

    def token_text(self, token_id: int) -> str:
        """The token as a person reads it."""
        return self.tokens[token_id].text

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of rows and fields."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def field_index(self) -> dict[tuple[str, str], int]:
        """Field indices by (class, input)."""
        return {pair: index for index, pair in enumerate(self.fields)}

    @cached_property
    def class_ids(self) -> dict[str, int]:
        """Token ids by class."""
        return {t.value: i for i, t in enumerate(self.tokens) if t.group == "class"}

    @cached_property
    def value_ids(self) -> dict[str, int]:
        """Token ids by `value_key`."""
        found = ((t, i) for i, t in enumerate(self.tokens) if t.group == "value")
        return {value_key(t.kind, t.value): i for t, i in found}

    @cached_property
    def file_ids(self) -> dict[tuple[str, str, str], int]:
        """Token ids by (folder, name, sha256)."""
        found = ((t, i) for i, t in enumerate(self.tokens) if t.group == "file")
        return {(t.kind, t.value, t.sha256): i for t, i in found}

    def to_json(self) -> dict[str, Any]:
        """Plain data; token fields equal to their default are left out."""
        blank = asdict(Token("", ""))
        rows = [
            {k: v for k, v in vars(t).items() if k in ("group", "text") or v != blank[k]}
            for t in self.tokens
        ]
        return {
            "tokens": rows,
            "fields": [list(pair) for pair in self.fields],
            "catalogue_hash": self.catalogue_hash,
        }

    @staticmethod
    def from_json(data: Any) -> Vocabulary:
        """Inverse of `to_json`.

        Raises:
            VocabularyError: `data` is not a saved vocabulary.
        """
        try:
            fault = json_fault(data)
            if fault:
                raise ValueError(fault)
            tokens = tuple(Token(**row) for row in data["tokens"])
            fields = tuple((str(c), str(i)) for c, i in data["fields"])
            return Vocabulary(tokens, fields, data.get("catalogue_hash", ""))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise VocabularyError(
                f"vocabulary: got {type(error).__name__} {str(error)[:200]}, "
                "expected tokens and fields"
            ) from error


def _file_token(file: Any) -> Token:
    text = f"{file.folder}/{file.name}"
    return Token("file", text, file.folder, file.name, file.sha256, file.family, file.role)


def _ascending(tokens: list[Token]) -> list[Token]:
    if all(isinstance(t.value, (int, float)) and not isinstance(t.value, bool) for t in tokens):
        return sorted(tokens, key=lambda token: token.value)
    return tokens
