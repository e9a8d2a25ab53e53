"""Pins: every way to write the same sampling gives the same picture (KSampler, KSamplerAdvanced cut
in two with leftover noise, the custom stack, split sigmas); guiders against their formulas; shift
and rescale reach the sampler; the second output is the last denoised picture; what has no step to
run gives its latent back."""

import itertools

import numpy as np
import pytest
import torch

from flowloom.render import samplers, schedules
from flowloom.render.batch import noise, step_seed
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.shapes import prompts
from tests.render.tiny import CHECKPOINTS, Sheet, write_world

TOLERANCE = 1e-5
PROMPTS = ("a red circle", "two blue stars", "a large square")
SEED = 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(ModelStore.open(write_world(tmp_path_factory.mktemp("world"), contrast=0.1)))


def picture(engine, workflow):
    return engine.render([RenderJob(workflow, "x")])[0].image


def texts_of(sheet, clip, count=2):
    return [sheet.text(clip, text) for text in PROMPTS[:count]]


def k_sampler(sheet=None, **inputs):
    sheet = sheet or Sheet()
    model, clip, _ = sheet.loader()
    positive, negative = texts_of(sheet, clip)
    settings = {"steps": 4, "cfg": 3.0, "seed": SEED, "sampler_name": "euler"} | inputs
    latent = sheet(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=sheet.latent(),
        **settings,
    )[0]
    return sheet.decoded(latent)


def by_hand(engine, guide, times, texts=PROMPTS, x=None):
    """Euler with one network call per text; `guide` makes one picture of x and the predictions."""
    model = engine.store.checkpoint(CHECKPOINTS[0])
    encoded = [model.encode_text([prompts.tokenize(text)]) for text in texts]
    x = noise(SEED, (3, 32, 32))[None] if x is None else x
    for t, t_next in itertools.pairwise(times):
        x0 = guide(x, [model(x, torch.tensor([t]), cond) for cond in encoded])
        x = x + (t_next - t) * (x - x0) / t
    return x[0].clamp(-1, 1).numpy()


def custom(sheet, model, guider, sigmas, latent, sampler="euler", output=0):
    chosen = sheet("KSamplerSelect", sampler_name=sampler)[0]
    drawn = sheet("RandomNoise", noise_seed=SEED)[0]
    return sheet(
        "SamplerCustomAdvanced",
        noise=drawn,
        guider=guider,
        sampler=chosen,
        sigmas=sigmas,
        latent_image=latent,
    )[output]


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_three_ways_to_write_one_run(engine, sampler):
    expected = picture(engine, k_sampler(sampler_name=sampler, scheduler="normal", steps=5))
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    positive, negative = texts_of(sheet, clip)
    guider = sheet("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)[0]
    sigmas = sheet("BasicScheduler", model=model, scheduler="normal", steps=5)[0]
    stack = custom(sheet, model, guider, sigmas, sheet.latent(), sampler)
    chosen = sheet("KSamplerSelect", sampler_name=sampler)[0]
    plain = sheet(
        "SamplerCustom",
        model=model,
        noise_seed=SEED,
        cfg=3.0,
        positive=positive,
        negative=negative,
        sampler=chosen,
        sigmas=sigmas,
        latent_image=sheet.latent(),
    )[0]
    for latent in (stack, plain):
        np.testing.assert_allclose(picture(engine, sheet.decoded(latent)), expected, atol=TOLERANCE)


def advanced(sheet, latent, **inputs):
    model, clip, _ = sheet.loader()
    positive, negative = texts_of(sheet, clip)
    settings = {"steps": 4, "cfg": 3.0, "noise_seed": SEED, "sampler_name": "euler"}
    return sheet(
        "KSamplerAdvanced",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        **settings | inputs,
    )[0]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_run_cut_in_two_goes_on_where_it_was(engine, sampler):
    sheet = Sheet()
    first = advanced(
        sheet,
        sheet.latent(),
        end_at_step=2,
        return_with_leftover_noise="enable",
        sampler_name=sampler,
    )
    second = advanced(sheet, first, add_noise="disable", start_at_step=2, sampler_name=sampler)
    whole = picture(engine, k_sampler(sampler_name=sampler))
    np.testing.assert_allclose(picture(engine, sheet.decoded(second)), whole, atol=TOLERANCE)
    # Other texts or seeds in the second half change it: it is really run.
    assert np.abs(picture(engine, sheet.decoded(first)) - whole).max() > 0.01


def test_an_early_end_without_leftover_noise_goes_straight_to_the_picture(engine):
    sheet = Sheet()
    early = picture(engine, sheet.decoded(advanced(sheet, sheet.latent(), end_at_step=2)))
    expected = by_hand(engine, lambda x, d: d[1] + 3 * (d[0] - d[1]), [1.0, 0.75, 0.0], PROMPTS[:2])
    np.testing.assert_allclose(early, expected, atol=TOLERANCE)


def test_a_start_behind_the_end_gives_the_latent_back(engine):
    sheet = Sheet()
    late = picture(engine, sheet.decoded(advanced(sheet, sheet.latent(), start_at_step=4)))
    np.testing.assert_array_equal(late, 0)
    none = picture(engine, sheet.decoded(advanced(sheet, sheet.latent(), end_at_step=0)))
    np.testing.assert_array_equal(none, 0)
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    guider = sheet("BasicGuider", model=model, conditioning=sheet.text(clip, "a star"))[0]
    sigmas = sheet("BasicScheduler", model=model, steps=4)[0]
    high = sheet("SplitSigmas", sigmas=sigmas, step=0)[0]
    latent = custom(sheet, model, guider, high, sheet.latent(), output=1)
    np.testing.assert_array_equal(picture(engine, sheet.decoded(latent)), 0)


def test_split_sigmas_with_noise_left_in_between(engine):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    positive, negative = texts_of(sheet, clip)
    sigmas = sheet("BasicScheduler", model=model, steps=4)[0]
    high, low = sheet("SplitSigmas", sigmas=sigmas, step=3)
    guider = sheet("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)[0]
    first = custom(sheet, model, guider, high, sheet.latent())
    chosen = sheet("KSamplerSelect")[0]
    second = sheet(
        "SamplerCustom",
        model=model,
        add_noise=False,
        cfg=3.0,
        positive=positive,
        negative=negative,
        sampler=chosen,
        sigmas=low,
        latent_image=first,
    )[0]
    whole = picture(engine, k_sampler())
    np.testing.assert_allclose(picture(engine, sheet.decoded(second)), whole, atol=TOLERANCE)


def test_the_second_output_is_the_last_denoised_picture(engine):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    guider = sheet("BasicGuider", model=model, conditioning=sheet.text(clip, PROMPTS[0]))[0]
    sigmas = sheet("BasicScheduler", model=model, steps=4)[0]
    high = sheet("SplitSigmas", sigmas=sigmas, step=2)[0]
    denoised = custom(sheet, model, guider, high, sheet.latent(), output=1)
    seen = []
    by_hand(engine, lambda x, d: seen.append(d[0]) or d[0], [1.0, 0.75, 0.5], PROMPTS[:1])
    expected = seen[-1][0].clamp(-1, 1).numpy()
    np.testing.assert_allclose(picture(engine, sheet.decoded(denoised)), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("style", "cfg_conds", "cfg_second", "formula"),
    [
        ("regular", 2.0, 3.0, lambda d: d[2] + 3 * (d[1] - d[2]) + 2 * (d[0] - d[1])),
        ("regular", 2.0, 1.0, lambda d: d[1] + 2 * (d[0] - d[1])),
        ("regular", 1.0, 1.0, lambda d: d[0]),
        ("nested", 2.0, 3.0, lambda d: d[2] + 3 * (d[1] + 2 * (d[0] - d[1]) - d[2])),
    ],
)
def test_dual_guidance_by_hand(engine, style, cfg_conds, cfg_second, formula):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    first, second, negative = texts_of(sheet, clip, 3)
    guider = sheet(
        "DualCFGGuider",
        model=model,
        cond1=first,
        cond2=second,
        negative=negative,
        cfg_conds=cfg_conds,
        cfg_cond2_negative=cfg_second,
        style=style,
    )[0]
    sigmas = sheet("BasicScheduler", model=model, steps=2)[0]
    workflow = sheet.decoded(custom(sheet, model, guider, sigmas, sheet.latent()))
    (result,) = engine.render([RenderJob(workflow, "x")])
    expected = by_hand(engine, lambda x, d: formula(d), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(result.image, expected, atol=TOLERANCE)
    calls = {(2.0, 3.0): 3, (2.0, 1.0): 2, (1.0, 1.0): 1}[cfg_conds, cfg_second]
    # Beside rows of other kinds nothing changes.
    plain = k_sampler(steps=3)
    mixed = engine.render([RenderJob(plain, "a"), RenderJob(workflow, "b")])[1]
    np.testing.assert_allclose(mixed.image, expected, atol=TOLERANCE)
    (one,) = engine.render([RenderJob(k_sampler(steps=2, cfg=1.0), "x")])
    assert result.flops == calls * one.flops == mixed.flops


def test_rescaled_guidance_by_hand(engine):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    positive, negative = texts_of(sheet, clip)
    rescaled = sheet("RescaleCFG", model=model, multiplier=0.6)[0]
    latent = sheet(
        "KSampler",
        model=rescaled,
        positive=positive,
        negative=negative,
        latent_image=sheet.latent(),
        seed=SEED,
        steps=2,
        cfg=6.0,
    )[0]

    def guide(x, d):
        v_pos, v_cfg = x - d[0], x - (d[1] + 6 * (d[0] - d[1]))
        return x - v_cfg * (0.6 * v_pos.std() / v_cfg.std() + 0.4)

    expected = by_hand(engine, guide, [1.0, 0.5, 0.0], PROMPTS[:2])
    np.testing.assert_allclose(picture(engine, sheet.decoded(latent)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("class_type", ["ModelSamplingSD3", "ModelSamplingAuraFlow"])
def test_a_shift_moves_the_times(engine, class_type):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    positive, negative = texts_of(sheet, clip)
    shifted = sheet(class_type, model=model, shift=3.0)[0]
    latent = sheet(
        "KSampler",
        model=shifted,
        positive=positive,
        negative=negative,
        latent_image=sheet.latent(),
        seed=SEED,
        steps=2,
        cfg=3.0,
    )[0]
    expected = by_hand(engine, lambda x, d: d[1] + 3 * (d[0] - d[1]), [1.0, 0.75, 0.0], PROMPTS[:2])
    np.testing.assert_allclose(picture(engine, sheet.decoded(latent)), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("class_type", "inputs", "times"),
    [
        ("KarrasScheduler", {"sigma_max": 0.9}, schedules.karras(3, 0.0291675, 0.9)),
        ("KarrasScheduler", {}, schedules.karras(3, 0.0291675, 1.0)),
        ("ExponentialScheduler", {"sigma_max": 0.8}, schedules.exponential(3, 0.0291675, 0.8)),
        ("BetaSamplingScheduler", {"alpha": 0.5}, schedules.beta(3, 0.5, 0.6)),
    ],
)
def test_explicit_schedules_reach_the_sampler(engine, class_type, inputs, times):
    sheet = Sheet()
    model, clip, _ = sheet.loader()
    if class_type == "BetaSamplingScheduler":
        inputs = inputs | {"model": model}
    guider = sheet("BasicGuider", model=model, conditioning=sheet.text(clip, PROMPTS[0]))[0]
    sigmas = sheet(class_type, steps=3, **inputs)[0]
    latent = custom(sheet, model, guider, sigmas, sheet.latent())
    x = times[0] * noise(SEED, (3, 32, 32))[None]
    expected = by_hand(engine, lambda x, d: d[0], times, PROMPTS[:1], x)
    np.testing.assert_allclose(picture(engine, sheet.decoded(latent)), expected, atol=TOLERANCE)


def test_fresh_noise_is_a_function_of_seed_and_step():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 400
    assert not seeds & set(range(40))
    assert step_seed(2**64 + 1, 0) == step_seed(1, 0)
