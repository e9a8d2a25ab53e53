"""Pins: prior weights act; base workflows, variations, wild ones and edits are as they say."""

import numpy as np
import pytest

from flowloom.dataset.config import PanelConfig, PriorConfig
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
from flowloom.workflow import Catalogue
from flowloom.workflow.validation import is_valid
from tests.render.tiny import write_world


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return Catalogue.load(write_world(tmp_path_factory.mktemp("world")) / "catalogue.json.gz")


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
    grammar = make_grammar(catalogue, PriorConfig().budget)
    flow = base_workflow(catalogue, "a.safetensors", 8, 2.5)
    flows = edited([flow] * 40, grammar, np.random.default_rng(0), twice_frac=0.5)
    assert all(is_valid(other, catalogue) for other in flows)
    changed = [w.template_fingerprint() != flow.template_fingerprint() for w in flows]
    assert sum(changed) >= 36  # two edits can undo each other
