"""What a trained designer is worth, by rendering: policies, oracle, guidance and temperature.

    python -m benchmarks.guidance [--catalogue DIR --triplets DIR --designer DIR --adapter DIR
                                   --reward DIR [--conditioned DIR]] [--root DIR]... [--recipe NAME]
                                  [--prompts N] [--seeds N] [--oracle-prompts N]
                                  [--quick] [--json] [--out DIR]

The folders are what `publish_generator`, `build_triplets`, `train_sft`, `train_grpo` and
`calibrate_reward` wrote, `conditioned` a `train_sft` with `score_levels`. Each option may be
repeated, once per training seed (what is given once serves all); `--root` names a folder that holds
them by these names. Without any, the recipe's stages are run first, as `flowloom run` does.

A. Every policy on the same held-out prompts and noise: one sample at temperature 1, a low one and
   the likeliest tokens, and the best of four by predicted reward. Paired 95 % intervals of
   GRPO + guidance (one sample, temperature 1).
B. Oracle and best fixed workflow, chosen on one half of the seeds and scored on the other, and the
   share of the gap between them that each policy closes (`flowloom.evaluation.oracle`).
C. Guidance w and temperature varied: scores against distinct workflows, a table and `sweep.png`.
D. Designs at w = 0, 1, 1.5 and 3: valid, and some rendered.
E. Share of single renders within the ensemble's 90 % intervals, on each policy's own designs.

`--out` keeps designs and scores, so that the same command goes on where it stopped, and training
seeds share what they have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.world import settings
from flowloom import recipes, stages
from flowloom.evaluation import oracle, sweeps
from flowloom.evaluation.comparison import predictions
from flowloom.evaluation.diversity import distinct
from flowloom.evaluation.frame import Choice
from flowloom.evaluation.statistics import paired_interval, share_of_gain, standard_error
from flowloom.evaluation.study import CHECKED, Sizes, Study
from flowloom.evaluation.tables import show_set, show_sets
from flowloom.runs import write_json

CLAIM = "grpo_one"
"""GRPO + guidance, one sample at temperature 1: what is claimed of it is claimed of this."""
PARTS = ("catalogue", "triplets", "designer", "adapter", "reward")
OWN_PER_KIND = 6
"""Workflows that policies design most often for a kind, candidates of the oracle."""
RENDERS_PER_S = 130
"""Two idle cores."""
QUICK = Sizes(
    prompts=6, seeds=1, oracle_prompts=3, oracle_seeds=8, unique=16, designs=32, rendered=8
)


def measure(study: Study) -> dict[str, Any]:
    """All tables of one set."""
    frame, halves, book = study.frame, study.halves, study.book
    prompts = study.prompts[:200]
    ends = sweeps.check_endpoints(study.designer, prompts, study.config.seed)
    for end, number in ends.items():
        print(f"{end}: {number} tokens, all equal", flush=True)
    began = time.perf_counter()
    designs, points, checked = study.designs(), study.points(), study.checked()
    print(f"designs in {time.perf_counter() - began:.0f} s", flush=True)

    # What is to be rendered
    number = len(frame.prompts)
    for choices in (*designs.values(), *points.values()):
        book.want(choices[:number], frame.prompts, frame.seeds_PS)
    shown = [Choice.from_row(row) for found in checked.values() for row in found["shown"]]
    share = len(shown) // len(CHECKED)
    several = [study.prompts[k % len(study.prompts)] for k in range(share)] * len(CHECKED)
    seeds = (1 << 45) + 16 * np.arange(len(shown))[:, None]
    book.want(shown, several, seeds)
    candidates = _candidates(study, designs)
    half = halves.seeds_PS.shape[1] // 2
    rounds = ((max(1, half // 8), 16), (max(2, half // 4), 6), (half, 1))
    bound = sum(map(len, candidates)) * rounds[0][0] + len(halves.prompts) * (
        16 * (rounds[1][0] - rounds[0][0]) + 6 * (half - rounds[1][0]) + half * (len(designs) + 8)
    )
    total = book.num_wanted + bound
    print(
        f"{book.num_wanted} renders for policies and sweeps, at most {bound} for the oracle: "
        f"about {total / RENDERS_PER_S / 60:.1f} min",
        flush=True,
    )

    # Render
    began = time.perf_counter()
    gap = _gap(study, designs, candidates, rounds)
    scores = {
        name: book.scores(choices[:number], frame.prompts, frame.seeds_PS)
        for name, choices in designs.items()
    }
    rendered = book.scores(shown, several, seeds)
    result = {
        "prompts": number,
        "seeds": study.sizes.seeds,
        "policies": {
            name: _row(study, designs[name], scores[name], scores[CLAIM]) for name in designs
        },
        "gap": gap,
        "sweep": [_point(study, point, choices) for point, choices in points.items()],
        "endpoints": ends,
        "checked": {
            weight: {key: value for key, value in found.items() if key != "shown"}
            for weight, found in checked.items()
        },
        "rendered": int(np.isfinite(rendered).sum()),
        "known": len(study.known),
    }
    print(f"rendered and scored in {time.perf_counter() - began:.0f} s", flush=True)
    return result


def _row(
    study: Study, choices: Sequence[Choice], scores_PS: np.ndarray, claim_PS: np.ndarray
) -> dict[str, Any]:
    """A policy's figures."""
    kinds = np.array(study.frame.kinds)
    workflows = [choice.workflow for choice in choices]
    on_frame = choices[: len(kinds)]
    by_kind = {kind: kinds == kind for kind in dict.fromkeys(study.frame.kinds)}
    lead = paired_interval(claim_PS, scores_PS)
    return {
        "mean": float(scores_PS.mean()),
        "se": standard_error(scores_PS),
        "lead": dataclasses.asdict(lead),
        "by_kind": {kind: float(scores_PS[rows].mean()) for kind, rows in by_kind.items()},
        "lead_by_kind": {
            kind: dataclasses.asdict(paired_interval(claim_PS[rows], scores_PS[rows]))
            for kind, rows in by_kind.items()
        },
        **predictions(on_frame, scores_PS),
        **distinct(workflows),
        "similarity": float(study.known.nearest(workflows).mean()),
        "num_tokens": float(np.mean([choice.num_tokens for choice in choices])),
    }


def _point(study: Study, point: sweeps.Point, choices: Sequence[Choice]) -> dict[str, Any]:
    """A sweep point's figures."""
    frame = study.frame
    on_frame = choices[: len(frame.prompts)]
    scores_PS = study.book.scores(on_frame, frame.prompts, frame.seeds_PS)
    return {
        "curve": point.curve,
        "value": point.value,
        "name": point.name,
        "score": float(scores_PS.mean()),
        "se": standard_error(scores_PS),
        **predictions(on_frame, scores_PS),
        **distinct([choice.workflow for choice in choices]),
    }


def _candidates(study: Study, designs: dict[str, list[Choice]]) -> list[list[Choice]]:
    """The oracle's for each prompt: strong workflows, those of its kind, and its own designs."""
    halves = study.halves
    common = _common(study, designs)
    trained = {name: choices for name, choices in designs.items() if name != "random"}
    on_frame = {name: choices[: len(halves.prompts)] for name, choices in trained.items()}
    whole = {name: choices[: len(study.frame.prompts)] for name, choices in trained.items()}
    by_kind = oracle.frequent_by_kind(whole, study.frame.kinds, OWN_PER_KIND)
    rows = []
    for p, kind in enumerate(halves.kinds):
        own = [choices[p] for choices in on_frame.values()]
        found = {c.fingerprint: c for c in (*common, *by_kind[kind], *own)}
        rows.append(list(found.values()))
    return rows


def _common(study: Study, designs: dict[str, list[Choice]]) -> list[Choice]:
    """Workflows that may be the best for all prompts; no prediction is asked of them."""
    groups = settings(study.designer.catalogue).values()
    flows = [flow for group in groups for _, flow in group]
    strong = [
        Choice(flow, flow.template_fingerprint(), float("nan"), (0.0, 1.0), 0) for flow in flows
    ]
    return [designs["best_fixed"][0], *strong]


def _gap(
    study: Study,
    designs: dict[str, list[Choice]],
    candidates: list[list[Choice]],
    rounds: oracle.Rounds,
) -> dict[str, Any]:
    """Best fixed, oracle, and the share of the gap between them that each policy closes."""
    halves, book = study.halves, study.book

    def scores(pairs: Sequence[tuple[int, Choice]], first: int, end: int) -> np.ndarray:
        rows = [p for p, _ in pairs]
        seeds = halves.seeds_PS[rows, first:end]
        return book.scores([c for _, c in pairs], [halves.prompts[p] for p in rows], seeds)

    def scored(choices: Sequence[Choice]) -> np.ndarray:
        """Means on the half that nothing was chosen on."""
        return scores(list(enumerate(choices)), half, halves.seeds_PS.shape[1]).mean(axis=1)

    number, half = len(halves.prompts), rounds[-1][0]
    for choices in designs.values():
        book.want(choices[:number], halves.prompts, halves.seeds_PS[:, half:])
    winners = oracle.race(candidates, scores, rounds)
    common = _common(study, designs)
    fixed = oracle.race_for_all(common, number, scores, ((rounds[0][0], 6), (rounds[-1][0], 1)))
    fixed_P, oracle_P = scored([fixed] * number), scored(winners)
    policies = {}
    for name, choices in designs.items():
        means_P = scored(choices[:number])
        policies[name] = {"mean": float(means_P.mean())}
        if (oracle_P - fixed_P).mean() > 0:
            policies[name] |= dataclasses.asdict(share_of_gain(means_P, fixed_P, oracle_P))
            policies[name] |= {"mean": float(means_P.mean()), "share": policies[name]["mean"]}
    gain = paired_interval(oracle_P[:, None], fixed_P[:, None])
    return {
        "prompts": number,
        "seeds_per_half": rounds[-1][0],
        "candidates": float(np.mean([len(of_prompt) for of_prompt in candidates])),
        "best_fixed": float(fixed_P.mean()),
        "oracle": float(oracle_P.mean()),
        "gain": dataclasses.asdict(gain),
        "policies": policies,
    }


def artifacts(recipe: str) -> dict[str, Path]:
    """Folders of a recipe's stages, which are run unless they were finished before."""
    made: dict[str, Any] = {}

    def make(stage: str, **more: Any) -> Path:
        config = recipes.stage_config(recipe, stage, more)
        wanted = (*stages.STAGES[stage].inputs, *getattr(config, "wanted_inputs", ()))
        return stages.run(stage, config, {name: made[name] for name in wanted}).out_dir

    made["generator"] = make("tune_generator")
    made["catalogue"] = make("publish_generator")
    made["pairs"] = make("build_pairs")
    made["triplets"] = make("build_triplets")
    made["designer"] = make("train_sft")
    made["members"] = [make("train_reward", member=k) for k in range(3)]
    made["reward"] = make("calibrate_reward")
    made["adapter"] = make("train_grpo")
    return {name: made[name] for name in PARTS}


def given_sets(options: argparse.Namespace) -> list[dict[str, Path]]:
    """Sets of artifacts that the options name.

    Raises:
        ValueError: A part is missing, or parts are given different numbers of times.
    """
    found = []
    for root in options.root:
        names = [name for name in (*PARTS, "conditioned") if (root / name).is_dir()]
        missing = [name for name in PARTS if name not in names]
        if missing:
            raise ValueError(f"--root: {root}: got no {', '.join(missing)}, expected every part")
        found.append({name: root / name for name in names})
    given = {name: getattr(options, name) for name in (*PARTS, "conditioned")}
    given = {name: paths for name, paths in given.items() if paths}
    if given:
        missing = [f"--{name}" for name in PARTS if name not in given]
        if missing:
            raise ValueError(f"guidance: got no {', '.join(missing)}, expected every part")
        number = max(map(len, given.values()))
        for name, paths in given.items():
            if len(paths) not in (1, number):
                raise ValueError(f"--{name}: got {len(paths)}, expected 1 or {number}")
        found += [
            {name: paths[k % len(paths)] for name, paths in given.items()} for k in range(number)
        ]
    return found


def main() -> None:
    """Measure every set and print tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    for name in (*PARTS, "conditioned"):
        parser.add_argument(f"--{name}", type=Path, action="append", help="folder; repeatable")
    parser.add_argument("--root", type=Path, action="append", default=[], help="folder of these")
    parser.add_argument("--recipe", help="without folders: its stages are run (default bench)")
    for field in dataclasses.fields(Sizes):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            option, type=int, default=field.default, help="see flowloom.evaluation.study"
        )
    parser.add_argument("--out", type=Path, help="folder kept; a temporary one without it")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, recipe smoke")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [field.name for field in dataclasses.fields(Sizes)]
    sizes = QUICK if options.quick else Sizes(**{name: getattr(options, name) for name in names})
    sets = given_sets(options)
    if not sets:
        sets = [artifacts(options.recipe or ("smoke" if options.quick else "bench"))]
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        results = []
        for number, parts in enumerate(sets):
            print(f"## Set {number}: {parts['adapter']}")
            result = measure(Study(parts, sizes, out))
            path = out / f"sweep-{number}.png"
            fixed = result["policies"]["best_fixed"]["mean"]
            sweeps.draw_sweep(path, result["sweep"], fixed)
            show_set(result, CLAIM)
            print(f"picture: {path}" if options.out else "picture: kept with --out")
            results.append(result)
        show_sets(results, CLAIM)
        write_json(out / "guidance.json", results)
    if options.json:
        print(json.dumps({"sets": results}))


if __name__ == "__main__":
    main()
