"""Policies from the folders that training wrote, whatever model they hold."""

from __future__ import annotations

from pathlib import Path

from flowloom.designer.policy import Policy


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
