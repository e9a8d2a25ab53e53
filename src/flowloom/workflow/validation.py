"""Every problem of a workflow at once, without a server.

Error types are ComfyUI's own where it has one; the rest are things it accepts and fails on later.
Written without the codec and the grammar, which are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowloom.workflow.catalogue import Catalogue, InputSpec
from flowloom.workflow.graph import Link, Node, Workflow
from flowloom.workflow.inputs import LITERAL_TYPES
from flowloom.workflow.literals import (
    ERROR,
    WARNING,
    accepts,
    kind_name,
    literal_faults,
    shown,
    takes_any,
)
from flowloom.workflow.plans import Plan, plans_of
from flowloom.workflow.soundness import cost_problems, family_problems
from flowloom.workflow.suggestions import Suggestions
from flowloom.workflow.wasted import pass_problems

MAX_NODES = 10_000
MAX_PROBLEMS = 10_000
# Outputs to suggest before others, and numbers that may have been meant as the id of a node.
_SAVING, _MAX_ID = ("SaveImage", "PreviewImage"), 1 << 63
_LISTS = frozenset({Link, list, tuple})


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
    fixes: tuple[Any, ...] = ()
    """Values (a `Link` for a link) that would mend the input, best first."""


class _Graph:
    """A graph being judged: nodes of known classes, and the problems found so far."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.plans: dict[str, Plan] = {}
        self.inputs: dict[str, Mapping[str, Any]] = {}
        """Of nodes with a plan, and of those whose class is not known."""
        self.unreadable: dict[str, str] = {}
        """Class of each node that has no plan, or whose inputs could not be read."""
        self.order: list[str] = []
        self.problems: list[Problem] = []
        self._suggestions: Suggestions | None = None

    @property
    def suggest(self) -> Suggestions:
        if self._suggestions is None:
            self._suggestions = Suggestions(self.catalogue, self.plans, self.inputs, self.order)
        return self._suggestions

    def add(
        self,
        kind: str,
        node_id: Any,
        name: Any,
        message: str,
        suggestion: str = "",
        severity: str = ERROR,
        fixes: tuple[Any, ...] = (),
    ) -> None:
        """Take down a problem of a node, or of the whole graph with the id ""."""
        if len(self.problems) > MAX_PROBLEMS:
            return
        if len(self.problems) == MAX_PROBLEMS:
            message = f"more than {MAX_PROBLEMS} problems; the rest is not listed"
            self.problems.append(Problem("resource_bound", ERROR, "", "", "", message))
            return
        plan = self.plans.get(node_id) if isinstance(node_id, str) else None
        class_type = self.unreadable.get(node_id, "") if plan is None else plan.class_type
        self.problems.append(
            Problem(
                kind, severity, shown(node_id), class_type[:100], shown(name), message,
                suggestion, fixes,
            )
        )  # fmt: skip


def validate(workflow: Any, catalogue: Catalogue) -> list[Problem]:
    """Find every problem of a workflow.

    Args:
        workflow: A `Workflow`, or what was read as API JSON (anything at all; this never raises).
        catalogue: Node facts, installed files and limits to judge by.

    Returns:
        Problems, errors of the whole graph first, then node by node; after `MAX_PROBLEMS` one more
        that says so. The workflow is valid if none has severity "error".
    """
    graph = _Graph(catalogue)
    nodes = workflow.nodes if isinstance(workflow, Workflow) else workflow
    if not isinstance(nodes, dict):
        graph.add("invalid_prompt", "", "", f"got {kind_name(nodes)}, expected nodes by id")
        return graph.problems
    if len(nodes) > MAX_NODES:
        got = f"got {len(nodes)} nodes, expected at most {MAX_NODES}"
        graph.add("resource_bound", "", "", got)
        return graph.problems

    _read_nodes(nodes, graph)
    plans, inputs = graph.plans, graph.inputs
    outputs = [node_id for node_id, plan in plans.items() if plan.spec.output_node]
    # A class that is not known may save a picture, or stand between one that does and its sources.
    unknown = [node_id for node_id in inputs if node_id not in plans]
    if not outputs and not unknown:
        classes = dict.fromkeys((*_SAVING, *sorted(catalogue.output_classes)))
        saving = [name for name in classes if name in catalogue.output_classes][:2]
        hint = f"add {' or '.join(saving)}" if saving else ""
        graph.add("prompt_no_outputs", "", "", "no output node", hint)
    sources = {
        node_id: [
            source
            for value in given.values()
            if type(value) in _LISTS
            and (source := value.node if type(value) is Link else _meant(value)) in inputs
        ]
        for node_id, given in inputs.items()
    }
    order, has_cycle = _order([*outputs, *unknown], sources)
    cyclic = _cyclic(order, sources) if has_cycle else frozenset()
    reached = set(order)
    graph.order.extend(node_id for node_id in order if node_id in plans)
    for node_id, plan in plans.items():
        if node_id not in reached:
            graph.add(
                "unreachable_node", node_id, "",
                "no output uses this node; the server will not run it",
                "remove it or link it", WARNING,
            )  # fmt: skip
            continue
        if node_id in cyclic:
            graph.add("dependency_cycle", node_id, "", "this node depends on itself")
        if not plan.is_clean(inputs[node_id], plans):
            _check_node(node_id, plan, inputs[node_id], graph)
    for fault in family_problems(graph.order, plans, inputs, catalogue):
        graph.add("family_mismatch", fault.node_id, *fault[2:5], fixes=fault.fixes)
    for fault in cost_problems(graph.order, plans, inputs, catalogue.limits):
        graph.add("resource_bound", fault.node_id, *fault[2:5], fixes=fault.fixes)
    for fault in pass_problems(graph.order, plans, inputs):
        graph.add("wasted_pass", fault.node_id, *fault[2:5], WARNING)
    return graph.problems


def is_valid(workflow: Any, catalogue: Catalogue) -> bool:
    """Whether `validate` finds no error."""
    return not any(problem.severity == ERROR for problem in validate(workflow, catalogue))


def _read_nodes(nodes: Mapping[Any, Any], graph: _Graph) -> None:
    """Fill in plans and inputs of readable nodes of known classes, links told from literals."""
    known, plans = graph.catalogue.nodes, plans_of(graph.catalogue)
    for node_id, node in nodes.items():
        if not isinstance(node_id, str):
            graph.add("invalid_prompt", node_id, "", f"id is {kind_name(node_id)}, not a string")
            continue
        if type(node) is Node:
            class_type, given = node.class_type, node.inputs
        elif isinstance(node, dict):
            class_type, given = node.get("class_type"), node.get("inputs", {})
        else:
            class_type, given = None, {}
        if not isinstance(class_type, str):
            graph.unreadable[node_id] = ""
            expected = 'expected {"class_type": ..., "inputs": {...}}'
            graph.add("invalid_prompt", node_id, "", "node has no class_type", expected)
            continue
        spec = known.get(class_type)
        if spec is None:
            graph.unreadable[node_id] = class_type
            graph.inputs[node_id] = _read_inputs(given) if isinstance(given, Mapping) else {}
            near = graph.suggest.spelling(class_type, known)
            graph.add(
                "missing_node_type", node_id, "",
                f"class {shown(class_type)} is not in the catalogue",
                f"did you mean {near[0]}?" if near else "",
            )  # fmt: skip
            continue
        if not isinstance(given, dict):
            graph.unreadable[node_id] = class_type
            got = f"inputs is {kind_name(given)}, expected an object"
            graph.add("invalid_prompt", node_id, "", got)
            given = {}
        given = _read_inputs(given)
        graph.plans[node_id] = plans.plan(spec, given)
        graph.inputs[node_id] = given


def _read_inputs(given: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        name: _ref(value) if isinstance(value, (list, tuple)) else value
        for name, value in given.items()
        if isinstance(name, str)
    }


def _ref(value: Sequence[Any]) -> Any:
    """A link, or the value itself where it is no well-formed one."""
    if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return value if type(value) is Link else Link(value[0], value[1])
    return tuple(value) if type(value) is Link else value


def _meant(value: Sequence[Any]) -> str:
    """Id of the node that a broken link such as ``[6, 0]`` may mean, or ""."""
    source = value[0] if len(value) == 2 else ""
    if type(source) is int and abs(source) < _MAX_ID:
        return str(source)
    return source if isinstance(source, str) else ""


def _order(outputs: Iterable[str], sources: Mapping[str, list[str]]) -> tuple[list[str], bool]:
    """Nodes that the outputs reach, each after its sources, and whether there is a cycle."""
    order: list[str] = []
    done: dict[str, bool] = {}
    has_cycle = False
    for output in outputs:
        stack = [output]
        while stack:
            node_id = stack[-1]
            if node_id not in done:
                done[node_id] = False
                for source in reversed(sources[node_id]):
                    if source not in done:
                        stack.append(source)
                    elif not done[source]:
                        has_cycle = True
            else:
                stack.pop()
                if not done[node_id]:
                    done[node_id] = True
                    order.append(node_id)
    return order, has_cycle


def _cyclic(order: list[str], sources: Mapping[str, list[str]]) -> frozenset[str]:
    """Nodes on a cycle: strongly connected components of more than one node, and self-links.

    Args:
        order: Nodes in the order in which a depth-first search left them.
        sources: Links of each node (Kosaraju's second pass walks them backwards).
    """
    readers: dict[str, list[str]] = {node_id: [] for node_id in order}
    for node_id in order:
        for source in sources[node_id]:
            readers[source].append(node_id)
    seen: set[str] = set()
    cyclic: set[str] = set()
    for node_id in reversed(order):
        component, todo = [], [node_id]
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                component.append(one)
                todo.extend(readers[one])
        if len(component) > 1 or (component and node_id in sources[node_id]):
            cyclic.update(component)
    return frozenset(cyclic)


def _check_node(node_id: str, plan: Plan, given: Mapping[str, Any], graph: _Graph) -> None:
    """Every problem of a node's own inputs."""
    for name in given:
        if name not in plan.by_name:
            _unknown_input(node_id, plan, name, graph)
    for item in plan.inputs:
        if item.name not in given:
            if item.required:
                _missing_input(node_id, item, graph)
            continue
        value = given[item.name]
        if type(value) is Link:
            _check_link(node_id, item, value, graph)
        elif isinstance(value, (list, tuple)):
            _broken_link(node_id, item, value, graph)
        else:
            for fault in literal_faults(item, value, graph.catalogue):
                hint, fixes = fault.suggestion, fault.fixes
                if fault.near:
                    hint, fixes = graph.suggest.options(item, value)
                elif fault.type == "literal_for_link" and fault.severity == ERROR:
                    hint, fixes = graph.suggest.output_of(node_id, item)
                message, severity = fault.message, fault.severity
                graph.add(fault.type, node_id, item.name, message, hint, severity, fixes)


def _broken_link(node_id: str, item: InputSpec, value: Sequence[Any], graph: _Graph) -> None:
    """A list that is no well-formed link."""
    hint, fixes = "a link is [node id as a string, slot as an integer]", ()
    if item.multiselect or item.widget:
        hint = 'a list that is no link is written {"__value__": [...]}'
    elif item.is_link:
        _, fixes = graph.suggest.output_of(node_id, item, _meant(value))
        if fixes:
            hint += f', such as ["{shown(fixes[0].node)}", {fixes[0].slot}]'
    got = f"got a list {shown(value)}"
    graph.add("bad_linked_input", node_id, item.name, got, hint, ERROR, fixes)


def _unknown_input(node_id: str, plan: Plan, name: str, graph: _Graph) -> None:
    above, _, short = name.rpartition(".")
    growing, choice = plan.spec.by_name.get(above or name), plan.by_name.get(above)
    branches = () if choice is None else choice.branches
    keys = [shown(key) for key, inner in branches if any(item.name == short for item in inner)]
    if growing is not None and growing.element is not None:
        hint = f"inputs of {growing.name} are {growing.name}.{growing.names[0]} and so on"
    elif keys:
        hint = f"it goes with {above} = {' or '.join(keys[:3])}"
    else:
        near = graph.suggest.spelling(name, plan.by_name)
        hint = f"did you mean {near[0]}?" if near else ""
    message = "the class has no such input; the server ignores it"
    graph.add("unknown_input", node_id, name, message, hint, WARNING)


def _missing_input(node_id: str, item: InputSpec, graph: _Graph) -> None:
    hint, fixes = "", ()
    if item.default is not None:
        hint, fixes = f"the default is {shown(item.default)}", (item.default,)
    elif graph.catalogue.options(item):
        hint, fixes = graph.suggest.options(item, None)
    elif item.type not in LITERAL_TYPES and not takes_any(item):
        hint, fixes = graph.suggest.output_of(node_id, item)
    message = f"required input of type {item.type} is missing"
    graph.add("required_input_missing", node_id, item.name, message, hint, ERROR, fixes)


def _check_link(node_id: str, item: InputSpec, link: Link, graph: _Graph) -> None:
    source = graph.plans.get(link.node)
    if source is None:
        if link.node in graph.unreadable:
            # That node has a problem of its own; where it is mended, the link may be right.
            return
        message = f"link to node {shown(link.node)}, which does not exist"
        hint, fixes = graph.suggest.output_of(node_id, item)
        graph.add("bad_linked_input", node_id, item.name, message, hint, ERROR, fixes)
        return
    if not 0 <= link.slot < len(source.outputs):
        has = f"which has {len(source.outputs)}"
        message = f"output {shown(link.slot)} of {source.class_type}, {has}"
        hint, fixes = graph.suggest.output_of(node_id, item, link.node)
        graph.add("bad_linked_input", node_id, item.name, message, hint, ERROR, fixes)
        return
    received = source.outputs[link.slot]
    if not accepts(item.type, received):
        message = f"got {received} from {source.class_type}, expected {item.type}"
        hint, fixes = graph.suggest.output_of(node_id, item, link.node)
        graph.add("return_type_mismatch", node_id, item.name, message, hint, ERROR, fixes)
