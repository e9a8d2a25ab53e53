"""Where nodes go on the editor's canvas: layers from left to right, no two nodes overlapping.

Layers follow the links (longest path), the order within a layer the mean place of neighbours
(Sugiyama, Tagawa, Toda 1981). All lengths are the editor's pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowloom.workflow.editor_file import CanvasError

TITLE = 30
"""Height of a node's title, which the editor draws above the node's own rectangle."""
SLOT, WIDGET, TEXT, PREVIEW, BORDER = 22, 32, 120, 260, 16
"""Heights: a row of slots, a literal, a text of several lines, a picture, above and below."""
LETTER = 7.5
"""Width of a letter."""
COLUMN_GAP, ROW_GAP = 80, 40
_SWEEPS = 4


@dataclass(frozen=True)
class Box:
    """A node's rectangle without its title."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


def topological(sources: Mapping[str, Sequence[str]]) -> list[str]:
    """Ids, each after those it uses, else in the given order.

    Args:
        sources: Ids of the nodes that each node uses.

    Raises:
        CanvasError: they go round in a circle.
    """
    open_sources = {node: len(set(used)) for node, used in sources.items()}
    users = _users(sources)
    order = [node for node, count in open_sources.items() if count == 0]
    for node in order:
        for user in users[node]:
            open_sources[user] -= 1
            if open_sources[user] == 0:
                order.append(user)
    if len(order) < len(sources):
        stuck = next(node for node, count in open_sources.items() if count)
        raise CanvasError(
            f"canvas: node {stuck[:40]}: depends on itself; such a graph has no layers"
        )
    return order


def place(boxes: Mapping[str, Box], sources: Mapping[str, Sequence[str]]) -> dict[str, Box]:
    """Boxes with their places, in the order of `boxes`.

    Args:
        boxes: Sizes by node id.
        sources: Ids of the nodes that each node uses; no circle.

    Raises:
        CanvasError: the links go round in a circle.
    """
    layers = _layers(sources)
    _sort_layers(layers, sources)
    placed: dict[str, Box] = {}
    x = 0.0
    for layer in layers:
        bottom = 0.0
        for node in layer:
            box = boxes[node]
            around = [placed[s].y + placed[s].height / 2 for s in sources[node]]
            wanted = sum(around) / len(around) - box.height / 2 if around else 0.0
            y = max(bottom, round(wanted))
            placed[node] = Box(box.width, box.height, x, y)
            bottom = y + box.height + TITLE + ROW_GAP
        x += max(boxes[node].width for node in layer) + COLUMN_GAP
    return {node: placed[node] for node in boxes}


def _layers(sources: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Node ids by layer: as far left as the links allow, then as near to their users as possible.

    So a loader stands beside what it feeds and no link goes to the left.
    """
    order = topological(sources)
    depth: dict[str, int] = {}
    for node in order:
        depth[node] = 1 + max((depth[source] for source in sources[node]), default=-1)
    users = _users(sources)
    for node in reversed(order):
        if users[node]:
            depth[node] = min(depth[user] for user in users[node]) - 1
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in order:
        layers[depth[node]].append(node)
    return [layer for layer in layers if layer]


def _sort_layers(layers: list[list[str]], sources: Mapping[str, Sequence[str]]) -> None:
    """Order each layer by the mean place of its neighbours, in place, to and fro."""
    users = _users(sources)
    rank = {node: float(k) for layer in layers for k, node in enumerate(layer)}
    for sweep in range(_SWEEPS):
        forth = sweep % 2 == 1
        near = sources if forth else users
        for layer in layers if forth else layers[::-1]:
            mean = {
                node: sum(rank[n] for n in near[node]) / len(near[node])
                if near[node]
                else rank[node]
                for node in layer
            }
            layer.sort(key=lambda node: mean[node])
            rank.update((node, float(k)) for k, node in enumerate(layer))


def _users(sources: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {node: [] for node in sources}
    for node, used in sources.items():
        for source in dict.fromkeys(used):
            users[source].append(node)
    return users
