"""Policies from the folders that training wrote, whatever model they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.designer.config import LanguageModelConfig, PolicyConfig
from flowloom.designer.policy import Policy
from flowloom.workflow import Catalogue, Vocabulary


def build_policy(
    config: PolicyConfig | LanguageModelConfig,
    *,
    vocabulary: Vocabulary,
    catalogue: Catalogue,
    texts: Sequence[str],
    seed: int,
) -> Policy:
    """A designer before any training.

    Args:
        config: What it is: the embedded model by size, or a pretrained language model.
        vocabulary: Workflow tokens.
        catalogue: Facts about them: a language model starts from their descriptions.
        texts: Prompts that the embedded model's tokenizer is fitted to.
        seed: Seed of fresh weights.
    """
    if isinstance(config, PolicyConfig):
        return Policy(config, WordTokenizer.fit(texts), vocabulary.size, seed)
    raise NotImplementedError("a language model as the designer is not built yet")


def load_policy(designer_dir: Path, adapter_dir: Path | None = None) -> Policy:
    """The policy of a designer folder, with the tuned weights of an adapter folder if given.

    Raises:
        ValueError: If the adapter was tuned from another designer.
    """
    return Policy.load(designer_dir, adapter_dir)


def load_pair(designer_dir: Path, adapter_dir: Path | None = None) -> tuple[Policy, Policy]:
    """Tuned policy and its reference, the policy before tuning; without an adapter equal.

    Raises:
        ValueError: If the adapter was tuned from another designer.
    """
    return load_policy(designer_dir, adapter_dir), load_policy(designer_dir)
