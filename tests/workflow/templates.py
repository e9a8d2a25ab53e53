"""Real workflows of the editor, from the installed template package, converted once per process.

Facts: the package holds 644 files in the editor's format; 230 of them use only classes of the 0.33
catalogue once subgraphs are opened and the editor's own nodes are resolved.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowloom.workflow.canvas import CanvasError, Converted, from_ui
from flowloom.workflow.catalogue import Catalogue, ModelFile
from flowloom.workflow.graph import Workflow
from flowloom.workflow.inputs import active_inputs

ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "data" / "catalogues" / "comfyui-0.33.json.gz"


def template_folder() -> Path:
    """Where the package keeps its files."""
    found = find_spec("comfyui_workflow_templates_json")
    if found is None or found.origin is None:
        raise FileNotFoundError("package comfyui-workflow-templates-json is not installed")
    return Path(found.origin).parent / "templates"


@cache
def load_templates() -> dict[str, Any]:
    """Parsed files in the editor's format by name; the package's index files are left out."""
    parsed = {
        path.stem: json.loads(path.read_text()) for path in sorted(template_folder().glob("*.json"))
    }
    return {name: ui for name, ui in parsed.items() if isinstance(ui, dict) and "nodes" in ui}


@cache
def load_server() -> Catalogue:
    """The catalogue of a 0.33 server without any model file."""
    return Catalogue.load(CATALOGUE)


@cache
def conversions() -> dict[str, Converted | CanvasError]:
    """What `from_ui` makes of every template, by name."""
    catalogue, results = load_server(), {}
    for name, ui in load_templates().items():
        try:
            results[name] = from_ui(ui, catalogue)
        except CanvasError as error:
            results[name] = error
    return results


@cache
def converted() -> dict[str, Workflow]:
    """The templates that the catalogue's classes suffice for, by name."""
    return {
        name: result.workflow
        for name, result in conversions().items()
        if isinstance(result, Converted)
    }


@cache
def load_catalogue() -> Catalogue:
    """The 0.33 catalogue with every model file and picture that the converted templates name."""
    server = load_server()
    files = {
        (item.folder, value): ModelFile(item.folder, value, "", "")
        for workflow in converted().values()
        for node in workflow.nodes.values()
        for item in active_inputs(server.nodes[node.class_type], node.inputs)
        for value in [node.inputs.get(item.name)]
        if item.folder is not None and isinstance(value, str) and value
    }
    return server.with_files(files.values())
