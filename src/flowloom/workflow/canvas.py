"""The editor's format (what people save and share) to a workflow and back (COMFYUI.md 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import Workflow


class CanvasError(ValueError):
    """A file of the editor cannot be converted; the message says what, where, got, expected."""

    def __init__(self, message: str, missing: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        """(node id, class) of every node whose class the catalogue lacks."""


@dataclass(frozen=True)
class Converted:
    """A workflow read from the editor's format."""

    workflow: Workflow
    warnings: tuple[str, ...] = ()
    """What the editor would have done that a conversion cannot: random choices in prompts."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Titles that people gave to nodes, by node id."""


def is_ui(value: Any) -> bool:
    """Whether parsed JSON looks like the editor's format (a list `nodes`), not the API format."""
    return isinstance(value, dict) and isinstance(value.get("nodes"), list)


def from_ui(ui: Any, catalogue: Catalogue) -> Converted:
    """Convert a workflow of the editor to one that a server takes.

    Raises:
        CanvasError: `ui` is malformed, or has nodes of classes that the catalogue lacks (all of
            them are named).
    """
    raise NotImplementedError


def to_ui(
    workflow: Workflow, catalogue: Catalogue, titles: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Lay a workflow out as a file that the editor opens.

    Args:
        workflow: Every class must be in the catalogue.
        catalogue: Node facts: which inputs are slots and which widgets, and their order.
        titles: Node titles by id, where they differ from the class name.

    Raises:
        CanvasError: a class is not in the catalogue.
    """
    raise NotImplementedError
