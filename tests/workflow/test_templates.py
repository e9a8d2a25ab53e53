"""644 real workflows of the editor through conversion, validation, layout and back.

Facts: 230 files use only classes of the 0.33 catalogue; `template_verdicts.json` names what each of
the others lacks, and the verdict on each of the 230 with its reason: 207 are accepted. All 230 give
the same workflow again after a way through the editor's format. Values by position are those by
name on 1715 of the 1732 nodes that hold both; 15 of the rest were edited by hand in one place only.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from flowloom.workflow.canvas import CanvasError, Converted, from_ui, to_ui
from flowloom.workflow.editor_file import read_sheets
from flowloom.workflow.graph import Link, Workflow
from flowloom.workflow.layout import TITLE
from flowloom.workflow.validation import validate
from flowloom.workflow.widgets import conflict, read_literals
from tests.workflow.templates import (
    conversions,
    converted,
    load_catalogue,
    load_server,
    load_templates,
)

VERDICTS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "template_verdicts.json").read_text()
)


def problems(workflow: Workflow) -> list[list[Any]]:
    """[type, class, input, how often] of every error."""
    found = validate(workflow, load_catalogue())
    errors = Counter((p.type, p.class_type, p.input) for p in found if p.severity == "error")
    return [[*key, count] for key, count in sorted(errors.items())]


def verdict(name: str) -> dict[str, Any]:
    result = conversions()[name]
    if isinstance(result, CanvasError):
        return {"missing": sorted({class_type for _, class_type in result.missing})}
    errors = problems(result.workflow)
    return {"accepted": False, "problems": errors} if errors else {"accepted": True}


def test_the_package_is_the_one_that_the_table_was_made_for():
    assert version("comfyui-workflow-templates-json") == "0.1.123"
    assert (len(load_templates()), len(converted())) == (644, 230)


def test_every_verdict_is_the_tables():
    computed = {name: verdict(name) for name in load_templates()}
    expected = {
        name: {key: row[key] for key in row if key != "reason"} for name, row in VERDICTS.items()
    }
    differ = {n: computed.get(n) for n in expected if computed.get(n) != expected[n]}
    assert differ == {}
    assert computed.keys() == expected.keys()


def test_every_rejection_has_a_reason_and_most_are_accepted():
    judged = [row for row in VERDICTS.values() if "accepted" in row]
    rejected = [row for row in judged if not row["accepted"]]
    assert (len(judged), len(rejected)) == (230, 23)
    assert all(len(row["reason"]) > 20 for row in rejected)
    assert sum(row["problems"][0][1] == "ImageCompare" for row in rejected) == 13


def test_values_by_position_are_those_by_name():
    same, total, by_hand = 0, 0, 0
    for name in load_templates():
        root, subgraphs = read_sheets(load_templates()[name])
        for block in (b for sheet in (root, *subgraphs.values()) for b in sheet.blocks.values()):
            spec = load_server().nodes.get(block.type)
            if spec is None or block.named is None or not block.values:
                continue
            total += 1
            same += read_literals(spec, block) == read_literals(spec, block, by_name=False)
            by_hand += conflict(spec, block) is not None
    assert (same, total, by_hand) == (1715, 1732, 15)


@pytest.fixture(scope="module")
def drawn() -> dict[str, dict[str, Any]]:
    """Every converted template laid out anew, as it is read from a file."""
    return {
        name: json.loads(json.dumps(to_ui(result.workflow, load_server(), result.titles)))
        for name, result in conversions().items()
        if isinstance(result, Converted)
    }


def test_there_and_back_is_the_same_workflow(drawn):
    server = load_server()
    for name, workflow in converted().items():
        back = from_ui(drawn[name], server)
        assert back.warnings == () or conversions()[name].warnings, name
        assert renamed(workflow, list(back.workflow.nodes)) == back.workflow, name
        assert back.workflow.canonical(server).to_api() == workflow.canonical(server).to_api(), name


def renamed(workflow: Workflow, ids: list[str]) -> Workflow:
    """The same workflow with other ids, in its order."""
    assert len(ids) == len(workflow.nodes)
    new = dict(zip(workflow.nodes, ids, strict=True))
    api = workflow.to_api()
    for node_id, node in workflow.nodes.items():
        for name, value in node.inputs.items():
            if type(value) is Link:
                api[node_id]["inputs"][name] = [new[value.node], value.slot]
    return Workflow.from_api({new[node_id]: node for node_id, node in api.items()})


def test_no_two_nodes_overlap_and_links_go_to_the_right(drawn):
    for name, ui in drawn.items():
        boxes = {
            n["id"]: (n["pos"][0], n["pos"][1] - TITLE, n["size"][0], n["size"][1] + TITLE)
            for n in ui["nodes"]
        }
        rows = sorted(boxes.values())
        for k, (x, y, width, height) in enumerate(rows):
            for left, top, _, tall in rows[k + 1 :]:
                if left >= x + width:
                    break
                assert top >= y + height or y >= top + tall, (name, (x, y), (left, top))
        for link_id, source, _, target, _, _ in ui["links"]:
            x, _, width, _ = boxes[source]
            assert x + width < boxes[target][0], (name, link_id)


def test_the_drawn_file_is_consistent(drawn):
    for name, ui in drawn.items():
        nodes = {n["id"]: n for n in ui["nodes"]}
        assert len(nodes) == len(ui["nodes"])
        assert ui["last_node_id"] == max(nodes), name
        assert sorted(n["order"] for n in ui["nodes"]) == list(range(len(nodes))), name
        for link_id, source, output, target, slot, _ in ui["links"]:
            assert link_id in nodes[source]["outputs"][output]["links"], name
            assert nodes[target]["inputs"][slot]["link"] == link_id, name
