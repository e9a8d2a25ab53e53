"""Policies from configurations, and from the folders that training wrote, whatever they hold.

A language model serves wherever `Policy` is asked for: both have the same methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.designer.config import LanguageModelConfig, PolicyConfig
from flowloom.designer.descriptions import describe
from flowloom.designer.policy import MODEL_RECORD, Policy
from flowloom.workflow import Catalogue, Vocabulary

if TYPE_CHECKING:
    from flowloom.designer.language_model import LanguageModelPolicy


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

    Raises:
        ValueError: There is no such language model.
    """
    if isinstance(config, PolicyConfig):
        return Policy(config, WordTokenizer.fit(texts), vocabulary.size, seed)
    from flowloom.designer.language_model import LanguageModelPolicy

    return _served(LanguageModelPolicy.build(config, describe(vocabulary, catalogue), seed))


def load_policy(designer_dir: Path, adapter_dir: Path | None = None) -> Policy:
    """The policy of a designer folder, with the tuned weights of an adapter folder if given.

    Raises:
        ValueError: If the adapter was tuned from another designer.
    """
    if not _is_language_model(designer_dir):
        return Policy.load(designer_dir, adapter_dir)
    from flowloom.designer.language_model import LanguageModelPolicy

    return _served(LanguageModelPolicy.load(designer_dir, adapter_dir))


def load_pair(designer_dir: Path, adapter_dir: Path | None = None) -> tuple[Policy, Policy]:
    """Tuned policy and its reference, the policy before tuning; without an adapter equal.

    Two embedded policies have weights of their own. Those of a language model share all of them:
    the reference is the tuned policy with its adapter off.

    Raises:
        ValueError: If the adapter was tuned from another designer.
    """
    tuned = load_policy(designer_dir, adapter_dir)
    if isinstance(tuned, Policy):
        return tuned, load_policy(designer_dir)
    if adapter_dir is None:
        tuned.make_tunable()
    return _served(tuned), _served(tuned.at_strength(0.0))


def extrapolated(tuned: Policy, reference: Policy, weight: float) -> Policy:
    """Guidance in the space of weights (arXiv 2601.04670): reference + w (tuned - reference).

    A language model's adapter counts w times: its update B A, and its scoring rows.

    Args:
        tuned: The policy after tuning.
        reference: The policy before it, of the same kind.
        weight: 0 is the reference and 1 the tuned policy, both exactly.
    """
    if not isinstance(tuned, Policy):
        return _served(tuned.at_strength(weight))
    mixed, before = deepcopy(tuned), reference.tuned_parameters()
    with torch.no_grad():
        for name, after in mixed.tuned_parameters().items():
            after.copy_(torch.lerp(before[name], after, weight))
    return mixed


def extended(
    policy: Policy, heirs: Mapping[int, Sequence[int]], vocabulary: Vocabulary, catalogue: Catalogue
) -> Policy:
    """A copy that knows files it never saw, each starting from those that it resembles.

    Args:
        policy: What it knows stays.
        heirs: New workflow token to the tokens it resembles.
        vocabulary: With the new files.
        catalogue: With the new files: a language model reads their cards.
    """
    if isinstance(policy, Policy):
        return policy.extended(heirs)
    texts = describe(vocabulary, catalogue)
    return _served(policy.extended(heirs, {token: texts[token] for token in heirs}))


def _is_language_model(designer_dir: Path) -> bool:
    return "language_model" in json.loads((designer_dir / MODEL_RECORD).read_text())


def _served(policy: LanguageModelPolicy) -> Policy:
    return cast(Policy, policy)
