"""Where reward tuning goes wrong, and what stops it: guidance, unequal rewards, reward hacking.

    python -m benchmarks.fdfo_limits [--quick] [--json]

guidance   FDFO and Flow-GRPO with guidance 1 (none) and 4.5 inside the tuned velocity, judged as
           tuned: reward, a score not trained on, values out of range, drift, clipped share
rewards    FDFO on an easy reward (pure colours) and a hard one (what was asked): their sum with
           two weights, balanced, and their product: the courses on the pictures trained on
hacking    FDFO on pure colours alone, without a penalty, watched by what was asked: with and
           without the stop rule

One seed each; settings are those of `benchmarks.fdfo` but for what is said. Runs are kept under
FLOWLOOM_HOME and found again by the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks.fdfo import BASELINE, BEST, METHODS, TRAINED, UNTRAINED, shortened
from flowloom import stages
from flowloom.generator.judged import Judged
from flowloom.generator.judging_config import Setting
from flowloom.score.config import RubricConfig, ShapesConfig, TermConfig

GUIDANCE = 4.5
PURE, ASKED = ShapesConfig(kind="crispness"), ShapesConfig()


def run(config, quick):
    """A run's curve, with looks, and what it was judged to be before and after."""
    out = stages.run("tune_generator", shortened(config) if quick else config).out_dir
    judged = json.loads((out / "judged.json").read_text())
    curve = json.loads((out / "curve.json").read_text())
    return curve, {when: Judged.from_dict(row) for when, row in judged.items()}


def guidance(quick):
    """Both methods without guidance and with much of it."""
    found = {}
    for method in (BEST, BASELINE):
        for scale in (None, GUIDANCE):
            config = METHODS[method]
            serve = Setting(num_steps=config.num_steps, guidance=scale)
            judging = dataclasses.replace(config.judging, serve=serve)
            config = dataclasses.replace(config, guidance=scale, judging=judging)
            curve, judged = run(config, quick)
            looks = [look[TRAINED] for look in curve["looks"]]
            row = {"reward of base": looks[0], "best": max(looks), "end": looks[-1]}
            row |= {"likeness of base": curve["looks"][0][UNTRAINED]}
            row |= {"likeness": curve["looks"][-1][UNTRAINED]}
            for when, one in judged.items():
                row[f"out of range {when}"] = one.interval("tuned/out_of_range").mean
            row["drift"] = judged["after"].interval("tuned/drift/velocity").mean
            row["clipped"] = max(epoch["train/clipped"] for epoch in curve["epochs"])
            name = f"{method}, guidance {scale or 1}"
            found[name] = row
            print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return found


def rewards(quick):
    """Two rewards: as sums of several weights, balanced, and as a product."""
    found = {}
    settings = {
        "sum, easy one four times": (summed(0.8), None),
        "sum, equal": (summed(0.5), None),
        "sum, equal, balanced": (summed(0.5), 4.0),
        "product": (METHODS[BEST].rubric, None),
    }
    for name, (rubric, epochs) in settings.items():
        config = dataclasses.replace(METHODS[BEST], rubric=rubric, balance_epochs=epochs)
        curve, _ = run(config, quick)
        for term in ("crispness", "faithfulness"):
            course = [epoch[f"train/term/{term}"] for epoch in curve["epochs"]]
            quarter = max(len(course) // 4, 1)
            ends = [sum(part) / quarter for part in (course[:quarter], course[-quarter:])]
            found[f"{name}, {term}"] = ends
            print(f"two rewards, {name}, {term}: first quarter {ends[0]:.3f}, last {ends[1]:.3f}")
    return found


def summed(easy):
    """A weighted sum of pure colours and what was asked."""
    terms = (TermConfig(scorer=PURE, weight=easy), TermConfig(scorer=ASKED, weight=1 - easy))
    return RubricConfig(name="crisp and faithful", terms=terms)


def hacking(quick):
    """Colours alone are raised; what was asked is watched."""
    found = {}
    rubric = RubricConfig(name="crisp", terms=(TermConfig(scorer=PURE, weight=1.0),))
    for name, drop in (("watched only", None), ("with the stop rule", 0.05)):
        config = METHODS[BEST]
        assert config.watch is not None, "the benchmark's configurations watch"
        watch = dataclasses.replace(config.watch, rubric="shapes", max_drop=drop, patience=1)
        method = dataclasses.replace(config.method, kl_coef=0.0)
        config = dataclasses.replace(config, rubric=rubric, watch=watch, method=method)
        curve, judged = run(config, quick)
        looks = [(look["epoch"], look[TRAINED], look[UNTRAINED]) for look in curve["looks"]]
        kept = {
            f"{key} {when}": one.interval(f"serve/{key}").mean
            for when, one in judged.items()
            for key in ("score", "score/shapes-likeness/score")
        }
        found[name] = {"looks": looks, **kept}
        course = ", ".join(f"{epoch}: {colour:.2f} {asked:.2f}" for epoch, colour, asked in looks)
        print(f"hacking {name}: epoch: pure colours, what was asked: {course}")
        print("  kept: " + ", ".join(f"{key} {value:.3f}" for key, value in kept.items()))
    return found


def main():
    """Print the tables; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two epochs, few prompts")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    figures = {part.__name__: part(options.quick) for part in (guidance, rewards, hacking)}
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
