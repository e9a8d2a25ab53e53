"""Facts: a fingerprint ignores ids, key order and unreachable nodes, but no type, value or sharing;
a template and all that is filled from it are one cell; seeds are seed + k in order of running."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowloom.workflow import Link, Node, Workflow, WorkflowError
from tests.workflow.flows import PLAIN, plain, plain_api, two_pass


def renamed(workflow: Workflow, seed: int) -> Workflow:
    """The same graph with other ids, another node order and other key orders."""
    rng = random.Random(seed)
    ids = {old: f"x{rng.randrange(10**9)}" for old in workflow.nodes}
    nodes = list(workflow.nodes.items())
    rng.shuffle(nodes)
    out = {}
    for old, node in nodes:
        items = list(node.inputs.items())
        rng.shuffle(items)
        out[ids[old]] = Node(
            node.class_type,
            {k: Link(ids[v.node], v.slot) if type(v) is Link else v for k, v in items},
        )
    return Workflow(out)


@given(st.integers(0, 10**6))
def test_ids_and_orders_do_not_matter(seed):
    workflow = two_pass()
    other = renamed(workflow, seed)
    assert other.fingerprint() == workflow.fingerprint()
    assert other.template_fingerprint() == workflow.template_fingerprint()
    assert other.canonical().to_api() == workflow.canonical().to_api()
    filled, other_filled = workflow.fill("a", seed=5), other.fill("a", seed=5)
    assert filled.fingerprint() == other_filled.fingerprint()


def test_two_outputs_do_not_depend_on_ids():
    api = plain_api()
    api["20"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["8", 0], "filename_prefix": "second"},
    }
    workflow = Workflow.from_api(api)
    for seed in range(20):
        other = renamed(workflow, seed)
        assert other.fingerprint() == workflow.fingerprint()
        assert other.canonical().to_api() == workflow.canonical().to_api()
    assert workflow.fingerprint() != plain().fingerprint()


@pytest.mark.parametrize("value", [2, 2.5000001, "2.5", True, None, -2.5])
def test_a_literal_counts_by_type_and_value(value):
    assert plain(n3_cfg=2.5).fingerprint() == plain().fingerprint()
    api = plain_api()
    api["3"]["inputs"]["cfg"] = value
    assert Workflow.from_api(api).fingerprint() != plain().fingerprint()


def test_int_float_and_bool_are_three_values():
    prints = {plain(n3_steps=value).fingerprint() for value in (1, 1.0, True, "1", 0.0, -0.0)}
    assert len(prints) == 6


def test_unreachable_nodes_do_not_count():
    api = plain_api()
    api["99"] = copy.deepcopy(PLAIN["6"])
    workflow = Workflow.from_api(api)
    assert workflow.fingerprint() == plain().fingerprint()
    assert len(workflow.canonical().nodes) == 7


def test_sharing_counts():
    api = plain_api()
    api["40"] = copy.deepcopy(PLAIN["4"])
    api["8"]["inputs"]["vae"] = ["40", 2]
    assert Workflow.from_api(api).fingerprint() != plain().fingerprint()


def test_the_target_of_a_link_counts():
    """Two equal loaders, one for each text: which of them gives the VAE tells two graphs apart."""
    api = plain_api(n7_clip=["40", 1])
    api["40"] = copy.deepcopy(PLAIN["4"])
    other = copy.deepcopy(api)
    other["8"]["inputs"]["vae"] = ["40", 2]
    assert Workflow.from_api(api).fingerprint() != Workflow.from_api(other).fingerprint()


def test_a_cell_of_two_outputs_has_one_id():
    api = plain_api()
    for old, new in (("9", "20"), ("8", "80"), ("3", "30")):
        api[new] = copy.deepcopy(PLAIN[old])
    api["20"]["inputs"]["images"], api["80"]["inputs"]["samples"] = ["80", 0], ["30", 0]
    api["30"]["inputs"]["steps"] = 20
    template = Workflow.from_api(api)
    cells = {template.fill("x", seed=k).template_fingerprint() for k in range(20)}
    assert cells == {template.template_fingerprint()}


def test_shared_between_outputs_differs_from_copied():
    """Two outputs of one sampler are one picture; of two samplers, two after filling."""
    api = plain_api()
    api["20"] = copy.deepcopy(PLAIN["9"])
    shared = Workflow.from_api(api)
    api["30"], api["80"] = copy.deepcopy(PLAIN["3"]), copy.deepcopy(PLAIN["8"])
    api["80"]["inputs"]["samples"], api["20"]["inputs"]["images"] = ["30", 0], ["80", 0]
    copied = Workflow.from_api(api)
    assert shared.template_fingerprint() != copied.template_fingerprint()


def test_without_an_output_class_sinks_are_roots():
    api = {k: v for k, v in PLAIN.items() if k != "9"}
    assert Workflow.from_api(api).roots() == ["8"]


def test_order_is_sources_first():
    order = plain().order()
    assert sorted(order) == sorted(PLAIN)
    place = {node_id: k for k, node_id in enumerate(order)}
    for node_id, node in plain().nodes.items():
        for value in node.inputs.values():
            if type(value) is Link:
                assert place[value.node] < place[node_id]


def test_fill_offsets_seeds_in_order_of_running():
    filled = two_pass().fill("a red circle", "blurry", seed=100)
    assert filled.nodes["3"].inputs["seed"] == 100  # the first pass
    assert filled.nodes["12"].inputs["seed"] == 101
    assert filled.nodes["6"].inputs["text"] == "a red circle"
    assert filled.nodes["7"].inputs["text"] == "blurry"
    # A second pass leaves the first pass's noise as it was.
    assert plain().fill("a red circle", seed=100).nodes["3"].inputs["seed"] == 100


def test_fill_wraps_seeds_and_does_not_fill_twice():
    filled = two_pass().fill("{negative} {prompt}", "no", seed=2**64 - 1)
    assert filled.nodes["6"].inputs["text"] == "{negative} {prompt}"
    assert filled.nodes["12"].inputs["seed"] == 0


def test_fill_leaves_linked_seeds_and_the_template_alone():
    workflow = plain(n3_seed=["4", 0])
    assert workflow.fill("x", seed=7).nodes["3"].inputs["seed"] == Link("4", 0)
    template = plain()
    template.fill("x", seed=9)
    assert template == plain()


def test_a_cell_has_one_id():
    template = two_pass()
    cell = template.template_fingerprint()
    for seed in (0, 1, 77):
        filled = template.fill("three blue stars", seed=seed)
        assert filled.template_fingerprint() == cell
        assert filled.template_fingerprint("three blue stars", "") == cell
    filled = template.fill("x", "blurry", 3)
    assert filled.template_fingerprint("x", "blurry") == cell
    assert template.replace("3", "steps", 20).template_fingerprint() != cell


def test_a_negative_is_not_a_prompt():
    swapped = plain(n6_text="{negative}", n7_text="{prompt}")
    assert swapped.template_fingerprint() != plain().template_fingerprint()
    assert plain(n7_text="").template_fingerprint() == plain().template_fingerprint()


def test_api_round_trip_drops_only_titles():
    api = plain_api()
    again = Workflow.from_api(api).to_api()
    assert again == {k: {x: v[x] for x in ("class_type", "inputs")} for k, v in api.items()}


def test_cycles_have_a_fingerprint():
    api = plain_api(n5_width=["3", 0])
    assert len(Workflow.from_api(api).fingerprint()) == 64
    assert set(Workflow.from_api(api).order()) == set(PLAIN)


def test_long_chains_need_no_recursion():
    nodes = {"0": Node("SaveImage", {"images": Link("1", 0)})}
    for k in range(1, 20_000):
        nodes[str(k)] = Node("ImageSharpen", {"image": Link(str(k + 1), 0)})
    workflow = Workflow(nodes)
    assert len(workflow.order()) == 20_000
    assert len(workflow.fingerprint()) == 64


@pytest.mark.parametrize(
    ("api", "message"),
    [
        ([], "workflow: got list"),
        ({"1": 3}, "node '1': got int"),
        ({1: {"class_type": "X"}}, "node '1': id is int"),
        ({"1": {"inputs": {}}}, "class_type is null"),
        ({"1": {"class_type": "X", "inputs": []}}, "inputs is list"),
        ({"1": {"class_type": "X", "inputs": {"a": [1, 0]}}}, r"input 'a': link is \[int, int\]"),
        ({"1": {"class_type": "X", "inputs": {"a": ["1", 0.0]}}}, r"link is \[str, float\]"),
        ({"1": {"class_type": "X", "inputs": {"a": b"x"}}}, "got bytes"),
    ],
)
def test_bad_shapes_are_named(api, message):
    with pytest.raises(WorkflowError, match=message):
        Workflow.from_api(api)


def test_replace_needs_the_node():
    with pytest.raises(WorkflowError, match="no node '77'"):
        plain().replace("77", "x", 1)
