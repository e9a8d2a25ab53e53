"""Pictures that FDFO and Flow-GRPO need to raise the reward of the mediocre generator.

    python -m benchmarks.fdfo [--seeds 3] [--sweep] [--chart PATH] [--quick] [--json]

Each method runs in the same loop with the same pictures, held-out prompts and noise, with the best
settings of its own sweep. `--sweep` runs those sweeps, as many settings for each, on a seed that
nothing else uses. The shipped base is tuned on single objects with and without a colour, without
guidance; every few epochs held-out prompts are judged as it is tuned.

A curve is the best rising fit (isotonic regression) of a run's looks. The ratio of a seed is the
number of pictures after which FDFO's curve reaches the end of Flow-GRPO's, over the number after
which Flow-GRPO's own does; null where FDFO's never does. Flow-GRPO has 2,048 pictures, FDFO 1,536.
Printed: the median over seeds with its 95 % bootstrap interval over seeds and held-out prompts.
Beside it, of the end: the reward, a score not trained on (likeness to a clean drawing of what was
asked), feature diversity among pictures that satisfy their prompt relative to the base's, values
out of range, the velocity's drift.

Runs are kept under FLOWLOOM_HOME and found again by the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from scipy.optimize import isotonic_regression

from flowloom import stages
from flowloom.generator.charts import Curve, write_reward_chart
from flowloom.generator.config import (
    FDFOConfig,
    FlowGRPOConfig,
    PromptsConfig,
    TuneGeneratorConfig,
    WatchConfig,
)
from flowloom.generator.intervals import ratio_interval
from flowloom.generator.judged import Judged
from flowloom.generator.judging_config import JudgingConfig, Setting
from flowloom.generator.lora_config import LoRAConfig

TRAINED, UNTRAINED = "watch/trained", "watch/watched"
SWEEP_SEED, NUM_RESAMPLES = 100, 2000

COMMON = TuneGeneratorConfig(
    prompts=PromptsConfig(kinds=("single", "colors")),
    num_epochs=32,
    images_per_epoch=64,
    lr_schedule="constant",
    watch=WatchConfig(every=2, num_prompts=96, num_seeds=2, rubric="shapes-likeness"),
    judging=JudgingConfig(
        num_prompts=96,
        num_seeds=4,
        serve=Setting(num_steps=10),
        held_out_rubrics=("shapes-likeness",),
    ),
    checkpoint_every=8,
)


def with_method(method, **fields):
    """The common configuration with a method and its own settings."""
    return dataclasses.replace(COMMON, method=method, **fields)


LAYERS = ("to_q", "to_k", "to_v", "to_out", "text_k", "text_v", "up", "down")
LORA = LoRAConfig(rank=8, alpha=8.0, target_modules=LAYERS)


def fdfo(num_branches=4, *, churn=0.1, min_rms=0.1, kl_coef=0.3, **fields):
    """FDFO with fewer pictures, a rate that falls to 0, and a mean over two epochs."""
    method = FDFOConfig(num_branches=num_branches, churn=churn, min_rms=min_rms, kl_coef=kl_coef)
    settings = {"num_epochs": 24, "lr": 8e-4, "lr_schedule": "linear", "average_epochs": 2.0}
    return with_method(method, **{**settings, **fields})


def flow_grpo(num_noisy=4, *, group_size=8, noise_level=0.7, **fields):
    """Flow-GRPO with noise in the first steps alone; None: in all but the last."""
    method = FlowGRPOConfig(
        window=num_noisy,
        window_frac=None if num_noisy is None else 0.0,
        group_size=group_size,
        noise_level=noise_level,
    )
    return with_method(method, **{"lora": LORA, "lr": 2e-3, "average_epochs": 5.0, **fields})


# The best of the settings tried that keep 80 % of the base's diversity (docs/log.md); 2 branches
# are there to compare, and keep a little less.
BASELINE, BEST = "Flow-GRPO", "FDFO, 4 branches"
METHODS = {"FDFO": fdfo(2), BEST: fdfo(), BASELINE: flow_grpo()}
CONSTANT = {"lr_schedule": "constant"}
SWEEPS = {
    "FDFO": {
        "2 branches": METHODS["FDFO"],
        "2 branches, churn .03, KL .1, min_rms .05, lr 3e-4, constant": fdfo(
            2, churn=0.03, min_rms=0.05, kl_coef=0.1, lr=3e-4, average_epochs=None, **CONSTANT
        ),
        "4 branches": METHODS[BEST],
        "min_rms .05": fdfo(min_rms=0.05),
        "min_rms .05, lr 5e-4, constant": fdfo(min_rms=0.05, lr=5e-4, **CONSTANT),
        "min_rms .05, lr 3e-4, constant": fdfo(min_rms=0.05, lr=3e-4, **CONSTANT),
        "min_rms .2, lr 6e-4, constant": fdfo(min_rms=0.2, lr=6e-4, **CONSTANT),
        "KL .5, lr 1e-3": fdfo(kl_coef=0.5, lr=1e-3),
        "churn .3": fdfo(churn=0.3),
        "8 steps per epoch, lr 5e-4": fdfo(num_minibatches=8, lr=5e-4),
        "LoRA, min_rms .2, lr 4e-3, constant": fdfo(min_rms=0.2, lr=4e-3, lora=LORA, **CONSTANT),
    },
    BASELINE: {
        "groups of 8": METHODS[BASELINE],
        "noise in all steps, all weights, lr 3e-4": flow_grpo(None, lora=None, lr=3e-4),
        "all weights, lr 3e-4": flow_grpo(lora=None, lr=3e-4),
        "groups of 16": flow_grpo(group_size=16),
        "groups of 4": flow_grpo(group_size=4),
        "groups of 16, noise 1": flow_grpo(group_size=16, noise_level=1.0),
        "groups of 16, noise .5": flow_grpo(group_size=16, noise_level=0.5),
        "lr 3e-3": flow_grpo(lr=3e-3),
        "mean of 2 epochs": flow_grpo(average_epochs=2.0),
        "groups of 16, 8 steps per epoch": flow_grpo(group_size=16, num_minibatches=8),
        "groups of 16, noise in the first 5 steps": flow_grpo(5, group_size=16),
    },
}


def shortened(config):
    """Two epochs and few prompts."""
    watch = dataclasses.replace(config.watch, every=1, num_prompts=8)
    judging = dataclasses.replace(config.judging, num_prompts=8, num_seeds=2)
    return dataclasses.replace(config, num_epochs=2, watch=watch, judging=judging)


def tune(config, quick):
    """A run's looks and what it was judged to be before and after."""
    out = stages.run("tune_generator", shortened(config) if quick else config).out_dir
    looks = json.loads((out / "curve.json").read_text())["looks"]
    judged = json.loads((out / "judged.json").read_text())
    images = np.array([look["epoch"] * config.images_per_epoch for look in looks])
    scores = {
        name: np.array([look["by_prompt"][name] for look in looks]) for name in (TRAINED, UNTRAINED)
    }
    return images, scores, {when: Judged.from_dict(row) for when, row in judged.items()}


def images_to(images_N, scores_N, target):
    """Pictures after which the rising fit of a curve reaches a target; infinity if it does not."""
    rising_N = isotonic_regression(scores_N).x
    if target > rising_N[-1]:
        return np.inf
    after = int(np.argmax(rising_N >= target))
    if after == 0:
        return float(images_N[0])
    low, high = rising_N[after - 1], rising_N[after]
    share = (target - low) / (high - low)
    return float(images_N[after - 1] + share * (images_N[after] - images_N[after - 1]))


def ratio_of(ours, theirs):
    """Pictures that ours needs per picture of theirs to reach the end of theirs.

    Args:
        ours: Pictures at each look `[N]`, and scores `[N, P]`.
        theirs: The same of the other method; it may have other looks.
    """
    target = float(isotonic_regression(theirs[1].mean(1)).x[-1])
    needed, own = (
        images_to(images_N, scores_NP.mean(1), target) for images_N, scores_NP in (ours, theirs)
    )
    # Where theirs never rose there is nothing to be compared with.
    return needed / own if own > theirs[0][0] else np.nan


def ratio_and_interval(ours, theirs):
    """Median over seeds, and its bootstrap interval; both sides see the same prompts.

    Args:
        ours: Pictures and scores of each seed, as `ratio_of` takes them.
        theirs: The same of the other method.
    """
    rng = np.random.default_rng(0)
    pairs = list(zip(ours, theirs, strict=True))
    alone = [ratio_of(*pair) for pair in pairs]
    medians = []
    for _ in range(NUM_RESAMPLES):
        ratios = []
        for seed in rng.integers(len(pairs), size=len(pairs)):
            picked_P = rng.integers(ours[seed][1].shape[1], size=ours[seed][1].shape[1])
            ratios.append(
                ratio_of(
                    *((images_N, scores_NP[:, picked_P]) for images_N, scores_NP in pairs[seed])
                )
            )
        medians.append(np.nanmedian(ratios) if np.isfinite(ratios).any() else np.inf)
    low, high = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
    return alone, float(np.nanmedian(alone)), [float(low), float(high)]


def summary(runs):
    """What a method's runs end with: means over seeds."""
    rows = []
    for _, scores, judged in runs:
        before, after = judged["before"], judged["after"]
        names = ("tuned/score", "tuned/out_of_range", "tuned/drift/velocity")
        row = {name: after.interval(name).mean for name in names}
        row |= {
            f"{name} of base": before.interval(name).mean for name in names if "drift" not in name
        }
        diversity = [j.values["tuned/diversity/satisfied"] for j in (after, before)]
        row["diversity"] = ratio_interval(*diversity).mean
        row["held-out reward"] = float(scores[TRAINED][-1].mean())
        row["likeness"] = float(scores[UNTRAINED][-1].mean())
        row["likeness of base"] = float(scores[UNTRAINED][0].mean())
        rows.append(row)
    return {name: finite(np.mean([row[name] for row in rows])) for name in rows[0]}


def sweep(quick):
    """Print the ends of every setting of every method."""
    for method, settings in SWEEPS.items():
        for name, config in settings.items():
            images_N, scores, _ = tune(dataclasses.replace(config, seed=SWEEP_SEED), quick)
            means_N = scores[TRAINED].mean(1)
            course = " ".join(f"{mean:.2f}" for mean in means_N[::2])
            area = float(np.trapezoid(means_N, images_N) / images_N[-1])
            print(
                f"{method:18} {name:34} end {means_N[-1]:.3f}, mean {area:.3f}: {course}",
                flush=True,
            )


def finite(value):
    """A number that JSON knows; None for infinity and for what is not defined."""
    return round(float(value), 4) if np.isfinite(value) else None


def main():
    """Print tables; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--sweep", action="store_true", help="run the sweeps first")
    parser.add_argument("--chart", type=Path, help="PNG or SVG of the curves")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, few prompts")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    if options.sweep:
        sweep(options.quick)
    seeds = range(1 if options.quick else options.seeds)
    runs = {
        name: [tune(dataclasses.replace(config, seed=seed), options.quick) for seed in seeds]
        for name, config in METHODS.items()
    }
    figures = {"image_ratio": None, "interval": [None, None]}
    theirs = [(images_N, scores[TRAINED]) for images_N, scores, _ in runs[BASELINE]]
    for name, found in runs.items():
        row = figures[name] = summary(found)
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
        if name == BASELINE:
            continue
        ours = [(images_N, scores[TRAINED]) for images_N, scores, _ in found]
        alone, median, interval = ratio_and_interval(ours, theirs)
        row |= {"image_ratio": finite(median), "interval": [finite(end) for end in interval]}
        row["image_ratios"] = [finite(value) for value in alone]
        seeds_ = ", ".join(f"{value:.2f}" for value in alone)
        ends = ", ".join(f"{end:.2f}" for end in interval)
        print(f"  pictures per picture of {BASELINE}: {median:.2f} ({ends}); by seed {seeds_}")
    figures |= {key: figures[BEST][key] for key in ("image_ratio", "interval")}
    if options.chart is not None:
        panels = {
            title: {
                name: Curve(
                    images_N=found[0][0],
                    rewards_RN=np.stack([scores[key].mean(1) for _, scores, _ in found]),
                )
                for name, found in runs.items()
            }
            for title, key in (("trained on", TRAINED), ("not trained on", UNTRAINED))
        }
        write_reward_chart(options.chart, panels)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
