"""A workflow as a file that the editor opens: layers of nodes from left to right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import Workflow


def to_ui(
    workflow: Workflow, catalogue: Catalogue, titles: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Lay a workflow out as a file that the editor opens.

    Args:
        workflow: Every class must be in the catalogue.
        catalogue: Node facts: which inputs are slots and which literals, and their order.
        titles: Node titles by id, where they differ from the class name.

    Raises:
        CanvasError: a class is not in the catalogue.
    """
    raise NotImplementedError
