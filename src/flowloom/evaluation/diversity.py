"""How different workflows are: near-equal ones counted once, and likeness to what was known.

Shapes: D designs, K known workflows, F facts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flowloom.workflow import Workflow
from flowloom.workflow.graph import Link, Node

COLLAPSE_RATIO = 1.5
"""Width of a bin of numbers that count as equal: cfg 2 and 2.5, or 6 and 8 steps with 16 and 20
apart from both."""
_UNIT_BIN = 1000
"""Bin of the number 1, far enough from 0 that tiny numbers keep their sign."""
_IRRELEVANT = ("filename_prefix",)
"""Inputs that change no picture."""
_BLOCK = 256
"""Designs compared with all known workflows at once."""


def collapsed_fingerprint(workflow: Workflow) -> str:
    """Template fingerprint with every number rounded to a coarse logarithmic grid.

    Steps, cfg, denoise, strengths, amounts of sharpening, scale factors and sizes v become
    round(log(|v|) / log(COLLAPSE_RATIO)) with their sign; 0 stays. Classes, links, files and
    options count as they are. `dataset.near_duplicates` joins neighbours of a vocabulary's grid
    instead, and so never numbers off the grid.
    """
    nodes = {
        node_id: Node(
            node.class_type,
            {
                name: "" if name in _IRRELEVANT and isinstance(value, str) else _binned(value)
                for name, value in node.inputs.items()
            },
        )
        for node_id, node in workflow.nodes.items()
    }
    return Workflow(nodes).template_fingerprint()


def _binned(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0:
        # 0 and 0.0 are one number here.
        return 0 if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    k = round(math.log(abs(value)) / math.log(COLLAPSE_RATIO))
    return int(math.copysign(_UNIT_BIN + k, value))


def facts(workflow: Workflow) -> list[tuple]:
    """What a workflow says, one (class, input, value, count) per input that its outputs reach.

    The value of a link is the class and slot that it comes from. `count` numbers equal facts, so
    that two samplers of the same steps are two facts.
    """
    seen: Counter[tuple] = Counter()
    found = []
    for node_id in workflow.order():
        node = workflow.nodes[node_id]
        for name, value in node.inputs.items():
            said = repr(value)
            if type(value) is Link and value.node in workflow.nodes:
                said = f"{workflow.nodes[value.node].class_type} {value.slot}"
            fact = (node.class_type, name, said)
            found.append((*fact, seen[fact]))
            seen[fact] += 1
    return found


class Known:
    """Workflows that designs are compared with."""

    def __init__(self, workflows: Iterable[Workflow]):
        """Take them; equal ones are kept once."""
        distinct = {workflow.template_fingerprint(): workflow for workflow in workflows}
        if not distinct:
            raise ValueError("similarity: got no known workflow, expected at least one")
        rows = [facts(workflow) for workflow in distinct.values()]
        self._column = {fact: k for k, fact in enumerate(dict.fromkeys(f for r in rows for f in r))}
        self._sizes_K = np.array([len(row) for row in rows], np.float32)
        self._has_FK = self._matrix(rows).T.copy()

    def __len__(self) -> int:
        return len(self._sizes_K)

    def nearest(self, workflows: Sequence[Workflow]) -> np.ndarray:
        """Similarity of each workflow to the most similar known one, `[D]` in [0, 1].

        The share of facts that agree, 2 |A and B| / (|A| + |B|) (Dice): 1 for a workflow that is
        known. Of a plain text-to-image workflow one other step count costs about 1/20.
        """
        rows = [facts(workflow) for workflow in workflows]
        best = np.zeros(len(rows), np.float32)
        for first in range(0, len(rows), _BLOCK):
            part = rows[first : first + _BLOCK]
            both_DK = self._matrix(part) @ self._has_FK
            sizes_D1 = np.array([[len(row)] for row in part], np.float32)
            best[first : first + _BLOCK] = (2 * both_DK / (sizes_D1 + self._sizes_K)).max(1)
        return best.astype(float)

    def _matrix(self, rows: Sequence[Sequence[tuple]]) -> np.ndarray:
        """Which facts each row has, of those that are known; float32 `[D, F]`."""
        matrix = np.zeros((len(rows), len(self._column)), np.float32)
        for number, row in enumerate(rows):
            columns = [self._column[fact] for fact in row if fact in self._column]
            matrix[number, columns] = 1.0
        return matrix


def distinct(workflows: Sequence[Workflow]) -> dict[str, int]:
    """Of `n` workflows how many differ: `raw` by fingerprint, `collapsed` without near-equal ones.

    Fingerprints are those of templates.
    """
    by_fingerprint = {workflow.template_fingerprint(): workflow for workflow in workflows}
    collapsed = {collapsed_fingerprint(workflow) for workflow in by_fingerprint.values()}
    return {"n": len(workflows), "raw": len(by_fingerprint), "collapsed": len(collapsed)}
