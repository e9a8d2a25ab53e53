"""Sorts workflows so that those whose samplers are equal, or can share a batch, lie together."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from flowloom.render.sampler_nodes import SAMPLER_CLASSES
from flowloom.workflow import Link, Workflow

_FILES = ("ckpt_name", "lora_name")
_SIZES = ("width", "height", "scale_by")


def batch_key(workflow: Workflow) -> tuple[str, ...]:
    """Sort key of a workflow, filled or not: what its samplers need, and no node behind them.

    In turn: model files and what is done to them, sizes, samplers and steps, and a digest of all
    that leads to the samplers, texts and seeds included. So jobs that differ in what happens to the
    finished picture have equal keys.
    """
    order = workflow.order()
    needed = _needed(workflow, order)
    digests: dict[str, str] = {}
    files: list[Any] = []
    samplers: list[Any] = []
    lengths: list[Any] = []
    picture_sizes: list[Any] = []
    for node_id in order:
        if node_id not in needed:
            continue
        node = workflow.nodes[node_id]
        row: list[Any] = [node.class_type]
        for name in sorted(node.inputs):
            value = node.inputs[name]
            if type(value) is Link:
                value = [digests.get(value.node, ""), value.slot]
            row.append([name, value])
        digests[node_id] = hashlib.sha256(json.dumps(row).encode()).hexdigest()
        inputs = node.inputs
        if any(name in inputs for name in _FILES) or node.class_type == "ModelMergeSimple":
            files.append([value for value in inputs.values() if type(value) is not Link])
        if "sampler_name" in inputs:
            samplers.append(inputs["sampler_name"])
        if "steps" in inputs:
            lengths.append(inputs["steps"])
        picture_sizes += [inputs[name] for name in _SIZES if name in inputs]
    ends = [digests[node_id] for node_id in order if node_id in digests]
    parts = (files, picture_sizes, samplers, lengths)
    return (*(json.dumps(part) for part in parts), "".join(ends[-1:]))


def _needed(workflow: Workflow, order: list[str]) -> set[str]:
    """Samplers and all that they read, directly or not."""
    needed: set[str] = set()
    for node_id in reversed(order):
        node = workflow.nodes[node_id]
        if node_id in needed or node.class_type in SAMPLER_CLASSES:
            needed.add(node_id)
            needed.update(v.node for v in node.inputs.values() if type(v) is Link)
    return needed
