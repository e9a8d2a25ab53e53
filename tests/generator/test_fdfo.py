"""The FDFO loop on a tiny random checkpoint.

Facts pinned here:
- Killed after any epoch and run again, every file of the artifact has the bytes of an uninterrupted
  run.
- Swapping the two branches of every pair leaves the update the same.
- A reward or gradient that is not finite stops the run and names epoch and step.
- Losses of ten optimiser steps stay what they are (golden).
- Prompts tuned on are never held-out ones.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from flowloom.generator import fdfo, pairs
from flowloom.generator.config import PromptsConfig, PublishGeneratorConfig, TuneGeneratorConfig
from flowloom.generator.publish import publish_generator
from flowloom.generator.velocity import ShapesFlow
from flowloom.render.models import ModelStore, file_record
from flowloom.runs import Run, folder_digest
from flowloom.score.rubric import Rubric, Term
from flowloom.shapes import prompts as language
from flowloom.shapes.model import ShapesConfig, ShapesModel, load, save
from flowloom.workflow import Catalogue

REL_GOLDEN = 1e-3
TINY = ShapesConfig(width=16, depth=1, text_depth=1, num_heads=2, mlp_ratio=2)
CONFIG = TuneGeneratorConfig(
    base="tiny.safetensors",
    name="tiny-fdfo.safetensors",
    num_epochs=3,
    pairs_per_epoch=3,
    num_steps=3,
    num_minibatches=2,
    num_eval_prompts=2,
    eval_seeds=2,
    num_grid_prompts=2,
    serve_steps=2,
    checkpoint_every=1,
    num_threads=1,
)


def tiny_model():
    torch.manual_seed(0)
    model = ShapesModel(TINY)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def brightness(prompts, images_BCHW, flops):
    return torch.sigmoid(images_BCHW.flatten(1).mean(1)).double().numpy()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A catalogue with one random checkpoint, and a score that any picture has."""
    root = tmp_path / "models"
    save(root / "checkpoints" / CONFIG.base, tiny_model())
    record = file_record(
        root / "checkpoints" / CONFIG.base, "checkpoints", family="shapes", licence="Apache-2.0"
    )
    store = ModelStore(Catalogue.load("embedded").with_files([record]), [root])
    monkeypatch.setattr(fdfo.ModelStore, "open", lambda catalogue_dir: store)
    rubric = Rubric("brightness", (Term("brightness", brightness),))
    monkeypatch.setattr(fdfo, "get_rubric", lambda name: rubric)


def start(folder):
    run = Run("tune_generator", folder)
    run.begin()
    return run


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_resumed_is_uninterrupted(world, tmp_path, monkeypatch, guidance):
    config = dataclasses.replace(CONFIG, guidance=guidance, checkpoint_every=2, num_epochs=4)
    whole = start(tmp_path / "whole")
    metrics = fdfo.tune_generator(config, whole)
    update = fdfo.update
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(fdfo, "update", killed)
    broken = start(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        fdfo.tune_generator(config, broken)
    again = start(tmp_path / "broken")
    assert fdfo.tune_generator(config, again) == metrics
    assert len(calls) == 6
    assert folder_digest(again.out) == folder_digest(whole.out)


def test_artifact(world, tmp_path):
    run = start(tmp_path / "run")
    metrics = fdfo.tune_generator(CONFIG, run)
    record = json.loads((run.out / "file.json").read_text())
    path = run.out / "models" / "checkpoints" / CONFIG.name
    assert record == dataclasses.asdict(
        file_record(
            path, "checkpoints", family="shapes", role="", licence="Apache-2.0", card=CONFIG.card
        )
    )
    curve = json.loads((run.out / "curve.json").read_text())
    assert [row["images"] for row in curve["epochs"]] == [6, 12, 18]
    lift = curve["after"]["serve/score"] - curve["before"]["serve/score"]
    assert metrics["generator/lift"] == pytest.approx(lift)
    assert (run.out / "grid_before.png").read_bytes() != (run.out / "grid_after.png").read_bytes()

    overlay = Run("publish_generator", tmp_path / "overlay")
    overlay.begin()
    publish_generator(PublishGeneratorConfig(), overlay, generator=run.out)
    catalogue = Catalogue.load(overlay.out / "catalogue.json.gz")
    assert dataclasses.asdict(catalogue.file("checkpoints", CONFIG.name)) == record
    store = ModelStore(catalogue, [overlay.out / "models"])
    saved = load(path)
    for name, value in store.checkpoint(CONFIG.name).state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])

    path.write_bytes(path.read_bytes()[:-1] + b"x")
    overlay.begin()
    with pytest.raises(ValueError, match="got sha256"):
        publish_generator(PublishGeneratorConfig(), overlay, generator=run.out)


def test_reward_rises(world, tmp_path):
    config = dataclasses.replace(CONFIG, num_epochs=15, pairs_per_epoch=8, lr=3e-3, kl_coef=0.0)
    metrics = fdfo.tune_generator(config, start(tmp_path / "run"))
    assert metrics["generator/tuned_score_after"] > metrics["generator/tuned_score_before"] + 0.02


def roll_out(flow, num_pairs=4, num_steps=3):
    prompts = fdfo.draw_prompts(PromptsConfig(), "train", num_pairs, (0, 0))
    noise = pairs.pair_noise(range(num_pairs), num_steps, fdfo.SHAPE)
    paths = pairs.roll_out(flow, prompts, *noise, churn=0.03)
    return [prompt for prompt in prompts for _ in range(2)], paths, torch.rand(2 * num_pairs)


def swapped(values, axis):
    return values.unflatten(axis, (-1, 2)).flip(axis + 1).flatten(axis, axis + 1)


def test_order_of_a_pair_does_not_matter():
    config = dataclasses.replace(CONFIG, lr=1.0, warmup_steps=0)
    weights = []
    for swap in (False, True):
        model = tiny_model()
        flow, base_flow = ShapesFlow(model), ShapesFlow(tiny_model())
        prompts, paths, rewards_B = roll_out(flow)
        if swap:
            paths = pairs.Trajectories(
                swapped(paths.states_TBCHW, 1),
                paths.times_T,
                swapped(paths.velocities_TBCHW, 1),
                swapped(paths.images_BCHW, 0),
            )
            rewards_B = swapped(rewards_B, 0)
        # Plain SGD: Adam's first step would hide a wrong size and blow up rounding where a gradient
        # is 0.
        optimizer = torch.optim.SGD(model.parameters())
        order_U = np.random.default_rng(0).permutation(12)
        fdfo.update(config, flow, base_flow, optimizer, prompts, paths, rewards_B, order_U, 0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    assert float((weights[0] - before).abs().max()) > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_losses(golden):
    config = dataclasses.replace(CONFIG, num_minibatches=5, lr=1e-3)
    model = tiny_model()
    flow, base_flow = ShapesFlow(model, guidance=2.0), ShapesFlow(tiny_model(), guidance=2.0)
    optimizer = torch.optim.AdamW(model.parameters())
    rows = []
    for epoch in range(2):
        prompts, paths, rewards_B = roll_out(flow)
        rewards_B = paths.images_BCHW.flatten(1).mean(1)
        order_U = np.random.default_rng(epoch).permutation(12)
        rows.append(
            fdfo.update(
                config, flow, base_flow, optimizer, prompts, paths, rewards_B, order_U, epoch
            )
        )
    golden("fdfo.json", rows, rel=REL_GOLDEN)


def test_reward_that_is_not_finite_names_the_epoch(world, tmp_path, monkeypatch):
    calls = []

    def breaks(prompts, images_BCHW, flops):
        calls.append(1)
        # Two calls judge the base; the second epoch is the fourth.
        return np.full(len(images_BCHW), np.nan if len(calls) == 4 else 0.5)

    monkeypatch.setattr(fdfo, "get_rubric", lambda name: Rubric("breaks", (Term("x", breaks),)))
    with pytest.raises(FloatingPointError, match="epoch 1: breaks: x is not finite"):
        fdfo.tune_generator(CONFIG, start(tmp_path / "run"))


def test_gradient_that_is_not_finite_names_the_step():
    flow = ShapesFlow(tiny_model())
    prompts, paths, rewards_B = roll_out(flow)
    rewards_B[0] = torch.inf
    optimizer = torch.optim.AdamW(flow.parameters())
    with pytest.raises(FloatingPointError, match="epoch 7, step 0"):
        fdfo.update(CONFIG, flow, flow, optimizer, prompts, paths, rewards_B, np.arange(12), 7)


def test_prompts_of_the_splits_do_not_meet():
    config = PromptsConfig(kinds=("two", "colors"), shapes=("circle", "star"))
    train = fdfo.draw_prompts(config, "train", 200, (0, 1))
    held_out = fdfo.draw_prompts(config, "holdout", 100, (0, 2))
    meanings = [{language.parse(text).meaning for text in texts} for texts in (train, held_out)]
    assert not meanings[0] & meanings[1]
    specs = [language.parse(text) for text in train + held_out]
    assert {spec.kind for spec in specs} == {"two", "colors"}
    assert {item.shape for spec in specs for item in spec.objects} == {"circle", "star"}


def test_guided_velocity_by_hand():
    model = tiny_model()
    prompts = ["a red circle", "two stars", "a red circle"]
    x, t = torch.randn(3, *fdfo.SHAPE), torch.tensor([0.9, 0.5, 0.2])
    cond = model.encode_text([language.tokenize(text) for text in prompts])
    empty = model.encode_text([language.tokenize("")] * 3)
    v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
    torch.testing.assert_close(ShapesFlow(model).velocity(x, t, prompts), v)
    guided = ShapesFlow(model, 2.5).velocity(x, t, prompts)
    torch.testing.assert_close(guided, v_empty + 2.5 * (v - v_empty), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_epochs": 0}, "num_epochs"),
        ({"churn": 0.0}, "churn"),
        ({"guidance": 0.0}, "guidance"),
        ({"num_minibatches": 10}, "num_minibatches"),
        ({"name": "tiny.safetensors"}, "name"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        dataclasses.replace(CONFIG, **change)
