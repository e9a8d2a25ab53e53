"""What a workflow is: graph, catalogue, validation, vocabulary, codec, grammar, random flows.

Names are loaded on first use; nothing here imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowloom.workflow.canvas import CanvasError, Converted, from_ui, is_ui, to_ui
    from flowloom.workflow.catalogue import (
        Catalogue,
        CatalogueError,
        InputSpec,
        Limits,
        ModelFile,
        NodeSpec,
    )
    from flowloom.workflow.codec import Codec, CodecError, Encoded, decode, encode
    from flowloom.workflow.comparison import differences
    from flowloom.workflow.estimation import estimate_weights
    from flowloom.workflow.grammar import Grammar, GrammarError
    from flowloom.workflow.graph import Link, Node, Workflow, WorkflowError
    from flowloom.workflow.mutation import mutate, mutate_all
    from flowloom.workflow.png import PngError, read_chunks, write_chunks
    from flowloom.workflow.profile import text_to_image
    from flowloom.workflow.sampling import random_workflows
    from flowloom.workflow.validation import Problem, is_valid, validate
    from flowloom.workflow.vocabulary import Vocabulary, VocabularyError

__all__ = [
    "CanvasError",
    "Catalogue",
    "CatalogueError",
    "Codec",
    "CodecError",
    "Converted",
    "Encoded",
    "Grammar",
    "GrammarError",
    "InputSpec",
    "Limits",
    "Link",
    "ModelFile",
    "Node",
    "NodeSpec",
    "PngError",
    "Problem",
    "Vocabulary",
    "VocabularyError",
    "Workflow",
    "WorkflowError",
    "decode",
    "differences",
    "encode",
    "estimate_weights",
    "from_ui",
    "is_ui",
    "is_valid",
    "mutate",
    "mutate_all",
    "random_workflows",
    "read_chunks",
    "text_to_image",
    "to_ui",
    "validate",
    "write_chunks",
]

_MODULES = {
    "graph": ("Link", "Node", "Workflow", "WorkflowError"),
    "canvas": ("CanvasError", "Converted", "from_ui", "is_ui", "to_ui"),
    "catalogue": ("Catalogue", "CatalogueError", "InputSpec", "Limits", "ModelFile", "NodeSpec"),
    "codec": ("Codec", "CodecError", "Encoded", "decode", "encode"),
    "comparison": ("differences",),
    "estimation": ("estimate_weights",),
    "grammar": ("Grammar", "GrammarError"),
    "mutation": ("mutate", "mutate_all"),
    "png": ("PngError", "read_chunks", "write_chunks"),
    "profile": ("text_to_image",),
    "sampling": ("random_workflows",),
    "validation": ("Problem", "is_valid", "validate"),
    "vocabulary": ("Vocabulary", "VocabularyError"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
