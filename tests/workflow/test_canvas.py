"""The editor's format to a workflow and back, on files written by hand.

Facts: literals lie in `widgets_values` in schema order, with one more value behind a seed and
behind an upload, a choice's own inputs behind its key; values by name go first; a link goes before
a literal, which keeps its place. Notes vanish, reroutes and primitives are resolved, a muted node
vanishes with its links, a bypassed one hands on the input of equal type, at the same place first.
A subgraph is opened with ids ``host:inner``; what its node shows goes before what lies inside. A
file that is broken, or made to exhaust, gives `CanvasError` and nothing else.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest

from flowloom.workflow.canvas import CanvasError, from_ui, is_ui, to_ui
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import Link, Workflow

THING = ["THING", {}]
INFO: dict[str, Any] = {
    "Text": {
        "input": {"required": {"text": ["STRING", {"multiline": True, "dynamicPrompts": True}]}},
        "output": ["THING"],
    },
    "Mix": {
        "input": {
            "required": {"a": THING, "b": THING},
            "optional": {"ratio": ["FLOAT", {"default": 0.5, "min": 0, "max": 1}]},
        },
        "output": ["THING", "OTHER"],
    },
    "Sample": {
        "input": {
            "required": {
                "thing": THING,
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "cfg": ["FLOAT", {"default": 8.0}],
                "sampler": [["euler", "heun"]],
            },
        },
        "output": ["THING"],
    },
    "OldSeed": {
        "input": {"required": {"noise_seed": ["INT", {}], "flag": ["BOOLEAN", {"default": False}]}},
        "output": ["THING"],
    },
    "Load": {
        "input": {
            "required": {"image": [["x.png"], {"image_upload": True}], "channel": [["red", "blue"]]}
        },
        "output": ["THING"],
    },
    "Resize": {
        "input": {
            "required": {
                "thing": ["COMFY_MATCHTYPE_V3", {}],
                "how": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {
                                "key": "size",
                                "inputs": {
                                    "required": {
                                        "crop": [["off", "on"]],
                                        "height": ["INT", {"default": 1}],
                                        "width": ["INT", {"default": 2}],
                                    }
                                },
                            },
                            {"key": "factor", "inputs": {"required": {"by": ["FLOAT", {}]}}},
                        ]
                    },
                ],
                "method": [["nearest", "area"]],
            }
        },
        "output": ["COMFY_MATCHTYPE_V3"],
    },
    "Batch": {
        "input": {
            "required": {
                "things": [
                    "COMFY_AUTOGROW_V3",
                    {
                        "template": {
                            "input": {"required": {"thing": THING}},
                            "prefix": "thing",
                            "min": 1,
                            "max": 4,
                        }
                    },
                ]
            }
        },
        "output": ["THING"],
    },
    "Curve": {"input": {"required": {"curve": ["CURVE", {"default": []}]}}, "output": ["CURVE"]},
    "Save": {"input": {"required": {"thing": THING}}, "output": [], "output_node": True},
}
CATALOGUE = Catalogue.from_object_info(INFO, name="test")


def node(
    node_id: int,
    kind: str,
    inputs: list[tuple] = [],  # noqa: B006 - never changed
    outputs: tuple[str, ...] = ("THING",),
    values: Any = (),
    **more: Any,
) -> dict[str, Any]:
    """A node; inputs are (name, type, link) or, for a literal, (name, type, link, "widget")."""
    slots = [
        {"name": s[0], "type": s[1], "link": s[2], **({"widget": {"name": s[0]}} if s[3:] else {})}
        for s in inputs
    ]
    return {
        "id": node_id,
        "type": kind,
        "mode": 0,
        "inputs": slots,
        "outputs": [{"name": t, "type": t, "links": None} for t in outputs],
        "widgets_values": list(values) if isinstance(values, tuple) else values,
        **more,
    }


def ui(*nodes: dict, links: list = [], subgraphs: list = []) -> dict[str, Any]:  # noqa: B006
    return {
        "nodes": list(nodes),
        "links": links,
        "definitions": {"subgraphs": subgraphs},
        "version": 0.4,
    }


def api(file: Any) -> dict[str, dict[str, Any]]:
    """Inputs by node id, with links as lists."""
    return {i: n["inputs"] for i, n in from_ui(file, CATALOGUE).workflow.to_api().items()}


TEXT, OTHER = node(1, "Text", values=("one",)), node(2, "Text", values=("two",))


def test_literals_by_position_skip_what_the_editor_put_between():
    sample = node(3, "Sample", [("thing", "THING", 7)], values=(5, "randomize", 8, 3, "heun"))
    file = ui(TEXT, sample, links=[[7, 1, 0, 3, 0, "THING"]])
    read = api(file)
    assert read["1"] == {"text": "one"}
    assert read["3"] == {"thing": ["1", 0], "seed": 5, "steps": 8, "cfg": 3.0, "sampler": "heun"}
    assert type(read["3"]["cfg"]) is float
    assert api(ui(node(1, "OldSeed", values=(4, "fixed", True)))) == {
        "1": {"noise_seed": 4, "flag": True}
    }


def test_old_files_hold_a_flag_behind_a_seed_unless_a_flag_comes_next():
    sample = node(1, "Sample", values=(5, False, 8, 3, "heun"))
    assert api(ui(sample))["1"]["steps"] == 8
    assert api(ui(node(1, "OldSeed", values=(4, True))))["1"]["flag"] is True


@pytest.mark.parametrize(
    "values", [("y.png", "blue", "image"), ("y.png", "image", "blue"), ("y.png", "blue")]
)
def test_upload_buttons_are_skipped(values):
    assert api(ui(node(1, "Load", values=values)))["1"] == {"image": "y.png", "channel": "blue"}


def test_values_that_a_file_lacks_are_the_default_or_the_first_option():
    assert api(ui(node(1, "Sample", values=(5,))))["1"] == {
        "seed": 5,
        "steps": 20,
        "cfg": 8.0,
        "sampler": "euler",
    }
    assert api(ui(node(1, "Load")))["1"] == {"channel": "red"}, "a file is never picked"


def test_values_by_name_go_first_and_a_change_of_one_alone_is_told():
    file = ui(node(1, "Text", values=("one",), widgets_values_named={"text": "two"}))
    read = from_ui(file, CATALOGUE)
    assert read.workflow.nodes["1"].inputs["text"] == "two"
    assert "'text': the file holds one by position and two by name" in read.warnings[0]


def test_stored_values_that_the_class_has_no_input_for_are_named():
    text = node(1, "Text", values=("one", "fixed", None, "", 7))
    warnings = from_ui(ui(text), CATALOGUE).warnings
    assert warnings == (
        "node 1 (Text): the catalogue knows no input for the stored values 7; left out",
    )
    named = node(1, "Text", widgets_values_named={"text": "one", "mood": "sad", "upload": "image"})
    assert "values mood=sad;" in from_ui(ui(named), CATALOGUE).warnings[0]


def test_a_linked_literal_keeps_its_place():
    slots = [("thing", "THING", None), ("steps", "INT", 7, "widget")]
    sample = node(3, "Sample", slots, values=(5, "fixed", 99, 3, "heun"))
    primitive = node(9, "PrimitiveNode", outputs=("INT",), values=(12, "fixed"))
    read = api(ui(sample, primitive, links=[[7, 9, 0, 3, 1, "INT"]]))
    assert read == {"3": {"seed": 5, "steps": 12, "cfg": 3.0, "sampler": "heun"}}


def test_choices_bring_dotted_inputs_in_the_order_of_the_slots():
    slots = [
        ("thing", "*", None),
        ("how.width", "INT", None, "widget"),
        ("how.height", "INT", None, "widget"),
    ]
    resize = node(1, "Resize", slots, values=("size", 640, 480, "on", "area"))
    assert api(ui(resize))["1"] == {
        "how": "size",
        "how.crop": "on",
        "how.height": 480,
        "how.width": 640,
        "method": "area",
    }
    other = node(1, "Resize", values=("factor", 2, "area"))
    assert api(ui(other))["1"] == {"how": "factor", "how.by": 2.0, "method": "area"}


def test_a_key_that_comes_over_a_link_brings_its_own_inputs():
    slots = [("thing", "THING", None), ("how", "COMBO", 7, "widget")]
    resize = node(1, "Resize", slots, values=("factor", 2, "area"))
    primitive = node(2, "PrimitiveNode", outputs=("COMBO",), values=("size", "fixed"))
    read = api(ui(resize, primitive, links=[[7, 2, 0, 1, 1, "COMBO"]]))["1"]
    sizes = {"how.crop": "off", "how.height": 1, "how.width": 2}
    assert read == {"how": "size", **sizes, "method": "area"}


def test_growing_inputs_and_links_to_inputs_that_are_unknown():
    slots = [("things.thing0", "THING", 7), ("things.thing1", "THING", 8), ("extra", "THING", 7)]
    file = ui(
        TEXT,
        OTHER,
        node(3, "Batch", slots),
        links=[[7, 1, 0, 3, 0, "THING"], [8, 2, 0, 3, 1, "THING"]],
    )
    read = from_ui(file, CATALOGUE)
    assert read.workflow.to_api()["3"]["inputs"] == {
        "things.thing0": ["1", 0],
        "things.thing1": ["2", 0],
    }
    assert "no input 'extra'" in read.warnings[0]


def test_lists_are_wrapped_lest_they_be_links():
    file = ui(node(1, "Curve", values=([[0, 0], [1, 1]],)))
    assert api(file)["1"] == {"curve": {"__value__": [[0, 0], [1, 1]]}}


def test_notes_reroutes_and_new_links():
    file = ui(
        TEXT,
        node(2, "Note", values=("hello",)),
        node(4, "Reroute", [("", "*", 7)], ("*",)),
        node(5, "Reroute", [("", "*", 8)], ("*",)),
        node(6, "Save", [("thing", "THING", 9)]),
        links=[
            {"id": 7, "origin_id": 1, "origin_slot": 0, "target_id": 4, "target_slot": 0},
            [8, 4, 0, 5, 0, "*"],
            None,
            [9, 5, 0, 6, 0, "*"],
        ],
    )
    assert api(file) == {"1": {"text": "one"}, "6": {"thing": ["1", 0]}}


def between(mode: int, inputs: list[tuple], slot: int = 0) -> dict[str, Any]:
    """Texts 1 and 2 into a Mix 3 of some mode, whose output goes to Save 4."""
    return ui(
        TEXT,
        OTHER,
        node(3, "Mix", inputs, ("THING", "OTHER"), (0.25,), mode=mode),
        node(4, "Save", [("thing", "THING", 9)]),
        links=[[7, 1, 0, 3, 0, "THING"], [8, 2, 0, 3, 1, "THING"], [9, 3, slot, 4, 0, "THING"]],
    )


def test_muted_nodes_vanish_with_their_links():
    read = api(between(2, [("a", "THING", 7), ("b", "THING", 8)]))
    assert read == {"1": {"text": "one"}, "2": {"text": "two"}, "4": {}}


@pytest.mark.parametrize(
    ("inputs", "slot", "source"),
    [
        ([("a", "THING", 7), ("b", "THING", 8)], 0, ["1", 0]),
        ([("a", "OTHER", 7), ("b", "THING", 8)], 0, ["2", 0]),
        ([("a", "OTHER", 7), ("b", "OTHER", 8)], 1, ["2", 0]),
        ([("a", "THING", 7), ("b", "THING", 8)], 1, None),
    ],
)
def test_bypassed_nodes_hand_on_the_input_of_equal_type(inputs, slot, source):
    read = api(between(4, inputs, slot))
    assert "3" not in read
    assert read["4"].get("thing") == source


SUB = {
    "id": "sub",
    "name": "Twice",
    "inputs": [
        {"name": "thing", "type": "THING", "linkIds": [1]},
        {"name": "steps", "type": "INT", "linkIds": [2]},
    ],
    "outputs": [{"name": "out", "type": "THING", "linkIds": [3]}],
    "nodes": [
        node(
            5,
            "Sample",
            [("thing", "THING", 1), ("steps", "INT", 2, "widget")],
            values=(1, "fixed", 7, 1, "euler"),
        )
    ],
    "links": [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0},
        {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 5, "target_slot": 1},
        {"id": 3, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0},
    ],
}
OUTER = {
    "id": "outer",
    "name": "Around",
    "inputs": SUB["inputs"],
    "outputs": SUB["outputs"],
    "nodes": [node(6, "sub", [("thing", "THING", 1), ("steps", "INT", 2, "widget")])],
    "links": [{**link, "target_id": 6, "origin_id": -10} for link in SUB["links"][:2]]
    + [{"id": 3, "origin_id": 6, "origin_slot": 0, "target_id": -20, "target_slot": 0}],
}


def hosted(kind: str = "sub", values: Any = (), mode: int = 0, **more: Any) -> dict[str, Any]:
    host = node(3, kind, [("thing", "THING", 7)], values=values, mode=mode, **more)
    return ui(
        TEXT,
        host,
        node(4, "Save", [("thing", "THING", 9)]),
        links=[[7, 1, 0, 3, 0, "THING"], [9, 3, 0, 4, 0, "THING"]],
        subgraphs=[SUB, OUTER],
    )


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({}, 7),
        ({"values": (11,)}, 11),
        ({"values": (11,), "widgets_values_named": {"steps": 12}}, 12),
        ({"properties": {"proxyWidgets": [["5", "steps"]]}}, 7),
        ({"values": (5, 13), "properties": {"proxyWidgets": [["5", "x"], ["-1", "steps"]]}}, 13),
    ],
)
@pytest.mark.parametrize(("kind", "inner"), [("sub", "3:5"), ("outer", "3:6:5")])
def test_subgraphs_are_opened_and_the_outermost_value_counts(kind, inner, more, steps):
    read = api(hosted(kind, **more))
    assert list(read) == ["1", inner, "4"]
    assert read[inner]["thing"] == ["1", 0]
    assert read[inner]["steps"] == steps
    assert read["4"] == {"thing": [inner, 0]}


def test_a_subgraphs_value_reaches_every_input_that_it_is_linked_to():
    sub = copy.deepcopy(SUB)
    sub["nodes"].append(node(8, "OldSeed", [("noise_seed", "INT", 4, "widget")], values=(1, True)))
    sub["links"].append(
        {"id": 4, "origin_id": -10, "origin_slot": 1, "target_id": 8, "target_slot": 0}
    )
    sub["inputs"][1]["linkIds"] = [2, 4]
    file = hosted()
    file["definitions"]["subgraphs"] = [sub]
    assert api(file)["3:8"]["noise_seed"] == 7, "the first node inside holds the value of both"


@pytest.mark.parametrize(("mode", "thing"), [(2, {}), (4, {"thing": ["1", 0]})])
def test_a_subgraphs_mode_applies_to_all_inside(mode, thing):
    assert api(hosted("outer", mode=mode)) == {"1": {"text": "one"}, "4": thing}


def test_prompts_that_the_editor_rewrites_are_kept_and_named():
    file = ui(node(1, "Text", values=("a {red|blue} {prompt} // hat",)))
    read = from_ui(file, CATALOGUE)
    assert read.workflow.nodes["1"].inputs["text"] == "a {red|blue} {prompt} // hat"
    assert "'{red|blue}'" in read.warnings[0]
    assert "comments" in read.warnings[1]
    assert from_ui(ui(node(1, "Text", values=("{prompt}",))), CATALOGUE).warnings == ()


def test_every_missing_class_is_named():
    with pytest.raises(CanvasError, match=r"Gone \(node 1, 3\); Lost \(node 2\)") as raised:
        from_ui(ui(node(1, "Gone"), node(2, "Lost"), node(3, "Gone"), TEXT | {"id": 4}), CATALOGUE)
    assert raised.value.missing == (("1", "Gone"), ("2", "Lost"), ("3", "Gone"))


def test_a_missing_class_keeps_its_links_where_it_is_not_refused():
    file = ui(
        TEXT,
        node(2, "Gone", [("thing", "THING", 7)], values=(5,)),
        links=[[7, 1, 0, 2, 0, "THING"]],
    )
    read = from_ui(file, CATALOGUE, known_only=False).workflow
    assert read.nodes["2"].inputs == {"thing": Link("1", 0)}
    assert read.nodes["1"].inputs


def test_titles_of_people_are_kept():
    read = from_ui(ui(TEXT | {"title": "Prompt"}), CATALOGUE)
    assert read.titles == {"1": "Prompt"}
    drawn = to_ui(read.workflow, CATALOGUE, read.titles)
    assert drawn["nodes"][0]["title"] == "Prompt"
    assert is_ui(drawn)
    assert not is_ui(read.workflow.to_api())


FLOW = Workflow.from_api(
    {
        "57:8": {"class_type": "Text", "inputs": {"text": "one"}},
        "3": {
            "class_type": "Resize",
            "inputs": {
                "thing": ["57:8", 0],
                "how": "size",
                "how.crop": "on",
                "how.height": ["n", 0],
                "how.width": 640,
                "method": "area",
            },
        },
        "n": {"class_type": "Curve", "inputs": {"curve": {"__value__": [[0, 0], [1, 1]]}}},
        "4": {
            "class_type": "Sample",
            "inputs": {"thing": ["3", 0], "seed": 5, "steps": 8, "cfg": 1.5, "sampler": "heun"},
        },
        "6": {"class_type": "Batch", "inputs": {"things.thing0": ["4", 0]}},
        "7": {"class_type": "Save", "inputs": {"thing": ["6", 0]}},
        "8": {"class_type": "Save", "inputs": {"thing": "a literal for a socket"}},
    }
)


def test_a_workflow_as_the_editor_has_it():
    drawn = to_ui(FLOW, CATALOGUE)
    nodes = {n["id"]: n for n in drawn["nodes"]}
    assert [n["id"] for n in drawn["nodes"]] == [9, 3, 10, 4, 6, 7, 8, 11]
    assert (drawn["last_node_id"], drawn["last_link_id"], drawn["version"]) == (11, 6, 0.4)
    sample = nodes[4]
    assert sample["widgets_values"] == [5, "fixed", 8, 1.5, "heun"]
    assert sample["properties"] == {"Node name for S&R": "Sample"}
    assert [slot["name"] for slot in sample["inputs"]] == ["thing"]
    height = nodes[3]["inputs"][2]
    assert (height["name"], height["widget"]) == ("how.height", {"name": "how.height"})
    assert nodes[3]["widgets_values"] == ["size", "on", 1, 640, "area"]
    assert nodes[3]["outputs"][0]["type"] == "THING", "a matched type is that of its input"
    assert [s["name"] for s in nodes[6]["inputs"]] == ["things.thing0", "things.thing1"]
    assert nodes[11]["type"] == "PrimitiveNode"
    for link_id, source, output, target, slot, _ in drawn["links"]:
        assert link_id in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link_id
        assert nodes[source]["order"] < nodes[target]["order"]


def test_there_and_back_is_the_same_workflow():
    back = from_ui(to_ui(FLOW, CATALOGUE), CATALOGUE).workflow
    assert back.canonical(CATALOGUE).to_api() == FLOW.canonical(CATALOGUE).to_api()
    assert len(back.nodes) == len(FLOW.nodes)


def test_literals_that_a_workflow_lacks_are_drawn_and_left_out_again_unless_changed():
    mix = {"class_type": "Mix", "inputs": {}}
    drawn = to_ui(Workflow.from_api({"1": mix}), CATALOGUE)
    assert drawn["nodes"][0]["widgets_values"] == [0.5]
    assert from_ui(drawn, CATALOGUE).workflow.to_api()["1"] == mix
    drawn["nodes"][0]["widgets_values"] = [0.75]
    assert api(drawn)["1"] == {"ratio": 0.75}
    drawn["nodes"][0]["properties"]["flowloom_left_out"] = ["a", "ratio", 5, "none"]
    drawn["nodes"][0]["widgets_values"] = []
    assert api(drawn)["1"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1": {"class_type": "Gone"}}, "lacks: Gone"),
        ({"1": {"class_type": "Save", "inputs": {"thing": ["2", 0]}}}, "node 2, which has 0"),
        ({"1": {"class_type": "Mix", "inputs": {"a": ["1", 0]}}}, "depends on itself"),
    ],
)
def test_what_cannot_be_drawn_is_named(change, message):
    with pytest.raises(CanvasError, match=message):
        to_ui(Workflow.from_api(change), CATALOGUE)


LONG = "9" * 5000


@pytest.mark.parametrize(
    "file",
    [
        None,
        [],
        {"nodes": {}},
        {"nodes": [None]},
        {"nodes": [{"type": "Text"}]},
        {"nodes": [{"id": True, "type": "Text"}]},
        {"nodes": [{"id": 1 << 70, "type": "Text"}]},
        {"nodes": [{"id": LONG, "type": "Text"}]},
        {"nodes": [{"id": 1, "type": 5}]},
        {"nodes": [{"id": 1, "type": "Text", "mode": "4"}]},
        {"nodes": [{"id": 1, "type": "Text", "inputs": {"a": 1}}]},
        {"nodes": [{"id": 1, "type": "Text", "inputs": [{"name": None}]}]},
        {"nodes": [{"id": 1, "type": "Text", "widgets_values": "text"}]},
        {"nodes": [{"id": 1, "type": "Text", "widgets_values_named": [1]}]},
        {"nodes": [TEXT, TEXT]},
        {"nodes": [TEXT], "links": 7},
        {"nodes": [TEXT], "links": [[1, 2]]},
        {"nodes": [TEXT], "links": [[1, 1, "x", 2, 0, "T"]]},
        {"nodes": [TEXT], "links": [[1, 1, 1 << 40, 2, 0, "T"]]},
        {"nodes": [TEXT], "definitions": {"subgraphs": [5]}},
        {"nodes": [TEXT], "definitions": {"subgraphs": {"a": 1}}},
        ui(TEXT | {"id": "3:5"}, node(3, "sub"), subgraphs=[SUB]),
    ],
)
def test_malformed_files_raise_only_canvas_errors(file):
    with pytest.raises(CanvasError, match=r"^canvas"):
        from_ui(file, CATALOGUE)


def test_a_malformed_link_is_told_by_its_place():
    file = {"nodes": [TEXT], "links": [None, [1, 1, 0, 2, 0, "T"], [1, 2]]}
    with pytest.raises(CanvasError, match=r"^canvas: links\[2\]: got list"):
        from_ui(file, CATALOGUE)


@pytest.mark.parametrize(
    "links", [[[7, 99, 0, 4, 0, "T"]], [], [[7, 4, 5, 4, 0, "T"]], [[7, -10, 0, 4, 0, "T"]]]
)
def test_links_to_nowhere_leave_the_input_open_or_the_fault_to_validation(links):
    read = api(ui(node(4, "Save", [("thing", "THING", 7)]), links=links))
    assert read["4"] in ({}, {"thing": ["4", 5]})


def nested(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value]
    return value


def circle_of_reroutes() -> dict[str, Any]:
    a, b = (node(k, "Reroute", [("", "*", k)], ("*",)) for k in (1, 2))
    save = node(3, "Save", [("thing", "THING", 1)])
    return ui(a, b, save, links=[[1, 2, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"]])


def sheet(name: str, *inner: str) -> dict[str, Any]:
    nodes = [node(k, kind) for k, kind in enumerate(inner)]
    return {"id": name, "name": name, "nodes": nodes, "links": [], "inputs": [], "outputs": []}


def tower(height: int, breadth: int) -> dict[str, Any]:
    sheets = [sheet(f"s{k}", *[f"s{k + 1}"] * breadth) for k in range(height)]
    return ui(node(1, "s0"), subgraphs=[*sheets, sheet(f"s{height}", "Text")])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (circle_of_reroutes(), "form a circle"),
        (ui(node(1, "s"), subgraphs=[sheet("s", "s")]), "contains itself"),
        (ui(node(1, "s"), subgraphs=[sheet("s", "t"), sheet("t", "s")]), "contains itself"),
        (tower(10_000, 1), "deeper in each other"),
        (tower(30, 4), "more than 10000 nodes"),
        (ui(node(1, "Curve", values=(nested(1, 10_000),))), "nested"),
        (ui(node(1, "Curve", widgets_values_named={"curve": nested(1, 10_000)})), "nested"),
    ],
)
def test_files_made_to_exhaust_are_refused_in_bounded_time(file, message):
    started = time.process_time()
    with pytest.raises(CanvasError, match=message):
        from_ui(file, CATALOGUE)
    assert time.process_time() - started < 2.0


def test_a_long_chain_of_reroutes_read_by_all_takes_linear_time():
    count = 4000
    chain = [node(k, "Reroute", [("", "*", k - 1)], ("*",)) for k in range(1, count)]
    saves = [node(count + k, "Save", [("thing", "THING", k)]) for k in range(1, count)]
    links = [[k, k, 0, k + 1, 0, "*"] for k in range(count)]
    started = time.process_time()
    read = api(ui(node(0, "Text", values=("x",)), *chain, *saves, links=links))
    assert all(read[str(count + k)] == {"thing": ["0", 0]} for k in range(1, count))
    assert time.process_time() - started < 2.0
