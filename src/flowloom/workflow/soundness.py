"""What a server accepts and fails on later: mixed model families, and graphs that cost too much.

Part of `validation`, and as it is written without the codec and the grammar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flowloom.workflow.catalogue import Catalogue, InputSpec, Limits, NodeSpec
from flowloom.workflow.graph import Link

# Types that belong to one model family; pictures and masks do not.
FAMILY_TYPES = frozenset({"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "CONTROL_NET"})


# Types that have a size in pixels; a conditioning made from a picture has none.
SIZED_TYPES = frozenset({"LATENT", "IMAGE", "MASK"})


class Fault(NamedTuple):
    """What is wrong where; empty strings for the graph as a whole."""

    node_id: str
    class_type: str
    input: str
    message: str
    suggestion: str = ""


Inputs = Mapping[str, Mapping[str, Any]]


def family_problems(
    order: Iterable[str], specs: Mapping[str, NodeSpec], inputs: Inputs, catalogue: Catalogue
) -> Iterator[Fault]:
    """Each node's own file and all it links to by a family's type must be of one family.

    Args:
        order: Node ids, each after those it links to.
        specs: Class of each node.
        inputs: Input values of each node by name, links as `Link`.
        catalogue: The installed files.
    """
    family: dict[str, str] = {}
    for node_id in order:
        found: dict[str, str] = {}
        for item in specs[node_id].inputs:
            name = _family_of(item, inputs[node_id].get(item.name), specs, family, catalogue)
            if name:
                found.setdefault(name, item.name)
        if len(found) > 1:
            (first, first_input), (other, other_input) = list(found.items())[:2]
            yield Fault(
                node_id,
                specs[node_id].class_type,
                other_input,
                f"{other_input} is of family {other}, {first_input} of family {first}",
                f"use a {first} file for {other_input}",
            )
        if found:
            family[node_id] = next(iter(found))


def _family_of(
    item: InputSpec,
    value: Any,
    specs: Mapping[str, NodeSpec],
    family: Mapping[str, str],
    catalogue: Catalogue,
) -> str:
    if type(value) is Link:
        return family.get(value.node, "") if _output(value, specs) in FAMILY_TYPES else ""
    if item.folder is not None and isinstance(value, str):
        file = catalogue.file(item.folder, value)
        return "" if file is None else file.family
    return ""


def cost_problems(
    order: Iterable[str], specs: Mapping[str, NodeSpec], inputs: Inputs, limits: Limits
) -> Iterator[Fault]:
    """Pixels, batch, and pixels x batch x steps, followed from node to node.

    A picture is as large as the largest one that its node reads; "width" and "height" set it where
    none is read or where the node scales (it has an upscale_method), and "scale_by" scales it.
    """
    pixels: dict[str, float] = {}
    batch: dict[str, float] = {}
    work = 0.0
    for node_id in order:
        values, class_type = inputs[node_id], specs[node_id].class_type
        links = [value for value in values.values() if type(value) is Link]
        sources = {link.node for link in links if _output(link, specs) in SIZED_TYPES}
        most = max((pixels.get(source, 0.0) for source in sources), default=0.0)
        most_batch = max((batch.get(source, 1.0) for source in sources), default=1.0)
        area, count = most, most_batch
        if "width" in values and "height" in values and (most == 0 or "upscale_method" in values):
            area = _number(values["width"]) * _number(values["height"])
        if "scale_by" in values:
            area *= _number(values["scale_by"]) ** 2
        if "batch_size" in values:
            count = _number(values["batch_size"])
        if "steps" in values:
            work += area * count * _number(values["steps"])
        pixels[node_id], batch[node_id] = area, count
        # Only where a bound is first exceeded: what follows is no fault of its own.
        if area > limits.pixels >= most:
            message = f"picture of {area:.0f} pixels, expected at most {limits.pixels}"
            yield Fault(node_id, class_type, "", message)
        if count > limits.batch >= most_batch:
            message = f"batch of {count:.0f}, expected at most {limits.batch}"
            yield Fault(node_id, class_type, "batch_size", message, f"use {limits.batch}")
    if work > limits.work:
        message = f"pixels x batch x steps is {work:.3g}, expected at most {limits.work:.3g}"
        yield Fault("", "", "", message, "fewer steps, a smaller picture or a smaller batch")


def _output(link: Link, specs: Mapping[str, NodeSpec]) -> str:
    """Type of the output that a link reads, or ""."""
    outputs = specs[link.node].outputs if link.node in specs else ()
    return outputs[link.slot] if 0 <= link.slot < len(outputs) else ""


def _number(value: Any) -> float:
    """A literal as a size; 1 where it is linked, no number or beyond any bound of its input."""
    usable = isinstance(value, (int, float)) and 0 < value < 1e12
    return float(value) if usable else 1.0
