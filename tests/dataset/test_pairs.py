"""Pins: pairs are valid, different, of train meanings and have their template's fingerprint; equal
configurations give equal bytes; prior weights, base workflows and edits are as they say."""

import json
from collections import Counter

import pytest

from flowloom.dataset.config import BuildPairsConfig, PanelConfig, PriorConfig, PromptsConfig
from flowloom.dataset.pairs import build_pairs
from flowloom.dataset.prompts import split_of
from flowloom.dataset.tables import read_table
from flowloom.dataset.workflows import (
    base_workflow,
    draw_wild_workflows,
    draw_workflows,
    edited,
    make_grammar,
    panel_workflows,
    variations,
    writable,
)
from flowloom.runs import Run
from flowloom.shapes.prompts import parse
from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.validation import is_valid
from tests.render.tiny import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def catalogue(world):
    return Catalogue.load(world / "catalogue.json.gz")


def build(world, folder, **changes):
    config = BuildPairsConfig(prompts=PromptsConfig(num_train=40), num_pairs=200, **changes)
    run = Run("build_pairs", folder)
    run.begin()
    metrics = build_pairs(config, run, catalogue=world)
    return (run.out / "pairs.parquet"), metrics


def test_pairs_are_valid_different_and_of_train_meanings(world, catalogue, tmp_path):
    path, metrics = build(world, tmp_path / "one")
    rows = read_table(path)
    assert metrics["pairs/num"] == len(rows["prompt"]) == 200
    pairs = set(zip(rows["prompt"], rows["fingerprint"], strict=True))
    assert len(pairs) == 200
    assert set(Counter(rows["prompt"]).values()) == {5}
    for prompt, kind, text, fingerprint in zip(
        rows["prompt"], rows["kind"], rows["workflow"], rows["fingerprint"], strict=True
    ):
        spec = parse(prompt)
        assert (spec.kind, split_of(spec)) == (kind, "train")
        workflow = Workflow.from_api(json.loads(text))
        assert is_valid(workflow, catalogue)
        assert workflow.template_fingerprint() == fingerprint
        assert "{prompt}" in text


def test_equal_configurations_give_equal_bytes(world, tmp_path):
    first, _ = build(world, tmp_path / "one")
    second, _ = build(world, tmp_path / "two")
    other, _ = build(world, tmp_path / "three", seed=1)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_prior_weights_act(catalogue):
    prior = PriorConfig(steps=(4, 8, 6, 12, 16, 20), steps_weights=(1, 1, *[1e-6] * 4))
    grammar = make_grammar(catalogue, prior.budget)
    flows = draw_workflows(grammar, prior, 100, 0)
    samplers = [n for w in flows for n in w.nodes.values() if n.class_type == "KSampler"]
    assert {node.inputs["steps"] for node in samplers} == {4, 8}
    euler = sum(node.inputs["sampler_name"] == "euler" for node in samplers)
    assert 0.6 < euler / len(samplers) < 0.95
    with pytest.raises(ValueError, match=r"steps_weights: got .* expected 6 weights"):
        PriorConfig(steps_weights=(1.0,))


def test_wild_workflows_are_valid_and_more_various(catalogue):
    prior = PriorConfig()
    grammar = make_grammar(catalogue, prior.budget)
    tame, wild = (draw(grammar, prior, 100, 0) for draw in (draw_workflows, draw_wild_workflows))
    assert all(is_valid(flow, catalogue) for flow in wild)
    one_sampler = [
        sum(
            [n.class_type for n in flow.nodes.values()].count("KSampler") == 1
            and "EmptyLatentImage" in [n.class_type for n in flow.nodes.values()]
            for flow in flows
        )
        for flows in (tame, wild)
    ]
    assert one_sampler[0] > one_sampler[1] + 15


def test_base_workflows_and_their_variations_are_writable(catalogue):
    grammar = make_grammar(catalogue, PriorConfig().budget)
    flows = panel_workflows(catalogue, PanelConfig())
    assert len(flows) == 2 * 3 + 2
    assert len(writable(flows, grammar)) == len(flows)
    varied = variations(base_workflow(catalogue, "a.safetensors", 8, 3.0), grammar)
    fingerprints = {flow.template_fingerprint() for flow in varied}
    assert len(fingerprints) == len(varied) >= 9
    assert all(is_valid(flow, catalogue) for flow in varied)


def test_edits_change_and_stay_valid(catalogue):
    import numpy as np

    grammar = make_grammar(catalogue, PriorConfig().budget)
    flow = base_workflow(catalogue, "a.safetensors", 8, 2.5)
    flows = edited([flow] * 40, grammar, np.random.default_rng(0), twice_frac=0.5)
    assert all(is_valid(other, catalogue) for other in flows)
    changed = [w.template_fingerprint() != flow.template_fingerprint() for w in flows]
    assert sum(changed) >= 36  # two edits can undo each other
