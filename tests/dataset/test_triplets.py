"""Pins: an interrupted run ends with the bytes of another, for any number of processes;
rows are what rendering and scoring them alone gives; held-out meanings are never trained on."""

import dataclasses
import json

import numpy as np
import pytest

from flowloom.dataset import triplets
from flowloom.dataset.config import (
    BuildPairsConfig,
    BuildTripletsConfig,
    PanelConfig,
    PriorConfig,
    PromptsConfig,
)
from flowloom.dataset.pairs import build_pairs
from flowloom.dataset.prompts import split_of
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.runs import Run, folder_entries
from flowloom.score import score_images
from flowloom.shapes.prompts import parse
from flowloom.workflow import Workflow
from tests.render.tiny import write_world

CONFIG = BuildTripletsConfig(
    prompts=PromptsConfig(num_train=16, num_calibration=4, num_test=12),
    panel=PanelConfig(
        settings=("4/2.0",),
        lora_settings=("4/2.0",),
        num_prompts=(4, 4),
        num_kept=(2,),
        num_varied=1,
    ),
    random_cells=1,
    evolved_cells=(1, 1),
    evolved_seeds=(1, 4),
    num_parents=4,
    calibration_cells=2,
    calibration_seeds=2,
    num_processes=1,
    shard_size=16,
)
SCORE_TOLERANCE = 5e-3  # float noise of a random model, seen through the detector


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world"))
    run = Run("build_pairs", folder / "pairs")
    run.begin()
    prior = PriorConfig(steps_weights=(1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3))
    config = BuildPairsConfig(prompts=CONFIG.prompts, prior=prior, num_pairs=40)
    build_pairs(config, run, catalogue=folder)
    return folder


def build(world, folder, config=CONFIG):
    run = Run("build_triplets", folder)
    run.begin()
    metrics = triplets.build_triplets(
        config, run, catalogue=world, pairs=world / "pairs" / "out.partial"
    )
    return run.out, metrics


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    return build(world, tmp_path_factory.mktemp("built"))


def test_columns_and_files(built, world):
    out, metrics = built
    rows = triplets.load(out)
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
    card = json.loads((out / "card.json").read_text())
    assert card["renders"] == sum(card["histogram"]["renders"]) == len(scores)
    assert card["catalogue"] == ModelStore.open(world).catalogue.hash
    assert sum(group["renders"] for group in card["groups"]) == len(scores)


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
    with pytest.raises(ValueError, match="split: got 'test', expected one of calibration, train"):
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


def test_an_interrupted_run_ends_with_the_same_bytes(built, world, tmp_path, monkeypatch):
    real, written = triplets.write_table, []

    def dies_at_the_fifth(path, columns, schema):
        if len(written) == 5:
            path.with_name(path.name + ".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, columns, schema)

    monkeypatch.setattr(triplets, "write_table", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        build(world, tmp_path)
    monkeypatch.setattr(triplets, "write_table", lambda *a: written.append(a[0].name) or real(*a))
    out, _ = build(world, tmp_path)
    assert len(set(written)) == len(written)  # no shard was rendered twice
    assert folder_entries(out) == folder_entries(built[0])


def test_processes_change_nothing(built, world, tmp_path):
    out, _ = build(world, tmp_path, dataclasses.replace(CONFIG, num_processes=2))
    assert folder_entries(out) == folder_entries(built[0])
