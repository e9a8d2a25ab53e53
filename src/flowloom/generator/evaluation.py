"""Judge a generator on held-out prompts with fixed noise, as it is served and as it is tuned.

Shapes: P prompts, S seeds, B = P * S rows (a prompt's seeds are neighbours), C channels, H x W
pixels, F features.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.generator.diversity import diversity
from flowloom.generator.judged import NUM_DIGITS, Judged
from flowloom.generator.judging_config import JudgingConfig, Setting
from flowloom.generator.picture_facts import Look, look_at_shapes, pyramid
from flowloom.generator.velocity import Generator
from flowloom.render.samplers import sample
from flowloom.render.schedules import schedule
from flowloom.score.rubric import Rubric
from flowloom.score.scorers import read_prompt

OUT_OF_RANGE = 1.05
OTHER_KIND = "prompts"
"""Of prompts outside the language of the shapes world."""
_JUDGED_NOISE, _GRID_NOISE = 1, 2


@torch.no_grad()
def judge(
    generator: Generator,
    prompts: Sequence[str],
    config: JudgingConfig,
    rubrics: Sequence[Rubric],
    tuned: Setting,
    *,
    held_out: Sequence[Rubric] = (),
    look: Look | None = None,
    kinds: Sequence[str] | None = None,
) -> Judged:
    """Judge a generator; two that are judged alike see the same prompts and noise.

    Args:
        generator: What to judge.
        prompts: P prompts that were not trained on.
        config: Seeds and how it is served.
        rubrics: Scores that are trained on; the first one says what satisfies a prompt.
        tuned: How it is sampled while it is tuned.
        held_out: Scores that are only watched.
        look: Features and errors of pictures. None: `look_at_shapes` where all prompts are in the
            language of the shapes world, else `pyramid`.
        kinds: Kind of each prompt. None: in that language as it says, else `OTHER_KIND`.

    Raises:
        ValueError: No rubric or prompt, two rubrics of one name, kinds that are not one per prompt,
            or a prompt that a rubric cannot judge.
        FloatingPointError: A picture or a score is not finite.
    """
    _check(prompts, [*rubrics, *held_out], kinds, num_trained=len(rubrics))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    known = _shapes_kinds(prompts)
    look = look or (pyramid if known is None else look_at_shapes)
    doubled = [prompt for prompt in prompts for _ in range(config.num_seeds)]
    noise_BCHW = noise(generator.shape, len(doubled), (config.seed, _JUDGED_NOISE))
    values: dict[str, np.ndarray] = {}
    for name, setting in (("serve", config.serve), ("tuned", tuned)):
        flow = generator.with_guidance(setting.guidance)
        found = _measure(flow, setting, doubled, noise_BCHW, config, [*rubrics, *held_out], look)
        found["drift/velocity"] = _drift(flow, setting, doubled, noise_BCHW, config)
        values |= {f"{name}/{key}": np.round(v_P, NUM_DIGITS) for key, v_P in found.items()}
    return Judged(
        prompts=tuple(prompts),
        kinds=tuple(kinds or known or [OTHER_KIND] * len(prompts)),
        trained=tuple(rubric.name for rubric in rubrics),
        held_out=tuple(rubric.name for rubric in held_out),
        values=values,
        num_images=2 * len(doubled),
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
    )


def noise(shape: Sequence[int], count: int, entropy: Sequence[int]) -> Tensor:
    """`[count, *shape]` normal noise; row k is a function of `entropy` and k."""
    seeds = np.random.default_rng(entropy).integers(2**63, size=count).tolist()
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


@torch.no_grad()
def draw(flow: Generator, prompts: Sequence[str], noise_BCHW: Tensor, setting: Setting) -> Tensor:
    """Pictures `[B, 3, H, W]` by Euler steps without churn, not clamped; `flow` is guided already.

    Args:
        flow: A generator with the setting's guidance.
        prompts: One per row.
        noise_BCHW: Where they start.
        setting: Steps.
    """

    def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        v = flow.velocity(x, t, [prompts[int(row)] for row in rows.tolist()])
        return x - t[:, None, None, None] * v

    start_BCHW = noise_BCHW.to(flow.device)
    return flow.decode(sample(denoise, start_BCHW, [times(setting)] * len(prompts), "euler")[0])


def times(setting: Setting) -> list[float]:
    """Falling times of a setting, from 1 to 0."""
    return schedule("simple", setting.num_steps, shift=setting.time_shift)


def draw_rows(
    generator: Generator, prompts: Sequence[str], config: JudgingConfig
) -> list[list[np.ndarray]]:
    """Pictures of the first prompts as served, by prompt, for a grid; the same noise each time."""
    shown = prompts[: config.num_grid_prompts]
    noise_SCHW = noise(generator.shape, config.grid_seeds, (config.seed, _GRID_NOISE))
    flow = generator.with_guidance(config.serve.guidance)
    rows = []
    for prompt in shown:
        images_SCHW = draw(flow, [prompt] * config.grid_seeds, noise_SCHW, config.serve)
        rows.append(list(images_SCHW.clamp(-1, 1).numpy()))
    return rows


def _measure(
    flow: Generator,
    setting: Setting,
    doubled: Sequence[str],
    noise_BCHW: Tensor,
    config: JudgingConfig,
    rubrics: Sequence[Rubric],
    look: Look,
) -> dict[str, np.ndarray]:
    """All measures of one setting but drift, `[P]` each; few pictures are held at once."""
    seeds = config.num_seeds
    columns: dict[str, list[np.ndarray]] = {}
    features = []
    # Whole prompts, since the spread is taken over their seeds.
    size = max(config.rows_per_pass // seeds, 1) * seeds
    for first in range(0, len(doubled), size):
        texts = doubled[first : first + size]
        raw_BCHW = draw(flow, texts, noise_BCHW[first : first + size], setting)
        images_BCHW = raw_BCHW.clamp(-1, 1)
        by_prompt = images_BCHW.unflatten(0, (-1, seeds))
        spread_P = by_prompt.std(1, correction=0).flatten(1).mean(1)
        rows = {
            "out_of_range": (raw_BCHW.abs() > OUT_OF_RANGE).double().flatten(1).mean(1).numpy(),
            "spread": spread_P.double().repeat_interleave(seeds).numpy(),
        }
        for rubric in rubrics:
            scored = rubric.score(texts, list(images_BCHW.numpy()))
            for column in rubric.columns:
                rows[f"score/{rubric.name}/{column}"] = np.array([row[column] for row in scored])
        facts = look(texts, images_BCHW)
        rows |= {f"error/{name}": error_B for name, error_B in facts.errors.items()}
        features.append(facts.features_BF)
        for name, values_B in rows.items():
            columns.setdefault(name, []).append(values_B)
    values_PS = {name: np.concatenate(parts).reshape(-1, seeds) for name, parts in columns.items()}
    score_PS = values_PS[f"score/{rubrics[0].name}/score"]
    satisfied_PS = score_PS > config.satisfied_score
    apart = diversity(np.concatenate(features).reshape(*score_PS.shape, -1), satisfied_PS)
    found = {"score": score_PS, "satisfied/share": satisfied_PS, **values_PS}
    return {name: values.mean(1, dtype=float) for name, values in found.items()} | {
        "diversity/all": apart.all_P,
        "diversity/satisfied": apart.satisfied_P,
        "diversity/wrong": apart.wrong_P,
    }


def _drift(
    flow: Generator,
    setting: Setting,
    doubled: Sequence[str],
    noise_BCHW: Tensor,
    config: JudgingConfig,
) -> np.ndarray:
    """mean (v - v_base)^2 over the states of the base's own paths, `[P]`."""
    used = np.flatnonzero(np.arange(len(doubled)) % config.num_seeds < config.num_drift_seeds)
    parts = []
    for first in range(0, len(used), config.rows_per_pass):
        rows = used[first : first + config.rows_per_pass]
        texts = [doubled[int(row)] for row in rows]
        parts.append(drift(flow, texts, noise_BCHW[torch.from_numpy(rows)], times(setting)))
    drift_B = torch.cat(parts).double().numpy()
    return drift_B.reshape(-1, config.num_drift_seeds).mean(1)


@torch.no_grad()
def drift(
    flow: Generator, prompts: Sequence[str], noise_BCHW: Tensor, times: Sequence[float]
) -> Tensor:
    """Mean over elements and steps of (v - v_base)^2 at the states that the base visits, `[B]`."""
    x_BCHW = noise_BCHW.to(flow.device)
    total_B = x_BCHW.new_zeros(len(x_BCHW))
    for t, s in itertools.pairwise(times):
        t_B = x_BCHW.new_full((len(x_BCHW),), t)
        v_base_BCHW = flow.base_velocity(x_BCHW, t_B, prompts)
        apart_BCHW = flow.velocity(x_BCHW, t_B, prompts) - v_base_BCHW
        total_B += apart_BCHW.square().flatten(1).mean(1)
        x_BCHW = x_BCHW + (s - t) * v_base_BCHW
    return (total_B / (len(times) - 1)).cpu()


def _shapes_kinds(prompts: Sequence[str]) -> list[str] | None:
    """Kinds in the language of the shapes world; None where a prompt is outside it."""
    try:
        return [read_prompt(prompt).kind for prompt in prompts]
    except ValueError:
        return None


def _check(
    prompts: Sequence[str], rubrics: Sequence[Rubric], kinds: Sequence[str] | None, num_trained: int
) -> None:
    names = [rubric.name for rubric in rubrics]
    if not num_trained or not prompts:
        got = f"{len(prompts)} prompts and {num_trained} rubrics"
        raise ValueError(f"judge: got {got}, expected at least one of each")
    if len(set(names)) < len(names):
        raise ValueError(f"judge: got rubrics {names}, expected different names")
    if kinds is not None and len(kinds) != len(prompts):
        raise ValueError(f"judge: got {len(kinds)} kinds, expected one per prompt ({len(prompts)})")
