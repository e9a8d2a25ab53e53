"""Facts: whatever comes in through a public door, it answers or raises its own kind of error, on
one line, in bounded time and memory: damaged flows, canvases, tokens, files, catalogues and
megabytes of text (`benchmarks/hostile.py` does the same a million times)."""

from __future__ import annotations

import contextlib
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.garbage.doors import DOORS, world
from benchmarks.garbage.giants import giants
from benchmarks.garbage.mutators import JUNK, damaged, nested, relinked
from benchmarks.hostile import measure
from flowloom.workflow import (
    Catalogue,
    CatalogueError,
    Vocabulary,
    VocabularyError,
    Workflow,
    WorkflowError,
    validate,
)
from flowloom.workflow.canvas import CanvasError, from_ui
from flowloom.workflow.graph import MAX_BITS, MAX_DEPTH
from flowloom.workflow.png import PngError, read_chunks
from tests.workflow.flows import PLAIN, plain_api

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("door", DOORS)
def test_damaged_input(door):
    result = measure(400, seed=1, doors=[door])
    assert result["doors"][door]["failures"] == []
    assert result["failed"] == 0
    assert result["inputs"] == 400


def test_giants():
    """Megabytes of text, names, inputs, outputs, nodes and depth, each in under 5 CPU seconds."""
    for call in giants(2):
        start = time.process_time()
        with contextlib.suppress(call.errors):
            call.run()
        assert time.process_time() - start < 5.0, call.name


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_any_json_is_answered(embedded, value):
    validate(value, embedded)
    for read, error in [
        (Workflow.from_api, WorkflowError),
        (Catalogue.from_json, CatalogueError),
        (Catalogue.from_object_info, CatalogueError),
        (Vocabulary.from_json, VocabularyError),
        (lambda data: from_ui(data, embedded), CanvasError),
    ]:
        try:
            read(value)
        except error as caught:
            assert "\n" not in str(caught)  # noqa: PT017 - either is an answer


@given(st.binary(max_size=80), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_answered(data, is_png):
    try:
        read_chunks(b"\x89PNG\r\n\x1a\n" * is_png + data)
    except PngError as caught:
        assert "\n" not in str(caught)  # noqa: PT017 - either is an answer


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (nested(MAX_DEPTH), True),
        (nested(MAX_DEPTH + 1), False),
        ([nested(MAX_DEPTH)], False),
        (2**MAX_BITS - 1, True),
        (2**MAX_BITS, False),
        ([1, 2, {"a": 2**MAX_BITS}], False),
        ({"a": {1: 2}}, False),
        ([1, b"x", 3], False),
        (["3", 2**64 - 1], True),
        (["3", 2**64], False),
    ],
)
def test_literals_that_can_be_written_again(value, fits):
    if not fits:
        with pytest.raises(WorkflowError, match=r"node '6', input 'text'"):
            Workflow.from_api(plain_api(n6_text=value))
        return
    workflow = Workflow.from_api(plain_api(n6_text=value))
    again = Workflow.from_api(json.loads(json.dumps(workflow.to_api())))
    assert again.fingerprint() == workflow.fingerprint()


def test_many_outputs_of_one_long_chain():
    """1,500 outputs of 1,500 nodes: identity does not walk the chain from each of them."""
    nodes = {"0": {"class_type": "Make", "inputs": {}}}
    for k in range(1500):
        nodes[f"{k + 1}"] = {"class_type": "Blur", "inputs": {"image": [f"{k}", 0]}}
    for k in range(1500):
        nodes[f"s{k}"] = {"class_type": "SaveImage", "inputs": {"images": ["1500", 0], "a": k}}
    start = time.process_time()
    workflow = Workflow.from_api(nodes)
    other = Workflow.from_api({**nodes, "s7": nodes["s8"]})
    assert workflow.fingerprint() != other.fingerprint()
    assert workflow.fingerprint() == Workflow(dict(reversed(workflow.nodes.items()))).fingerprint()
    assert time.process_time() - start < 3.0


def test_values_in_each_other_many_times_over():
    """A list of two equal lists, 60 deep, takes no memory but would be 2^60 values."""
    value = [1]
    for _ in range(60):
        value = [value, value, 1]
    with pytest.raises(WorkflowError, match="more than 1000000 values"):
        Workflow.from_api(plain_api(n6_text=value))
    loop = []
    loop.append(loop)
    with pytest.raises(WorkflowError, match="64 deep"):
        Workflow.from_api(plain_api(n6_text=loop))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"nodes": {"A": {"inputs": [{"name": 5, "type": "INT"}], "outputs": []}}}, "name, type"),
        ({"nodes": {"A": {"inputs": [], "outputs": [None]}}}, "output"),
        (
            {"nodes": {"A": {"inputs": [{"name": "a", "type": "INT", "min": "0"}], "outputs": []}}},
            "input 'a': min is no number",
        ),
        (
            {
                "nodes": {
                    "A": {"inputs": [{"name": "a", "type": "INT", "required": 9}], "outputs": []}
                }
            },
            "input 'a': required is no boolean",
        ),
        ({"nodes": {"A": {"inputs": [], "outputs": [], "deprecated": 1 << 40}}}, "deprecated"),
        ({"nodes": {}, "limits": {"pixels": "many"}}, "pixels"),
        ({"nodes": {}, "limits": {"batch": -1}}, "batch"),
        ({"nodes": {}, "files": [{"folder": 1, "name": "", "sha256": "", "family": ""}]}, "file"),
    ],
)
def test_catalogues_are_checked_when_they_are_read(facts, message):
    with pytest.raises(CatalogueError, match=message):
        Catalogue.from_json({"files": [], **facts})


def test_a_server_may_tell_nonsense_of_bounds():
    """What is no number bounds nothing; a growing input of a billion is refused."""
    entry = ["INT", {"min": "low", "max": [1], "step": float("nan"), "default": 5}]
    info = {"A": {"input": {"required": {"a": entry}}, "output": [], "output_node": True}}
    catalogue = Catalogue.from_object_info(info)
    assert validate({"1": {"class_type": "A", "inputs": {"a": -(10**9)}}}, catalogue) == []
    template = {"input": {"required": {"x": ["IMAGE", {}]}}, "prefix": "x", "max": 10**9}
    info["A"]["input"]["required"]["a"] = ["COMFY_AUTOGROW_V3", {"template": template}]
    with pytest.raises(CatalogueError, match="expected at most 1000"):
        Catalogue.from_object_info(info)


def test_mutators_leave_their_input_alone_and_depend_on_the_seed_alone():
    before = json.dumps(PLAIN)
    drawn = [
        repr([damaged(PLAIN, rng, 3), relinked(PLAIN, rng)])[:2000]
        for rng in (random.Random(k) for k in (1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert json.dumps(PLAIN) == before
    assert len(JUNK) > 40
    assert len(world().flows) > 100
