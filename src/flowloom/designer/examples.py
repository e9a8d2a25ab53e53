"""Prompts with designs, as many as there are: token shards in memory-mapped files.

A workflow is encoded and replayed through the grammar once, a shard at a time, by worker processes
if there are several shards. A shard is two files in the run's `work` folder, of which the second
appears last: what a killed run has finished is not done again.

    NAME.masks.npy   the different sets of legal tokens, eight tokens to a byte, uint8 [M, V/8]
    NAME.arrow       prompt | tokens | masks: row of the set at each token, -1 where it is forced

Sets are few (some hundreds per 10,000 workflows), since they depend on an input, its family and the
room left. In memory are lengths, numbers of choices and sets; the rest is read where it is used.

Shapes: B rows of a batch, T tokens, N choices, V vocabulary, M sets of legal tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc
from torch import Tensor

from flowloom.dataset.pairs import pair_files
from flowloom.dataset.splits import TRAIN
from flowloom.dataset.tables import stream_tables
from flowloom.dataset.workers import run_tasks
from flowloom.designer.rollout import Sequences, replay
from flowloom.runs import write_json
from flowloom.workflow import Catalogue, Grammar, Vocabulary, Workflow, encode

POOL_BATCHES = 8
"""Batches sorted by length together: little padding, still random company."""
_ROWS_AT_ONCE = 2048
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("masks", pa.list_(pa.int32())),
    ]
)
Row = tuple[str, str]
"""A prompt and a template workflow, API JSON."""


class Examples:
    """Rows of shards, in their order."""

    def __init__(self, shards: Sequence[Path], num_tokens: int):
        """Map shards that `write_shard` wrote.

        Args:
            shards: Their `.arrow` files.
            num_tokens: Size V of the vocabulary.

        Raises:
            ValueError: They hold no row.
        """
        self.num_tokens = num_tokens
        self._chunks: list[_Chunk] = []
        sets = [np.zeros((0, -(-num_tokens // 8)), np.uint8)]
        for shard in shards:
            first_set = sum(map(len, sets))
            sets.append(np.load(_sets_path(shard)))
            table = ipc.open_file(pa.memory_map(str(shard))).read_all()
            self._chunks += [_Chunk(batch, first_set) for batch in table.to_batches()]
        self._packed_MV = np.concatenate(sets)
        sizes = [len(chunk) for chunk in self._chunks]
        if not sum(sizes):
            raise ValueError("train_sft: got no examples, expected at least one")
        self._ends = np.cumsum(sizes)
        self.lengths = np.concatenate([np.diff(chunk.offsets) for chunk in self._chunks])
        self.num_choices = np.concatenate([chunk.num_choices() for chunk in self._chunks])

    def __len__(self) -> int:
        return len(self.lengths)

    def prompts(self) -> list[str]:
        """The different prompts, in order of first appearance."""
        found: dict[str, None] = {}
        for chunk in self._chunks:
            found.update(dict.fromkeys(chunk.prompts.unique().to_pylist()))
        return list(found)

    def select(self, rows: Tensor) -> tuple[list[str], Sequences]:
        """Prompts of these rows, and their designs padded to the longest of them."""
        numbers = rows.numpy()
        lengths_B = self.lengths[numbers]
        tokens_BT = np.zeros((len(numbers), int(lengths_B.max())), np.int64)
        sets_BT = np.full(tokens_BT.shape, -1, np.int64)
        prompts = []
        for place, number in enumerate(numbers.tolist()):
            index = int(np.searchsorted(self._ends, number, "right"))
            chunk = self._chunks[index]
            prompt, tokens, sets = chunk.row(number - int(self._ends[index]) + len(chunk))
            prompts.append(prompt)
            tokens_BT[place, : len(tokens)] = tokens
            # Where there is a choice, which set of all shards it is from.
            sets_BT[place, : len(sets)] = np.where(sets >= 0, sets + chunk.first_set, -1)
        choice_BT = sets_BT >= 0
        sequences = Sequences(
            torch.from_numpy(tokens_BT),
            torch.from_numpy(choice_BT),
            torch.from_numpy(lengths_B.astype(np.int64)),
            self._packed_MV[sets_BT[choice_BT]],
            self.num_tokens,
        )
        return prompts, sequences

    def batches(self, batch_size: int, key: Sequence[int]) -> Iterator[Tensor]:
        """Endless batches of rows of like length; epoch e is a function of (key, e)."""
        lengths, num = self.lengths, len(self)
        # With fewer rows than a batch, an epoch is repeated until it fills one.
        repeats = -(-batch_size // num)
        for epoch in itertools.count():
            rng = np.random.default_rng([*key, epoch])
            order = np.concatenate([rng.permutation(num) for _ in range(repeats)])
            order = order[: len(order) // batch_size * batch_size]
            pools = [
                order[at : at + POOL_BATCHES * batch_size]
                for at in range(0, len(order), POOL_BATCHES * batch_size)
            ]
            by_length = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
            order = np.concatenate(by_length)
            for batch in rng.permutation(len(order) // batch_size):
                yield torch.from_numpy(order[batch * batch_size : (batch + 1) * batch_size])


class _Chunk:
    """Rows of one record batch; nothing is copied out of the mapped file."""

    def __init__(self, batch: pa.RecordBatch, first_set: int):
        self.prompts = batch.column("prompt")
        tokens, sets = batch.column("tokens"), batch.column("masks")
        self.offsets = tokens.offsets.to_numpy()
        self.tokens, self.sets = tokens.values.to_numpy(), sets.values.to_numpy()
        self.first_set = first_set

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def num_choices(self) -> np.ndarray:
        """Choices [B] of each row."""
        before = np.concatenate([[0], np.cumsum(self.sets >= 0)])
        return np.diff(before[self.offsets])

    def row(self, number: int) -> tuple[str, np.ndarray, np.ndarray]:
        span = slice(self.offsets[number], self.offsets[number + 1])
        return self.prompts[number].as_py(), self.tokens[span], self.sets[span]


def pair_examples(
    pairs: Path, catalogue: Path, grammar: Grammar, work: Path, num_processes: int
) -> list[Path]:
    """Token shards of the train split, one for each shard of the pairs; written if missing.

    Args:
        pairs: Folder of `build_pairs`.
        catalogue: Folder of `publish_generator`.
        grammar: Of that catalogue, with the policy's vocabulary.
        work: Where to write.
        num_processes: Worker processes.
    """
    vocabulary = work / "vocabulary.json"
    if not vocabulary.is_file():
        write_json(vocabulary, grammar.vocabulary.to_json())
    files = pair_files(pairs)
    shards = [work / f"prior-{number:05d}.arrow" for number in range(len(files))]
    tasks = [
        (file, catalogue, vocabulary, grammar.budget, shard)
        for file, shard in zip(files, shards, strict=True)
        if not shard.is_file()
    ]
    run_tasks(_write_pairs, tasks, num_processes)
    return shards


def write_shard(shard: Path, rows: Iterable[Row], grammar: Grammar) -> Path:
    """Encode, replay and write rows a few at a time, unless the shard is there; returns its path.

    Raises:
        ValueError: A workflow that the grammar does not write.
    """
    if shard.is_file():
        return shard
    known: dict[bytes, int] = {}
    partial = shard.with_suffix(".partial")
    with ipc.new_file(str(partial), _SCHEMA) as file:
        rows = iter(rows)
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            sequences = replay(grammar, _encoded([workflow for _, workflow in some], grammar))
            file.write_batch(_batch([prompt for prompt, _ in some], sequences, known))
    width = -(-grammar.vocabulary.size // 8)
    sets = np.frombuffer(b"".join(known), np.uint8).reshape(len(known), width)
    np.save(_sets_path(shard), sets)
    partial.replace(shard)
    return shard


def _batch(prompts: list[str], sequences: Sequences, known: dict[bytes, int]) -> pa.RecordBatch:
    """Rows of a shard; sets of legal tokens that are new join `known`."""
    packed_NV = sequences.packed_NV
    keys = np.ascontiguousarray(packed_NV).view(f"V{packed_NV.shape[1]}").ravel().tolist()
    sets_N = [known.setdefault(key, len(known)) for key in keys]
    sets_BT = np.full(sequences.tokens_BT.shape, -1, np.int32)
    sets_BT[sequences.choice_BT.numpy()] = sets_N
    lengths_B = sequences.lengths_B.numpy()
    inside_BT = np.arange(sets_BT.shape[1]) < lengths_B[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_B)]), pa.int32())
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(values[inside_BT], pa.int32()))
        for values in (sequences.tokens_BT.numpy(), sets_BT)
    ]
    return pa.record_batch([pa.array(prompts, pa.string()), *columns], schema=_SCHEMA)


def _write_pairs(
    pair_file: Path, catalogue: Path, vocabulary: Path, budget: int, shard: Path
) -> None:
    rows = (
        (prompt, workflow)
        for table in stream_tables([pair_file], ["prompt", "workflow", "split"])
        for prompt, workflow, split in zip(
            table["prompt"], table["workflow"], table["split"], strict=True
        )
        if split == TRAIN
    )
    write_shard(shard, rows, _grammar(catalogue, vocabulary, budget))


@functools.lru_cache(maxsize=1)
def _grammar(catalogue: Path, vocabulary: Path, budget: int) -> Grammar:
    installed = Catalogue.load(catalogue / "catalogue.json.gz")
    tokens = Vocabulary.from_json(json.loads(vocabulary.read_text()))
    return Grammar(installed, tokens, budget)


def _encoded(workflows: Sequence[str], grammar: Grammar) -> list[list[int]]:
    """Tokens of template workflows (API JSON), each distinct one encoded once."""
    known: dict[str, list[int]] = {}
    for text in workflows:
        if text not in known:
            known[text] = encode(Workflow.from_api(json.loads(text)), grammar).tokens
    return [known[text] for text in workflows]


def _sets_path(shard: Path) -> Path:
    return shard.with_suffix(".masks.npy")
