"""Facts pinned: a tuned run leaves a checkpoint, a LoRA, or both, with records and a card; the
published catalogue offers them, and its grammar designs with them; rendered from it, base and LoRA
at strength 1 give the tuned model's pixels, at 0 the base's to the bit; files that are not what
their record says are refused; those of an earlier turn stay, and another file of the same name is
numbered."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from flowloom.config import override
from flowloom.generator.card import CARD, IMAGES, write_card
from flowloom.generator.config import PublishGeneratorConfig, TuneGeneratorConfig
from flowloom.generator.export import export, lora_name, merged, sd3_record
from flowloom.generator.exported import FILES, Exported, read_files
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.publish import publish_generator
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.model_records import CATALOGUE_FILE, file_record
from flowloom.render.models import ModelStore
from flowloom.runs import Run, folder_digest
from flowloom.shapes.model import load, save
from flowloom.workflow import Catalogue, Grammar, ModelFile, random_workflows, validate
from tests.generator.test_lora_file import tuned
from tests.render.tiny import CHECKPOINTS, Sheet, write_world

BASE = CHECKPOINTS[0]
NAME = "a-tuned.safetensors"
LORA = lora_name(NAME)
SECOND = "a-tuned-2.safetensors"
KEPT = ("family", "role", "licence", "card")
CONFIG = LoRAConfig(rank=4, alpha=6.0, target_modules=("to_q", "to_k", "to_out", "mlp.up"))
LORA_PIXELS = 1e-3
"""Pixels in [-1, 1] of base + LoRA file (float16) against the tuned model in float32."""
CHECKPOINT_PIXELS = 3e-3
"""The same of the merged checkpoint, all of whose weights are rounded to float16."""
FACTS = {
    "generator/serve_score_before": 0.25,
    "generator/serve_score_after": 0.75,
    "generator/serve_score_se_before": 0.0625,
    "generator/serve_score_se_after": 0.125,
    "generator/serve_single_before": 0.5,
    "generator/serve_single_after": 0.625,
    "generator/lift": 0.5,
    IMAGES: 1920.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), contrast=0.1)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """What `tune_generator` leaves of a model whose LoRA was tuned; and the model, merged."""
    out = tmp_path_factory.mktemp("tuned")
    model = load(world / "models" / "checkpoints" / BASE)
    adapter = tuned(model, CONFIG)
    path = world / "models" / "checkpoints" / BASE
    base = file_record(path, "checkpoints", family="shapes", licence="Apache-2.0")
    config = TuneGeneratorConfig(base=BASE, name=NAME, lora=CONFIG, card="better at circles")
    exported = export(
        out, model=model, adapter=adapter, base=base, name=config.name, card=config.card
    )
    write_card(out / CARD, config, exported, FACTS, ["best on stars: 0.9"])
    return out, merged(model, adapter)


def publish(world, generator, out, *roles, earlier=None):
    config = PublishGeneratorConfig(catalogue=str(world / CATALOGUE_FILE), roles=roles)
    overlay = Run("publish_generator", out)
    overlay.begin()
    metrics = publish_generator(config, overlay, generator=generator, earlier=earlier)
    catalogue = Catalogue.load(overlay.out / CATALOGUE_FILE)
    assert metrics == {"catalogue/files": len(catalogue.files)}
    return catalogue, overlay.out


def workflow(checkpoint, strengths=None, lora=LORA):
    sheet = Sheet()
    model, clip, vae = sheet.loader(checkpoint)
    if strengths is not None:
        model, clip = sheet(
            "LoraLoader", model=model, clip=clip, lora_name=lora,
            strength_model=strengths, strength_clip=strengths,
        )  # fmt: skip
    inputs = {"positive": sheet.text(clip, "a red circle"), "negative": sheet.text(clip, "")}
    inputs |= {"steps": 4, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple"}
    latent = sheet("KSampler", model=model, latent_image=sheet.latent(), seed=3, **inputs)[0]
    return sheet.saved(sheet("VAEDecode", samples=latent, vae=vae)[0])


def test_the_published_lora_gives_the_tuned_pixels_and_at_0_the_base(
    world, run, tmp_path, monkeypatch
):
    generator, plain = run
    catalogue, out = publish(world, generator, tmp_path / "both", "checkpoint", "lora")
    store = ModelStore(catalogue, [out / "models", world / "models"])
    jobs = {
        "base": workflow(BASE), "off": workflow(BASE, 0.0), "half": workflow(BASE, 0.5),
        "on": workflow(BASE, 1.0), "checkpoint": workflow(NAME),
    }  # fmt: skip
    faults = [fault for job in jobs.values() for fault in validate(job, catalogue)]
    assert {(fault.class_type, fault.input) for fault in faults} == {
        ("SaveImage", "filename_prefix")
    }

    def render(store):
        results = Engine(store).render([RenderJob(job, key) for key, job in jobs.items()])
        return {key: r.image for key, r in zip(jobs, results, strict=True)}

    seen = render(store)
    monkeypatch.setitem(store._checkpoints, NAME, plain)
    exact = render(store)["checkpoint"]
    assert np.abs(exact - seen["base"]).max() > 0.1
    assert 0.02 < np.abs(seen["half"] - seen["base"]).max() < np.abs(exact - seen["base"]).max()
    np.testing.assert_array_equal(seen["off"], seen["base"])
    np.testing.assert_allclose(seen["on"], exact, atol=LORA_PIXELS, rtol=0)
    np.testing.assert_allclose(seen["checkpoint"], exact, atol=CHECKPOINT_PIXELS, rtol=0)


@pytest.mark.parametrize("roles", [("checkpoint",), ("lora",), ("checkpoint", "lora")])
def test_the_chosen_files_join_the_catalogue_and_designs_use_them(world, run, tmp_path, roles):
    catalogue, out = publish(world, run[0], tmp_path / "run", *roles)
    records = {r["role"]: r for r in json.loads((run[0] / "files.json").read_text())}
    before = Catalogue.load(world / CATALOGUE_FILE)
    assert set(catalogue.files) - set(before.files) == {ModelFile(**records[r]) for r in roles}
    assert {p.name for p in (out / "models").rglob("*") if p.is_file()} == {
        name
        for role in roles
        for name in (records[role]["name"], records[role]["name"].replace(".safetensors", ".md"))
    }
    grammar = Grammar(catalogue)
    designs = [
        str(grammar.codec.decode(code.tokens, code.texts, code.seeds))
        for code in random_workflows(grammar, 200, 0)
    ]
    for role in roles:
        assert any(records[role]["name"] in design for design in designs), role
    assert folder_digest(publish(world, run[0], tmp_path / "again", *roles)[1]) == (
        folder_digest(out)
    )


def test_records_say_family_role_licence_and_what_they_are_for(run):
    files = read_files(run[0])
    checkpoint, lora = (files[role][0] for role in ("checkpoint", "lora"))
    assert (checkpoint.folder, checkpoint.name) == ("checkpoints", NAME)
    assert (lora.folder, lora.name) == ("loras", "a-tuned-lora.safetensors")
    for file in (checkpoint, lora):
        assert (file.family, file.licence) == ("shapes", "Apache-2.0")
    assert checkpoint.card == "better at circles"
    assert lora.card == "LoRA for a.safetensors: better at circles"


def test_a_fully_tuned_model_has_no_lora_and_sd3_nothing_but_one(run, tmp_path):
    base = ModelFile("checkpoints", BASE, "", "shapes")
    exported = export(tmp_path / "a", model=run[1], adapter=None, base=base, name=NAME, card="")
    assert [file.role for file in exported.files] == ["checkpoint"]
    for name, value in load(tmp_path / "a" / "models" / "checkpoints" / NAME).state_dict().items():
        torch.testing.assert_close(value, run[1].state_dict()[name], atol=1e-3, rtol=1e-3)

    model = nn.ModuleDict({"context_embedder": nn.Linear(3, 4), "proj_out": nn.Linear(4, 3)})
    adapter = tuned(model, LoRAConfig(rank=2, target_modules=("proj_out",)))
    base = sd3_record("some/sd3.5-medium", 24, (0, 1))
    assert base.family == "sd35-medium"
    assert sd3_record("x", 38, ()).family == "sd35-large"
    assert sd3_record("x", 24, ()).family == "sd3-medium"
    exported = export(tmp_path / "b", model=model, adapter=adapter, base=base, name=NAME, card="")
    assert [(f.folder, f.family, f.role) for f in exported.files] == [
        ("loras", "sd35-medium", "lora")
    ]
    with pytest.raises(ValueError, match="got a ModuleDict without a LoRA"):
        export(tmp_path / "c", model=model, adapter=None, base=base, name=NAME, card="")
    with pytest.raises(ValueError, match="name inside its folder"):
        export(tmp_path / "c", model=run[1], adapter=None, base=base, name="../x", card="")


def test_missing_or_changed_files_are_refused(world, run, tmp_path):
    whole = publish(world, run[0], tmp_path / "run", "lora")[0]
    assert whole.file("loras", LORA)
    alone = tmp_path / "alone"
    base = ModelFile("checkpoints", BASE, "", "shapes")
    export(alone, model=run[1], adapter=None, base=base, name=NAME, card="")
    with pytest.raises(ValueError, match=r"roles: got 'lora', expected what .* has: checkpoint"):
        publish(world, alone, tmp_path / "refused", "checkpoint", "lora")
    path = alone / "models" / "checkpoints" / NAME
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="got sha256"):
        publish(world, alone, tmp_path / "refused", "checkpoint")
    path.unlink()
    with pytest.raises(ValueError, match=r"got no file .*a-tuned\.safetensors"):
        publish(world, alone, tmp_path / "refused", "checkpoint")
    with pytest.raises(ValueError, match=r"roles\[0\]: got 'upscaler'"):
        override(PublishGeneratorConfig(), {"roles": ["upscaler"]})


def test_the_card_says_how_it_was_made_and_how_it_is_used(run, tmp_path):
    text = (run[0] / CARD).read_text()
    for said in (
        "license: apache-2.0", "base_model: a.safetensors", "tags: [lora]", "Better at circles.",
        "Finite Difference Flow Optimization (arXiv 2603.12893)", "| reward | shapes |",
        "| pictures rendered | 1,920 |", "| optimiser steps | 120,", "LoRA of rank 4, alpha 6.0",
        "| serve_score | 0.250 +- 0.062 | 0.750 +- 0.125 |\n| serve_single | 0.500 | 0.625 |\n",
        "- best on stars: 0.9", "*LoraLoader*", LORA, NAME,
    ):  # fmt: skip
        assert said in text, said
    files = (read_files(run[0])["lora"][0],)
    exported = Exported(files, sd3_record("some/sd3.5-medium", 24, (0,)))
    write_card(tmp_path / CARD, TuneGeneratorConfig(lora=CONFIG), exported, {IMAGES: 64})
    text = (tmp_path / CARD).read_text()
    for said in (
        "license: stabilityai-ai-community", "*LoraLoaderModelOnly*", "`models/loras`",
        'from_pretrained("some/sd3.5-medium")', "Not measured.",
    ):  # fmt: skip
        assert said in text, said


def test_an_earlier_overlay_stays_and_names_keep_their_files(world, run, tmp_path):
    generator, _ = run
    first, out = publish(world, generator, tmp_path / "1", "checkpoint")
    again, same = publish(world, generator, tmp_path / "2", "checkpoint", earlier=out)
    assert folder_digest(same) == folder_digest(out)
    assert again.hash == first.hash
    other = tmp_path / "other"
    shutil.copytree(generator, other)
    path = other / "models" / "checkpoints" / NAME
    base = load(path)
    with torch.no_grad():
        next(base.parameters()).add_(0.5)
    path.unlink()
    save(path, base)
    (fields, *rest) = json.loads((other / FILES).read_text())
    record = file_record(path, "checkpoints", **{name: fields[name] for name in KEPT})
    (other / FILES).write_text(json.dumps([dataclasses.asdict(record), *rest]))
    grown, more = publish(world, other, tmp_path / "3", "checkpoint", earlier=out)
    assert grown.file("checkpoints", NAME) == first.file("checkpoints", NAME)
    second = grown.file("checkpoints", SECOND)
    assert second.sha256 == record.sha256
    assert (more / "models" / "checkpoints" / SECOND).read_bytes() == path.read_bytes()
    assert (more / "models" / "checkpoints" / SECOND).with_suffix(".md").is_file()
    # The same one later: it has its name already.
    last, _ = publish(world, other, tmp_path / "4", "checkpoint", earlier=more)
    assert last.hash == grown.hash
    kept, _ = publish(world, None, tmp_path / "5", "checkpoint", earlier=more)
    assert kept.hash == grown.hash


def test_without_a_generator_the_catalogue_is_as_it_was(world, tmp_path):
    catalogue, out = publish(world, None, tmp_path / "none", "checkpoint")
    assert catalogue.hash == Catalogue.load(world / CATALOGUE_FILE).hash
    assert [path.name for path in out.iterdir()] == [CATALOGUE_FILE]
