"""Rounds of policy optimisation: render designs of the tuned policy, refit the reward, go on.

    python -m benchmarks.rounds [--recipe bench] [--seeds 3] [--rounds 3] [--members 3]
                                [--conditioned N] [--quick] [--json] --out DIR

Data is built once, as the recipe says. For every training seed: SFT; then in each round the reward
members, their calibration and GRPO, from the second round on from the weights of the one before.
Between two rounds the policy's designs on train prompts are rendered and join the triplets; within
one nothing is. `DIR/seed-K` becomes a folder of links to the last round's parts, for

    python -m benchmarks.guidance --root DIR/seed-0 --root DIR/seed-1 ... --out DIR/guidance

The first round's parts lie beside them as `DIR/seed-K-round-0`, and so on. `--conditioned N` trains
score-conditioned SFT with N levels for that comparison too. The same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from flowloom import recipes, stages
from flowloom.recipes.recipe import Recipe
from flowloom.runs import write_json

OUT = Path("build/rounds")
FIRST_SEED = OUT / "seed-0"
"""Where other benchmarks look for trained parts, unless told otherwise."""
SHOWN = ("renders", "spearman", "within", "coverage", "reward", "kl", "unique_frac", "seconds")


class Rounds:
    """The rounds of one training seed."""

    def __init__(self, recipe: Recipe, seed: int, num_members: int, data: Mapping[str, Path]):
        """Take a recipe and the folders `catalogue`, `pairs` and `triplets`."""
        self.recipe, self.seed, self.num_members = recipe, seed, num_members
        self.parts = dict(data)

    def supervised(self, levels: int | None = None) -> Path:
        """SFT, or with levels score-conditioned SFT."""
        config = dataclasses.replace(self.recipe.train_sft, seed=self.seed, score_levels=levels)
        return self._run("train_sft", config, "catalogue", "pairs", "triplets").out_dir

    def round(self, number: int) -> dict[str, float]:
        """Reward, calibration and GRPO; before them, from the second round on, renders."""
        began = time.perf_counter()
        recipe, parts = self.recipe, self.parts
        if number > 0:
            config = dataclasses.replace(recipe.build_triplets, seed=number)
            inputs = {"earlier": parts["triplets"], "proposals": parts["adapter"]}
            built = self._run("build_triplets", config, "catalogue", "pairs", **inputs)
            parts["triplets"] = built.out_dir
        members = []
        for k in range(self.num_members):
            config = dataclasses.replace(recipe.train_reward, member=k, seed=self.seed)
            members.append(self._run("train_reward", config, "catalogue", "triplets"))
        calibrated = self._run(
            "calibrate_reward",
            recipe.calibrate_reward,
            "catalogue",
            "triplets",
            members=[member.out_dir for member in members],
        )
        parts["reward"] = calibrated.out_dir
        # Other prompts and noise in every round.
        config = dataclasses.replace(recipe.train_grpo, seed=1000 * self.seed + number)
        start = {"start": parts["adapter"]} if number > 0 else {}
        names = ("catalogue", "triplets", "designer", "reward")
        tuned = self._run("train_grpo", config, *names, **start)
        parts["adapter"] = tuned.out_dir
        found, judged = tuned.metrics, calibrated.metrics
        return {
            "renders": members[0].metrics["reward/rows"],
            "spearman": judged["reward/spearman"],
            "within": judged["reward/spearman_within"],
            "coverage": judged["reward/coverage"],
            **{name: found[f"grpo/{name}"] for name in ("reward", "kl", "unique_frac")},
            "seconds": time.perf_counter() - began,
        }

    def link(self, folder: Path) -> None:
        """Make `folder` one of links to the parts there are now."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in self.parts.items():
            target = folder / name
            target.unlink(missing_ok=True)
            target.symlink_to(path.resolve())

    def _run(self, stage: str, config: Any, *names: str, **more: Any) -> Any:
        return stages.run(stage, config, {name: self.parts[name] for name in names} | more)


def build_data(recipe: Recipe) -> dict[str, Path]:
    """The folders that all seeds share."""
    generator = stages.run("tune_generator", recipe.tune_generator).out_dir
    inputs = {"generator": generator}
    catalogue = stages.run("publish_generator", recipe.publish_generator, inputs).out_dir
    pairs = stages.run("build_pairs", recipe.build_pairs, {"catalogue": catalogue}).out_dir
    inputs = {"catalogue": catalogue, "pairs": pairs}
    triplets = stages.run("build_triplets", recipe.build_triplets, inputs).out_dir
    return {**inputs, "triplets": triplets}


def main() -> None:
    """Run the rounds and print a row for each; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="bench", help="recipe of all stages")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds, from 0 on")
    parser.add_argument("--first-seed", type=int, default=0, help="another first seed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of GRPO")
    parser.add_argument("--members", type=int, default=3, help="reward members")
    parser.add_argument("--conditioned", type=int, help="levels of score-conditioned SFT")
    parser.add_argument("--quick", action="store_true", help="recipe smoke, one seed, two rounds")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results")
    options = parser.parse_args()
    if options.quick:
        options.recipe, options.seeds, options.rounds = "smoke", 1, 2
    recipe = recipes.resolve(options.recipe)
    data = build_data(recipe)
    result = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rounds = Rounds(recipe, seed, options.members, data)
        if options.conditioned is not None:
            rounds.parts["conditioned"] = rounds.supervised(options.conditioned)
        rounds.parts["designer"] = rounds.supervised()
        for number in range(options.rounds):
            row = {"seed": seed, "round": number, **rounds.round(number)}
            rounds.link(options.out / f"seed-{seed}-round-{number}")
            result.append(row)
            shown = ", ".join(f"{name} {row[name]:.4g}" for name in SHOWN)
            print(f"seed {seed} round {number}: {shown}", flush=True)
        rounds.link(options.out / f"seed-{seed}")
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "rounds.json", result)
    if options.json:
        print(json.dumps({"rounds": result}))


if __name__ == "__main__":
    main()
