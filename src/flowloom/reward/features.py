"""What the reward sees of a workflow: per node a bag of table rows, and who feeds whom.

A node's rows are one for its class, one for each input, (field, token), where the token of a link
is the class of its source, and one for each input that it feeds. The bag does not depend on how
nodes are named or ordered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowloom.workflow import Catalogue, Codec, Link, Node, Vocabulary, Workflow
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.graph import NEGATIVE, PROMPT
from flowloom.workflow.steps import FILE, LINK, SEED, TEXT, VALUE, Step, identity

UNKNOWN_ROW = 0
BASE_FOLDERS = ("checkpoints", "diffusion_models")
FILE_SPAN, WORD_SPAN = 1 << 32, 1 << 31
"""Facts have keys: a row r has r, a word w has WORD_SPAN + w, and with a file of row f either has
FILE_SPAN * (1 + f) more."""


def word_key(word: Any) -> Any:
    """Key of the fact that the prompt has a word."""
    return WORD_SPAN + word


def fact_key(file_row: Any, key: Any) -> Any:
    """Key of the fact that a file is loaded where another fact holds."""
    return FILE_SPAN * (1 + file_row) + key


@dataclasses.dataclass(frozen=True)
class Features:
    """One workflow. Entries are sorted by node."""

    rows_E: np.ndarray
    """Table row of each entry."""
    nodes_E: np.ndarray
    """Node of each entry, counted from 0."""
    sources_L: np.ndarray
    """Node that each link comes from."""
    targets_L: np.ndarray
    """Node that each link goes to."""
    num_nodes: int
    """Number of nodes."""
    file_rows_F: np.ndarray
    """Rows of the files that it loads, each once."""
    file_shares_F: np.ndarray
    """1 / number of different files in the same input: loading more of them adds up to no more."""
    file_is_base_F: np.ndarray
    """Whether it is a model of its own and not one that changes another: a LoRA, an upscaler."""

    @functools.cached_property
    def facts(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys of its facts that hold for any prompt, and their values.

        Each row once with value 1, and with each file with that file's share.
        """
        rows_U = np.unique(self.rows_E)
        pairs_FU = fact_key(self.file_rows_F[:, None], rows_U)
        shares_FU = np.broadcast_to(self.file_shares_F[:, None], pairs_FU.shape)
        ones_U = np.ones(len(rows_U), np.float32)
        keys = np.concatenate([rows_U, pairs_FU.ravel()])
        return keys, np.concatenate([ones_U, shares_FU.ravel()])


class FeatureTable:
    """Rows by (field, token) and by field fed: a function of catalogue and vocabulary.

    A vocabulary that was extended to new files has the same rows: those of its reserved tokens are
    there from the beginning.
    """

    def __init__(self, catalogue: Catalogue, vocabulary: Vocabulary):
        """Number the rows; 0 is for what has no token, such as a value that is spelled out."""
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.codec = Codec(catalogue, vocabulary)
        self.schema = self.codec.schema
        tokens = vocabulary.tokens
        by_group: dict[str, list[int]] = {}
        for index, token in enumerate(tokens):
            by_group.setdefault(token.group, []).append(index)
        classes = by_group["class"]
        files = sorted(by_group.get("file", []) + by_group.get("reserved", []))
        pairs: list[tuple[int, int]] = [(voc.CLASS_FIELD, token) for token in classes]
        fed: list[int] = []
        for class_type in self.schema.start:
            for step in self.schema.holes(class_type):
                if step.how == LINK:
                    # Any class may be a source: which can, changes with the catalogue.
                    legal = list(classes)
                    fed.append(step.field)
                elif step.how == TEXT:
                    legal = [voc.PROMPT_ID, voc.NEGATIVE_ID, voc.TEXT_ID]
                elif step.how == FILE:
                    # Of every folder: which one a reserved token will serve is not known yet.
                    legal = files
                elif step.how == VALUE:
                    values = by_group.get("value", [])
                    legal = [i for i in values if tokens[i].kind == step.kind]
                else:
                    continue
                pairs += [(step.field, token) for token in (voc.NONE_ID, *legal)]
        self.row_of_pair = {pair: 1 + k for k, pair in enumerate(dict.fromkeys(pairs))}
        first = 1 + len(self.row_of_pair)
        self.row_of_fed = {field: first + k for k, field in enumerate(dict.fromkeys(fed))}
        self.num_rows = first + len(self.row_of_fed)
        self.folder_of_field = {
            step.field: step.kind
            for class_type in self.schema.start
            for step in self.schema.holes(class_type)
            if step.how == FILE
        }
        self.field_of_file_row = {
            row: field
            for (field, _), row in self.row_of_pair.items()
            if field in self.folder_of_field
        }

    def of_tokens(self, tokens: Sequence[int]) -> Features:
        """Features of a workflow's code.

        Raises:
            CodecError: The tokens are no code.
        """
        texts = None if voc.TEXT_ID not in tokens else [""] * len(tokens)
        return self.of_workflow(self.codec.decode(list(tokens), texts))

    def of_workflow(self, workflow: Workflow) -> Features:
        """Features of the nodes that the outputs of a workflow reach."""
        order = workflow.order()
        number = {node_id: k for k, node_id in enumerate(order)}
        bags: list[list[int]] = [[] for _ in order]
        links: list[tuple[int, int]] = []
        for node_id, target in number.items():
            node = workflow.nodes[node_id]
            token = self.vocabulary.class_ids.get(node.class_type, -1)
            bags[target].append(self._row(voc.CLASS_FIELD, token))
            if token < 0:
                continue
            for step in self.schema.active(node.class_type, node.inputs):
                if step.how == SEED:
                    continue
                value = node.inputs.get(step.name)
                if isinstance(value, Link):
                    source = number[value.node]
                    links.append((source, target))
                    bags[source].append(self.row_of_fed.get(step.field, UNKNOWN_ROW))
                bags[target].append(self._row(step.field, self.token_of(step, node, workflow)))
        sizes = [len(bag) for bag in bags]
        ends = np.array(links, np.int64).reshape(-1, 2)
        loaded = sorted({row for bag in bags for row in bag} & self.field_of_file_row.keys())
        alike = Counter(self.field_of_file_row[row] for row in loaded)
        shares = [1 / alike[self.field_of_file_row[row]] for row in loaded]
        return Features(
            rows_E=np.array([row for bag in bags for row in bag], np.int64),
            nodes_E=np.repeat(np.arange(len(order)), sizes),
            sources_L=ends[:, 0],
            targets_L=ends[:, 1],
            num_nodes=len(order),
            file_rows_F=np.array(loaded, np.int64),
            file_shares_F=np.array(shares, np.float32),
            file_is_base_F=np.array([self._is_base(row) for row in loaded], bool),
        )

    def _is_base(self, file_row: int) -> bool:
        return self.folder_of_field[self.field_of_file_row[file_row]] in BASE_FOLDERS

    def heirs(self, older: Vocabulary) -> dict[int, list[int]]:
        """Rows of files that `older` does not know, and the rows they start as the mean of.

        These are the rows, in the same field, of files of the same role and family; where there are
        none, of all files of the folder.
        """
        tokens = self.vocabulary.tokens
        known = [k for k, token in enumerate(older.tokens) if token.group == "file"]
        new = [
            k
            for k, token in enumerate(tokens)
            if token.group == "file" and older.tokens[k].group != "file"
        ]
        result = {}
        for (field, token_id), row in self.row_of_pair.items():
            token = tokens[token_id]
            if token_id not in new or self.folder_of_field.get(field) != token.kind:
                continue
            folder = [k for k in known if tokens[k].kind == token.kind]
            like = [k for k in folder if _class_of(tokens[k]) == _class_of(token)]
            rows = [self.row_of_pair.get((field, k)) for k in like or folder]
            found = [r for r in rows if r is not None]
            if found:
                result[row] = found
        return result

    def _row(self, field: int, token: int) -> int:
        return self.row_of_pair.get((field, token), UNKNOWN_ROW)

    def token_of(self, step: Step, node: Node, workflow: Workflow) -> int:
        """The token that stands for an input; -1 where it has none."""
        if step.name not in node.inputs:
            return voc.NONE_ID
        value: Any = node.inputs[step.name]
        if isinstance(value, Link):
            return self.vocabulary.class_ids.get(workflow.nodes[value.node].class_type, -1)
        if step.how == TEXT:
            return {PROMPT: voc.PROMPT_ID, NEGATIVE: voc.NEGATIVE_ID, "": voc.NEGATIVE_ID}.get(
                value, voc.TEXT_ID
            )
        if step.how == FILE:
            file = self.catalogue.file(step.kind, value)
            key = None if file is None else (file.folder, file.name, file.sha256)
            return -1 if key is None else self.vocabulary.file_ids.get(key, -1)
        key = identity(value)
        return -1 if key is None else self.schema.value_ids.get((step.kind, *key), -1)


def _class_of(token: voc.Token) -> tuple[str, str]:
    return token.role, token.family
