"""Facts: rows read from shards are what encoding and replaying them in memory gives; sets of legal
tokens are kept once; a shard that is there is not written again; batches have like lengths, cover
the rows once per epoch and depend on (seed, epoch) alone; any order of shards' sizes works; pairs
of other splits than train stay out; scores become quantiles within the prompt."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from flowloom.dataset import triplets
from flowloom.dataset.tables import read_table, write_table
from flowloom.designer.config import SFTConfig
from flowloom.designer.examples import Examples, pair_examples, write_shard
from flowloom.designer.rollout import replay
from flowloom.designer.score_levels import levels_of, prompt_for_best, prompt_with_level
from flowloom.designer.selection import shrunk_means
from flowloom.designer.sft import _good_cells
from flowloom.workflow import Workflow, encode


@pytest.fixture(scope="module")
def rows(inputs):
    table = read_table(inputs["pairs"] / "pairs.parquet")
    return list(zip(table["prompt"], table["workflow"], strict=True))


@pytest.fixture
def examples(rows, grammar, tmp_path):
    """The rows in shards of 50, 100 and 10."""
    cuts = ((0, 50), (50, 150), (150, 160))
    shards = [
        write_shard(tmp_path / f"part-{number}.arrow", rows[slice(*cut)], grammar)
        for number, cut in enumerate(cuts)
    ]
    return Examples(shards, grammar.vocabulary.size)


def test_streamed_rows_equal_those_in_memory(examples, rows, grammar):
    designs = [encode(Workflow.from_api(json.loads(flow)), grammar).tokens for _, flow in rows]
    whole = replay(grammar, designs)
    assert len(examples) == len(rows) == 160
    assert np.array_equal(examples.lengths, whole.lengths_B.numpy())
    assert np.array_equal(examples.num_choices, whole.choice_BT.sum(1).numpy())
    for numbers in ([3], [159, 0, 49, 50, 149, 150, 50]):
        prompts, got = examples.select(torch.tensor(numbers))
        expected = whole.select(torch.tensor(numbers))
        assert prompts == [rows[number][0] for number in numbers]
        assert torch.equal(got.tokens_BT, expected.tokens_BT)
        assert torch.equal(got.choice_BT, expected.choice_BT)
        assert torch.equal(got.lengths_B, expected.lengths_B)
        assert torch.equal(got.legal(), expected.legal())
        assert got.rows() == expected.rows()


def test_sets_of_legal_tokens_are_kept_once(rows, grammar, tmp_path):
    shard = write_shard(tmp_path / "all.arrow", rows, grammar)
    kept = np.load(tmp_path / "all.masks.npy")
    examples = Examples([shard], grammar.vocabulary.size)
    assert len(np.unique(kept, axis=0)) == len(kept) < examples.num_choices.sum() / 10


def test_a_shard_that_is_there_stays(rows, grammar, tmp_path):
    shard = write_shard(tmp_path / "a.arrow", rows[:5], grammar)
    written = shard.read_bytes()
    write_shard(shard, rows[5:9], grammar)
    assert shard.read_bytes() == written
    # A killed writer leaves a partial file; the next one starts over.
    (tmp_path / "b.partial").write_bytes(b"half")
    assert write_shard(tmp_path / "b.arrow", rows[:5], grammar).read_bytes() == written


def test_batches_have_like_lengths_and_cover_the_rows(examples):
    stream = examples.batches(16, (0, 0))
    batches = [next(stream) for _ in range(10)]
    assert sorted(torch.cat(batches).tolist()) == list(range(160))
    lengths = torch.from_numpy(examples.lengths).float()
    spread = torch.stack([lengths[batch].std() for batch in batches]).mean()
    assert spread < 0.5 * lengths.std()
    again, other = examples.batches(16, (0, 0)), examples.batches(16, (1, 0))
    assert [next(again).tolist() for _ in batches] == [batch.tolist() for batch in batches]
    assert next(other).tolist() != batches[0].tolist()
    second = [next(stream) for _ in range(10)]
    assert sorted(torch.cat(second).tolist()) == list(range(160))
    assert second[0].tolist() != batches[0].tolist()


def test_fewer_rows_than_a_batch_repeat(rows, grammar, tmp_path):
    shard = write_shard(tmp_path / "few.arrow", rows[:3], grammar)
    few = Examples([shard], grammar.vocabulary.size)
    batch = next(few.batches(8, (0,)))
    assert sorted(np.bincount(batch.numpy(), minlength=3)) == [2, 3, 3]


def test_pairs_of_other_splits_stay_out(inputs, rows, grammar, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number, splits in enumerate((["train"] * 4 + ["held_out_prompt"], ["train"] * 3)):
        some = rows[number * 5 : number * 5 + len(splits)]
        columns = {
            "prompt": [prompt for prompt, _ in some],
            "workflow": [flow for _, flow in some],
            "split": splits,
        }
        schema = pa.schema([(name, pa.string()) for name in columns])
        write_table(folder / f"pairs-{number:05d}-of-00002.parquet", columns, schema)
    shards = pair_examples(folder, inputs["catalogue"], grammar, tmp_path, 1)
    examples = Examples(shards, grammar.vocabulary.size)
    prompts, _ = examples.select(torch.arange(len(examples)))
    assert prompts == [rows[k][0] for k in (0, 1, 2, 3, 5, 6, 7)]


def test_no_rows_are_an_error(grammar, tmp_path):
    shard = write_shard(tmp_path / "none.arrow", [], grammar)
    with pytest.raises(ValueError, match="got no examples, expected at least one"):
        Examples([shard], grammar.vocabulary.size)


def test_levels_are_quantiles_within_the_prompt():
    scores = {("p", "a"): 0.1, ("p", "b"): 0.9, ("p", "c"): 0.5, ("p", "d"): 0.5}
    scores |= {("q", "a"): -3.0, ("q", "b"): -2.0, ("r", "a"): 7.0}
    levels = levels_of(scores, 4)
    assert [levels["p", name] for name in "abcd"] == [0, 3, 2, 2]
    assert [levels["q", name] for name in "ab"] == [1, 3]
    assert levels["r", "a"] == 2


def test_the_best_level_is_asked_for():
    assert prompt_for_best("a circle", None) == "a circle"
    assert prompt_for_best("a circle", 3) == prompt_with_level("a circle", 2)
    assert prompt_with_level("a circle", 2) == "scorelevelc a circle"


def test_all_cells_get_their_level(inputs):
    table = triplets.load(inputs["triplets"], "train")
    means = shrunk_means(*(table[name] for name in ("prompt", "kind", "fingerprint", "score")))
    chosen = _good_cells(SFTConfig(score_levels=2), inputs["triplets"])
    assert len(chosen) == len(means)
    best = max((cell for cell in means if cell[0] == "a circle"), key=means.__getitem__)
    flow = dict(zip(table["fingerprint"], table["workflow"], strict=True))[best[1]]
    assert ("scorelevelb a circle", flow) in chosen
