"""Which pairs say nearly the same as another.

Two pairs are near-duplicates if
  1. their prompts have the same words up to case, punctuation, opening and articles, and
  2. their workflows have the same *coarse code*: the canonical code (one token per class, value,
     file and link), with neighbouring grid values of a number joined two by two from the lowest
     up, and all file name prefixes taken for one. Structure, files and options count; node ids,
     key order, seeds, texts and unreachable nodes never do.

Pairs that are equal (same prompt, same template fingerprint) are near-duplicates too. Hashes have
64 bits: among a million pairs a false match has a chance of 3e-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from flowloom.dataset.prompts import content_words
from flowloom.workflow import Vocabulary

_IRRELEVANT = ("prefix",)
"""Kinds of values that change no picture."""


class CoarseCode:
    """Hashes of workflow codes with neighbouring values joined."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Join the rows of a vocabulary."""
        self._joined = np.arange(vocabulary.size, dtype=np.int32)
        by_kind: dict[str, list[int]] = {}
        for row, token in enumerate(vocabulary.tokens):
            if token.group == "value" and (_is_number(token.value) or token.kind in _IRRELEVANT):
                by_kind.setdefault(token.kind, []).append(row)
        for kind, rows in by_kind.items():
            if kind in _IRRELEVANT:
                self._joined[rows] = rows[0]
                continue
            ascending = sorted(rows, key=lambda row: vocabulary.tokens[row].value)
            for place, row in enumerate(ascending):
                self._joined[row] = ascending[place - place % 2]

    def __call__(self, tokens: Sequence[int]) -> int:
        """Hash of one code, 64 bits."""
        return hash_64(self._joined[tokens].tobytes())


def prompt_keys(prompts: Iterable[str]) -> np.ndarray:
    """Hashes [P] of the words of prompts, uint64."""
    return np.array([hash_64(content_words(prompt).encode()) for prompt in prompts], np.uint64)


def hash_64(data: bytes) -> int:
    """BLAKE2b of 8 bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def joint_keys(prompts: np.ndarray, workflows: np.ndarray) -> np.ndarray:
    """Hashes [N] of pairs of hashes [N], uint64; the order of the two counts.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014) over one plus an odd multiple of the
    other.
    """
    mixed = prompts * np.uint64(0x9E3779B97F4A7C15) + workflows
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class KnownPairs:
    """The keys of pairs taken so far, 8 bytes each."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)

    def take(self, keys: np.ndarray) -> np.ndarray:
        """Which [N] of the keys [N] are new, each first one of equal ones; these are kept."""
        _, first = np.unique(keys, return_index=True)
        is_new = np.zeros(len(keys), bool)
        is_new[first] = True
        is_new &= ~self.has(keys)
        self._sorted = np.sort(np.concatenate([self._sorted, keys[is_new]]))
        return is_new

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which [N] of the keys [N] were kept."""
        place = np.searchsorted(self._sorted, keys)
        found = np.zeros(len(keys), bool)
        inside = place < len(self._sorted)
        found[inside] = self._sorted[place[inside]] == keys[inside]
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
