"""What a server accepts and fails on later: mixed model families, and graphs that cost too much.

Part of `validation`, and as it is written without the codec and the grammar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flowloom.workflow.catalogue import Catalogue, Limits
from flowloom.workflow.graph import Link
from flowloom.workflow.literals import unwrapped
from flowloom.workflow.plans import FAMILY_TYPES, SIZED_TYPES, Plan

# Classes whose batch_size is the most that a part may hold; they make nothing new.
_REGROUPING = frozenset({"RebatchImages", "RebatchLatents"})


class Unsound(NamedTuple):
    """What is wrong where; empty strings for the graph as a whole."""

    node_id: str
    class_type: str
    input: str
    message: str
    suggestion: str = ""
    fixes: tuple[Any, ...] = ()


Plans = Mapping[str, Plan]
Inputs = Mapping[str, Mapping[str, Any]]


def family_problems(
    order: Iterable[str], plans: Plans, inputs: Inputs, catalogue: Catalogue
) -> Iterator[Unsound]:
    """Each node's own file and all it links to by a family's type must be of one family.

    Files of family "" go with any.

    Args:
        order: Node ids, each after those it links to.
        plans: What is known of each node's class.
        inputs: Input values of each node by name, links as `Link`.
        catalogue: The installed files.
    """
    if len(catalogue.families) < 2:
        return
    family: dict[str, str] = {}
    for node_id in order:
        plan, given = plans[node_id], inputs[node_id]
        found: dict[str, str] = {}
        for item in plan.inputs:
            value = given.get(item.name)
            if type(value) is Link:
                name = family.get(value.node)
                if name and _output(value, plans) in FAMILY_TYPES and name not in found:
                    found[name] = item.name
            elif item.folder is not None and isinstance(value, str):
                file = catalogue.file(item.folder, value)
                if file is not None and file.family and file.family not in found:
                    found[file.family] = item.name
        if len(found) > 1:
            (first, first_input), (other, other_input) = list(found.items())[:2]
            folder = plan.files.get(other_input)
            files = catalogue.files_in(folder) if folder is not None else ()
            yield Unsound(
                node_id,
                plan.class_type,
                other_input,
                f"{other_input} is of family {other}, {first_input} of family {first}",
                f"use a {first} file for {other_input}",
                tuple(file.name for file in files if file.family == first)[:5],
            )
        if found:
            family[node_id] = next(iter(found))


def cost_problems(
    order: Iterable[str], plans: Plans, inputs: Inputs, limits: Limits
) -> Iterator[Unsound]:
    """Pixels, batch, and pixels x batch x steps, followed from node to node.

    A picture is as large as the largest one that its node reads; "width" and "height" set it where
    none is read or where the node scales (it has an upscale_method), and "scale_by" or an upscale
    model scales it. A sampler takes the steps that its schedule was made with.
    """
    steps: dict[str, float] = {}
    pixels: dict[str, float] = {}
    batch: dict[str, float] = {}
    for node_id in order:
        plan = plans[node_id]
        if not plan.sized:
            continue
        most, most_batch, values = 0.0, 0.0, inputs[node_id]
        for value in values.values():
            if (
                type(value) is Link
                and value.node in pixels
                and _output(value, plans) in SIZED_TYPES
            ):
                most = max(most, pixels[value.node])
                most_batch = max(most_batch, batch[value.node])
        area = most
        count = most_batch = most_batch or 1.0
        if plan.sizes:
            if (
                "width" in values
                and "height" in values
                and (most == 0 or "upscale_method" in values)
            ):
                area = _size(values["width"], plans, inputs) * _size(
                    values["height"], plans, inputs
                )
            if "scale_by" in values:
                area *= _size(values["scale_by"], plans, inputs) ** 2
            if "batch_size" in values and plan.class_type not in _REGROUPING:
                count = _size(values["batch_size"], plans, inputs)
        area *= plan.scale**2
        num_steps = _steps(plan, values, plans, inputs, steps)
        if plan.schedules:
            steps[node_id] = num_steps
        elif num_steps:
            work = area * count * num_steps
            if work > limits.work:
                message = (
                    f"pixels x batch x steps is {work:.3g}, expected at most {limits.work:.3g}"
                )
                hint = "fewer steps, a smaller picture or a smaller batch"
                name = "steps" if "steps" in values else "sigmas"
                yield Unsound(node_id, plan.class_type, name, message, hint)
        pixels[node_id], batch[node_id] = area, count
        # Only where a bound is first exceeded: what follows is no fault of its own.
        if area > limits.pixels >= most:
            message = f"picture of {area:.0f} pixels, expected at most {limits.pixels}"
            yield Unsound(node_id, plan.class_type, "", message)
        if count > limits.batch >= most_batch:
            message = f"batch of {count:.0f}, expected at most {limits.batch}"
            fix = int(limits.batch)
            yield Unsound(node_id, plan.class_type, "batch_size", message, f"use {fix}", (fix,))


def _steps(
    plan: Plan,
    values: Mapping[str, Any],
    plans: Plans,
    inputs: Inputs,
    known: Mapping[str, float],
) -> float:
    """Steps that a node says itself or reads in a schedule, 0 where it does neither."""
    if "steps" in values and plan.sizes:
        return _size(values["steps"], plans, inputs)
    if not plan.scheduled:
        return 0.0
    links = (v for v in values.values() if type(v) is Link and _output(v, plans) == "SIGMAS")
    return max((known.get(link.node, 0.0) for link in links), default=0.0)


def _output(link: Link, plans: Plans) -> str:
    """Type of the output that a link reads, or ""."""
    outputs = plans[link.node].outputs if link.node in plans else ()
    return outputs[link.slot] if 0 <= link.slot < len(outputs) else ""


def _size(value: Any, plans: Plans, inputs: Inputs) -> float:
    """A literal as a size, also one that a primitive node holds; 1 where it is not known.

    It is not known where it is no number, beyond any bound of its input, or computed by a node.
    """
    if type(value) is Link and value.node in plans:
        held = plans[value.node].by_name
        value = inputs[value.node].get("value") if set(held) == {"value"} else None
    value = unwrapped(value)
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            return 1.0
    usable = isinstance(value, (int, float)) and 0 < value < 1e12
    return float(value) if usable else 1.0
