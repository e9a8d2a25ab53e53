"""Facts: the embedded catalogue has ComfyUI's names, order and ranges; its hash covers content
only; an overlay changes files and hash but no node; a loader without files is unavailable."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest

from flowloom.workflow import Catalogue, CatalogueError, ModelFile, catalogue
from tests.workflow.flows import SMALL

KSAMPLER = [
    "model", "seed", "steps", "cfg", "sampler_name", "scheduler",
    "positive", "negative", "latent_image", "denoise",
]  # fmt: skip


def test_embedded_node_facts(embedded):
    assert set(SMALL) < set(embedded.nodes)
    assert len(embedded.nodes) == 41
    sampler = embedded.nodes["KSampler"]
    assert [spec.name for spec in sampler.inputs] == KSAMPLER
    assert sampler.outputs == ("LATENT",)
    assert sampler.by_name["seed"].max == 2**64 - 1
    cfg = sampler.by_name["cfg"]
    assert (cfg.type, cfg.min, cfg.max, cfg.step) == ("FLOAT", 0.0, 100.0, 0.1)
    assert sampler.by_name["sampler_name"].options == (
        "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde",
    )  # fmt: skip
    assert sampler.by_name["scheduler"].options == (
        "simple", "normal", "karras", "exponential", "sgm_uniform", "beta",
    )  # fmt: skip
    assert embedded.nodes["CheckpointLoaderSimple"].outputs == ("MODEL", "CLIP", "VAE")
    assert embedded.output_classes == {"SaveImage", "PreviewImage"}
    assert embedded.limits.pixels == 64 * 64
    assert embedded.limits.batch == 1


def test_embedded_files():
    embedded = Catalogue.load("embedded")
    names = [file.name.removesuffix(".safetensors") for file in embedded.files_in("checkpoints")]
    assert len(names) > 2
    assert names == sorted(names)
    assert embedded.file("loras", "nothing") is None
    assert all(len(file.sha256) == 64 for file in embedded.files)
    assert embedded.families == ("shapes",)


def test_json_round_trip_keeps_the_hash(embedded):
    data = json.loads(json.dumps(embedded.to_json()))
    assert Catalogue.from_json(data) == embedded
    assert Catalogue.from_json(data).hash == embedded.hash
    assert Catalogue.from_json({**data, "name": "other"}).hash == embedded.hash


@pytest.mark.parametrize("part", ["nodes", "files", "limits"])
def test_every_part_counts(embedded, part):
    data = embedded.to_json()
    if part == "nodes":
        data["nodes"]["KSampler"]["inputs"][2]["max"] = 9
    elif part == "files":
        data["files"][0]["sha256"] = "0" * 64
    else:
        data["limits"]["pixels"] = 1
    assert Catalogue.from_json(data).hash != embedded.hash


def test_overlay(embedded):
    tuned = ModelFile("checkpoints", "tuned.safetensors", "a" * 64, "shapes", "checkpoint")
    overlay = embedded.with_files([tuned])
    assert overlay.nodes == embedded.nodes
    assert overlay.file("checkpoints", "tuned.safetensors") == tuned
    assert len(overlay.files) == len(embedded.files) + 1
    assert overlay.hash != embedded.hash
    replaced = overlay.with_files([dataclasses.replace(tuned, sha256="b" * 64)])
    assert len(replaced.files) == len(overlay.files)
    assert replaced.file("checkpoints", "tuned.safetensors").sha256 == "b" * 64
    assert embedded.with_files([]).hash == embedded.hash


def test_a_loader_without_files_is_unavailable(embedded):
    bare = dataclasses.replace(embedded, files=())
    assert embedded.available("LoraLoader")
    assert not bare.available("LoraLoader")
    assert bare.available("KSampler")


def test_saved_files_load(embedded, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(embedded.to_json()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(embedded.to_json()).encode()))
    assert Catalogue.load(tmp_path / "c.json") == embedded
    assert Catalogue.load(str(tmp_path / "c.json.gz")) == embedded


def test_object_info_old_and_new_choices(tmp_path):
    info = {
        "Sampler": {
            "input": {
                "required": {
                    "name": ["COMBO", {"options": ["a", "b"], "default": "b"}],
                    "model": ["MODEL"],
                },
                "optional": {"kind": [["x", "y"], {}]},
            },
            "input_order": {"required": ["model", "name"], "optional": ["kind"]},
            "output": ["LATENT"],
            "output_node": False,
        },
        "CheckpointLoaderSimple": {
            "input": {"required": {"ckpt_name": [["sd/x.safetensors", "y.ckpt"], {}]}},
            "output": ["MODEL", "CLIP", "VAE"],
            "output_node": False,
        },
    }
    (tmp_path / "server.json").write_text(json.dumps(info))
    found = Catalogue.load(tmp_path / "server.json")
    assert found.name == "server"
    assert [s.name for s in found.nodes["Sampler"].inputs] == ["model", "name", "kind"]
    assert found.nodes["Sampler"].by_name["name"].options == ("a", "b")
    assert found.nodes["Sampler"].by_name["kind"].options == ("x", "y")
    assert not found.nodes["Sampler"].by_name["kind"].required
    assert [f.name for f in found.files_in("checkpoints")] == ["sd/x.safetensors", "y.ckpt"]
    assert Catalogue.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://127.0.0.1:9", "expected a ComfyUI server"),
        ("catalogue.yaml", "expected 'embedded', http://HOST:PORT, or a .json"),
        ("nowhere.json", "cannot read"),
    ],
)
def test_bad_sources_are_named(source, message):
    with pytest.raises(CatalogueError, match=message):
        Catalogue.load(source)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nodes": {}, "files": [1]}', '{"X": {}}'])
def test_bad_content_is_one_typed_line(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CatalogueError) as caught:
        Catalogue.load(tmp_path / "c.json")
    assert "\n" not in str(caught.value)


def test_bake_replaces_the_file_list(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr(catalogue, "DATA", tmp_path)
    (tmp_path / "embedded.json").write_text(json.dumps(embedded.to_json()))
    entry = {
        "folder": "checkpoints", "name": "n.safetensors", "sha256": "c" * 64, "family": "shapes",
        "role": "checkpoint", "licence": "Apache-2.0", "card": "a card",
    }  # fmt: skip
    (tmp_path / "files.json").write_text(json.dumps([entry]))
    try:
        assert catalogue.main(["--bake", str(tmp_path / "files.json")]) == 0
        baked = Catalogue.load("embedded")
        assert baked.files == (ModelFile(**entry),)
        assert baked.nodes == embedded.nodes
        (tmp_path / "files.json").write_text(json.dumps([{**entry, "sha256": "short"}]))
        assert catalogue.main(["--bake", str(tmp_path / "files.json")]) == 2
        assert catalogue.main([]) == 2
    finally:
        catalogue._embedded.cache_clear()
