"""What a list of workflows has to compute: every different node once, in an order that works.

Two nodes are one where their class, their literals and what they read are the same, as in the
server's cache: so workflows share their loaders, texts, samplers and pictures up to where they
part. Inputs that a class does not have, and nodes that no output reaches, do not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flowloom.render.inputs import node_spec, parameters, value_of
from flowloom.workflow import Link, Node, Workflow


@dataclasses.dataclass(eq=False)
class Step:
    """One node to compute, for all workflows that have it."""

    where: str
    """Job, node and class, of the first job that has it."""
    function: Callable[..., Any]
    literals: dict[str, Any]
    links: dict[str, tuple[Step, int]]
    """By input: the step and the output that it reads."""
    outputs: tuple[Any, ...] | None = None
    flops: int = 0
    """Multiply-adds times two of the network calls it took."""

    @property
    def is_ready(self) -> bool:
        """Whether all that it reads is there."""
        return all(source.outputs is not None for source, _ in self.links.values())

    def inputs(self) -> dict[str, Any]:
        """What its function is called with."""
        values = dict(self.literals)
        for name, (source, slot) in self.links.items():
            assert source.outputs is not None
            values[name] = source.outputs[slot]
        return values


class Plan:
    """Steps of several workflows, each after those it reads."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]):
        """Take the function of each class."""
        self.steps: list[Step] = []
        self._functions = functions
        self._known: dict[tuple, Step] = {}
        self._read: dict[int, tuple[Node, tuple, dict[str, Any]]] = {}

    def add(self, workflow: Workflow, name: str) -> tuple[list[Step], Step]:
        """Add a workflow; its different steps, and the one that holds its picture.

        Raises:
            ValueError: A node cannot be executed as it is; names job, node, class and reason.
        """
        roots = workflow.roots()
        if not roots or not self._is_output(workflow.nodes[roots[0]].class_type):
            raise ValueError(f"job {name}: workflow: got no output node, expected a SaveImage")
        steps: dict[str, Step] = {}
        for node_id in workflow.order():
            node = workflow.nodes[node_id]
            where = f"job {name}: node {node_id} ({node.class_type})"
            try:
                steps[node_id] = self._step(where, node, steps, workflow)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return list(dict.fromkeys(steps.values())), steps[roots[0]]

    def _is_output(self, class_type: str) -> bool:
        return class_type not in self._functions or node_spec(class_type).output_node

    def _step(self, where: str, node: Node, steps: Mapping[str, Step], workflow: Workflow) -> Step:
        read = self._read.get(id(node))
        if read is None:
            # Filled workflows of one template share the nodes that hold no text and no seed.
            read = self._read[id(node)] = (node, *self._values(node))
        _, identity, values = read
        links = {
            name: self._source(name, link, node, steps, workflow)
            for name, link in values.items()
            if type(link) is Link
        }
        key = (*identity, *((id(step), slot) for step, slot in links.values()))
        if key not in self._known:
            literals = {name: value for name, value in values.items() if type(value) is not Link}
            step = Step(where, self._functions[node.class_type], literals, links)
            self.steps.append(step)
            self._known[key] = step
        return self._known[key]

    def _values(self, node: Node) -> tuple[tuple, dict[str, Any]]:
        """What tells a node from others but its sources, and its literals and links by input."""
        if node.class_type not in self._functions:
            known = ", ".join(sorted(self._functions))
            raise ValueError(f"class not known to the embedded engine, expected one of {known}")
        values = {}
        for parameter in parameters(node.class_type, self._functions[node.class_type]):
            value = value_of(node, parameter)
            if value is not None:
                values[parameter.spec.name] = value
        literals = (
            (name, None if type(value) is Link else value) for name, value in values.items()
        )
        return (node.class_type, *literals), values

    def _source(
        self, name: str, link: Link, node: Node, steps: Mapping[str, Step], workflow: Workflow
    ) -> tuple[Step, int]:
        wanted = next(i.type for i in node_spec(node.class_type).inputs if i.name == name)
        if link.node in steps:
            outputs = node_spec(workflow.nodes[link.node].class_type).outputs
            if 0 <= link.slot < len(outputs):
                if outputs[link.slot] != wanted:
                    raise ValueError(
                        f"{name}: got a link to {outputs[link.slot]}, expected one to {wanted}"
                    )
                return steps[link.node], link.slot
        raise ValueError(f"{name}: got link {list(link)}, expected an output of another node")
