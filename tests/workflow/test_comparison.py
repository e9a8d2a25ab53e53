"""Facts: differences are none if and only if fingerprints are equal; they do not depend on ids or
key order; one edit is told as one thing that a person does (a value, a node inserted, removed or
replaced, a link moved); every mutation is told; hundreds of nodes take well under a second."""

from __future__ import annotations

import copy
import random
import time
from itertools import pairwise

import numpy as np
import pytest

from flowloom.workflow import Workflow, decode, random_workflows
from flowloom.workflow.comparison import differences
from flowloom.workflow.mutation import mutate_all
from tests.workflow.flows import PLAIN, plain, plain_api, two_pass

LORA = {
    "class_type": "LoraLoader",
    "inputs": {
        "model": ["4", 0],
        "clip": ["4", 1],
        "lora_name": "detail.safetensors",
        "strength_model": 0.8,
        "strength_clip": 1.0,
    },
}


def with_lora(**changes):
    api = plain_api(n3_model=["10", 0], n6_clip=["10", 1], n7_clip=["10", 1], **changes)
    api["10"] = copy.deepcopy(LORA)
    return Workflow.from_api(api)


def renamed(workflow: Workflow, seed: int) -> Workflow:
    """The same with other ids, and nodes and inputs in another order."""
    rng = random.Random(seed)
    ids = list(workflow.nodes)
    new = {old: f"n{k}" for old, k in zip(ids, rng.sample(range(900), len(ids)), strict=True)}
    rng.shuffle(ids)
    api = workflow.to_api()
    turned = {}
    for node_id in ids:
        inputs = list(api[node_id]["inputs"].items())
        rng.shuffle(inputs)
        turned[new[node_id]] = {
            "class_type": api[node_id]["class_type"],
            "inputs": {
                k: [new.get(v[0], "gone"), v[1]] if isinstance(v, list) else v for k, v in inputs
            },
        }
    return Workflow.from_api(turned)


def told(old, new):
    """The differences, which must be the same whatever the ids."""
    lines = differences(old, new)
    for seed in range(3):
        assert sorted(differences(renamed(old, seed), renamed(new, seed + 7))) == sorted(lines)
    return lines


def test_nothing_changed(embedded):
    assert told(plain(), plain()) == []
    assert differences(two_pass(), renamed(two_pass(), 1), embedded) == []
    extra = {**PLAIN, "77": {"class_type": "VAEDecode", "inputs": {}}}
    assert told(plain(), Workflow.from_api(extra)) == []
    assert told(Workflow({}), Workflow({})) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"n3_steps": 30}, ["KSampler: steps 8 -> 30"]),
        ({"n3_steps": "8"}, ['KSampler: steps 8 -> "8"']),
        ({"n3_denoise": 1}, ["KSampler: denoise 1.0 -> 1"]),
        ({"n3_denoise": None}, ["KSampler: denoise removed (was 1.0)"]),
        ({"n3_extra": 5}, ["KSampler: extra 5 added"]),
        (
            {"n8_vae": ["4", 1]},
            [
                "VAEDecode.vae now from CheckpointLoaderSimple (shapes-warm.safetensors) output 1 "
                "(was CheckpointLoaderSimple (shapes-warm.safetensors) output 2)"
            ],
        ),
        (
            {"n4_ckpt_name": "x.safetensors"},
            ["CheckpointLoaderSimple: ckpt_name shapes-warm.safetensors -> x.safetensors"],
        ),
        (
            {"n6_text": "a cat", "n3_cfg": 3.0},
            [
                "CLIPTextEncode (KSampler.positive): text {prompt} -> a cat",
                "KSampler: cfg 2.5 -> 3.0",
            ],
        ),
        (
            {"n3_negative": ["6", 0]},
            [
                "KSampler.negative now from CLIPTextEncode "
                "(was CLIPTextEncode (KSampler.negative))",
                "CLIPTextEncode (KSampler.negative) removed between "
                "CheckpointLoaderSimple (shapes-warm.safetensors) and KSampler",
            ],
        ),
        (
            {"n3_latent_image": ["99", 0]},
            [
                "KSampler.latent_image now a missing node (was EmptyLatentImage)",
                "EmptyLatentImage removed before KSampler",
            ],
        ),
    ],
)  # fmt: skip
def test_values_and_links(changes, lines):
    assert sorted(told(plain(), plain(**changes))) == sorted(lines)


def test_a_node_between():
    line = (
        "LoraLoader (detail.safetensors) {} between "
        "CheckpointLoaderSimple (shapes-warm.safetensors) and {}"
    )
    told_in = told(plain(), with_lora())
    assert len(told_in) == 1
    assert told_in[0].startswith(line.format("inserted", ""))
    assert "KSampler" in told_in[0]
    told_out = told(with_lora(), plain())
    assert len(told_out) == 1
    assert told_out[0].startswith(line.format("removed", ""))
    with_steps = told(plain(), with_lora(n3_steps=30))
    assert "KSampler: steps 8 -> 30" in with_steps
    assert len(with_steps) == 2


def test_two_nodes_between():
    api = with_lora().to_api()
    api["11"] = copy.deepcopy(LORA)
    api["11"]["inputs"].update(model=["10", 0], clip=["10", 1], lora_name="b.safetensors")
    api["3"]["inputs"]["model"] = ["11", 0]
    for node in ("6", "7"):
        api[node]["inputs"]["clip"] = ["11", 1]
    lines = told(plain(), Workflow.from_api(api))
    assert sorted(line.split(" inserted")[0] for line in lines) == [
        "LoraLoader (b.safetensors)",
        "LoraLoader (detail.safetensors)",
    ]
    lines = told(with_lora(), Workflow.from_api(api))
    assert len(lines) == 1
    assert lines[0].startswith("LoraLoader (b.safetensors) inserted between LoraLoader (detail")


def test_a_second_pass():
    lines = told(plain(), two_pass())
    first, second = "KSampler (LatentUpscaleBy.samples)", "KSampler (VAEDecode.samples)"
    assert f"LatentUpscaleBy inserted between {first} and {second}" in lines
    assert f"{second} inserted between LatentUpscaleBy and VAEDecode" in lines
    assert [line for line in lines if line.startswith("LoraLoader (shapes-two")]
    assert len(lines) == 3
    # Nothing above the first sampler and nothing below it is as it was.
    changed = told(plain(n4_ckpt_name="x.safetensors"), two_pass())
    file = "CheckpointLoaderSimple: ckpt_name x.safetensors -> shapes-warm.safetensors"
    assert sorted(changed) == sorted([*lines, file])


def test_replaced_nodes():
    api = plain_api()
    api["9"]["class_type"] = "PreviewImage"
    assert told(plain(), Workflow.from_api(api)) == ["SaveImage replaced by PreviewImage"]
    api = plain_api()
    api["8"]["class_type"] = "VAEDecodeTiled"
    assert told(plain(), Workflow.from_api(api)) == ["VAEDecode replaced by VAEDecodeTiled"]
    api["9"]["inputs"]["images"] = ["8", 1]
    assert sorted(told(plain(), Workflow.from_api(api))) == [
        "SaveImage.images now from VAEDecodeTiled output 1 (was VAEDecode)",
        "VAEDecode replaced by VAEDecodeTiled",
    ]


def test_long_texts_show_where_they_differ():
    text = "a cat " * 40
    (line,) = told(plain(n6_text=text + "on a mat"), plain(n6_text=text + "in a hat"))
    assert "on a mat" in line
    assert "in a hat" in line
    assert len(line) < 200


def test_every_mutation_is_told(grammar):
    graphs = [decode(code.tokens, grammar) for code in random_workflows(grammar, 150, 3)]
    rng = np.random.default_rng(0)
    for edits in (1, 3):
        for old, new in zip(graphs, mutate_all(graphs, grammar, rng, edits), strict=True):
            lines = differences(old, new, grammar.catalogue)
            outputs = grammar.catalogue.output_classes
            assert (lines == []) == (old.fingerprint(outputs) == new.fingerprint(outputs))
            if edits == 1:
                assert len(lines) <= 5, lines
    for old, new in pairwise(graphs):
        assert (differences(old, new) == []) == (old.fingerprint() == new.fingerprint())


def test_damaged_graphs_are_told_apart():
    """Links turned at random: cycles, shared and missing nodes, no output at all."""
    rng = random.Random(1)
    for _ in range(300):
        pair = []
        for _ in range(2):
            api = two_pass().to_api()
            for _ in range(rng.randint(0, 3)):
                node = rng.choice(list(api.values()))
                if node["inputs"]:
                    key = rng.choice(list(node["inputs"]))
                    node["inputs"][key] = rng.choice(
                        [[rng.choice([*api, "99"]), rng.randint(-1, 2)], 5, {"a": [1]}, None]
                    )
                if rng.random() < 0.2:
                    node["class_type"] = rng.choice(["SaveImage", "KSampler", "X"])
            pair.append(Workflow.from_api(api))
        same = pair[0].fingerprint() == pair[1].fingerprint()
        assert (differences(*pair) == []) == same


def test_large_graphs_take_no_time():
    """600 nodes: a chain of LoRAs into a chain of conditionings; half of the values changed."""

    def chain(strength, num):
        api = plain_api()
        model = ["4", 0]
        for k in range(num):
            api[f"l{k}"] = {
                "class_type": "LoraLoaderModelOnly",
                "inputs": {
                    "model": model,
                    "lora_name": "x.pt",
                    "strength_model": strength * (k % 2),
                },
            }
            model = [f"l{k}", 0]
        api["3"]["inputs"]["model"] = model
        return Workflow.from_api(api)

    start = time.process_time()
    assert len(differences(chain(1.0, 600), chain(0.5, 600))) == 300
    assert len(differences(chain(1.0, 600), chain(1.0, 500))) >= 100
    assert time.process_time() - start < 1.0
