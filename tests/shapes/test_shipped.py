"""The shipped models: what their list says, and that each is better than the base in its concept.

Pinned: digests of `files.json`, under 15 MB; every specialist is at least .15 above the base in its
own concept and at least .05 below it in another (32 prompts, 8 Euler steps, guidance 2).
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np
import pytest
import torch

from flowloom.runs import data_dir
from flowloom.shapes import detector, prompts
from flowloom.shapes import model as shapes_model
from flowloom.shapes.config import WorldConfig

MODELS = data_dir() / "models"
NUM_PROMPTS = 32
CONCEPTS = {job.name: job.concept for job in WorldConfig().jobs if job.role == "specialist"}


@functools.cache
def mean_score(name, concept):
    """Mean over prompts of a concept, one noise each."""
    model = shapes_model.load(MODELS / "checkpoints" / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    specs = [
        prompts.sample_prompt(rng, **dataclasses.asdict(CONCEPTS[concept]))
        for _ in range(NUM_PROMPTS)
    ]
    cond = model.encode_text([prompts.tokenize(spec.text) for spec in specs])
    empty = model.encode_text([prompts.tokenize("")] * NUM_PROMPTS)
    x = torch.randn(NUM_PROMPTS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(8):
            t = torch.full((NUM_PROMPTS,), 1 - step / 8)
            v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
            x = x - (v_empty + 2.0 * (v - v_empty)) / 8
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
    ],
)
def test_specialists_win_inside_and_fail_outside(name, other):
    assert mean_score(name, name) > mean_score("shapes-base", name) + 0.15
    assert mean_score(name, other) < mean_score("shapes-base", other) - 0.05


def test_the_lora_fits_the_base():
    base = shapes_model.load(MODELS / "checkpoints" / "shapes-base.safetensors")
    lora = shapes_model.load_lora(MODELS / "loras" / "shapes-two-objects.safetensors")
    patched = shapes_model.apply_lora(base, lora, 1.0, 0.0)
    moved = [
        name
        for name, value in patched.state_dict().items()
        if not value.equal(base.state_dict()[name])
    ]
    assert moved
    assert not any(name.startswith("text.") for name in moved)
