"""Pins: the engine against a loop written here by hand (Euler, CFG, second pass, LoRA); pictures do
not depend on what else is rendered; equal calls give equal bytes; errors name job and node."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from flowloom.render.batch import noise
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.shapes import prompts
from flowloom.shapes.model import apply_lora, flops_per_call
from flowloom.workflow import Grammar, random_workflows
from tests.render.tiny import CHECKPOINTS, LORA, flow, write_world

PROMPT = "a red circle"
THREE_STEPS = [1.0, 0.667, 0.334, 0.0]  # times come from a table of 1,000
TOLERANCE = 2e-4  # float noise of a random, badly conditioned model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(world):
    return Engine(ModelStore.open(world))


def render(engine, *workflows, prompt=PROMPT, seed=3):
    jobs = [RenderJob(w.fill(prompt, seed=seed), f"job-{k}") for k, w in enumerate(workflows)]
    return engine.render(jobs)


def by_hand(model, clip, x, times, cfg, negative="", zeroed=False, prompt=PROMPT):
    """Euler with two separate network calls per step."""
    positive = clip.encode_text([prompts.tokenize(prompt)])
    other = positive.zeroed() if zeroed else clip.encode_text([prompts.tokenize(negative)])
    for t, t_next in itertools.pairwise(times):
        t_1 = torch.tensor([t])
        v_pos, v_neg = model.velocity(x, t_1, positive), model.velocity(x, t_1, other)
        x = x + (t_next - t) * (v_neg + cfg * (v_pos - v_neg))
    return x


def test_euler_with_guidance_by_hand(engine):
    (result,) = render(engine, flow(steps=3, cfg=2.5))
    model = engine.store.checkpoint(CHECKPOINTS[0])
    x = noise(3, (3, 32, 32))[None]
    expected = by_hand(model, model, x, THREE_STEPS, 2.5).clamp(-1, 1)
    np.testing.assert_allclose(result.image, expected[0].numpy(), atol=TOLERANCE)
    assert result.image.dtype == np.float32
    assert result.flops == 6 * flops_per_call(model.config, 32, model.config.max_tokens)


def test_zeroed_negative_by_hand(engine):
    (result,) = render(engine, flow(cfg=4.0, zero_negative=True))
    model = engine.store.checkpoint(CHECKPOINTS[0])
    x = noise(3, (3, 32, 32))[None]
    expected = by_hand(model, model, x, THREE_STEPS, 4.0, zeroed=True)
    np.testing.assert_allclose(result.image, expected.clamp(-1, 1)[0].numpy(), atol=TOLERANCE)


def test_cfg_one_leaves_the_negative_call_out(engine):
    (guided, plain) = render(engine, flow(steps=4, cfg=2.0), flow(steps=4, cfg=1.0))
    assert guided.flops == 2 * plain.flops
    model = engine.store.checkpoint(CHECKPOINTS[0])
    expected = by_hand(model, model, noise(3, (3, 32, 32))[None], [1.0, 0.75, 0.5, 0.25, 0.0], 1.0)
    np.testing.assert_allclose(plain.image, expected.clamp(-1, 1)[0].numpy(), atol=TOLERANCE)


def test_second_pass_starts_from_the_first_latent_with_its_own_noise(engine):
    (result,) = render(engine, flow(steps=2, second_pass={"steps": 2, "denoise": 0.5}))
    model = engine.store.checkpoint(CHECKPOINTS[0])
    x = by_hand(model, model, noise(3, (3, 32, 32))[None], [1.0, 0.5, 0.0], 2.5)
    # The latent goes on unclamped; the second sampler's seed is the first one's plus one.
    x = torch.nn.functional.interpolate(x, size=(48, 48), mode="bilinear")
    x = 0.5 * x + 0.5 * noise(4, (3, 48, 48))[None]
    expected = by_hand(model, model, x, [0.5, 0.25, 0.0], 2.5).clamp(-1, 1)
    assert result.image.shape == (3, 48, 48)
    np.testing.assert_allclose(result.image, expected[0].numpy(), atol=TOLERANCE)


def test_denoise_zero_returns_the_latent(engine):
    first, both = render(
        engine, flow(steps=2), flow(steps=2, second_pass={"denoise": 0.0, "steps": 2})
    )
    assert both.flops == first.flops
    assert both.image.shape == (3, 48, 48)


def test_lora_strengths_act_on_model_and_text_apart(engine):
    (result,) = render(engine, flow(lora=(0.5, -1.0)))
    base, tensors = engine.store.checkpoint(CHECKPOINTS[0]), engine.store.lora(LORA)
    model, clip = apply_lora(base, tensors, 0.5, 0.0), apply_lora(base, tensors, 0.0, -1.0)
    x = noise(3, (3, 32, 32))[None]
    expected = by_hand(model, clip, x, THREE_STEPS, 2.5).clamp(-1, 1)
    np.testing.assert_allclose(result.image, expected[0].numpy(), atol=TOLERANCE)


def mixed_workflows():
    return [
        flow(),
        flow(steps=5, cfg=1.0),
        flow(steps=4, sampler="heun", scheduler="karras"),
        flow(CHECKPOINTS[1], cfg=4.0),
        flow(lora=(1.0, 0.5)),
        flow(lora=(1.0, 0.0), zero_negative=True),
        flow(second_pass={"steps": 3, "denoise": 0.4, "scheduler": "karras"}),
        flow(second_pass={"steps": 2, "denoise": 0.8, "sampler_name": "heun"}),
        flow(image_nodes=(("ImageBlur", {"blur_radius": 2, "sigma": 0.5}),)),
        flow(size=48, steps=2),
    ] * 4


def test_pictures_do_not_depend_on_what_else_is_rendered(tmp_path):
    """To the bit, where the network rounds rows alike in any batch: with rows of whole vectors."""
    engine = Engine(ModelStore.open(write_world(tmp_path, width=32)))
    model = engine.store.checkpoint(CHECKPOINTS[0])
    with torch.inference_mode():
        cond = model.encode_text([prompts.tokenize(PROMPT)] * 64)
        x, t = torch.randn(64, 3, 32, 32), torch.rand(64)
        whole = model(x, t, cond)
        alike = all(
            torch.equal(model(x[:n], t[:n], cond[:n]), whole[:n]) for n in (1, 2, 3, 17, 33)
        )
    jobs = [
        RenderJob(w.fill(PROMPT, seed=k % 7), str(k))
        for k, w in enumerate([*mixed_workflows()[:20], *random_templates(engine, 16)])
    ]
    together = engine.render(jobs)
    small = Engine(engine.store, batch_size=3).render(jobs[::-1])[::-1]
    for job, one, other in zip(jobs, together, small, strict=True):
        (alone,) = engine.render([job])
        for result in (one, other):
            assert result.flops == alone.flops
            if alike:
                np.testing.assert_array_equal(result.image, alone.image)
            else:
                np.testing.assert_allclose(result.image, alone.image, atol=TOLERANCE)


def random_templates(engine, count):
    grammar = Grammar(engine.store.catalogue)
    codes = random_workflows(grammar, count, 0)
    return [grammar.codec.decode(code.tokens, code.texts, code.seeds) for code in codes]


def test_equal_calls_give_equal_bytes(engine, world):
    jobs = [RenderJob(w.fill(PROMPT, seed=k), str(k)) for k, w in enumerate(mixed_workflows())]
    first = engine.render(jobs)
    second = Engine(ModelStore.open(world)).render(jobs)
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, second, strict=True))


def test_seed_and_prompt_matter(engine):
    (one,) = render(engine, flow(), seed=1)
    (two,) = render(engine, flow(), seed=2)
    (three,) = render(engine, flow(), seed=1, prompt="a blue star")
    assert np.abs(one.image - two.image).max() > 0.1
    assert np.abs(one.image - three.image).max() > 0.01
    assert render(engine, flow(), seed=2**64 - 1)[0].image.shape == (3, 32, 32)


def test_image_nodes_change_pixels_as_written(engine):
    sharpen = {"sharpen_radius": 1, "sigma": 1.0, "alpha": 0.5}
    scale = {"upscale_method": "nearest-exact", "scale_by": 2.0}
    plain, scaled, sharp = render(
        engine,
        flow(),
        flow(image_nodes=(("ImageScaleBy", scale),)),
        flow(image_nodes=(("ImageSharpen", sharpen),)),
    )
    np.testing.assert_array_equal(scaled.image, plain.image.repeat(2, 1).repeat(2, 2))
    assert np.abs(sharp.image - plain.image).max() > 0.05
    assert np.abs(sharp.image).max() <= 1


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (
            flow().replace("1", "ckpt_name", "z"),
            r"job x: node 1 \(CheckpointLoaderSimple\): checkpoin",
        ),
        (
            flow().replace("6", "sampler_name", "dpm"),
            r"node 6 \(KSampler\): sampler_name: got 'dpm'",
        ),
        (flow().replace("5", "batch_size", 2), r"batch_size: got 2, expected 1"),
        (flow().replace("5", "width", 4096), r"size: got 4096 x 32 pixels"),
        (
            flow().replace("9", "samples", 3),
            r"node 9 \(VAEDecode\): samples: got int, expected a link",
        ),
    ],
)
def test_errors_name_job_node_and_reason(engine, workflow, message):
    with pytest.raises(ValueError, match=message):
        engine.render([RenderJob(workflow.fill(PROMPT), "x")])


def test_missing_inputs_and_unknown_classes_are_named(engine):
    workflow = flow().fill(PROMPT)
    node = workflow.nodes["6"]
    inputs = {name: value for name, value in node.inputs.items() if name != "cfg"}
    broken = dataclasses.replace(node, inputs=inputs)
    workflow.nodes["6"] = broken
    with pytest.raises(ValueError, match=r"node 6 \(KSampler\): cfg: input is missing"):
        engine.render([RenderJob(workflow, "x")])
    workflow.nodes["6"] = dataclasses.replace(node, class_type="FreeU_V2")
    with pytest.raises(ValueError, match=r"node 6 \(FreeU_V2\): class not known"):
        engine.render([RenderJob(workflow, "x")])


def test_files_are_checked_once_and_missing_ones_say_how_to_get_them(world, tmp_path):
    store = ModelStore(ModelStore.open(world).catalogue, [tmp_path])
    with pytest.raises(ValueError, match="`make data`"):
        store.checkpoint(CHECKPOINTS[0])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / CHECKPOINTS[0]).write_bytes(b"other")
    with pytest.raises(ValueError, match="got sha256"):
        store.checkpoint(CHECKPOINTS[0])
