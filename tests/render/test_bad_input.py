"""Pins: bad input is one line that says what, where, got and expected, through the engine and the
`render` command, and leaves nothing half-written: files that are missing, damaged, foreign or lie;
names that lead out of a folder; texts without end; numbers that are none; links of another type."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowloom.cli import main
from flowloom.render import files
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.inputs import MAX_TEXT_LENGTH
from flowloom.render.model_records import file_record, save_catalogue
from flowloom.render.models import ModelStore
from flowloom.shapes import model as shapes_model
from flowloom.shapes.model import ShapesConfig, ShapesModel, save
from flowloom.workflow import Workflow
from tests.render.tiny import CHECKPOINTS, LORA, UPSCALER, Sheet, flow, write_world

PROMPT = "a red circle"
HUGE = 10_000


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(world):
    return Engine(ModelStore.open(world))


def with_upscaler(name):
    sheet = Sheet()
    model, clip, vae = sheet.loader()
    text = sheet.text(clip, "a star")
    latent = sheet(
        "KSampler", model=model, positive=text, negative=text, latent_image=sheet.latent(), steps=1
    )[0]
    image = sheet("VAEDecode", samples=latent, vae=vae)[0]
    upscaler = sheet("UpscaleModelLoader", model_name=name)[0]
    return sheet.saved(sheet("ImageUpscaleWithModel", upscale_model=upscaler, image=image)[0])


def advanced(**inputs):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    text = sheet.text(clip, "a star")
    shifted = sheet("ModelSamplingSD3", model=model, shift=inputs.pop("shift", 1.0))[0]
    latent = sheet(
        "KSampler",
        model=shifted,
        positive=text,
        negative=text,
        latent_image=sheet.latent(64),
        **inputs,
    )[0]
    return sheet.decoded(latent)


BAD_WORKFLOWS = {
    "missing model": (
        flow("nothing.safetensors"),
        r"node 1 \(CheckpointLoaderSimple\): checkpoints: got 'nothing.safetensors', expected one",
    ),
    "absolute path": (flow("/etc/passwd"), r"ckpt_name: got '/etc/passwd', expected a name inside"),
    "path upwards": (
        flow("../a.safetensors"),
        r"ckpt_name: got '\.\./a\.s.*', expected a name",
    ),
    "path upwards later": (flow("x/../../a"), r"ckpt_name: got 'x/\.\./\.\./a', expected a name"),
    "backslash": (flow("x\\a"), r"ckpt_name: got 'x\\\\a', expected a name inside"),
    "drive": (flow("C:x"), r"ckpt_name: got 'C:x', expected a name inside"),
    "nul": (flow("a\0"), r"ckpt_name: got 'a\\x00', expected a name inside"),
    "no name": (flow(""), r"ckpt_name: got '', expected a name inside"),
    "lora path": (
        flow(lora=(1.0, 1.0)).replace("2", "lora_name", "../l"),
        r"node 2 \(LoraLoader\): lora_name: got '\.\./l', expected a name inside",
    ),
    "upscaler path": (with_upscaler("/x"), r"model_name: got '/x', expected a name inside"),
    "prefix path": (
        flow().replace("99", "filename_prefix", "../../x"),
        r"node 99 \(SaveImage\): filename_prefix: got '\.\./\.\./x', expected a name inside",
    ),
    "long text": (
        flow().replace("3", "text", "a star " * (HUGE // 7)),
        rf"node 3 \(CLIPTextEncode\): text: got \d+ characters, expected at most {MAX_TEXT_LENGTH}",
    ),
    "text that is none": (
        flow().replace("3", "text", ["a"]),
        r"text: got \['a'\], expected a tex",
    ),
    "huge latent": (flow(size=16384), r"node 5 \(EmptyLatentImage\): size: got 16384 x 16384 pix"),
    "nan": (flow(cfg=float("nan")), r"cfg: got nan, expected a number from 0 to 100"),
    "infinity": (flow(cfg=float("inf")), r"cfg: got inf, expected a number from 0 to 100"),
    "too large": (flow(cfg=1e6), r"cfg: got 1000000.0, expected a number from 0 to 100"),
    "no number": (flow(cfg="much"), r"cfg: got 'much', expected a number from 0 to 100"),
    "no steps": (flow(steps=0), r"steps: got 0, expected an integer from 1 to 10000"),
    "too much work": (
        advanced(steps=5000, scheduler="karras"),
        r"node 5 \(KSampler\): steps: got \d+ of 4096 pixels, expected at most 200 at this size",
    ),
    "shift of 0": (
        advanced(shift=0.0),
        r"\(ModelSamplingSD3\): shift: got 0, expected a nu",
    ),
    "list as a number": (flow(steps=[1, 2, 3]), r"steps: got \[1, 2, 3\], expected an integer"),
    "negative seed": (flow().replace("6", "seed", -1), r"seed: got -1, expected an integer from 0"),
    "sampler": (flow(sampler="dpm"), r"sampler_name: got 'dpm', expected one of euler, euler_anc"),
    "scheduler": (flow(scheduler="x"), r"scheduler: got 'x', expected one of simple, normal"),
}


def filled(workflow):
    seed = workflow.nodes.get("6", workflow.nodes["1"]).inputs.get("seed", 0)
    return workflow.fill(PROMPT) if seed != -1 else workflow


@pytest.mark.parametrize("name", BAD_WORKFLOWS)
def test_bad_workflows_are_one_line(engine, name):
    workflow, message = BAD_WORKFLOWS[name]
    with pytest.raises(ValueError, match=message) as caught:
        engine.render([RenderJob(filled(workflow), "x")])
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_links_of_another_type_are_refused(engine):
    api = flow().fill(PROMPT).to_api()
    for link, message in [
        (["1", 1], r"node 6 \(KSampler\): model: got a link to CLIP, expected one to MODEL"),
        (["1", 3], r"model: got link \['1', 3\], expected an output of another node"),
        (["1", -1], r"model: got link \['1', -1\], expected an output of another node"),
        (["6", 0], r"model: got link \['6', 0\], expected an output of another node"),
        ("abc", r"model: got str, expected a link to MODEL"),
    ]:
        api["6"]["inputs"]["model"] = link
        with pytest.raises(ValueError, match=message):
            engine.render([RenderJob(Workflow.from_api(api), "x")])


def test_a_workflow_without_an_output_is_refused(engine):
    api = flow().fill(PROMPT).to_api()
    del api["99"]
    for rest in (api, {}):
        with pytest.raises(ValueError, match="job x: workflow: got no output node, expected a Sav"):
            engine.render([RenderJob(Workflow.from_api(rest), "x")])


def test_numbers_are_coerced_as_the_server_does(engine):
    plain = flow(steps=3, cfg=2.0).fill(PROMPT)
    for name, value in (("steps", "3"), ("steps", 3.7), ("cfg", 2), ("cfg", "2")):
        other = plain.replace("6", name, value)
        (one, two) = engine.render([RenderJob(plain, "a"), RenderJob(other, "b")])
        assert one.image.tobytes() == two.image.tobytes()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def header(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())


def reshaped(path):
    tensors = load_file(str(path))
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(1, 1)
    with_metadata(path, tensors)


def with_metadata(path, tensors, **changes):
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        info = dict(file.metadata() or {})
    for key in info:
        record = json.loads(info[key])
        record.get("config", record).update(changes)
        info[key] = json.dumps(record)
    save_file(tensors, str(path), metadata=info or None)


def resized(path, **changes):
    with_metadata(path, load_file(str(path)), **changes)


def with_nan(path):
    tensors = load_file(str(path))
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    with_metadata(path, tensors)


def foreign(path):
    save_file({"unet.weight": torch.zeros(2, 2)}, str(path))


def without_partner(path):
    tensors = load_file(str(path))
    del tensors["blocks.0.to_q.lora_B.weight"]
    save_file(tensors, str(path))


def of_another_rank(path):
    tensors = load_file(str(path))
    tensors["blocks.0.to_q.lora_B.weight"] = torch.zeros(16, 7)
    save_file(tensors, str(path))


def for_another_model(path):
    parts = {"lora_A": torch.zeros(2, 99), "lora_B": torch.zeros(99, 2)}
    save_file({f"blocks.0.to_q.{k}.weight": v for k, v in parts.items()}, str(path))


def for_no_module(path):
    parts = {"lora_A": torch.zeros(2, 16), "lora_B": torch.zeros(16, 2)}
    save_file({f"blocks.9.to_q.{k}.weight": v for k, v in parts.items()}, str(path))


def empty(path):
    path.write_bytes(b"")


CHECKPOINT = ("checkpoints", CHECKPOINTS[0])
BAD_FILES = [
    (CHECKPOINT, empty, "got a damaged file"),
    (CHECKPOINT, lambda path: cut(path, 7), "got a damaged file"),
    (CHECKPOINT, lambda path: cut(path, 5000), "got a damaged file"),
    (CHECKPOINT, lambda path: header(path, "{nonsense"), "got a damaged file"),
    (CHECKPOINT, foreign, r"got metadata \[\], expected an entry 'flowloom-shapes-1'"),
    (CHECKPOINT, reshaped, r"got \(1, 1\), expected \("),
    (CHECKPOINT, lambda path: resized(path, width=32), r"got \(.*\), expected \("),
    (CHECKPOINT, lambda path: resized(path, width=10**9), "width: got 1000000000, expected an int"),
    (CHECKPOINT, lambda path: resized(path, num_heads=3), "width 16, expected a multiple of 3 hea"),
    (CHECKPOINT, lambda path: resized(path, colour=3), "got config .* expected"),
    (CHECKPOINT, with_nan, "got values that are not finite"),
    (("loras", LORA), lambda path: cut(path, 300), "got a damaged file"),
    (("loras", LORA), foreign, "got key 'unet.weight', expected lora_A.weight, lora_B.weight or a"),
    (("loras", LORA), without_partner, "got 'blocks.0.to_q.*', expected lora_A and lora_B of it"),
    (("loras", LORA), of_another_rank, "got 'blocks.0.to_q' of shapes"),
    (("loras", LORA), with_nan, "no finite value"),
    (("loras", LORA), for_another_model, r"loras/l.safetensors: LoRA key .*: got \(99, 99\), exp"),
    (("loras", LORA), for_no_module, "loras/l.safetensors: LoRA key .* no linear module"),
    (("upscale_models", UPSCALER), lambda path: cut(path, 100), "got a damaged file"),
    (("upscale_models", UPSCALER), foreign, "expected an entry 'flowloom-upscaler-1'"),
    (("upscale_models", UPSCALER), reshaped, r"got \(1, 1\), expected \("),
    (
        ("upscale_models", UPSCALER),
        lambda path: resized(path, width=0),
        "width: got 0, expected",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_FILES)))
def test_bad_files_are_one_line(tmp_path, number):
    (folder, name), damage, message = BAD_FILES[number]
    write_world(tmp_path)
    path = tmp_path / "models" / folder / name
    damage(path)
    store = ModelStore.open(tmp_path)
    workflow = with_upscaler(UPSCALER) if folder == "upscale_models" else flow(lora=(1.0, 1.0))
    job = RenderJob(workflow.fill(PROMPT), "x")
    # The catalogue's digest tells other bytes from the published ones.
    with pytest.raises(ValueError, match=r"node \d+ \(\w+\): .*got sha256 .*dvc checkout"):
        Engine(store).render([job])
    # A file that was published like this is told by what it holds.
    record = file_record(path, folder, family="shapes", role="x")
    save_catalogue(tmp_path / "catalogue.json.gz", store.catalogue.with_files([record]))
    with pytest.raises(ValueError, match=message) as caught:
        Engine(ModelStore.open(tmp_path)).render([job])
    assert str(caught.value).startswith("job x: node ")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_in_a_catalogue_cannot_lead_out_of_the_folder(world, tmp_path):
    store = ModelStore.open(world)
    hostile = dataclasses.replace(store.catalogue.files_in("checkpoints")[0], name="../x")
    store = ModelStore(store.catalogue.with_files([hostile]), store.roots)
    with pytest.raises(ValueError, match=r"checkpoints: got '\.\./x', expected a name inside"):
        store.checkpoint("../x")
    assert files.check_name("sub/a.safetensors") == "sub/a.safetensors"


def test_models_of_different_sizes_do_not_mix(tmp_path):
    write_world(tmp_path)
    other = tmp_path / "models" / "checkpoints" / CHECKPOINTS[1]
    save(other, ShapesModel(ShapesConfig(width=32, depth=2, text_depth=1, num_heads=2)))
    store = ModelStore.open(tmp_path)
    record = file_record(other, "checkpoints", family="shapes", role="x")
    engine = Engine(ModelStore(store.catalogue.with_files([record]), store.roots))

    def merged(sheet, one, two):
        model = sheet("ModelMergeSimple", model1=one[0], model2=two[0], ratio=0.5)[0]
        return model, sheet.text(one[1], "a star")

    def crossed(sheet, one, two):
        return one[0], sheet.text(two[1], "a star")

    for write, message in [(merged, "of different sizes"), (crossed, "width 32, expected 16")]:
        sheet = Sheet()
        model, text = write(sheet, sheet.loader(), sheet.loader(CHECKPOINTS[1]))
        latent = sheet(
            "KSampler", model=model, positive=text, negative=text, latent_image=sheet.latent()
        )[0]
        with pytest.raises(ValueError, match=rf"node \d+ \(KSampler\): .*{message}"):
            engine.render([RenderJob(sheet.decoded(latent), "x")])


def test_a_word_table_of_another_version_is_refused(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.setattr(shapes_model.prompts, "WORDS", (*shapes_model.prompts.WORDS, "zebra"))
    with pytest.raises(ValueError, match=r"\(CLIPTextEncode\): text: the checkpoint knows \d+ wor"):
        Engine(ModelStore.open(tmp_path)).render([RenderJob(flow().fill(PROMPT), "x")])


def test_pictures_that_are_not_finite_are_refused(tmp_path):
    engine = Engine(ModelStore.open(write_world(tmp_path)))
    model = engine.store.checkpoint(CHECKPOINTS[0])
    with torch.inference_mode():
        model.patch_out.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"not finite.*job x: node 6 \(KSampler\)"):
        engine.render([RenderJob(flow().fill(PROMPT), "x")])


def test_the_command_tells_bad_workflows_and_renders_the_others(world, tmp_path, capsys):
    rows = [filled(workflow) for workflow, _ in BAD_WORKFLOWS.values()]
    rows.insert(3, flow().fill(PROMPT))
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"workflow": row.to_api()}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    status = main(["render", str(path), "--out", str(out), "--catalogue-dir", str(world), "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert status == 1
    assert [bool(result["images"]) for result in results] == [k == 3 for k in range(len(rows))]
    for result in results[:3] + results[4:]:
        assert result["error"]
        assert "\n" not in result["error"]
    assert [file.name for file in out.iterdir()] == ["rows-00004.png"]


def test_the_command_names_a_damaged_file(tmp_path, capsys):
    write_world(tmp_path)
    cut(tmp_path / "models" / "checkpoints" / CHECKPOINTS[0], 5000)
    path = tmp_path / "one.json"
    path.write_text(json.dumps(flow().fill(PROMPT).to_api()))
    out = tmp_path / "out"
    status = main(["render", str(path), "--out", str(out), "--catalogue-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert status == 1
    assert "got sha256" in said
    assert CHECKPOINTS[0] in said
    assert not list(out.iterdir())


def test_an_interrupted_picture_leaves_no_file(tmp_path, monkeypatch):
    from flowloom.render import png

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(png, "write_chunks", fail)
    with pytest.raises(OSError, match="no space left"):
        png.write(tmp_path / "x.png", np.zeros((3, 8, 8), np.float32), flow().fill(PROMPT))
    assert not list(tmp_path.iterdir())
