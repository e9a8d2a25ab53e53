"""Causal language models and their tokenizers, from a folder or the hub."""

from __future__ import annotations

import os
from typing import Any

import torch

from flowloom.designer.config import LanguageModelConfig
from flowloom.progress import no_progress_bars


def read_model(
    source: str, config: LanguageModelConfig, revision: str | None = None
) -> tuple[Any, Any]:
    """Model, in evaluation mode on its device, and tokenizer.

    Args:
        source: Folder, or name on the hub.
        config: Type of the weights, device and attention.
        revision: Commit on the hub; None takes the newest.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with no_progress_bars("transformers"):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attention,
            )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source}: expected a causal language model, got: {reason}") from error
    return torch.nn.Module.to(model, _device(config.device)).eval(), tokenizer


def _device(name: str) -> str:
    """The device of a name; `auto` is this process's GPU under torchrun."""
    if name != "auto":
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
