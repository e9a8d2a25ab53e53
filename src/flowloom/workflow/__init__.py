"""What a workflow is: graph, catalogue, validation, vocabulary, codec, grammar, random and mutated flows.

Names are loaded on first use; nothing here imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Link": "graph",
    "Node": "graph",
    "Workflow": "graph",
    "WorkflowError": "graph",
    "Catalogue": "catalogue",
    "CatalogueError": "catalogue",
    "InputSpec": "catalogue",
    "ModelFile": "catalogue",
    "NodeSpec": "catalogue",
    "Problem": "validation",
    "validate": "validation",
    "Vocabulary": "vocabulary",
    "CodecError": "codec",
    "Encoded": "codec",
    "decode": "codec",
    "encode": "codec",
    "Grammar": "grammar",
    "GrammarError": "grammar",
    "random_workflows": "sampling",
    "mutate": "mutation",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
