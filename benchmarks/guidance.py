"""What a trained designer is worth, by rendering: policies, oracle, guidance and temperature.

    python -m benchmarks.guidance [--catalogue DIR --triplets DIR --designer DIR --adapter DIR
                                   --reward DIR [--conditioned DIR]] [--root DIR]... [--recipe NAME]
                                  [--prompts N] [--seeds N] [--quick] [--json] [--out DIR]

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.world import settings
from flowloom import recipes, stages
from flowloom.dataset.triplets import load, load_prompts, load_unrendered_prompts
from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.evaluation import oracle, sweeps
from flowloom.evaluation.comparison import predictions
from flowloom.evaluation.config import EvaluateConfig
from flowloom.evaluation.diversity import Known, distinct
from flowloom.evaluation.frame import Choice, make_frame
from flowloom.evaluation.policies import (
    Conditioned,
    Draw,
    choices_of,
    choose,
    draw_of,
    grammar_of,
    sample,
)
from flowloom.evaluation.scores import ScoreBook
from flowloom.evaluation.statistics import paired_interval, share_of_gain, standard_error
from flowloom.evaluation.tables import show_set, show_sets
from flowloom.evaluation.unrendered import check_designs
from flowloom.runs import Run, input_digest, write_json
from flowloom.workflow import Workflow

CLAIM = "grpo_one"
"""GRPO + guidance, one sample at temperature 1: what is claimed of it is claimed of this."""
SAMPLED = ("sft", "grpo_unguided", "grpo")
POLICIES = (
    "random", "best_fixed", "retrieval",
    *(f"{who}{more}" for who in SAMPLED for more in ("_one", "", "_cold_one", "_cold", "_greedy")),
)  # fmt: skip
CONDITIONED = ("conditioned_one", "conditioned")
GUIDANCES = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)
TEMPERATURES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
IN_WEIGHTS = (1.5, 2.0, 3.0)
CHECKED = (0.0, 1.0, 1.5, 3.0)
"""Guidance of the designs that are checked for validity."""
PARTS = ("catalogue", "triplets", "designer", "adapter", "reward")
OWN_PER_KIND = 6
"""Workflows that policies design most often for a kind, candidates of the oracle."""
RENDERS_PER_S = 130
"""Two idle cores."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompts: int = 350
    seeds: int = 4
    oracle_prompts: int = 100
    oracle_seeds: int = 64
    unique: int = 500
    designs: int = 10_000
    rendered: int = 1000
    strong: int | None = None
    """Strong workflows of `benchmarks.world` among the oracle's candidates; None takes all."""


QUICK = Sizes(8, 1, 3, 8, 32, 64, 8, 4)


class Measured:
    """One set of artifacts under measurement: its designs, in files, and the scores of all."""

    def __init__(self, parts: dict[str, Path], sizes: Sizes, out: Path):
        """Load the designer; designs and scores of an earlier process are found in `out`."""
        self.parts, self.sizes = parts, sizes
        held_out = load_prompts(parts["triplets"])
        number = min(sizes.prompts, len(held_out))
        self.config = EvaluateConfig(num_prompts=number, num_seeds=sizes.seeds)
        self.frame = make_frame(self.config, held_out)
        number = min(sizes.oracle_prompts, number)
        # Noise of its own: the oracle has not seen that of the other tables.
        halves = EvaluateConfig(num_prompts=number, num_seeds=sizes.oracle_seeds, seed=1)
        self.halves = make_frame(halves, held_out)
        more = [*held_out, *load_unrendered_prompts(parts["triplets"])]
        self.prompts = list(dict.fromkeys(row["prompt"] for row in more))[: sizes.unique]
        self.prompts = [*self.frame.prompts, *self.prompts[len(self.frame.prompts) :]]

        stored = stored_policies(parts["triplets"])
        self.designer = Designer.from_parts(*(parts[name] for name in _BUILT), stored)
        self.conditioned = None
        self.policies = POLICIES
        if "conditioned" in parts:
            self.conditioned = Conditioned.load(parts["conditioned"])
            self.policies = POLICIES + CONDITIONED
        texts = dict.fromkeys(load(parts["triplets"], "train")["workflow"])
        self.known = Known(Workflow.from_api(json.loads(text)) for text in texts)
        key = "-".join(input_digest(path)[:6] for path in parts.values())
        self.run = Run("guidance", out / f"set-{key}")
        self.run.work.mkdir(exist_ok=True)
        scores = Run("guidance", out / "scores")
        scores.work.mkdir(exist_ok=True)
        self.book = ScoreBook(scores, parts["catalogue"])

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once and kept in a file."""
        sizes = "-".join(str(value) for value in dataclasses.astuple(self.sizes))
        path = self.run.work / f"{name}-{sizes}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text())

    def singles(self, name: str, draw: Callable[[], list[list[int]]]) -> list[Choice]:
        """One design for each of `prompts`."""

        def make() -> list[list[Any]]:
            return [c.to_row() for c in choices_of(self.designer, self.prompts, draw())]

        return [Choice.from_row(row) for row in self.kept(name, make)]

    def designs(self) -> dict[str, list[Choice]]:
        """Of every policy; those that write one have it for all `prompts`, else for the frame."""
        found = {}
        for name in self.policies:
            draw = draw_of(name, self.config)
            if draw.num == 1 and draw.who in ("grpo", "sft", "conditioned"):
                found[name] = self.singles(name, lambda draw=draw: self._sample(draw))
            else:
                rows = self.kept(name, lambda draw=draw: [c.to_row() for c in self._choose(draw)])
                found[name] = [Choice.from_row(row) for row in rows]
        return found

    def points(self) -> dict[sweeps.Point, list[Choice]]:
        """Of every point of the sweeps."""
        seed = self.config.seed
        return {
            point: self.singles(
                point.name.replace(" ", "-"),
                lambda point=point: sweeps.sample_point(self.designer, point, self.prompts, seed),
            )
            for point in sweeps.points_of(GUIDANCES, TEMPERATURES, IN_WEIGHTS)
        }

    def checked(self) -> dict[str, dict[str, Any]]:
        """Many designs at each weight: how many are valid, and tokens of some, to render."""
        grammar = grammar_of(self.designer)
        share = self.sizes.rendered // len(CHECKED)

        def make() -> dict[str, dict[str, Any]]:
            found = {}
            for weight in CHECKED:
                prompts = [self.prompts[k % len(self.prompts)] for k in range(self.sizes.designs)]
                rows = sample(self.designer, Draw("grpo", guidance=weight), prompts, 7)
                shown = choices_of(self.designer, prompts[:share], rows[:share])
                counts = check_designs(rows, grammar)
                found[f"{weight:g}"] = {**counts, "shown": [c.to_row() for c in shown]}
            return found

        return self.kept("checked", make)

    def _sample(self, draw: Draw) -> list[list[int]]:
        return sample(self.designer, draw, self.prompts, self.config.seed, self.conditioned)

    def _choose(self, draw: Draw) -> list[Choice]:
        prompts = self.frame.prompts
        return choose(self.designer, draw, prompts, self.config.seed, self.conditioned)


_BUILT = ("catalogue", "designer", "adapter", "reward")


def measure(measured: Measured) -> dict[str, Any]:
    """All tables of one set."""
    frame, halves, book = measured.frame, measured.halves, measured.book
    prompts = measured.prompts[:200]
    ends = sweeps.check_endpoints(measured.designer, prompts, measured.config.seed)
    for end, number in ends.items():
        print(f"{end}: {number} tokens, all equal", flush=True)
    began = time.perf_counter()
    designs, points, checked = measured.designs(), measured.points(), measured.checked()
    print(f"designs in {time.perf_counter() - began:.0f} s", flush=True)

    # What is to be rendered
    number = len(frame.prompts)
    for choices in (*designs.values(), *points.values()):
        book.want(choices[:number], frame.prompts, frame.seeds_PS)
    shown = [Choice.from_row(row) for found in checked.values() for row in found["shown"]]
    share = len(shown) // len(CHECKED)
    several = [measured.prompts[k % len(measured.prompts)] for k in range(share)] * len(CHECKED)
    seeds = (1 << 45) + 16 * np.arange(len(shown))[:, None]
    book.want(shown, several, seeds)
    candidates = _candidates(measured, designs)
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
    gap = _gap(measured, designs, candidates, rounds)
    scores = {
        name: book.scores(choices[:number], frame.prompts, frame.seeds_PS)
        for name, choices in designs.items()
    }
    rendered = book.scores(shown, several, seeds)
    result = {
        "prompts": number,
        "seeds": measured.sizes.seeds,
        "policies": {
            name: _row(measured, designs[name], scores[name], scores[CLAIM]) for name in designs
        },
        "gap": gap,
        "sweep": [_point(measured, point, choices) for point, choices in points.items()],
        "endpoints": ends,
        "checked": {
            weight: {key: value for key, value in found.items() if key != "shown"}
            for weight, found in checked.items()
        },
        "rendered": int(np.isfinite(rendered).sum()),
        "known": len(measured.known),
    }
    print(f"rendered and scored in {time.perf_counter() - began:.0f} s", flush=True)
    return result


def _row(
    measured: Measured, choices: Sequence[Choice], scores_PS: np.ndarray, claim_PS: np.ndarray
) -> dict[str, Any]:
    """A policy's figures."""
    kinds = np.array(measured.frame.kinds)
    workflows = [choice.workflow for choice in choices]
    on_frame = choices[: len(kinds)]
    by_kind = {kind: kinds == kind for kind in dict.fromkeys(measured.frame.kinds)}
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
        "similarity": float(measured.known.nearest(workflows).mean()),
        "num_tokens": float(np.mean([choice.num_tokens for choice in choices])),
    }


def _point(measured: Measured, point: sweeps.Point, choices: Sequence[Choice]) -> dict[str, Any]:
    """A sweep point's figures."""
    frame = measured.frame
    on_frame = choices[: len(frame.prompts)]
    scores_PS = measured.book.scores(on_frame, frame.prompts, frame.seeds_PS)
    return {
        "curve": point.curve,
        "value": point.value,
        "name": point.name,
        "score": float(scores_PS.mean()),
        "se": standard_error(scores_PS),
        **predictions(on_frame, scores_PS),
        **distinct([choice.workflow for choice in choices]),
    }


def _candidates(measured: Measured, designs: dict[str, list[Choice]]) -> list[list[Choice]]:
    """The oracle's for each prompt: strong workflows, those of its kind, and its own designs."""
    halves = measured.halves
    common = _common(measured, designs)
    trained = {name: choices for name, choices in designs.items() if name != "random"}
    on_frame = {name: choices[: len(halves.prompts)] for name, choices in trained.items()}
    whole = {name: choices[: len(measured.frame.prompts)] for name, choices in trained.items()}
    by_kind = oracle.frequent_by_kind(whole, measured.frame.kinds, OWN_PER_KIND)
    rows = []
    for p, kind in enumerate(halves.kinds):
        own = [choices[p] for choices in on_frame.values()]
        found = {c.fingerprint: c for c in (*common, *by_kind[kind], *own)}
        rows.append(list(found.values()))
    return rows


def _common(measured: Measured, designs: dict[str, list[Choice]]) -> list[Choice]:
    """Workflows that may be the best for all prompts; no prediction is asked of them."""
    groups = settings(measured.designer.catalogue).values()
    flows = [flow for group in groups for _, flow in group][: measured.sizes.strong]
    strong = [
        Choice(flow, flow.template_fingerprint(), float("nan"), (0.0, 1.0), 0) for flow in flows
    ]
    return [designs["best_fixed"][0], *strong]


def _gap(
    measured: Measured,
    designs: dict[str, list[Choice]],
    candidates: list[list[Choice]],
    rounds: oracle.Rounds,
) -> dict[str, Any]:
    """Best fixed, oracle, and the share of the gap between them that each policy closes."""
    halves, book = measured.halves, measured.book

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
    common = _common(measured, designs)
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
        inputs = {name: made[name] for name in stages.STAGES[stage].inputs}
        return stages.run(stage, recipes.stage_config(recipe, stage, more), inputs).out_dir

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
    parser.add_argument("--prompts", type=int, default=Sizes.prompts, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=Sizes.seeds, help="noises per prompt")
    parser.add_argument("--out", type=Path, help="folder kept; a temporary one without it")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, recipe smoke")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(prompts=options.prompts, seeds=options.seeds)
    sets = given_sets(options)
    if not sets:
        sets = [artifacts(options.recipe or ("smoke" if options.quick else "bench"))]
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        results = []
        for number, parts in enumerate(sets):
            print(f"## Set {number}: {parts['adapter']}")
            result = measure(Measured(parts, QUICK if options.quick else sizes, out))
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
