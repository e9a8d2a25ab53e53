"""What is held out: prompts by what they mean, workflows by their template's fingerprint.

Both are decided by a seeded hash of the thing alone, so two runs, machines or datasets never
disagree on where a prompt or a workflow belongs.
"""

from __future__ import annotations

import hashlib

from flowloom.shapes.prompts import SPLIT_SEED

TRAIN = "train"
HELD_OUT_PROMPT = "held_out_prompt"
HELD_OUT_WORKFLOW = "held_out_workflow"
HELD_OUT_BOTH = "held_out_both"
PAIR_SPLITS = (TRAIN, HELD_OUT_PROMPT, HELD_OUT_WORKFLOW, HELD_OUT_BOTH)
WORKFLOW_FRAC = 0.05


def bucket(name: str, key: str, seed: int) -> float:
    """A number in [0, 1) that `key` has for the purpose `name`; even over keys."""
    digest = hashlib.sha256(f"{name}/{seed}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # a float holds 53 bits


def is_held_out_workflow(
    fingerprint: str, seed: int = SPLIT_SEED, frac: float = WORKFLOW_FRAC
) -> bool:
    """Whether a workflow, by its template fingerprint, is never trained on."""
    return bucket("workflow", fingerprint, seed) < frac


def pair_split(*, prompt_held_out: bool, workflow_held_out: bool) -> str:
    """The one of `PAIR_SPLITS` that a pair of such a prompt and workflow is in."""
    return PAIR_SPLITS[prompt_held_out + 2 * workflow_held_out]
