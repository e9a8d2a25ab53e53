"""Pins: who is held out never changes with run, machine or data; shares are as asked."""

import hashlib

import pytest

from flowloom.dataset.splits import (
    PAIR_SPLITS,
    WORKFLOW_FRAC,
    bucket,
    is_held_out_workflow,
    pair_split,
)

PRINTS = [hashlib.sha256(str(k).encode()).hexdigest() for k in range(4000)]


def test_a_share_of_workflows_is_held_out_for_good():
    held_out = [k for k, text in enumerate(PRINTS) if is_held_out_workflow(text)]
    # Standard deviation of the share: sqrt(.05 * .95 / 4000) = .0034.
    assert len(held_out) / 4000 == pytest.approx(WORKFLOW_FRAC, abs=0.011)
    assert held_out[:4] == [0, 14, 24, 97]  # as on every machine
    other = [k for k, text in enumerate(PRINTS) if is_held_out_workflow(text, seed=1)]
    assert len(set(held_out) & set(other)) < 30


def test_buckets_are_even_and_differ_by_purpose():
    values = [bucket("a", text, 0) for text in PRINTS]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert sum(values) / 4000 == pytest.approx(0.5, abs=0.02)
    assert bucket("a", "x", 0) != bucket("b", "x", 0) != bucket("b", "x", 1)


def test_names():
    found = [
        pair_split(prompt_held_out=prompt, workflow_held_out=workflow)
        for workflow in (False, True)
        for prompt in (False, True)
    ]
    assert found == ["train", "held_out_prompt", "held_out_workflow", "held_out_both"]
    assert tuple(found) == PAIR_SPLITS
