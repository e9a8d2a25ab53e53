"""Every problem of a workflow at once, without a server.

Error types are ComfyUI's own where it has one; the rest are things it accepts and fails on later
(COMFYUI.md 3). Written without the codec and the grammar, which are tested against it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flowloom.workflow.catalogue import Catalogue, InputSpec, NodeSpec
from flowloom.workflow.graph import Link, Workflow
from flowloom.workflow.soundness import cost_problems, family_problems

ERROR, WARNING = "error", "warning"
MAX_NODES = 10_000
_NUMBERS = {"INT": int, "FLOAT": float}


@dataclass(frozen=True)
class Problem:
    """One fault: `severity` is error or warning; empty strings where a field does not apply."""

    type: str
    severity: str
    node_id: str
    class_type: str
    input: str
    message: str
    suggestion: str = ""


class _Report:
    """Problems found so far."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(
        self,
        kind: str,
        node_id: Any,
        class_type: str,
        name: Any,
        message: str,
        suggestion: str = "",
        severity: str = ERROR,
    ) -> None:
        self.problems.append(
            Problem(kind, severity, _text(node_id), class_type, _text(name), message, suggestion)
        )


def validate(workflow: Any, catalogue: Catalogue) -> list[Problem]:
    """Find every problem of a workflow.

    Args:
        workflow: A `Workflow`, or what was read as API JSON (anything at all; this never raises).
        catalogue: Node facts, installed files and limits to judge by.

    Returns:
        Problems, errors of the whole graph first, then node by node. The workflow is valid if none
        has severity "error".
    """
    report = _Report()
    api = workflow.to_api() if isinstance(workflow, Workflow) else workflow
    if not isinstance(api, dict):
        report.add("invalid_prompt", "", "", "", f"got {_name(api)}, expected nodes by id")
        return report.problems
    if len(api) > MAX_NODES:
        got = f"got {len(api)} nodes, expected at most {MAX_NODES}"
        report.add("resource_bound", "", "", "", got)
        return report.problems

    specs, inputs = _read_nodes(api, catalogue, report)
    outputs = [i for i, spec in specs.items() if spec.output_node]
    if not outputs:
        classes = ", ".join(sorted(catalogue.output_classes)[:3])
        report.add("prompt_no_outputs", "", "", "", "no output node", f"add one of: {classes}")
    links = {
        node_id: [v.node for v in values.values() if type(v) is Link and v.node in specs]
        for node_id, values in inputs.items()
    }
    order, reached, cyclic = _order(outputs, links)
    for node_id in specs:
        class_type = specs[node_id].class_type
        if node_id not in reached:
            report.add(
                "unreachable_node", node_id, class_type, "",
                "no output uses this node; the server will not run it",
                "remove it or link it", WARNING,
            )  # fmt: skip
            continue
        if node_id in cyclic:
            report.add("dependency_cycle", node_id, class_type, "", "this node depends on itself")
        _check_node(node_id, specs, inputs, api, catalogue, report)
    for fault in family_problems(order, specs, inputs, catalogue):
        report.add("family_mismatch", fault.node_id, fault.class_type, *fault[2:])
    for fault in cost_problems(order, specs, inputs, catalogue.limits):
        report.add("resource_bound", fault.node_id, fault.class_type, *fault[2:])
    return report.problems


def is_valid(workflow: Any, catalogue: Catalogue) -> bool:
    """Whether `validate` finds no error."""
    return not any(problem.severity == ERROR for problem in validate(workflow, catalogue))


def _read_nodes(
    api: dict, catalogue: Catalogue, report: _Report
) -> tuple[dict[str, NodeSpec], dict[str, dict[str, Any]]]:
    """Nodes of known classes, and their inputs with links told from literals."""
    specs: dict[str, NodeSpec] = {}
    inputs: dict[str, dict[str, Any]] = {}
    for node_id, node in api.items():
        if not isinstance(node_id, str):
            report.add("invalid_prompt", node_id, "", "", f"id is {_name(node_id)}, not a string")
            continue
        class_type = node.get("class_type") if isinstance(node, dict) else None
        if not isinstance(class_type, str):
            report.add(
                "invalid_prompt", node_id, "", "", "node has no class_type",
                'expected {"class_type": ..., "inputs": {...}}',
            )  # fmt: skip
            continue
        spec = catalogue.nodes.get(class_type)
        if spec is None:
            near = _near(class_type, catalogue.nodes)
            report.add(
                "missing_node_type", node_id, class_type[:100], "",
                f"class {_text(class_type)} is not in the catalogue", near,
            )  # fmt: skip
            continue
        given = node.get("inputs", {})
        if not isinstance(given, dict):
            report.add(
                "invalid_prompt", node_id, class_type, "",
                f"inputs is {_name(given)}, expected an object",
            )  # fmt: skip
            given = {}
        specs[node_id] = spec
        inputs[node_id] = {
            name: _ref(value) if isinstance(value, (list, tuple)) else value
            for name, value in given.items()
            if isinstance(name, str)
        }
    return specs, inputs


def _ref(value: Sequence[Any]) -> Any:
    """A link, or the value itself where it is no well-formed one."""
    if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return Link(value[0], value[1])
    return value


def _order(
    outputs: Iterable[str], links: dict[str, list[str]]
) -> tuple[list[str], set[str], set[str]]:
    """Reachable nodes each after its sources, the set of them, and those on a cycle."""
    order: list[str] = []
    state: dict[str, int] = {}
    cyclic: set[str] = set()
    for output in outputs:
        path: list[str] = []
        todo: list[tuple[str, Iterator[str]]] = []

        def enter(node_id: str, path: list[str] = path, todo: list = todo) -> None:
            state[node_id] = 1
            path.append(node_id)
            todo.append((node_id, iter(links[node_id])))

        if output not in state:
            enter(output)
        while todo:
            node_id, sources = todo[-1]
            source = next(sources, None)
            if source is None:
                todo.pop()
                path.pop()
                state[node_id] = 2
                order.append(node_id)
            elif source not in state:
                enter(source)
            elif state[source] == 1 and source not in cyclic:
                cyclic.update(path[path.index(source) :])
    return order, set(state), cyclic


def _check_node(
    node_id: str,
    specs: dict[str, NodeSpec],
    inputs: dict[str, dict[str, Any]],
    api: dict,
    catalogue: Catalogue,
    report: _Report,
) -> None:
    spec, given = specs[node_id], inputs[node_id]
    known = spec.by_name
    for name in given:
        if name not in known:
            report.add(
                "unknown_input", node_id, spec.class_type, name,
                "the class has no such input; the server ignores it",
                _near(name, known), WARNING,
            )  # fmt: skip
    for item in spec.inputs:
        if item.name not in given:
            if item.required:
                hint = "" if item.default is None else f"the default is {_text(item.default)}"
                report.add(
                    "required_input_missing", node_id, spec.class_type, item.name,
                    f"required input of type {item.type} is missing", hint,
                )  # fmt: skip
            continue
        value = given[item.name]
        if type(value) is Link:
            _check_link(node_id, item, value, specs, api, report)
        elif isinstance(value, (list, tuple)):
            report.add(
                "bad_linked_input", node_id, spec.class_type, item.name,
                f"got a list {_text(value)}", "a link is [node id as a string, slot as an integer]",
            )  # fmt: skip
        elif item.is_link:
            if item.type.startswith("COMFY_") or item.type == "*" or value is None:
                severity = ERROR if value is None and item.required else WARNING
            else:
                severity = ERROR
            report.add(
                "literal_for_link", node_id, spec.class_type, item.name,
                f"got {_text(value)}, expected a link to an output of type {item.type}",
                "", severity,
            )  # fmt: skip
        else:
            for kind, message, suggestion, severity in _check_literal(item, value, catalogue):
                report.add(kind, node_id, spec.class_type, item.name, message, suggestion, severity)


def _check_link(
    node_id: str,
    item: InputSpec,
    link: Link,
    specs: dict[str, NodeSpec],
    api: dict,
    report: _Report,
) -> None:
    class_type = specs[node_id].class_type
    source = specs.get(link.node)
    if source is None:
        # A node that exists but could not be read has its own problem already.
        reason = "could not be read" if link.node in api else "does not exist"
        report.add(
            "bad_linked_input", node_id, class_type, item.name,
            f"link to node {_text(link.node)}, which {reason}", _near(link.node, specs),
        )  # fmt: skip
        return
    if not 0 <= link.slot < len(source.outputs):
        report.add(
            "bad_linked_input", node_id, class_type, item.name,
            f"output {_text(link.slot)} of {source.class_type}, which has {len(source.outputs)}",
        )  # fmt: skip
        return
    received = source.outputs[link.slot]
    if not _accepts(item.type, received):
        fitting = [str(k) for k, out in enumerate(source.outputs) if _accepts(item.type, out)]
        hint = f"output {fitting[0]} of that node has this type" if fitting else ""
        report.add(
            "return_type_mismatch", node_id, class_type, item.name,
            f"got {received} from {source.class_type}, expected {item.type}", hint,
        )  # fmt: skip


def _accepts(wanted: str, received: str) -> bool:
    if wanted == received or "*" in (wanted, received):
        return True
    if "COMFY_MATCHTYPE_V3" in (wanted, received):
        return True
    return not set(wanted.split(",")).isdisjoint(received.split(","))


def _check_literal(
    item: InputSpec, value: Any, catalogue: Catalogue
) -> Iterator[tuple[str, str, str, str]]:
    """Problems of one literal as (type, message, suggestion, severity)."""
    options = catalogue.options(item)
    if options is not None:
        if not (isinstance(value, str) and value in options) and not any(
            value == option and type(value) is type(option) for option in options
        ):
            near = _near(value, options) if isinstance(value, str) else ""
            where = f"installed in {item.folder}" if item.folder else "among the options"
            if not near and options:
                near = f"use one of: {', '.join(_text(option) for option in options[:6])}"
            yield "value_not_in_list", f"{_text(value)} is not {where}", near, ERROR
        return
    if item.type in _NUMBERS:
        yield from _check_number(item, value)
    elif item.type == "STRING" and not isinstance(value, str):
        ok = isinstance(value, (int, float))
        message = f"got {_text(value)}, expected a string"
        kind = "coerced_value" if ok else "invalid_input_type"
        yield kind, message, "", WARNING if ok else ERROR
    elif item.type == "BOOLEAN" and not isinstance(value, bool):
        ok = isinstance(value, (int, float, str))
        message = f"got {_text(value)}, expected true or false; any non-empty text is true"
        yield "coerced_value" if ok else "invalid_input_type", message, "", WARNING if ok else ERROR


def _check_number(item: InputSpec, value: Any) -> Iterator[tuple[str, str, str, str]]:
    cast = _NUMBERS[item.type]
    try:
        number = cast(value)
        finite = math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        number, finite = 0, False
    if not finite:
        message = f"got {_text(value)}, expected {item.type}"
        yield "invalid_input_type", message, _default(item), ERROR
        return
    if isinstance(value, bool) or number != value:
        yield "coerced_value", f"{_text(value)} is read as {_text(number)}", "", WARNING
    if item.min is not None and number < item.min:
        message = f"{_text(number)} is below the least value {item.min}"
        yield "value_smaller_than_min", message, f"use {item.min}", ERROR
    elif item.max is not None and number > item.max:
        message = f"{_text(number)} is above the greatest value {item.max}"
        yield "value_bigger_than_max", message, f"use {item.max}", ERROR
    elif item.step and abs(number) < 1e12:
        start = item.min or 0
        steps = (number - start) / item.step
        if abs(steps - round(steps)) > 1e-6 * max(1.0, abs(steps)):
            nearest = cast(round(start + round(steps) * item.step, 10))
            message = f"{_text(number)} is not a step of {item.step} from {start}"
            yield "off_step", message, f"nearest is {nearest}", WARNING


def _default(item: InputSpec) -> str:
    return "" if item.default is None else f"the default is {_text(item.default)}"


def _near(value: Any, options: Iterable[Any]) -> str:
    """A hint at the option most like `value`, or "". Folders before a file name do not count."""
    if not isinstance(value, str) or len(value) > 200:
        return ""
    names = [option for option in options if isinstance(option, str)][:2000]
    tail = value.replace("\\", "/").rsplit("/", 1)[-1]
    same = [name for name in names if name.replace("\\", "/").rsplit("/", 1)[-1] == tail]
    found = same or difflib.get_close_matches(value, names, 1, 0.6)
    return f"did you mean {found[0]}?" if found else ""


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _text(value: Any) -> str:
    """At most 80 characters of a value, whatever it is."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:77] + "..."
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= 4:
        inner = ("..." if isinstance(v, (list, tuple, dict)) else _text(v) for v in value)
        return f"[{', '.join(inner)}]"
    return f"{_name(value)} of {len(value)}" if hasattr(value, "__len__") else _name(value)
