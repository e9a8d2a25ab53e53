"""Facts about Stable Diffusion 3 as a generator, on tiny random weights of its layout.

Its velocity is that of diffusers' own pipeline for the same latents, prompt and time, with guidance
and without, with T5 and without; a whole run with the shifted times gives the pipeline's picture.
Only the adapters, in float32, have gradients, over float32 or bfloat16 weights; switched off, they
leave the base. Recomputed activations change no gradient. Text encoders are gone once prompts are
encoded, embeddings on disk equal fresh ones and are not made twice, nor by two processes. What is
missing is named. An epoch of FDFO on a person's prompts moves every adapter and writes the LoRA
under diffusers' keys.
"""

import dataclasses
import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from flowloom.generator import sd3, tune
from flowloom.generator.config import FDFOConfig, PromptsConfig, TuneGeneratorConfig
from flowloom.generator.judging_config import JudgingConfig, Setting
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.sd3 import load_sd3
from flowloom.generator.sd3_config import SD3Config
from flowloom.generator.sd3_text import TextEncoders
from flowloom.render.schedules import schedule
from flowloom.runs import Run
from flowloom.score.rubric import Rubric, Term
from tests.generator import tiny_sd3

PROMPTS = ["a red fox", "two blue stars near a tree"]
LORA = LoRAConfig(rank=2, alpha=4.0, target_modules=("attn.to_q", "attn.to_out.0", "add_k_proj"))
ENCODERS = (CLIPTextModelWithProjection, T5EncoderModel)
EXACT = {"rtol": 0, "atol": 1e-5}
"""Float32 sums in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    tiny_sd3.build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd3.build()


@pytest.fixture
def config(folder, tmp_path):
    return SD3Config(
        name_or_path=str(folder), size=tiny_sd3.SIZE, dtype="float32", device="cpu",
        num_t5_tokens=tiny_sd3.NUM_T5_TOKENS, embeddings_dir=str(tmp_path / "embeddings"),
        gradient_checkpointing=False, text_batch_size=2, decode_batch_size=1,
    )  # fmt: skip


def noise(num_rows=2, seed=1):
    return torch.randn(num_rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def randomise(flow):
    """Adapters that change something: B starts at 0."""
    generator = torch.Generator().manual_seed(7)
    state = flow.state_dict()
    flow.load_state_dict({k: torch.randn(v.shape, generator=generator) for k, v in state.items()})


def num_encoders():
    gc.collect()
    return sum(type(thing) in ENCODERS for thing in gc.get_objects())


def pipeline_velocity(pipeline, x, t, prompts, guidance):
    """From one Euler step of the pipeline to time 0: x' = x - t v."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    moved = pipeline(
        prompts, latents=x, sigmas=[t], guidance_scale=guidance, output_type="latent",
        max_sequence_length=tiny_sd3.NUM_T5_TOKENS, height=64, width=64,
    ).images  # fmt: skip
    return (x - moved) / t


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("t", [0.9, 0.3])
def test_velocity_is_the_pipelines(config, pipeline, guidance, t):
    flow = load_sd3(config, LORA, PROMPTS, guidance=guidance)
    x = noise()
    with torch.no_grad():
        v = flow.velocity(x, torch.full((2,), t), PROMPTS)
    expected = pipeline_velocity(pipeline, x, t, PROMPTS, guidance or 1.0)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)
    assert flow.shape == (4, 8, 8)
    assert v.std() > 0.1


def test_without_t5_its_positions_are_zeros(config, tmp_path):
    pipeline = tiny_sd3.build(with_t5=False)
    pipeline.save_pretrained(tmp_path / "model")
    config = dataclasses.replace(config, name_or_path=str(tmp_path / "model"), use_t5=False)
    flow = load_sd3(config, LORA, PROMPTS)
    with torch.no_grad():
        v = flow.velocity(noise(), torch.full((2,), 0.5), PROMPTS)
    expected = pipeline_velocity(pipeline, noise(), 0.5, PROMPTS, 1.0)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)


def test_a_run_with_shifted_times_gives_the_pipelines_picture(config, pipeline):
    flow = load_sd3(config, LORA, PROMPTS, guidance=2.0)
    times = schedule("normal", 4, shift=sd3.TIME_SHIFT)
    x = noise()
    for t, s in itertools.pairwise(times):
        with torch.no_grad():
            x = x + (s - t) * flow.velocity(x, torch.full((2,), t), PROMPTS)
    pictures = flow.decode(x)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=sd3.TIME_SHIFT)
    expected = pipeline(
        PROMPTS, latents=noise(), num_inference_steps=4, guidance_scale=2.0, output_type="pt",
        max_sequence_length=tiny_sd3.NUM_T5_TOKENS, height=64, width=64,
    ).images  # fmt: skip
    assert pictures.shape == (2, 3, 64, 64)
    torch.testing.assert_close(((pictures + 1) / 2).clamp(0, 1), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


def test_simple_times_are_the_shifted_equal_ones():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=sd3.TIME_SHIFT)
    scheduler.set_timesteps(sigmas=[1 - i / 40 for i in range(40)])
    times = torch.tensor(schedule("simple", 40, shift=sd3.TIME_SHIFT))
    torch.testing.assert_close(times, scheduler.sigmas, **EXACT)
    # Shifted by 3: t' = 3 t / (1 + 2 t).
    assert schedule("simple", 2, shift=sd3.TIME_SHIFT) == pytest.approx([1, 0.75, 0])


def test_latents_are_an_eighth_of_the_pixels_and_fill_whole_patches():
    sizes = {"patch_size": 2, "pos_embed_max_size": 8, "in_channels": 4}, tiny_sd3.VAE
    # 8 positions of 2 latents of 8 pixels are just enough for 128.
    assert sd3.latent_shape(SD3Config(size=128), *sizes) == (4, 16, 16)
    assert sd3.latent_shape(SD3Config(size=64), *sizes) == (4, 8, 8)
    with pytest.raises(ValueError, match="size: got 144 pixels, expected at most 128"):
        sd3.latent_shape(SD3Config(size=144), *sizes)


def test_adapters_are_those_of_the_seed(config):
    first, same, other = (load_sd3(config, LORA, [], seed=seed).state_dict() for seed in (1, 1, 2))
    for key in first:
        assert torch.equal(first[key], same[key])
        assert torch.equal(first[key], other[key]) == key.endswith("lora_B.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_in_float32_have_gradients_and_off_is_the_base(config, dtype):
    flow = load_sd3(dataclasses.replace(config, dtype=dtype), LORA, PROMPTS)
    untouched = flow.velocity(noise(), torch.full((2,), 0.5), PROMPTS).detach()
    randomise(flow)
    tuned = flow.velocity(noise(), torch.full((2,), 0.5), PROMPTS)
    tuned.square().mean().backward()
    assert {w.dtype for w in flow.parameters()} == {torch.float32}
    assert {w.dtype for w in flow.transformer.state_dict().values()} >= {getattr(torch, dtype)}
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in flow.parameters())
    adapters = {id(w) for w in flow.parameters()}
    frozen = itertools.chain(flow.transformer.parameters(), flow.vae.parameters())
    assert not [w for w in frozen if id(w) not in adapters and (w.requires_grad or w.grad)]
    base = flow.base_velocity(noise(), torch.full((2,), 0.5), PROMPTS)
    assert not base.requires_grad
    assert torch.equal(base, untouched)
    assert (tuned - base).abs().mean() > 0.01
    assert torch.equal(flow.velocity(noise(), torch.full((2,), 0.5), PROMPTS), tuned)


def test_recomputing_activations_changes_no_gradient(config):
    grads = []
    for recompute in (False, True):
        flow = load_sd3(
            dataclasses.replace(config, gradient_checkpointing=recompute), LORA, PROMPTS
        )
        randomise(flow)
        flow.velocity(noise(), torch.full((2,), 0.5), PROMPTS).square().mean().backward()
        grads.append([w.grad for w in flow.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_state_is_the_adapters_and_comes_back(config):
    flow = load_sd3(config, LORA, PROMPTS)
    randomise(flow)
    other = load_sd3(config, LORA, PROMPTS, seed=3)
    other.load_state_dict(flow.state_dict())
    t = torch.full((2,), 0.5)
    assert torch.equal(other.velocity(noise(), t, PROMPTS), flow.velocity(noise(), t, PROMPTS))
    assert all(".lora_" in key for key in flow.state_dict())
    wider = other.with_guidance(3.0)
    assert next(wider.parameters()) is next(other.parameters())
    assert not torch.equal(wider.velocity(noise(), t, PROMPTS), other.velocity(noise(), t, PROMPTS))


def test_encoders_are_gone_and_embeddings_on_disk_are_fresh_ones(config, folder):
    before = num_encoders()
    flow = load_sd3(config, LORA, PROMPTS)
    assert num_encoders() == before
    encoders = TextEncoders(folder, config, torch.device("cpu"))
    assert num_encoders() == before + 3
    for given, fresh in zip(flow.embeddings(PROMPTS), encoders(PROMPTS), strict=True):
        torch.testing.assert_close(given, fresh, **EXACT)
    assert flow.embeddings(PROMPTS)[0].shape == (2, 16 + tiny_sd3.NUM_T5_TOKENS, 32)
    for given, fresh in zip(flow.embeddings.empty(2), encoders(["", ""]), strict=True):
        torch.testing.assert_close(given, fresh, **EXACT)


def test_embeddings_are_the_pipelines(config, pipeline):
    context_BSE, pooled_BP = load_sd3(config, LORA, PROMPTS).embeddings(PROMPTS)
    expected_BSE, _, expected_BP, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False,
        max_sequence_length=tiny_sd3.NUM_T5_TOKENS,
    )  # fmt: skip
    torch.testing.assert_close(context_BSE, expected_BSE, **EXACT)
    torch.testing.assert_close(pooled_BP, expected_BP, **EXACT)


def test_an_encoder_that_is_still_held_is_noticed(config, monkeypatch):
    held = []
    build = TextEncoders.__init__

    def holding(self, *args):
        build(self, *args)
        held.append(self.models[0])

    monkeypatch.setattr(TextEncoders, "__init__", holding)
    with pytest.raises(AssertionError, match="a text encoder is still held"):
        load_sd3(config, LORA, PROMPTS)


class Joint:
    """A process of a group; `wait` is what another one does before both go on."""

    def __init__(self, is_first, wait):
        self.is_first, self.wait = is_first, wait


def test_the_first_process_encodes_for_all(config, monkeypatch):
    made, found = [], []
    build = TextEncoders.__init__
    monkeypatch.setattr(
        TextEncoders, "__init__", lambda self, *args: made.append(1) or build(self, *args)
    )

    def look():
        found.extend(Path(config.embeddings_dir).iterdir())

    load_sd3(config, LORA, PROMPTS, processes=Joint(True, look))
    assert (len(made), len(found)) == (1, 1 + len(PROMPTS))
    config = dataclasses.replace(config, embeddings_dir=f"{config.embeddings_dir}-others")
    first = Joint(False, lambda: load_sd3(config, LORA, PROMPTS))
    load_sd3(config, LORA, PROMPTS, processes=first)
    assert len(made) == 2


def test_prompts_are_encoded_once(config, folder):
    flow = load_sd3(config, LORA, PROMPTS)
    assert flow.embeddings.prepare([*PROMPTS, "a new one", "a new one"]) == 1
    assert load_sd3(config, LORA, PROMPTS).embeddings.prepare(["a new one"]) == 0
    # Other settings are other embeddings.
    without = dataclasses.replace(config, use_t5=False)
    assert load_sd3(without, LORA, []).embeddings.prepare(PROMPTS) == len(PROMPTS)
    with pytest.raises(ValueError, match="got 'unheard of', expected one that was encoded"):
        flow.velocity(noise(1), torch.ones(1), ["unheard of"])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "tokenizer_3"])
def test_a_missing_part_is_named(config, folder, tmp_path, part):
    for path in folder.iterdir():
        if path.name != part:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=f"got no (folder )?{part}"):
        load_sd3(dataclasses.replace(config, name_or_path=str(tmp_path)), LORA, PROMPTS)


def test_broken_weights_names_that_do_not_exist_and_too_large_pictures(config, folder, tmp_path):
    for path in folder.iterdir():
        if path.name != "transformer":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        (folder / "transformer" / "config.json").read_text()
    )
    with pytest.raises(ValueError, match="expected a SD3Transformer2DModel, got"):
        load_sd3(dataclasses.replace(config, name_or_path=str(tmp_path)), LORA, PROMPTS)
    with pytest.raises(ValueError, match="name_or_path: got 'nobody/nothing', expected a folder"):
        load_sd3(dataclasses.replace(config, name_or_path="nobody/nothing"), LORA, PROMPTS)
    with pytest.raises(ValueError, match="size: got 256 pixels, expected at most 128"):
        load_sd3(dataclasses.replace(config, size=256), LORA, PROMPTS)
    unknown = dataclasses.replace(LORA, target_modules=("nowhere",))
    with pytest.raises(ValueError, match="target_modules: got 'nowhere'"):
        load_sd3(config, unknown, PROMPTS)


def brightness(prompts, images, flops):
    return np.array([float(torch.as_tensor(image).mean()) + 1 for image in images]) / 2


def test_an_epoch_of_the_loop(config, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# people's words\n" + "".join(f"a painting of {n} cats\n" for n in range(30))
    )
    rubric = Rubric("bright", (Term("brightness", brightness, 1.0, native=False),), kind="sum")
    monkeypatch.setattr(tune, "build_rubric", lambda name, timeout_s=None: rubric)
    tuning = TuneGeneratorConfig(
        sd3=dataclasses.replace(config, gradient_checkpointing=True), lora=LORA,
        name="tiny-fdfo.safetensors", prompts=PromptsConfig(file=str(prompts)), num_epochs=1,
        images_per_epoch=4, num_steps=2, time_shift=sd3.TIME_SHIFT, num_minibatches=1,
        sample_rows=4, units_per_pass=2, method=FDFOConfig(churn=0.2, kl_coef=0.1),
        judging=JudgingConfig(
            num_prompts=2, num_seeds=2, num_grid_prompts=1, grid_seeds=1,
            serve=Setting(num_steps=1, guidance=2.0, time_shift=sd3.TIME_SHIFT),
        ),
    )  # fmt: skip
    run = Run("tune_generator", tmp_path / "run")
    run.begin()
    metrics = tune.tune_generator(tuning, run)
    assert metrics["generator/images"] == 4
    (path,) = (run.out / "models" / "loras").iterdir()
    lora = safetensors.torch.load_file(path)
    before = load_sd3(config, LORA, []).state_dict()
    assert {key for key in lora if key.endswith(".weight")} == {
        f"{sd3.TRANSFORMER_PREFIX}.{key}" for key in before
    }
    assert all(lora[f"transformer.{key}"].any() for key in before)
