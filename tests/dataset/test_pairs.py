"""Pins: pairs are valid, no two nearly the same, held out by meaning and by fingerprint; bytes are
a function of the configuration: not of processes, interruptions or machines that drew the shards; a
person's prompts and workflows take part; readers stream."""

import dataclasses
import json
from collections import Counter

import pytest

from flowloom.dataset import pair_shards
from flowloom.dataset.card import ContentDigest, read_card
from flowloom.dataset.config import BuildPairsConfig, PromptsConfig
from flowloom.dataset.near_duplicates import CoarseCode
from flowloom.dataset.pairs import (
    SCHEMA,
    build_pairs,
    pair_files,
    read_pairs,
    stream_pairs,
)
from flowloom.dataset.prompts import content_words, split_of
from flowloom.dataset.splits import is_held_out_workflow
from flowloom.dataset.tables import read_table
from flowloom.dataset.workflows import make_grammar
from flowloom.runs import Run, folder_entries
from flowloom.shapes.prompts import parse, wording_of
from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.validation import is_valid
from tests.dataset.small import FOUR_KINDS
from tests.render.tiny import flow, write_world

CONFIG = BuildPairsConfig(
    prompts=PromptsConfig(kinds=FOUR_KINDS, num_train=19, num_test=12),
    num_pairs=100,
    shard_size=60,
    num_processes=1,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def catalogue(world):
    return Catalogue.load(world / "catalogue.json.gz")


def build(world, folder, config=CONFIG, parts=()):
    run = Run("build_pairs", folder)
    run.begin()
    metrics = build_pairs(config, run, catalogue=world, parts=parts)
    return run.out, metrics


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    return build(world, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def rows(built):
    return read_pairs(built[0], split=None)


def test_pairs_are_valid_and_evenly_shared_by_prompts(built, rows, catalogue):
    assert built[1]["pairs/num"] == len(rows["prompt"]) == 100
    counts = Counter(rows["prompt"])
    # 95 places have the 19 train prompts in turn, 5 have held-out ones.
    assert Counter(counts.values()) == {5: 19, 1: 5}
    for prompt, kind, text, fingerprint in zip(
        *(rows[name] for name in ("prompt", "kind", "workflow", "fingerprint")), strict=True
    ):
        assert parse(prompt).kind == kind
        workflow = Workflow.from_api(json.loads(text))
        assert is_valid(workflow, catalogue)
        assert workflow.template_fingerprint() == fingerprint
        assert "{prompt}" in text
    assert Counter(rows["origin"])["edited"] == pytest.approx(30, abs=5)


def test_no_two_pairs_are_nearly_the_same(rows, catalogue):
    grammar = make_grammar(catalogue, CONFIG.prior.budget)
    coarse = CoarseCode(grammar.vocabulary)
    seen = set()
    for prompt, text in zip(rows["prompt"], rows["workflow"], strict=True):
        tokens = grammar.codec.encode(Workflow.from_api(json.loads(text))).tokens
        seen.add((content_words(prompt), coarse(tokens)))
    assert len(seen) == 100


def test_near_duplicates_are_removed_and_counted(world, tmp_path, catalogue):
    """One prompt and edits of few base workflows: most of what is drawn repeats."""
    prompts = PromptsConfig(kinds=("single",), num_train=1)
    crowded = dataclasses.replace(CONFIG, prompts=prompts, mutated_frac=1.0, held_out_frac=0.0)
    out, metrics = build(world, tmp_path / "one", crowded)
    assert min(metrics["pairs/removed_near"], metrics["pairs/removed_equal"]) > 10
    card = read_card(out)
    removed = metrics["pairs/removed_near"] + metrics["pairs/removed_equal"]
    assert card["drawn"] - removed == card["rows"] == 100
    test_no_two_pairs_are_nearly_the_same(read_pairs(out, split=None), catalogue)

    file = tmp_path / "mine.json"
    file.write_text(json.dumps(flow(steps=8).to_api()))
    one = dataclasses.replace(crowded, workflows_file=str(file), mutated_frac=0, given_frac=1)
    with pytest.raises(
        ValueError, match=r"num_pairs: got 1 different pairs of \d+ drawn, expected 1"
    ):
        build(world, tmp_path / "two", one)


def test_splits_hold_out_meanings_and_fingerprints(rows):
    for prompt, fingerprint, split, wording in zip(
        *(rows[name] for name in ("prompt", "fingerprint", "split", "wording")), strict=True
    ):
        held_out = split_of(parse(prompt)) == "test"
        assert split_of(parse(prompt)) in ("test", "train")
        assert split.endswith(("_prompt", "_both")) == held_out
        assert split.endswith(("_workflow", "_both")) == is_held_out_workflow(fingerprint)
        assert wording == wording_of(prompt)
        assert wording == "train" or held_out
    assert (
        set(Counter(rows["wording"]).values()) == {198, 2} or Counter(rows["wording"])["held_out"]
    )


def test_equal_configurations_give_equal_bytes(built, world, tmp_path):
    again, _ = build(world, tmp_path / "one", dataclasses.replace(CONFIG, num_processes=2))
    other, _ = build(world, tmp_path / "two", dataclasses.replace(CONFIG, seed=1))
    assert folder_entries(again) == folder_entries(built[0]) != folder_entries(other)


def test_an_interrupted_run_ends_with_the_same_bytes(built, world, tmp_path, monkeypatch):
    real, written = pair_shards.write_arrow, []

    def dies_at_the_second(path, table):
        if len(written) == 1:
            path.with_name(path.name + ".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, table)

    monkeypatch.setattr(pair_shards, "write_arrow", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build(world, tmp_path)
    monkeypatch.setattr(
        pair_shards, "write_arrow", lambda *a: written.append(a[0].name) or real(*a)
    )
    out, _ = build(world, tmp_path)
    assert len(set(written)) == len(written) >= 2  # no shard was drawn twice
    assert folder_entries(out) == folder_entries(built[0])


def test_parts_of_several_machines_merge_to_the_same_bytes(built, world, tmp_path):
    parts = []
    for k in range(2):
        config = dataclasses.replace(CONFIG, part=f"{k}/2")
        out, metrics = build(world, tmp_path / f"part-{k}", config)
        assert metrics["pairs/shards"] == 1
        parts.append(out)
    merged, _ = build(world, tmp_path / "merged", parts=parts)
    assert folder_entries(merged) == folder_entries(built[0])

    with pytest.raises(ValueError, match=r"parts: got .*part-0.* of another config, expected the"):
        build(world, tmp_path / "other", dataclasses.replace(CONFIG, seed=1), parts)
    with pytest.raises(
        ValueError, match=r"parts: got .*built.*, expected the folder of a run with"
    ):
        build(world, tmp_path / "no part", parts=built[0])
    shard = parts[0] / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00000.parquet: got [0-9a-f]{32}, expected md5"):
        build(world, tmp_path / "broken", parts=parts)


def test_card_tells_what_is_there(built, rows):
    card = read_card(built[0])
    assert [row["rows"] for row in card["files"]] == [60, 40]
    assert [row["file"] for row in card["files"]] == [file.name for file in pair_files(built[0])]
    content = ContentDigest()
    content.add(rows)
    assert card["content"] == content.hexdigest()
    for name in ("split", "kind", "origin", "wording"):
        assert card["counts"][name] == Counter(rows[name])
    assert sum(card["histograms"]["tokens per workflow"]["rows"]) == 100
    assert card["workflows"] == len(set(rows["fingerprint"]))
    assert card["prompts"] == len(set(rows["prompt"]))


def test_readers(built, rows):
    train = read_pairs(built[0])
    assert set(train["split"]) == {"train"}
    several = read_pairs(built[0], ("held_out_both", "held_out_prompt"), ["kind"])
    assert list(several) == ["kind"]
    assert len(several["kind"]) == 5
    assert [len(part["prompt"]) for part in stream_pairs(built[0], None)] == [60, 40]
    with pytest.raises(ValueError, match=r"split: got 'test', expected one of train, held_out_pro"):
        read_pairs(built[0], "test")
    with pytest.raises(ValueError, match=r"pairs: got .* without shards"):
        read_pairs(built[0].parent)


def test_datasets_reads_the_shards(built, rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(file) for file in pair_files(built[0])]
    streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert [row["prompt"] for row in streamed] == rows["prompt"]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path)
    assert loaded.column_names == SCHEMA.names
    assert loaded[99] == {name: values[99] for name, values in rows.items()}


def test_a_persons_prompts_take_the_place_of_drawn_ones(world, tmp_path):
    given = tmp_path / "mine.txt"
    texts = [f"a cat number {k} in the rain" for k in range(20)] + ["a red circle", "a star"]
    given.write_text("\n".join(texts))
    config = dataclasses.replace(CONFIG, prompts=PromptsConfig(prompts_file=str(given)))
    out, _ = build(world, tmp_path / "one", config)
    rows = read_pairs(out, split=None)
    assert set(rows["prompt"]) <= set(texts)
    assert "other" in rows["kind"]
    by_prompt = dict(zip(rows["prompt"], rows["split"], strict=True))
    assert len({split.endswith(("prompt", "both")) for split in by_prompt.values()}) == 2
    for row in zip(rows["prompt"], rows["split"], strict=True):
        assert row[1].endswith(("prompt", "both")) == by_prompt[row[0]].endswith(("prompt", "both"))
    # The run is known by the content of the file, the dataset by nothing of its path.
    moved = tmp_path / "moved.txt"
    moved.write_bytes(given.read_bytes())
    same = dataclasses.replace(CONFIG, prompts=PromptsConfig(prompts_file=str(moved)))
    assert same.prompts.prompts_digest == config.prompts.prompts_digest
    again, _ = build(world, tmp_path / "two", same)
    assert folder_entries(again) == folder_entries(out)
    few = dataclasses.replace(same, prompts=dataclasses.replace(same.prompts, num_train=3))
    build(world, tmp_path / "few", few)
    assert "only the first 3 train prompts" in (tmp_path / "few" / "log.txt").read_text()
    given.write_text("a dog\n")
    changed = dataclasses.replace(config.prompts)
    assert changed.prompts_digest != config.prompts.prompts_digest


def test_a_persons_workflows_seed_the_pairs(world, tmp_path, catalogue):
    file = tmp_path / "mine.jsonl"
    mine = [flow(steps=4, scheduler="karras"), flow(steps=16, cfg=7.0, sampler="heun")]
    file.write_text("".join(json.dumps(w.fill("a cat").to_api()) + "\n" for w in mine))
    config = dataclasses.replace(CONFIG, workflows_file=str(file), given_frac=0.2)
    out, _ = build(world, tmp_path / "one", config)
    rows = read_pairs(out, split=None)
    prints = {w.canonical(catalogue).template_fingerprint() for w in mine}
    given = [f for f, o in zip(rows["fingerprint"], rows["origin"], strict=True) if o == "given"]
    assert set(given) == prints
    assert len(given) == pytest.approx(20, abs=6)
    assert Counter(rows["origin"])["edited"] == pytest.approx(30, abs=6)
    heuns = [
        text
        for text, origin in zip(rows["workflow"], rows["origin"], strict=True)
        if origin == "edited" and '"heun"' in text
    ]
    assert len(heuns) > 2  # edits of the second one; base workflows take euler

    file.write_text(file.read_text() + '{"1": {"class_type": "None", "inputs": {}}}\n')
    broken = dataclasses.replace(config, workflows_file=str(file))
    message = r"workflows_file: got 1 workflows that cannot be used.*mine.jsonl:3: node 1 \(None\)"
    with pytest.raises(ValueError, match=message):
        build(world, tmp_path / "two", broken)
    again, _ = build(world, tmp_path / "three", dataclasses.replace(broken, skip_invalid=True))
    for folder in ("two", "three"):
        assert "cannot be used: " in (tmp_path / folder / "log.txt").read_text()
    assert read_table(pair_files(again)[0]) == read_table(pair_files(out)[0])


def test_configuration_errors_name_the_field(tmp_path):
    with pytest.raises(ValueError, match=r"part: got '4/4', expected k/N with 0 <= k < N"):
        BuildPairsConfig(part="4/4")
    with pytest.raises(ValueError, match=r"prompts_file: got '/none.txt', expected an existing"):
        PromptsConfig(prompts_file="/none.txt")
    with pytest.raises(
        ValueError, match=r"mutated_frac \+ given_frac: got 1.1, expected at most 1"
    ):
        BuildPairsConfig(mutated_frac=0.6, given_frac=0.5, workflows_file=str(tmp_path))
