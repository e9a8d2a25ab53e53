"""What a node class takes and gives: its inputs, also those that depend on values, and its outputs.

Two kinds of input grow out of others. A *choice* (ComfyUI's dynamic combo) is a COMBO whose options
bring inputs of their own, named ``choice.inner``. A *growing* input (autogrow) is up to N inputs of
one kind, named ``growing.name0`` and so on. `active_inputs` lists what a node has for given values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from flowloom.workflow.graph import json_fault

CHOICE, GROWING, MATCH = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "COMFY_MATCHTYPE_V3"
LITERAL_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})


@dataclass(frozen=True)
class InputSpec:
    """One input of a class."""

    name: str
    """As in API JSON; dotted below a choice or a growing input once `active_inputs` gave it."""
    type: str
    """What it takes: "INT", "MODEL", "*", or several types separated by commas."""
    required: bool = True
    default: Any = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    options: tuple[Any, ...] | None = None
    """Choices of a COMBO; the keys of a choice."""
    folder: str | None = None
    """The model folder whose files are the choices, instead of `options`."""
    multiline: bool = False
    widget: bool = False
    """A literal of a type that only the editor knows (COLOR, CURVE, ...): any JSON."""
    force_input: bool = False
    """Shown as a socket only; a literal is still taken by the server."""
    control: bool = False
    """The editor stores one more value behind it: what happens to a seed after a run."""
    upload: bool = False
    """The editor stores one more value behind it: the upload button."""
    multiselect: bool = False
    """The value is a list of options."""
    branches: tuple[tuple[str, tuple[InputSpec, ...]], ...] = ()
    """Of a choice: the inputs that each key brings, with names still undotted."""
    element: InputSpec | None = None
    """Of a growing input: what each of its inputs is like."""
    names: tuple[str, ...] = ()
    """Of a growing input: undotted names of its inputs, in order."""
    min_count: int = 0
    """Of a growing input: how many of its inputs are required."""
    dynamic_prompt: bool = False
    """The editor draws one of `{a|b}` at random and strips comments before it sends the text."""

    @property
    def is_link(self) -> bool:
        """Whether the input is a socket; else a literal, which may still be linked."""
        if self.type in LITERAL_TYPES:
            return self.force_input
        return not (self.widget or self.type in (CHOICE, GROWING))

    @property
    def literal_type(self) -> str:
        """INT, FLOAT, STRING, BOOLEAN, COMBO; JSON for an editor's own type; "" for a socket."""
        if self.type in LITERAL_TYPES:
            return self.type
        if self.type == CHOICE:
            return "COMBO"
        if not self.widget:
            return ""
        return next((kind for kind in self.type.split(",") if kind in LITERAL_TYPES), "JSON")


@dataclass(frozen=True)
class NodeSpec:
    """One node class: inputs in schema order (required first), output types in slot order."""

    class_type: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    output_node: bool = False
    output_names: tuple[str, ...] = ()
    """Names of the outputs; empty where they are called as their types."""
    deprecated: bool = False

    @cached_property
    def by_name(self) -> dict[str, InputSpec]:
        """Inputs by name; a growing input by its own name."""
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def is_dynamic(self) -> bool:
        """Whether some of its inputs depend on values."""
        return any(spec.branches or spec.element for spec in self.inputs)


def active_inputs(spec: NodeSpec, given: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """The inputs that a node has, in schema order, with dotted names; no growing input is left.

    Args:
        spec: Class of the node.
        given: Its inputs by name. They decide which branch of a choice is open, and which inputs of
            a growing input are there beyond the required ones.
    """
    return tuple(_expand(spec.inputs, given, "")) if spec.is_dynamic else spec.inputs


def _expand(
    specs: tuple[InputSpec, ...], given: Mapping[str, Any], prefix: str, required: bool = True
) -> Iterator[InputSpec]:
    for spec in specs:
        name = prefix + spec.name
        needed = spec.required and required
        if spec.element is not None:
            for k, short in enumerate(spec.names):
                dotted = f"{name}.{short}"
                if dotted in given or (k < spec.min_count and needed):
                    counted = needed and k < spec.min_count and spec.element.required
                    yield replace(spec.element, name=dotted, required=counted)
            continue
        yield replace(spec, name=name, required=needed) if prefix else spec
        if spec.branches:
            key = given.get(name)
            inner = next((inputs for k, inputs in spec.branches if k == key), ())
            yield from _expand(inner, given, f"{name}.", needed)


_FLAGS = tuple(f.name for f in fields(InputSpec) if f.type == "bool")
_BOUNDS = ("min", "max", "step")


def spec_fault(spec: NodeSpec) -> str:
    """What is wrong with the facts of a class that was read from a file, or ""."""
    if not all(isinstance(name, str) for name in (*spec.outputs, *spec.output_names)):
        return "an output that is no text"
    if not all(isinstance(flag, bool) for flag in (spec.output_node, spec.deprecated)):
        return "output_node or deprecated is no boolean"
    found = (fault for item in spec.inputs if (fault := _input_fault(item)))
    return next(found, "")


def _input_fault(item: InputSpec) -> str:
    texts = (item.name, item.type, *item.names, *(() if item.folder is None else (item.folder,)))
    if not all(isinstance(text, str) for text in texts):
        return "an input whose name, type or folder is no text"
    where = f"input {item.name[:40]!r}"
    for flag in _FLAGS:
        if not isinstance(getattr(item, flag), bool):
            return f"{where}: {flag} is no boolean"
    for bound in _BOUNDS:
        value = getattr(item, bound)
        is_number = type(value) in (int, float) and value == value and not json_fault(value)
        if value is not None and not is_number:
            return f"{where}: {bound} is no number"
    if type(item.min_count) is not int or json_fault(item.min_count):
        return f"{where}: min_count is no integer"
    fault = json_fault([item.default, item.options])
    if fault:
        return f"{where}: default or options: {fault}"
    inner = [*(one for _, branch in item.branches for one in branch)]
    if item.element is not None:
        inner.append(item.element)
    return next((fault for one in inner if (fault := _input_fault(one))), "")
