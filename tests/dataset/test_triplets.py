"""Pins: rows are what rendering and scoring them alone gives; held-out meanings and workflows are
never trained on; frozen constants are of the train split; equal bytes for any number of processes;
`datasets` reads the files, streaming too; what cannot be rendered or scored is named."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from flowloom.dataset import triplets
from flowloom.dataset.card import read_card
from flowloom.dataset.prompts import split_of
from flowloom.dataset.splits import is_held_out_workflow
from flowloom.dataset.triplet_rows import Rows, schema
from flowloom.render.engine import Engine, RenderJob, RenderResult
from flowloom.render.models import ModelStore
from flowloom.runs import folder_entries
from flowloom.score import rubric as rubrics
from flowloom.score import score_images
from flowloom.score.standard import Standard
from flowloom.shapes.prompts import parse
from flowloom.workflow import Workflow
from tests.dataset.small import CONFIG, build, build_small_pairs
from tests.render.tiny import write_world

SCORE_TOLERANCE = 5e-3  # float noise of a random model, seen through the detector


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_small_pairs(write_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    return build(world, tmp_path_factory.mktemp("built"))


def test_columns_and_files(built, world):
    out, metrics = built
    rows = triplets.load(out)
    assert list(rows) == schema(("faithfulness", "crispness")).names
    assert metrics["triplets/renders"] == len(rows["score"])
    cells = set(zip(rows["cell"], rows["prompt"], rows["fingerprint"], strict=True))
    assert len(cells) == len({cell for cell, _, _ in cells}) == metrics["triplets/cells"]
    renders = set(zip(rows["cell"], rows["seed"], strict=True))
    assert len(renders) == len(rows["score"])
    for text, fingerprint in set(zip(rows["workflow"], rows["fingerprint"], strict=True)):
        assert Workflow.from_api(json.loads(text)).template_fingerprint() == fingerprint
    scores = np.array(rows["score"])
    parts = np.array(rows["faithfulness"]) * (0.8 + 0.2 * np.array(rows["crispness"]))
    np.testing.assert_allclose(scores, parts, atol=1e-6)

    best = Workflow.from_api(json.loads((out / "best_fixed.json").read_text()))
    assert best.template_fingerprint() in rows["fingerprint"]
    card = read_card(out)
    assert card["rows"] == sum(card["histograms"]["score"]["rows"]) == len(scores)
    assert card["catalogue"] == ModelStore.open(world).catalogue.hash
    assert sum(group["renders"] for group in card["groups"]) == len(scores)
    assert card["counts"]["split"] == dict(sorted(Counter(rows["split"]).items()))
    assert not {"num_processes", "part"} & set(card["config"])
    assert "#" * 40 in (out / "card.md").read_text()


def test_standardisation_is_of_the_train_split(built, world):
    out, _ = built
    scores = np.array(triplets.load(out, "train")["score"])
    standard = Standard.load(out / "standard.json")
    assert standard.num_rows == len(scores)
    assert standard.means["score"] == pytest.approx(scores.mean())
    assert standard.sds["score"] == pytest.approx(scores.std())
    catalogue = ModelStore.open(world).catalogue.hash
    values = standard.apply(rubrics.shapes_rubric(), catalogue, {"score": scores})["score"]
    assert (values.mean(), values.std()) == (pytest.approx(0, abs=1e-9), pytest.approx(1))


def test_files_are_cut_by_rows(built, tmp_path):
    rows = triplets.load(built[0])
    table = Rows(("faithfulness", "crispness"))
    table.columns = rows
    num = -(-len(rows["score"]) // 50)
    names = [path.name for path in table.write(tmp_path, 50)]
    assert names == [f"triplets-{k:05d}-of-{num:05d}.parquet" for k in range(num)]
    assert triplets.load(tmp_path) == rows


def test_datasets_reads_the_files(built, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = triplets.load(built[0])
    files = str(built[0] / "triplets-*.parquet")
    options = {"data_files": files, "split": "train", "cache_dir": str(tmp_path)}
    stream = datasets.load_dataset("parquet", streaming=True, **options)
    streamed = [row["score"] for row in stream]
    assert streamed == rows["score"]
    assert list(datasets.load_dataset("parquet", **options)["seed"]) == rows["seed"]


def test_splits_do_not_leak(built):
    out, _ = built
    train, calibration = triplets.load(out, "train"), triplets.load(out, "calibration")
    held_out = triplets.load_prompts(out)
    assert len(held_out) == 12
    meanings = [
        {parse(prompt).meaning for prompt in prompts}
        for prompts in (
            train["prompt"],
            calibration["prompt"],
            [row["prompt"] for row in held_out],
        )
    ]
    assert not meanings[0] & meanings[1]
    assert not meanings[0] & meanings[2]
    assert not meanings[1] & meanings[2]
    assert {split_of(parse(row["prompt"])) for row in held_out} == {"test"}
    assert [row["kind"] for row in held_out[:4]] == ["single", "two", "counting", "colors"]
    unseen = triplets.load(out, "held_out_workflow")
    assert not set(unseen["fingerprint"]) & set(train["fingerprint"])
    assert all(map(is_held_out_workflow, unseen["fingerprint"]))
    assert {parse(prompt).meaning for prompt in unseen["prompt"]} <= meanings[0]
    with pytest.raises(ValueError, match="split: got 'test', expected one of calibration, held_o"):
        triplets.load(out, "test")
    with pytest.raises(ValueError, match="expected the folder of build_triplets"):
        triplets.load(out / "nothing")


def test_rows_are_what_rendering_alone_gives(built, world):
    rows = triplets.load(built[0])
    engine = Engine(ModelStore.open(world))
    for row in range(0, len(rows["score"]), 17):
        template = Workflow.from_api(json.loads(rows["workflow"][row]))
        filled = template.fill(rows["prompt"][row], seed=rows["seed"][row])
        (result,) = engine.render([RenderJob(filled, "x")])
        (expected,) = score_images("shapes", [rows["prompt"][row]], [result.image])
        assert rows["score"][row] == pytest.approx(expected["score"], abs=SCORE_TOLERANCE)
        assert rows["flops"][row] == result.flops


def test_processes_change_nothing(built, world, tmp_path):
    out, _ = build(world, tmp_path, dataclasses.replace(CONFIG, num_processes=2))
    assert folder_entries(out) == folder_entries(built[0])
    seconds = [json.loads(line) for line in (tmp_path / triplets.SECONDS_FILE).open()]
    assert sum(row["renders"] for row in seconds) == len(triplets.load(out, None)["cell"])


def test_missing_pairs_are_named(world, tmp_path):
    with pytest.raises(ValueError, match=r"pairs: got '.*nothing' without shards"):
        build(world, tmp_path, pairs=tmp_path / "nothing")


def test_a_workflow_that_cannot_be_rendered_names_its_cell(world, tmp_path, monkeypatch):
    def refuse(self, jobs):
        raise ValueError(f"job {jobs[3].id}: node 5 (KSampler): no such file")

    monkeypatch.setattr(Engine, "render", refuse)
    with pytest.raises(ValueError, match=r"^job cell \w+ [0-9a-f]{12} on '.*', seed \d+: node 5"):
        build(world, tmp_path)


def test_a_score_that_is_not_finite_names_its_jobs(world, tmp_path, monkeypatch):
    poisoned = []

    def render(self, jobs):
        image = np.zeros((3, 32, 32), np.float32)
        poisoned[:] = [jobs[2].id]
        spoilt = np.full_like(image, np.nan)
        return [RenderResult(spoilt if k == 2 else image, 1) for k in range(len(jobs))]

    def brightness(prompts, images_BCHW, flops_B):
        return images_BCHW.mean((1, 2, 3)).double().numpy()

    rubric = rubrics.Rubric("odd", (rubrics.Term("brightness", brightness),))
    monkeypatch.setitem(rubrics.RUBRICS, "odd", lambda: rubric)
    monkeypatch.setattr(Engine, "render", render)
    with pytest.raises(FloatingPointError, match="brightness is not finite") as caught:
        build(world, tmp_path, dataclasses.replace(CONFIG, rubric="odd"))
    assert str(caught.value).endswith(f"jobs {poisoned[0]}")
    assert not list((tmp_path / "work").glob("*.parquet"))


def test_terms_follow_the_rubric_and_may_not_hide_a_column(world, tmp_path):
    assert "thrift" in schema(("faithfulness", "thrift")).names
    with pytest.raises(ValueError, match="rubric: got a term 'seed'"):
        schema(("seed",))
