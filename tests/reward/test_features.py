"""What the reward sees of a workflow.

Facts pinned here:
- A node's bag holds its class, one row per literal and link, and one row per input it feeds;
  checked by hand.
- Names, order and unreachable parts of a graph change no feature but the numbering of nodes.
- Tokens and the workflow they decode to have the same features.
- After an extension by a file, old rows keep their numbers and the new file's row has its like for
  heirs.
"""

import dataclasses
from collections import Counter

import pytest

from flowloom.reward.features import UNKNOWN_ROW, FeatureTable
from flowloom.workflow import (
    Catalogue,
    Grammar,
    ModelFile,
    Vocabulary,
    Workflow,
    encode,
    random_workflows,
)
from flowloom.workflow import vocabulary as voc


def file(name, folder="checkpoints", role="checkpoint", family="shapes"):
    return ModelFile(folder, name, name.encode().hex().ljust(64, "0")[:64], family, role)


@pytest.fixture(scope="module")
def catalogue():
    bare = dataclasses.replace(Catalogue.load("embedded"), files=())
    return bare.with_files([file("a.safetensors"), file("b.safetensors"), file("l.st", "loras")])


@pytest.fixture(scope="module")
def vocabulary(catalogue):
    return Vocabulary.build(catalogue)


@pytest.fixture(scope="module")
def table(catalogue, vocabulary):
    return FeatureTable(catalogue, vocabulary)


def api(checkpoint="a.safetensors", cfg=2.5):
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "{prompt}", "clip": ["1", 1]}},
        "3": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
        "4": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 32, "height": 32, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "seed": 0,
                "steps": 8,
                "cfg": cfg,
                "sampler_name": "euler",
                "scheduler": "simple",
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {
            "class_type": "SaveImage",
            "inputs": {"images": ["6", 0], "filename_prefix": "flowloom"},
        },
    }


def bags(table, features):
    """Node bags as counters, in order of nodes."""
    result = [Counter() for _ in range(features.num_nodes)]
    for row, node in zip(features.rows_E.tolist(), features.nodes_E.tolist(), strict=True):
        result[node][row] += 1
    return result


def test_bags_by_hand(table, vocabulary):
    workflow = Workflow.from_api(api())
    features = table.of_workflow(workflow)
    order = workflow.order()
    found = dict(zip(order, bags(table, features), strict=True))
    classes, fields = vocabulary.class_ids, vocabulary.field_index

    def pair(class_type, name, token):
        return table.row_of_pair[fields[class_type, name], token]

    def fed(class_type, name):
        return table.row_of_fed[fields[class_type, name]]

    text = [
        table.row_of_pair[voc.CLASS_FIELD, classes["CLIPTextEncode"]],
        pair("CLIPTextEncode", "text", voc.PROMPT_ID),
        pair("CLIPTextEncode", "clip", classes["CheckpointLoaderSimple"]),
        fed("KSampler", "positive"),
        fed("ConditioningZeroOut", "conditioning"),
    ]
    assert found["2"] == Counter(text)
    name = next(i for i, t in enumerate(vocabulary.tokens) if t.value == "a.safetensors")
    loader = [
        table.row_of_pair[voc.CLASS_FIELD, classes["CheckpointLoaderSimple"]],
        pair("CheckpointLoaderSimple", "ckpt_name", name),
        fed("CLIPTextEncode", "clip"),
        fed("KSampler", "model"),
        fed("VAEDecode", "vae"),
    ]
    assert found["1"] == Counter(loader)
    cfg = next(i for i, t in enumerate(vocabulary.tokens) if t.kind == "cfg" and t.value == 2.5)
    assert found["5"][pair("KSampler", "cfg", cfg)] == 1
    # Class, nine inputs without the seed, one input fed.
    assert sum(found["5"].values()) == 1 + 9 + 1
    links = {
        (order[source], order[target])
        for source, target in zip(features.sources_L, features.targets_L, strict=True)
    }
    assert links == {
        ("1", "2"), ("2", "3"), ("1", "5"), ("2", "5"), ("3", "5"), ("4", "5"),
        ("5", "6"), ("1", "6"), ("6", "7"),
    }  # fmt: skip
    assert UNKNOWN_ROW not in features.rows_E


def test_names_order_and_dead_parts_do_not_matter(table):
    plain = table.of_workflow(Workflow.from_api(api()))
    renamed = {
        f"n{9 - int(key)}": {
            "class_type": node["class_type"],
            "inputs": {
                name: [f"n{9 - int(value[0])}", value[1]] if isinstance(value, list) else value
                for name, value in reversed(node["inputs"].items())
            },
        }
        for key, node in reversed(api().items())
    }
    renamed["dead"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "b.st"}}
    other = table.of_workflow(Workflow.from_api(renamed))
    assert other.num_nodes == plain.num_nodes == 7

    def sorted_bags(features):
        return sorted(sorted(bag.elements()) for bag in bags(table, features))

    assert sorted_bags(other) == sorted_bags(plain)


def test_a_value_off_the_grid_and_another_checkpoint_change_one_bag(table):
    plain = bags(table, table.of_workflow(Workflow.from_api(api())))
    spelled = bags(table, table.of_workflow(Workflow.from_api(api(cfg=2.123))))
    other = bags(table, table.of_workflow(Workflow.from_api(api("b.safetensors"))))
    assert sum(a != b for a, b in zip(plain, spelled, strict=True)) == 1
    assert sum(bag[UNKNOWN_ROW] for bag in spelled) == 1
    assert sum(a != b for a, b in zip(plain, other, strict=True)) == 1


def test_tokens_and_workflows_agree(table, catalogue, vocabulary):
    grammar = Grammar(catalogue, vocabulary)
    for encoded in random_workflows(grammar, 50, seed=0):
        features = table.of_tokens(encoded.tokens)
        again = table.of_workflow(table.codec.decode(encoded.tokens))
        assert features.rows_E.tolist() == again.rows_E.tolist()
        assert UNKNOWN_ROW not in features.rows_E
        assert features.rows_E.max() < table.num_rows


def test_extension_keeps_rows_and_names_heirs(table, catalogue, vocabulary):
    more = catalogue.with_files([file("new.safetensors"), file("tuned.st", role="tuned")])
    extended = vocabulary.extend(more)
    wide = FeatureTable(more, extended)
    assert wide.row_of_pair == table.row_of_pair
    assert wide.row_of_fed == table.row_of_fed
    field = vocabulary.field_index["CheckpointLoaderSimple", "ckpt_name"]
    ids = {token.value: k for k, token in enumerate(extended.tokens) if token.group == "file"}
    like = [table.row_of_pair[field, ids[name]] for name in ("a.safetensors", "b.safetensors")]
    heirs = wide.heirs(vocabulary)
    assert heirs == {
        wide.row_of_pair[field, ids["new.safetensors"]]: like,
        # Of this role there is no other: all of the folder.
        wide.row_of_pair[field, ids["tuned.st"]]: like,
    }
    tokens = encode(Workflow.from_api(api("new.safetensors")), wide.codec).tokens
    assert wide.row_of_pair[field, ids["new.safetensors"]] in wide.of_tokens(tokens).rows_E


def test_files_share_their_input(table, vocabulary):
    two = api()
    two["8"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "b.safetensors"}}
    two["5"]["inputs"]["model"] = ["8", 0]
    twice = api()
    twice["8"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}}
    twice["5"]["inputs"]["model"] = ["8", 0]
    field = vocabulary.field_index["CheckpointLoaderSimple", "ckpt_name"]
    ids = {token.value: k for k, token in enumerate(vocabulary.tokens) if token.group == "file"}
    rows = [table.row_of_pair[field, ids[name]] for name in ("a.safetensors", "b.safetensors")]
    for graph, files, shares in (
        (api(), rows[:1], [1.0]),
        (two, rows, [0.5, 0.5]),
        (twice, rows[:1], [1.0]),
    ):
        features = table.of_workflow(Workflow.from_api(graph))
        assert features.file_rows_F.tolist() == sorted(files)
        assert features.file_shares_F.tolist() == shares
