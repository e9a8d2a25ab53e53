"""Candidates for pairs: shards of workflows, each a function of (configuration, number) alone.

A shard number below `num_shards` holds as many candidates as it has pairs; higher numbers are spare
shards, which fill the places of near-duplicates.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from flowloom.dataset.config import BuildPairsConfig
from flowloom.dataset.near_duplicates import CoarseCode
from flowloom.dataset.tables import write_arrow
from flowloom.dataset.user_workflows import read_templates, summary
from flowloom.dataset.workers import run_tasks
from flowloom.dataset.workflows import base_workflow, edited, make_grammar, token_weights
from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.estimation import estimate_weights
from flowloom.workflow.sampling import draw
from flowloom.workflow.weighing import Weigher

CANDIDATES = pa.schema(
    [
        ("workflow", pa.string()),
        ("fingerprint", pa.string()),
        ("origin", pa.string()),
        ("num_tokens", pa.int32()),
        ("coarse", pa.uint64()),
    ]
)
ORIGINS = ("random", "edited", "given")
"""From the grammar, an edit of a sane or of a person's workflow, a person's as it is."""
SETTINGS = ((4, 2.0), (8, 2.5))
"""Steps and guidance of the sane base workflows that edits start from."""
TWICE_FRAC = 0.5
_AT_ONCE = 2048
_SPARE_FRAC, _MIN_SPARE = 0.05, 64

Row = tuple[str, str, str, int, int]


def num_shards(config: BuildPairsConfig) -> int:
    """Shards of the dataset; candidates beyond them are spare."""
    return -(-config.num_pairs // config.shard_size)


def num_candidates(config: BuildPairsConfig, number: int) -> int:
    """Workflows of shard `number`."""
    left = config.num_pairs - number * config.shard_size
    if left > 0:
        return min(left, config.shard_size)
    spare = max(round(_SPARE_FRAC * config.num_pairs), _MIN_SPARE)
    return min(spare, config.shard_size)


def shard_path(folder: Path, number: int) -> Path:
    """File of shard `number`."""
    return folder / f"shard-{number:05d}.parquet"


def draw_shard(config: BuildPairsConfig, catalogue: Path, folder: Path, number: int) -> None:
    """Write the file of one shard, unless it is there."""
    path = shard_path(folder, number)
    if not path.is_file():
        write_arrow(path, _drawer(_shared(config), catalogue).table(number))


def draw_shards(config: BuildPairsConfig, catalogue: Path, folder: Path, numbers: range) -> int:
    """Draw the shards that are not there; returns how many those were."""
    missing = [k for k in numbers if not shard_path(folder, k).is_file()]
    tasks = [(config, catalogue, folder, number) for number in missing]
    run_tasks(draw_shard, tasks, config.num_processes)
    return len(missing)


def _shared(config: BuildPairsConfig) -> BuildPairsConfig:
    """The configuration without what changes no shard, as a key."""
    return dataclasses.replace(config, num_processes=1, part=None)


@functools.lru_cache(maxsize=1)
def _drawer(config: BuildPairsConfig, catalogue: Path) -> Drawer:
    return Drawer(config, Catalogue.load(catalogue / "catalogue.json.gz"))


class Drawer:
    """Draws the candidates of any shard."""

    def __init__(self, config: BuildPairsConfig, facts: Catalogue) -> None:
        """Build grammar and parents.

        Raises:
            ValueError: A given workflow cannot be used and is not to be skipped, or all are such.
        """
        self.config = config
        self.grammar = make_grammar(facts, config.prior.budget)
        self.coarse = CoarseCode(self.grammar.vocabulary)
        self.base = [
            base_workflow(facts, file.name, steps, cfg, lora=lora)
            for file in facts.files_in("checkpoints")
            for steps, cfg in SETTINGS
            for lora in (
                None,
                *(f.name for f in facts.files_in("loras") if f.family == file.family),
            )
        ]
        self.given: list[Workflow] = []
        self.problems: list[str] = []
        if config.workflows_file is not None:
            self.given, self.problems = read_templates(config.workflows_file, self.grammar)
            self._check_given()
        if self.given and config.like_given:
            weights = estimate_weights(self.given, self.grammar)
        else:
            weights = token_weights(config.prior, self.grammar)
        self.weigher = Weigher(self.grammar, weights)

    def _check_given(self) -> None:
        bad, good = len(self.problems), len(self.given)
        if bad and not self.config.skip_invalid:
            raise ValueError(
                f"workflows_file: got {bad} workflows that cannot be used, expected none (or "
                f"skip_invalid=true): {summary(self.problems)}"
            )
        if not good:
            why = summary(self.problems) or "it holds none"
            raise ValueError(
                f"workflows_file: got no usable workflow, expected at least one: {why}"
            )

    def table(self, number: int) -> pa.Table:
        """The candidates of shard `number`, in random order."""
        config, num = self.config, num_candidates(self.config, number)
        rng = np.random.default_rng((config.seed, 1, number))
        num_given = round(config.given_frac * num) if self.given else 0
        num_edited = round(config.mutated_frac * num)
        rows = [*self._given_rows(number, num_given), *self._edited_rows(rng, num_edited)]
        rows += self._random_rows(rng, num - len(rows))
        rows = [rows[place] for place in rng.permutation(num)]
        columns = zip(*rows, strict=True)
        return pa.table(dict(zip(CANDIDATES.names, columns, strict=True)), schema=CANDIDATES)

    def _given_rows(self, number: int, num: int) -> Iterator[Row]:
        """A person's workflows in turn, each as often as the others."""
        for place in range(num):
            flow = self.given[(number * num + place) % len(self.given)]
            yield self._row(flow, self.grammar.codec.encode(flow).tokens, "given")

    def _edited_rows(self, rng: np.random.Generator, num: int) -> Iterator[Row]:
        """Edits of base workflows; of given ones by turns, where there are any."""
        for first in range(0, num, _AT_ONCE):
            parents = []
            for place in range(first, min(first + _AT_ONCE, num)):
                pool = self.given if self.given and place % 2 else self.base
                parents.append(pool[int(rng.integers(len(pool)))])
            for flow in edited(parents, self.grammar, rng, TWICE_FRAC):
                yield self._row(flow, self.grammar.codec.encode(flow).tokens, "edited")

    def _random_rows(self, rng: np.random.Generator, num: int) -> Iterator[Row]:
        """Drawn in batches larger than those of `random_workflows`, at half its cost."""
        for first in range(0, num, _AT_ONCE):
            batch = min(_AT_ONCE, num - first)
            for tokens in draw(self.weigher, self.grammar, batch, rng):
                yield self._row(self.grammar.codec.decode(tokens), tokens, "random")

    def _row(self, flow: Workflow, tokens: list[int], origin: str) -> Row:
        text = json.dumps(flow.to_api(), separators=(",", ":"))
        return text, flow.template_fingerprint(), origin, len(tokens), self.coarse(tokens)
