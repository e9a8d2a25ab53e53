"""The shipped models: what their list says, and that each is better than the base in its concept.

Pinned: digests of `files.json`, under 15 MB; every specialist is at least .1 above the base in its
own concept and at least .05 below it in another; position and binding score at least .5, also in
wordings never trained on (32 prompts, 8 Euler steps, guidance 2); the upscaler mends blur.
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowloom.render.files import read_lora
from flowloom.runs import data_dir
from flowloom.shapes import detector, drawing, prompts, upscaler
from flowloom.shapes import model as shapes_model
from flowloom.shapes.config import WorldConfig

MODELS = data_dir() / "models"
NUM_PROMPTS = 32
CONCEPTS = {job.name: job.concept for job in WorldConfig().jobs if job.role == "specialist"}


@functools.cache
def mean_score(name, concept, wording="train"):
    """Mean over prompts of a concept, one noise each."""
    model = shapes_model.load(MODELS / "checkpoints" / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    choices = dataclasses.asdict(CONCEPTS[concept]) | {"wording": wording}
    specs = [prompts.sample_prompt(rng, **choices) for _ in range(NUM_PROMPTS)]
    cond = model.encode_text([prompts.tokenize(spec.text) for spec in specs])
    empty = model.encode_text([prompts.tokenize("")] * NUM_PROMPTS)
    x = torch.randn(NUM_PROMPTS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(8):
            t = torch.full((NUM_PROMPTS,), 1 - step / 8)
            x0, x0_empty = model(x, t, cond), model(x, t, empty)
            # Euler: a step of 1/8 of the way that is left at t, (x - x0) / t.
            x = x - (x - (x0_empty + 2.0 * (x0 - x0_empty))) / (8 - step)
    return detector.score(x.clamp(-1, 1), specs).mean().item()


def test_the_list_names_what_is_there():
    records = json.loads((MODELS / "files.json").read_text())
    total = 0
    for record in records:
        content = (MODELS / record["folder"] / record["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == record["sha256"], record["name"]
        assert record["licence"] == "Apache-2.0"
        assert record["card"]
        total += len(content)
    assert total < 15e6
    names = {f"{record['folder']}/{record['name']}" for record in records}
    found = {p.relative_to(MODELS).as_posix() for p in MODELS.glob("*/*.safetensors")}
    assert names == found


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("shapes-circle-star", "shapes-square-triangle"),
        ("shapes-square-triangle", "shapes-circle-star"),
        ("shapes-warm", "shapes-cool"),
        ("shapes-cool", "shapes-warm"),
        ("shapes-counting", "shapes-pairs"),
        ("shapes-pairs", "shapes-counting"),
        ("shapes-position", "shapes-counting"),
        ("shapes-binding", "shapes-counting"),
        ("shapes-three", "shapes-cool"),
    ],
)
def test_specialists_win_inside_and_fail_outside(name, other):
    assert mean_score(name, name) > mean_score("shapes-base", name) + 0.1
    assert mean_score(name, other) < mean_score("shapes-base", other) - 0.05


@pytest.mark.parametrize("name", ["shapes-position", "shapes-binding"])
def test_relations_and_attributes_are_learned(name):
    assert mean_score(name, name) >= 0.5
    assert mean_score(name, name, "held_out") >= 0.5


@pytest.mark.parametrize("name", ["two-objects", "relations", "vivid"])
def test_loras_fit_the_base(name):
    base = shapes_model.load(MODELS / "checkpoints" / "shapes-base.safetensors")
    lora = read_lora(MODELS / "loras" / f"shapes-{name}.safetensors")
    for strengths, part in (((1.0, 0.0), False), ((0.0, 1.0), True)):
        patched = shapes_model.apply_lora(base, lora, *strengths)
        moved = [
            key
            for key, value in patched.state_dict().items()
            if not value.equal(base.state_dict()[key])
        ]
        assert moved
        assert all(key.startswith("text.") == part for key in moved)


def test_the_upscaler_mends_blur():
    model = upscaler.load(MODELS / "upscale_models" / "shapes-x2.safetensors")
    rng = np.random.default_rng(0)
    drawn = [drawing.render(prompts.sample_prompt(rng), rng) for _ in range(32)]
    x = torch.from_numpy(np.stack(drawn))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mended = F.avg_pool2d(model(blurred), 2)
    assert (mended - x).abs().mean() < 0.5 * (blurred - x).abs().mean()
    assert detector.crispness(mended).mean() > detector.crispness(blurred).mean() + 0.1
