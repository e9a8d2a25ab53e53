"""Training of the world: its optimiser, its losses, resuming, and what it writes.

Pinned: Muon's update is near-orthogonal, the loss by hand, resumed = uninterrupted, the files of a
whole tiny world and their digests.
"""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from flowloom.shapes import model as shapes_model
from flowloom.shapes import prompts, train_world
from flowloom.shapes.config import Concept, Job, UpscalerConfig, WorldConfig
from flowloom.shapes.model import ShapesConfig, ShapesModel
from flowloom.shapes.muon import orthogonalize

TINY = WorldConfig(
    model=ShapesConfig(width=16, depth=1, text_depth=1, num_heads=2),
    batch_size=4,
    compile=False,
    checkpoint_every=3,
    base_steps=2,
    lora_rank=2,
    trunk=Job(name="trunk", role="trunk", concept=Concept(), steps=4, decay=False, card="parent"),
    specialists=(
        Job(name="stars", concept=Concept(kinds=("single",), shapes=("star",)), steps=5, card="s"),
    ),
    loras=(Job(name="pairs", role="lora", concept=Concept(kinds=("two",)), steps=3, card="p"),),
    upscaler=UpscalerConfig(name="x2", width=4, steps=4),
)


def test_orthogonalize_levels_singular_values():
    for shape in ((3, 8, 8), (2, 16, 4), (2, 4, 16)):
        update = orthogonalize(torch.randn(shape))
        values = torch.linalg.svdvals(update)
        # The quintic ends between .7 and 1.2, up to small values that five steps do not lift.
        assert 0.5 < values.mean() < 1.1
        assert values.max() < 1.25
    left = orthogonalize(torch.randn(1, 6, 3))
    torch.testing.assert_close(orthogonalize(left * 100), orthogonalize(left))


def test_loss_by_hand():
    net = ShapesModel(TINY.model)  # its output layer starts at zero, so x0_hat = 0
    x0 = torch.ones(2, 3, 32, 32)
    ids = shapes_model.pad_tokens([[1], [1]], 16)
    t = torch.tensor([0.5, 0.01])
    nouns, labels = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3, 5), -1)
    labels[0, 0] = torch.tensor([0, 0, 0, 0, 0])
    batch = train_world.Batch(x0, ids, t, torch.randn_like(x0), torch.ones(2, 1), nouns, labels)
    heads = train_world.ParseHeads(net.config.width)
    for param in heads.parameters():
        torch.nn.init.zeros_(param)
    # (1 / .5)^2 = 4 and (1 / .05)^2 = 400
    flow = train_world.training_loss(net, heads, 0.0, batch)
    assert flow.item() == pytest.approx(202.0)
    # Untrained heads: log of the number of shapes, colours, sizes, sides, counts.
    both = train_world.training_loss(net, heads, 0.5, batch)
    assert (both - flow).item() == pytest.approx(0.5 * np.log(4 * 9 * 3 * 5 * 6), rel=1e-5)


def test_batches_depend_on_seed_and_step_only():
    first = train_world.sample_batch(TINY, Concept(), 5, 7)
    again = train_world.sample_batch(TINY, Concept(), 5, 7)
    other = train_world.sample_batch(TINY, Concept(), 5, 8)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])


def test_prompts_are_dropped_at_their_rates():
    config = dataclasses.replace(TINY, batch_size=2000)
    batch = train_world.sample_batch(config, Concept(), 0, 0)
    ids, t, kept = batch.ids_BL, batch.t_B, batch.kept_B1
    empty = (ids != 0).sum(1) == 1
    assert (batch.labels_BOA[empty] == -1).all()
    assert (batch.labels_BOA[~empty, 0] >= 0).all()
    assert empty.float().mean().item() == pytest.approx(config.empty_frac, abs=0.02)
    assert 1 - kept.mean().item() == pytest.approx(config.zeroed_frac, abs=0.012)
    assert t.logit().mean().item() == pytest.approx(config.time_center, abs=0.08)


def test_learning_rate():
    job = Job(name="x", concept=Concept(), steps=1000, card="", lr_scale=0.5)
    factor = train_world.learning_rate_factor
    assert factor(TINY, job, 0) == pytest.approx(0.5 / 50)
    assert factor(TINY, job, 699) == 0.5
    assert factor(TINY, job, 850) == pytest.approx(0.25)
    assert factor(TINY, dataclasses.replace(job, decay=False), 999) == 0.5


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_whole_world_and_the_same_after_an_interruption(tmp_path, monkeypatch):
    records = train_world.build_world(TINY, out=tmp_path / "a", work=tmp_path / "work-a")
    assert [(r["folder"], r["name"], r["role"]) for r in records] == [
        ("checkpoints", "shapes-base.safetensors", "checkpoint"),
        ("checkpoints", "stars.safetensors", "checkpoint"),
        ("loras", "pairs.safetensors", "lora"),
        ("upscale_models", "x2.safetensors", "upscale_model"),
    ]
    whole = digests(tmp_path / "a")
    for record in records:
        assert whole[f"{record['folder']}/{record['name']}"] == record["sha256"]
    assert json.loads((tmp_path / "a" / "files.json").read_text()) == records

    class StoppedError(Exception):
        pass

    update, calls = train_world.Trainer.update, []

    def interrupted(trainer):
        calls.append(trainer.step)
        if len(calls) == 9:
            raise StoppedError
        return update(trainer)

    monkeypatch.setattr(train_world.Trainer, "update", interrupted)
    with pytest.raises(StoppedError):
        train_world.build_world(TINY, out=tmp_path / "b", work=tmp_path / "work-b")
    # 4 steps of the trunk and 4 of 5 of the next; its last saved state is after 3.
    assert calls == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    train_world.build_world(TINY, out=tmp_path / "b", work=tmp_path / "work-b")
    assert calls[9:] == [3, 4, 0, 1, 2]
    assert digests(tmp_path / "b") == whole


def test_the_lora_file_is_what_was_trained(tmp_path):
    torch.manual_seed(0)
    base = ShapesModel(TINY.model)
    # With the output layer at its initial zero nothing before it would learn.
    torch.nn.init.normal_(base.patch_out.weight)
    job = dataclasses.replace(TINY.loras[0], lr_scale=1.0)
    parent = train_world.Weights(base.state_dict(), train_world.ParseHeads(16).state_dict())
    trainer = train_world.train_job(TINY, job, work=tmp_path, parent=parent)
    trainer.model.eval()
    with torch.no_grad():
        for value, param in zip(trainer.ema, trainer.params, strict=True):
            param.copy_(value.half().float())
    patched = shapes_model.apply_lora(base, train_world.lora_tensors(trainer.averaged()), 1.0, 1.0)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([0.7])
    ids = [prompts.tokenize("a star and a box")]
    with torch.no_grad():
        ours = patched(x, t, patched.encode_text(ids))
        theirs = trainer.model(x, t, trainer.model.encode_text(ids))
    moved = patched.blocks[0].text_v.weight - base.blocks[0].text_v.weight
    assert moved.any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = train_world.Trainer(TINY, TINY.trunk, None)
    with torch.no_grad():
        trainer.model.patch_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="trunk: loss is nan at step 0"):
        trainer.update()


def test_unknown_job_is_named(tmp_path):
    with pytest.raises(ValueError, match="'moons', expected one of trunk"):
        train_world.build_world(TINY, out=tmp_path, work=tmp_path / "w", only=("moons",))


def test_shipped_jobs_stay_inside_their_concepts():
    config = WorldConfig()
    names = {job.name for job in config.jobs}
    assert len(names) == len(config.jobs)
    rng = np.random.default_rng(0)
    for job in config.jobs:
        for _ in range(50):
            spec = prompts.sample_prompt(rng, **dataclasses.asdict(job.concept))
            assert {item.shape for item in spec.objects} <= set(job.concept.shapes)
            assert len(spec.text.split()) < prompts.MAX_TOKENS
            if job.name == "shapes-warm":
                assert prompts.prompt_concepts(spec)["colors"] == "warm"
            if job.name == "shapes-circle-star":
                assert prompts.prompt_concepts(spec) == {"shapes": "round", "colors": "any"}
