"""Facts: on small catalogues the grammar without taste generates exactly the valid graphs whose
code fits the budget, each once. One catalogue has two families, a choice, a growing input, an
optional input, a class with two outputs of a type, a seed and a literal that may be linked; others
are random. The graphs are built by an enumerator that knows neither grammar nor codec; the
validator judges them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from flowloom.workflow import (
    Catalogue,
    Grammar,
    GrammarError,
    Workflow,
    decode,
    encode,
    is_valid,
)
from flowloom.workflow import vocabulary as voc
from tests.workflow.flows import every_code


def _node(outputs: list[str], *inputs: dict[str, Any], output_node: bool = False) -> dict[str, Any]:
    return {"inputs": list(inputs), "outputs": outputs, "output_node": output_node}


def _file(name: str, family: str) -> dict[str, str]:
    return {"folder": "checkpoints", "name": name, "sha256": family * 64, "family": family}


NODES = {
    "Load": _node(["MODEL", "CLIP"], {"name": "name", "type": "COMBO", "folder": "checkpoints"}),
    "Encode": _node(
        ["CONDITIONING", "CONDITIONING"],
        {"name": "text", "type": "STRING", "multiline": True},
        {"name": "clip", "type": "CLIP", "required": False},
    ),
    "Latent": _node(
        ["LATENT"],
        {
            "name": "mode",
            "type": "COMFY_DYNAMICCOMBO_V3",
            "options": ["plain", "sized", "like"],
            "branches": [
                ["plain", []],
                ["sized", [{"name": "amount", "type": "INT", "default": 3}]],
                ["like", [{"name": "image", "type": "IMAGE"}]],
            ],
        },
    ),
    "Number": _node(["INT"], {"name": "sign", "type": "COMBO", "options": ["plus", "minus"]}),
    "Sample": _node(
        ["IMAGE"],
        {"name": "model", "type": "MODEL"},
        {"name": "seed", "type": "INT", "default": 0},
        {"name": "cond", "type": "CONDITIONING"},
        {"name": "latent", "type": "LATENT"},
    ),
    "Save": _node(
        [],
        {
            "name": "images",
            "type": "COMFY_AUTOGROW_V3",
            "element": {"name": "image", "type": "IMAGE"},
            "names": ["image0", "image1", "image2"],
            "min_count": 1,
        },
        output_node=True,
    ),
}
FILES = [_file("a.safetensors", "a"), _file("b.safetensors", "b")]


TYPES = ["MODEL", "CLIP", "LATENT", "IMAGE", "CONDITIONING"]


def _catalogue(nodes: dict[str, Any]) -> Catalogue:
    return Catalogue.from_json({"name": "small", "nodes": nodes, "files": FILES})


def random_nodes(seed: int) -> dict[str, Any]:
    """A loader, some classes with random inputs and outputs, and an output node."""
    rng = random.Random(seed)

    def link(name: str, optional: float = 0.25) -> dict[str, Any]:
        return {"name": name, "type": rng.choice(TYPES), "required": rng.random() >= optional}

    def entry(k: int) -> dict[str, Any]:
        what = rng.choices(["link", "value", "choice", "growing", "file"], [65, 10, 10, 8, 7])[0]
        if what == "value":
            return {"name": f"value{k}", "type": "INT", "default": 3}
        if what == "choice":
            branches = [["p", []], ["q", [link("inner", 0)]]]
            type_ = "COMFY_DYNAMICCOMBO_V3"
            return {
                "name": f"choice{k}",
                "type": type_,
                "options": ["p", "q"],
                "branches": branches,
            }
        if what == "growing":
            element = {"name": "item", "type": rng.choice(TYPES)}
            more = {"names": ["item0", "item1"], "min_count": rng.randint(0, 1)}
            return {"name": f"g{k}", "type": "COMFY_AUTOGROW_V3", "element": element, **more}
        if what == "file":
            return {"name": f"file{k}", "type": "COMBO", "folder": "checkpoints"}
        return link(f"link{k}")

    outputs = rng.choice([["MODEL"], ["MODEL", "CLIP"], ["MODEL", "MODEL", "CLIP"]])
    nodes = {"Load": _node(outputs, {"name": "name", "type": "COMBO", "folder": "checkpoints"})}
    for name in ("A", "B", "C", "D")[: rng.randint(3, 4)]:
        gives = rng.choices(TYPES, k=rng.choice([1, 1, 2]))
        nodes[name] = _node(gives, *(entry(k) for k in range(rng.randint(0, 2))))
    if rng.random() < 0.4:
        nodes["Number"] = _node(["INT"])
    ends = [link("first", 0), link("second")][: rng.randint(1, 2)]
    return nodes | {"Save": _node([], *ends, output_node=True)}


def _literals(entry: dict[str, Any]) -> list[Any]:
    if "folder" in entry:
        return [file["name"] for file in FILES]
    if "options" in entry:
        return entry["options"]
    return ["{prompt}", "{negative}"] if entry.get("multiline") else [entry["default"]]


def _ways(entries: list[dict[str, Any]], prefix: str = "") -> Iterator[tuple[dict, list, int]]:
    """All ways to fill inputs by themselves: literals, links still to make as (name, type), tokens.

    A link that is made to a new node takes no token of its own; one to a known node takes one.
    """
    if not entries:
        yield {}, [], 0
        return
    first, rest = entries[0], entries[1:]
    for literals, links, tokens in _ways_of(first, prefix):
        for more, more_links, more_tokens in _ways(rest, prefix):
            yield {**literals, **more}, [*links, *more_links], tokens + more_tokens


def _ways_of(entry: dict[str, Any], prefix: str) -> Iterator[tuple[dict, list, int]]:
    name = prefix + entry["name"]
    if "names" in entry:
        for count in range(entry["min_count"], len(entry["names"]) + 1):
            links = [(f"{name}.{n}", entry["element"]["type"]) for n in entry["names"][:count]]
            yield {}, links, int(count < len(entry["names"]))
        return
    if "branches" in entry:
        for key, inner in entry["branches"]:
            for literals, links, tokens in _ways(inner, f"{name}."):
                yield {name: key, **literals}, links, tokens + 1
        return
    if name == "seed":
        yield {name: 0}, [], 0
        return
    if not entry.get("required", True):
        yield {}, [], 1
    if entry["type"] in TYPES:
        yield {}, [(name, entry["type"])], 0
        return
    for value in _literals(entry):
        yield {name: value}, [], 1
    if entry["type"] == "INT":
        yield {}, [(name, "INT")], 0


def every_graph(classes: dict[str, Any], budget: int) -> Iterator[dict[str, Any]]:
    """Every graph of one output node that may take at most `budget` tokens, in API form.

    Links are made breadth first, each to a new node or to one that is there already, whatever its
    family, if that closes no cycle.
    """
    shapes = {name: list(_ways(node["inputs"])) for name, node in classes.items()}

    def grow(nodes: list[tuple[str, dict]], todo: list, spent: int) -> Iterator[dict]:
        # Each open link takes at least one more token: a class or a reference.
        if spent + len(todo) > budget:
            return
        if not todo:
            yield {
                str(k): {"class_type": name, "inputs": dict(inputs)}
                for k, (name, inputs) in enumerate(nodes)
            }
            return
        (holder, name, kind), rest = todo[0], todo[1:]
        for k, (source, _) in enumerate(nodes):
            for slot, out in enumerate(classes[source]["outputs"]):
                if out == kind and not _reaches(nodes, k, holder):
                    grown = _linked(nodes, holder, name, k, slot)
                    yield from grow(grown, rest, spent + 1 + _slots(classes[source], kind))
        for source, node in classes.items():
            for slot, out in enumerate(node["outputs"]):
                if out != kind:
                    continue
                for literals, links, tokens in shapes[source]:
                    grown = _linked(nodes, holder, name, len(nodes), slot)
                    more = [*rest, *((len(nodes), *link) for link in links)]
                    cost = 1 + tokens + _slots(classes[source], kind)
                    yield from grow([*grown, (source, literals)], more, spent + cost)

    for literals, links, tokens in shapes["Save"]:
        yield from grow([("Save", literals)], [(0, *link) for link in links], 2 + tokens)


def _linked(nodes: list, holder: int, name: str, source: int, slot: int) -> list:
    changed = list(nodes)
    changed[holder] = (nodes[holder][0], {**nodes[holder][1], name: [str(source), slot]})
    return changed


def _slots(node: dict[str, Any], kind: str) -> int:
    """Tokens that tell which output of a class is meant."""
    return int(node["outputs"].count(kind) > 1)


def _reaches(nodes: list, source: int, goal: int) -> bool:
    if source == goal:
        return True
    links = [int(v[0]) for v in nodes[source][1].values() if isinstance(v, list)]
    return any(_reaches(nodes, below, goal) for below in links)


def compare(nodes: dict[str, Any], budget: int) -> int:
    """Check a budget; how many graphs there are."""
    catalogue = _catalogue(nodes)
    try:
        grammar = Grammar(catalogue, budget=budget, taste=False)
    except GrammarError:
        assert not any(is_valid(api, catalogue) for api in every_graph(nodes, budget))
        return 0
    wanted: dict[str, int] = {}
    for api in every_graph(nodes, budget):
        if is_valid(api, catalogue):
            graph = Workflow.from_api(api)
            tokens = encode(graph, grammar).tokens
            assert len(tokens) <= budget
            # A link to a node further back than the eighth is not drawn.
            if voc.NUMBER not in tokens:
                wanted[graph.fingerprint(catalogue.output_classes)] = len(tokens)
    codes = every_code(grammar)
    written = [decode(code, grammar).fingerprint(catalogue.output_classes) for code in codes]
    assert len(set(written)) == len(written)
    assert set(written) == set(wanted)
    assert all(wanted[key] == len(code) for key, code in zip(written, codes, strict=True))
    return len(codes)


def test_exactly_the_valid_graphs_of_a_length_are_generated():
    counts = [compare(NODES, budget) for budget in (11, 12, 13, 16, 18, 20)]
    assert counts == [0, 16, 72, 288, 1024, 9968]


@pytest.mark.parametrize("seed", range(24))
def test_on_random_catalogues_too(seed):
    nodes = random_nodes(seed)
    for budget in range(3, 18):
        if compare(nodes, budget) > 300:
            break


def test_what_an_open_node_will_give_is_counted_on():
    """Two loaders' worth of slack is not there, but one loader gives CLIP as well as MODEL."""
    link = dict(zip(("name", "type", "required"), ("a", "MODEL", False), strict=True))
    nodes = {
        "Load": _node(["MODEL", "MODEL", "CLIP"], NODES["Load"]["inputs"][0]),
        "First": _node(["LATENT"], link, {"name": "b", "type": "CLIP"}),
        "Next": _node(["LATENT"], {**link, "required": True}, {"name": "b", "type": "LATENT"}),
        "Save": _node(
            [], {"name": "a", "type": "LATENT"}, {"name": "b", "type": "LATENT"}, output_node=True
        ),
    }
    assert [compare(nodes, budget) for budget in (7, 8, 9, 10, 11)] == [2, 6, 12, 34, 102]
