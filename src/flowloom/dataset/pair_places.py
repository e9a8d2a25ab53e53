"""Which prompt each place of the pairs has, and which candidate fills it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from pyarrow import parquet

from flowloom.dataset import pair_shards
from flowloom.dataset.config import BuildPairsConfig
from flowloom.dataset.near_duplicates import KnownPairs, hash_64, joint_keys, prompt_keys
from flowloom.dataset.prompts import Prompt, as_prompts, draw_held_out, list_prompts

MAX_DRAWN = 8
"""Workflows drawn at most, as a multiple of the pairs."""


@dataclasses.dataclass(frozen=True)
class Places:
    """The prompts of the dataset's places."""

    prompts: list[Prompt]
    """Train prompts, then held-out ones."""
    prompt: np.ndarray
    """Index [N] of each place's prompt."""
    words: np.ndarray
    """Hash [P] of what each prompt says."""
    texts: np.ndarray
    """Hash [P] of each prompt's text."""

    @staticmethod
    def of(config: BuildPairsConfig) -> Places:
        """Train prompts in turn, a held-out one after every 1 / `held_out_frac` places.

        Raises:
            ValueError: There is no train prompt.
        """
        lists, num = config.prompts, config.num_pairs
        train = list_prompts(lists, "train")
        if not train:
            raise ValueError("prompts: got none of the split 'train', expected at least one")
        before = np.floor(np.arange(num + 1) * config.held_out_frac).astype(np.int64)
        wanted = min(int(before[-1]), lists.num_test)
        if lists.prompts_file is not None:
            held_out = list_prompts(lists, "test", wanted)
        else:
            held_out = as_prompts(draw_held_out(wanted, lists.kinds, lists.seed))
        if not held_out:
            before[:] = 0
        is_held_out = np.diff(before) > 0
        turn = np.where(
            is_held_out,
            len(train) + before[:-1] % max(len(held_out), 1),
            (np.arange(num) - before[:-1]) % len(train),
        )
        prompts = [*train, *held_out]
        texts = np.array([hash_64(prompt.text.encode()) for prompt in prompts], np.uint64)
        words = prompt_keys(prompt.text for prompt in prompts)
        return Places(prompts, turn, words, texts)

    def rows(self, config: BuildPairsConfig, number: int) -> list[Prompt]:
        """Prompts of the places of one shard."""
        first = number * config.shard_size
        return [self.prompts[k] for k in self.prompt[first : first + config.shard_size]]


@dataclasses.dataclass
class Choice:
    """Which candidate fills each place."""

    shard: np.ndarray
    """Number [N] of its shard."""
    row: np.ndarray
    """Its row [N] there."""
    num_drawn: int = 0
    num_equal: int = 0
    num_near: int = 0

    def rows(self, config: BuildPairsConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows of the places of one shard."""
        first = number * config.shard_size
        places = slice(first, first + config.shard_size)
        return self.shard[places], self.row[places]


def choose(config: BuildPairsConfig, catalogue: Path, folder: Path, places: Places) -> Choice:
    """Fill every place with the next candidate that is no near-duplicate there."""
    num = config.num_pairs
    choice = Choice(np.full(num, -1), np.full(num, -1))
    near, equal = KnownPairs(), KnownPairs()
    open_places = np.arange(num)
    numbers = range(pair_shards.num_shards(config))
    while len(open_places):
        pair_shards.draw_shards(config, catalogue, folder, numbers)
        still_open = []
        for number in numbers:
            coarse, prints = _candidate_keys(pair_shards.shard_path(folder, number))
            here, open_places = np.split(open_places, [min(len(coarse), len(open_places))])
            prompt = places.prompt[here]
            used = slice(len(here))
            equals = joint_keys(places.texts[prompt], prints[used])
            is_new = near.take(joint_keys(places.words[prompt], coarse[used]))
            was_equal = ~equal.take(equals)
            choice.shard[here[is_new]] = number
            choice.row[here[is_new]] = np.flatnonzero(is_new)
            choice.num_drawn += len(here)
            choice.num_equal += int((~is_new & was_equal).sum())
            choice.num_near += int((~is_new & ~was_equal).sum())
            still_open.append(here[~is_new])
        open_places = np.concatenate([*still_open, open_places])
        if choice.num_drawn > MAX_DRAWN * num:
            raise ValueError(
                f"num_pairs: got {num - len(open_places)} different pairs of "
                f"{choice.num_drawn} drawn, expected {num}"
            )
        spare = pair_shards.num_candidates(config, numbers.stop)
        numbers = range(numbers.stop, numbers.stop - (-len(open_places) // spare))
    return choice


def _candidate_keys(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Hashes [N] of the coarse codes and of the template fingerprints of a shard."""
    table = parquet.read_table(path, columns=["coarse", "fingerprint"])
    prints = [int(text[:16], 16) for text in table["fingerprint"].to_pylist()]
    return table["coarse"].to_numpy(), np.array(prints, np.uint64)
