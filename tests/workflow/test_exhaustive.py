"""Facts: on a small catalogue the grammar without taste generates exactly the valid graphs whose
code fits the budget, each once. The catalogue has two families, a choice, a growing input, an
optional input, a class with two outputs of a type, a seed and a literal that may be linked. The
graphs are built by an enumerator that knows neither grammar nor codec; the validator judges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flowloom.workflow import Catalogue, Grammar, Workflow, decode, encode, is_valid


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


@pytest.fixture(scope="module")
def small() -> Catalogue:
    return Catalogue.from_json({"name": "small", "nodes": NODES, "files": FILES})


# -- the enumerator ----------------------------------------------------------------------------


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
    if entry["type"] in ("MODEL", "CLIP", "CONDITIONING", "LATENT", "IMAGE"):
        yield {}, [(name, entry["type"])], 0
        return
    for value in _literals(entry):
        yield {name: value}, [], 1
    if entry["type"] == "INT":
        yield {}, [(name, "INT")], 0


def every_graph(budget: int) -> Iterator[dict[str, Any]]:
    """Every graph of one output node that may take at most `budget` tokens, in API form.

    Links are made breadth first, each to a new node or to one that is there already, whatever its
    family, if that closes no cycle.
    """
    shapes = {name: list(_ways(node["inputs"])) for name, node in NODES.items()}

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
            for slot, out in enumerate(NODES[source]["outputs"]):
                if out == kind and not _reaches(nodes, k, holder):
                    grown = _linked(nodes, holder, name, k, slot)
                    yield from grow(grown, rest, spent + 1 + _slots(source, kind))
        for source, node in NODES.items():
            for slot, out in enumerate(node["outputs"]):
                if out != kind:
                    continue
                for literals, links, tokens in shapes[source]:
                    grown = _linked(nodes, holder, name, len(nodes), slot)
                    more = [*rest, *((len(nodes), *link) for link in links)]
                    cost = 1 + tokens + _slots(source, kind)
                    yield from grow([*grown, (source, literals)], more, spent + cost)

    for literals, links, tokens in shapes["Save"]:
        yield from grow([("Save", literals)], [(0, *link) for link in links], 2 + tokens)


def _linked(nodes: list, holder: int, name: str, source: int, slot: int) -> list:
    changed = list(nodes)
    changed[holder] = (nodes[holder][0], {**nodes[holder][1], name: [str(source), slot]})
    return changed


def _slots(source: str, kind: str) -> int:
    """Tokens that tell which output of a class is meant."""
    return int(NODES[source]["outputs"].count(kind) > 1)


def _reaches(nodes: list, source: int, goal: int) -> bool:
    if source == goal:
        return True
    links = [int(v[0]) for v in nodes[source][1].values() if isinstance(v, list)]
    return any(_reaches(nodes, below, goal) for below in links)


# -- the grammar -------------------------------------------------------------------------------


def every_code(grammar: Grammar) -> list[list[int]]:
    """All token sequences of a grammar, by walking its masks."""
    found, state, prefixes = [], grammar.start(1), [[]]
    while prefixes:
        rows, tokens = np.nonzero(state.mask())
        state = state.select(rows)
        prefixes = [[*prefixes[r], t] for r, t in zip(rows.tolist(), tokens.tolist(), strict=True)]
        state.advance(tokens)
        found += [p for p, done in zip(prefixes, state.done, strict=True) if done]
        prefixes = [p for p, done in zip(prefixes, state.done, strict=True) if not done]
        state = state.select(~state.done)
    return found


@pytest.mark.parametrize("budget", [12, 13, 16, 18, 20])
def test_exactly_the_valid_graphs_of_a_length_are_generated(small, budget):
    grammar = Grammar(small, budget=budget, taste=False)
    wanted: dict[str, int] = {}
    for api in every_graph(budget):
        if is_valid(api, small):
            graph = Workflow.from_api(api)
            length = len(encode(graph, grammar).tokens)
            if length <= budget:
                wanted[graph.fingerprint(small.output_classes)] = length
    codes = every_code(grammar)
    written = [decode(code, grammar).fingerprint(small.output_classes) for code in codes]
    assert len(set(written)) == len(written)
    assert set(written) == set(wanted)
    assert all(wanted[key] == len(code) for key, code in zip(written, codes, strict=True))
