"""What the embedded node classes of sampling do: schedules, guiders, and runs that wait.

Values: SIGMAS a list of falling times, SAMPLER a name, NOISE a seed, GUIDER a `guidance.Guider`.
The samplers give back a `SamplerTask` that waits for its batch, or their latent where there is no
step to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowloom.render import guidance, schedules
from flowloom.render.batch import SamplerTask
from flowloom.render.conditioning import Texts
from flowloom.render.guidance import Guider, Model
from flowloom.render.models import ModelStore

SAMPLER_CLASSES = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
"""Classes whose runs wait for a batch."""

Times = list[float]


def k_sampler(
    store: ModelStore,
    *,
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Texts,
    negative: Texts,
    latent_image: Tensor,
    denoise: float = 1.0,
):
    """KSampler; with `denoise` 0 nothing is run."""
    times = schedules.schedule(scheduler, steps, denoise=denoise, shift=model.shift)
    guider = guidance.classifier_free(model, positive, negative, cfg)
    return _task(store, guider, latent_image, seed, True, sampler_name, times, num_outputs=1)


def k_sampler_advanced(
    store: ModelStore,
    *,
    model: Model,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Texts,
    negative: Texts,
    latent_image: Tensor,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
):
    """KSamplerAdvanced: the steps [start, end) of a schedule."""
    times = schedules.part(
        schedules.schedule(scheduler, steps, shift=model.shift),
        start_at_step,
        end_at_step,
        keep_noise=return_with_leftover_noise == "enable",
    )
    guider = guidance.classifier_free(model, positive, negative, cfg)
    noisy = add_noise == "enable"
    return _task(store, guider, latent_image, noise_seed, noisy, sampler_name, times, num_outputs=1)


def sampler_custom(
    store: ModelStore,
    *,
    model: Model,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: Texts,
    negative: Texts,
    sampler: str,
    sigmas: Times,
    latent_image: Tensor,
):
    """SamplerCustom: a given schedule."""
    guider = guidance.classifier_free(model, positive, negative, cfg)
    return _task(store, guider, latent_image, noise_seed, add_noise, sampler, sigmas, num_outputs=2)


def sampler_custom_advanced(
    store: ModelStore,
    *,
    noise: int,
    guider: Guider,
    sampler: str,
    sigmas: Times,
    latent_image: Tensor,
):
    """SamplerCustomAdvanced: a given schedule and guider."""
    return _task(store, guider, latent_image, noise, True, sampler, sigmas, num_outputs=2)


def _task(
    store: ModelStore,
    guider: Guider,
    latent_CHW: Tensor,
    seed: int,
    add_noise: bool,
    sampler: str,
    times: Times,
    *,
    num_outputs: int,
) -> SamplerTask | tuple[Tensor, ...]:
    """The run, or its latent for all outputs where there is no step to run."""
    if len(times) < 2:
        return (latent_CHW,) * num_outputs
    pixels, limit = latent_CHW.shape[1] * latent_CHW.shape[2], store.catalogue.limits.work
    if pixels * (len(times) - 1) > limit:
        raise ValueError(
            f"steps: got {len(times) - 1} of {pixels} pixels, expected at most "
            f"{int(limit // pixels)} at this size"
        )
    return SamplerTask(
        guider=guider,
        latent_CHW=latent_CHW,
        seed=seed,
        add_noise=add_noise,
        sampler=sampler,
        times=tuple(times),
        num_outputs=num_outputs,
    )


def random_noise(store: ModelStore, *, noise_seed: int):
    """A seed."""
    return (noise_seed,)


def basic_guider(store: ModelStore, *, model: Model, conditioning: Texts):
    """See `guidance.basic`."""
    return (guidance.basic(model, conditioning),)


def cfg_guider(store: ModelStore, *, model: Model, positive: Texts, negative: Texts, cfg: float):
    """See `guidance.classifier_free`."""
    return (guidance.classifier_free(model, positive, negative, cfg),)


def dual_cfg_guider(
    store: ModelStore,
    *,
    model: Model,
    cond1: Texts,
    cond2: Texts,
    negative: Texts,
    cfg_conds: float,
    cfg_cond2_negative: float,
    style: str,
):
    """See `guidance.dual`."""
    return (
        guidance.dual(
            model, cond1, cond2, negative, cfg_conds, cfg_cond2_negative, style == "nested"
        ),
    )


def k_sampler_select(store: ModelStore, *, sampler_name: str):
    """A sampler's name."""
    return (sampler_name,)


def basic_scheduler(
    store: ModelStore, *, model: Model, scheduler: str, steps: int, denoise: float = 1.0
):
    """See `schedules.schedule`."""
    return (schedules.schedule(scheduler, steps, denoise=denoise, shift=model.shift),)


def karras_scheduler(
    store: ModelStore, *, steps: int, sigma_max: float, sigma_min: float, rho: float
):
    """See `schedules.karras`."""
    return (schedules.karras(steps, sigma_min, sigma_max, rho),)


def exponential_scheduler(store: ModelStore, *, steps: int, sigma_max: float, sigma_min: float):
    """See `schedules.exponential`."""
    return (schedules.exponential(steps, sigma_min, sigma_max),)


def beta_scheduler(store: ModelStore, *, model: Model, steps: int, alpha: float, beta: float):
    """See `schedules.beta`."""
    return (schedules.beta(steps, alpha, beta, shift=model.shift),)


def split_sigmas(store: ModelStore, *, sigmas: Times, step: int):
    """See `schedules.split`."""
    return schedules.split(sigmas, step)


SAMPLER_NODES: dict[str, Callable[..., Any]] = {
    "KSampler": k_sampler,
    "KSamplerAdvanced": k_sampler_advanced,
    "SamplerCustom": sampler_custom,
    "SamplerCustomAdvanced": sampler_custom_advanced,
    "RandomNoise": random_noise,
    "BasicGuider": basic_guider,
    "CFGGuider": cfg_guider,
    "DualCFGGuider": dual_cfg_guider,
    "KSamplerSelect": k_sampler_select,
    "BasicScheduler": basic_scheduler,
    "KarrasScheduler": karras_scheduler,
    "ExponentialScheduler": exponential_scheduler,
    "BetaSamplingScheduler": beta_scheduler,
    "SplitSigmas": split_sigmas,
}
