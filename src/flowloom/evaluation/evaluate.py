"""Policies compared by rendering: the same held-out prompts, the same noise, one frame.

| policy | its design for a prompt |
|---|---|
| grpo | GRPO with guidance: best of n by predicted score, first in `flowloom design` |
| grpo_unguided | the same without guidance (w = 1) |
| sft, sft_cold | the same from the SFT model, at temperature 1 and at a low one |
| grpo_one, sft_one | a single sample of these, no prediction asked |
| conditioned | the same as sft from a model trained on scores, asked for the best |
| retrieval | the best workflow of the most similar train prompt |
| best_fixed | one workflow for all prompts, the best on the train prompts |
| random | one random valid workflow |
| champion | what the registry serves now, with its own catalogue, models and guidance |

Every (prompt, seed) has noise of its own, which all policies share: prompts that shared their noise
would not be independent, and the intervals would be too narrow. Prompts are what is resampled.

More of them, such as greedy ones, are named as `flowloom.evaluation.policies` says.

One process: flowloom run evaluate --recipe demo.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from flowloom.config import check
from flowloom.dataset.triplets import load, load_prompts, load_unrendered_prompts
from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.evaluation.comparison import (
    compare,
    describe_catalogue,
    final_metrics,
    write_examples,
    write_rows,
)
from flowloom.evaluation.config import (
    CANDIDATE,
    CHAMPION,
    CONDITIONED,
    EvaluateConfig,
    parse_policy,
)
from flowloom.evaluation.diversity import Known
from flowloom.evaluation.frame import Choice, Frame, make_frame
from flowloom.evaluation.grids import write_pair_grid
from flowloom.evaluation.policies import Conditioned, Draw, choose, draw_of
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.evaluation.unrendered import check_policies, diversity
from flowloom.runs import Run, write_json
from flowloom.workflow import Workflow

TIMING_FILE = "evaluation_timing.json"
"""In the run folder: designs and pictures per second, score per second of rendering."""


def evaluate(
    config: EvaluateConfig,
    run: Run,
    *,
    catalogue: Path,
    triplets: Path,
    designer: Path,
    adapter: Path,
    reward: Path,
    champion: Path | None = None,
    conditioned: Path | None = None,
) -> dict[str, float]:
    """Render the designs of every policy and compare.

    Args:
        config: What to compare.
        run: Run folder; `out` gets `evaluation.json`, `rows.parquet`, `examples.json`, pictures and
            `grid.png`.
        catalogue: Folder of `publish_generator`.
        triplets: Folder of `build_triplets`.
        designer: Folder of `train_sft`.
        adapter: Folder of `train_grpo`.
        reward: Folder of `calibrate_reward`.
        champion: Folder of the registered model that serves now.
        conditioned: Folder of a `train_sft` with `score_levels`.

    Returns:
        Mean scores and the paired differences with their lower ends.

    Raises:
        ValueError: Fewer held-out prompts than asked for, or no designer for a policy.
        FloatingPointError: A picture or a score is not finite.
    """
    torch.set_num_threads(config.num_threads)

    # Validate.
    policies = list(config.policies)
    wanted = [name for name in policies if parse_policy(name)[0] == CONDITIONED]
    if conditioned is not None and not wanted:
        policies.append(CONDITIONED)
    given = conditioned is not None or not wanted
    check(given, "policies", ", ".join(wanted), "the input conditioned with it")

    # Load.
    held_out = load_prompts(triplets)
    frame = make_frame(config, held_out)
    ours = Designer.from_parts(catalogue, designer, adapter, reward, stored_policies(triplets))
    theirs = None if champion is None else Designer.load(champion)
    asked = None if conditioned is None else Conditioned.load(conditioned)
    assert ours.ensemble is not None
    timing = _Timing()

    # Design, before anything is rendered.
    draws = {name: draw_of(name, config) for name in policies}
    designs = _choices(run.work / "designs.json", config, frame, ours, draws, timing, asked)
    if champion is not None and theirs is not None:
        draw = Draw(CANDIDATE, config.num_designs, _registered_guidance(champion, config))
        path = run.work / "champion-designs.json"
        designs |= _choices(path, config, frame, theirs, {CHAMPION: draw}, timing)
    opponent = "best_fixed" if champion is None else CHAMPION

    # Render in other processes; check unrendered designs here meanwhile.
    shown = (CANDIDATE, opponent)
    known = Known(_workflows(triplets))
    with ThreadPoolExecutor(1) as executor:
        rendering = executor.submit(
            _render, config, run, frame, designs, catalogue, champion, shown, timing
        )
        checked = _checked(config, run, ours, [row["prompt"] for row in held_out])
        various = _diversity(config, run, ours, triplets, draws, known, asked)
        rows = rendering.result()

    # Compare.
    evaluation = compare(config, frame, designs, rows, opponent, known)
    evaluation["designs"], evaluation["random_designs"] = checked["candidate"], checked["random"]
    evaluation["diversity"], evaluation["num_known"] = various, len(known)
    evaluation["coverage_level"] = ours.ensemble.calibration["coverage"]
    evaluation["catalogue"] = describe_catalogue(ours.catalogue)

    # Write.
    write_json(run.out / "evaluation.json", evaluation)
    write_rows(run.out / "rows.parquet", frame, designs, rows)
    examples = write_examples(run, frame, designs, rows, shown, config.num_grid_prompts)
    if examples:
        sides = [(CANDIDATE, "design (GRPO + guidance)"), (opponent, opponent.replace("_", " "))]
        write_pair_grid(run.out / "grid.png", run.out, examples, sides)
    write_json(run.dir / TIMING_FILE, timing.record(evaluation["policies"]))
    for name, interval in evaluation["paired"].items():
        low, high = interval["low"], interval["high"]
        run.log(f"{CANDIDATE} {name}: {interval['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return final_metrics(evaluation)


def _choices(
    path: Path,
    config: EvaluateConfig,
    frame: Frame,
    designer: Designer,
    draws: Mapping[str, Draw],
    timing: _Timing,
    conditioned: Conditioned | None = None,
) -> dict[str, list[Choice]]:
    """Each policy's choice per prompt; read from `path` if an earlier process got there.

    All policies or none: the ensemble remembers predictions, and so a policy's last bits depend on
    those before it.
    """
    if not path.is_file():
        rows = {}
        for name, draw in draws.items():
            began = time.perf_counter()
            found = choose(designer, draw, frame.prompts, config.seed, conditioned)
            timing.designs_per_s[name] = len(found) * draw.num / (time.perf_counter() - began)
            rows[name] = [choice.to_row() for choice in found]
        write_json(path, rows)
    rows = json.loads(path.read_text())
    return {name: [Choice.from_row(row) for row in rows[name]] for name in draws}


def _registered_guidance(champion: Path, config: EvaluateConfig) -> float:
    """The guidance that a champion is served with."""
    return json.loads((champion / "config.json").read_text()).get("guidance", config.guidance)


def _workflows(triplets: Path) -> list[Workflow]:
    """Workflows that were rendered for training."""
    texts = dict.fromkeys(load(triplets, "train")["workflow"])
    return [Workflow.from_api(json.loads(text)) for text in texts]


def _render(
    config: EvaluateConfig,
    run: Run,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    catalogue: Path,
    champion: Path | None,
    shown: Sequence[str],
    timing: _Timing,
) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of the rubric by policy, prompt and seed. Equal pictures are rendered once."""
    jobs: dict[str, dict[str, JudgedJob]] = {"ours": {}, CHAMPION: {}}
    ids: dict[str, list[list[str]]] = {}
    for policy, choices_P in designs.items():
        source = CHAMPION if policy == CHAMPION else "ours"
        ids[policy] = []
        for p, choice in enumerate(choices_P):
            keep = policy in shown and p < config.num_grid_prompts
            ids[policy].append([])
            for s, seed in enumerate(frame.seeds_PS[p].tolist()):
                name = f"{source}-{p:04d}-{s}-{choice.fingerprint[:16]}"
                workflow = choice.workflow.fill(frame.prompts[p], seed=seed)
                known = jobs[source].get(name)
                keep_now = keep or (known is not None and known.keep)
                jobs[source][name] = JudgedJob(workflow, name, frame.prompts[p], keep_now)
                ids[policy][p].append(name)
    folders = {"ours": catalogue, CHAMPION: champion}
    done: dict[str, dict[str, float]] = {}
    resumed, began = any(run.work.glob("scores-*")), time.perf_counter()
    for source, by_name in jobs.items():
        if by_name:
            folder = folders[source]
            assert folder is not None
            run.log(f"{len(by_name)} pictures with the models of {source}")
            done |= render_and_score(
                list(by_name.values()),
                run,
                f"scores-{source}",
                catalogue_dir=folder,
                rubric=config.rubric,
                chunk_size=config.chunk_size,
                num_processes=config.num_processes,
            )
    if not resumed:
        timing.render_s = time.perf_counter() - began
        timing.pictures = len(done)
        timing.flops = sum(row["flops"] for row in done.values())
    return {
        policy: [[{**done[name], "id": name} for name in row] for row in ids[policy]]
        for policy in designs
    }


def _checked(
    config: EvaluateConfig, run: Run, ours: Designer, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Counts over designs that are not rendered; kept in `work`."""
    path = run.work / "checked.json"
    if not path.is_file():
        number, seed = config.num_unrendered, config.seed
        write_json(path, check_policies(ours, prompts, number, config.guidance, seed))
    return json.loads(path.read_text())


def _diversity(
    config: EvaluateConfig,
    run: Run,
    ours: Designer,
    triplets: Path,
    draws: Mapping[str, Draw],
    known: Known,
    conditioned: Conditioned | None,
) -> dict[str, dict[str, Any]]:
    """Distinct workflows of every sampling policy, one design per prompt; kept in `work`."""
    path = run.work / "diversity.json"
    if not path.is_file():
        rows = [*load_prompts(triplets), *load_unrendered_prompts(triplets)]
        number = min(config.num_unique, config.num_unrendered)
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:number]
        found = {}
        for name in draws:
            who, *_ = parse_policy(name)
            if who not in found and who not in ("retrieval", "best_fixed", "random") and prompts:
                draw = draw_of(f"{who}_one", config)
                found[who] = diversity(ours, draw, prompts, config.seed, known, conditioned)
        write_json(path, found)
    return json.loads(path.read_text())


class _Timing:
    """Measured seconds, for a sidecar: nothing that varies enters an artifact."""

    def __init__(self) -> None:
        self.designs_per_s: dict[str, float] = {}
        self.render_s = self.flops = 0.0
        self.pictures = 0

    def record(self, policies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What was measured in this process; of a resumed one what it did itself.

        A picture's seconds are its share of the flops of all that were rendered.
        """
        s_per_flop = self.render_s / self.flops if self.flops else 0.0
        score_per_s = {
            name: row["mean"] / (row["flops_mean"] * s_per_flop)
            for name, row in policies.items()
            if s_per_flop and row["flops_mean"]
        }
        return {
            "designs_per_s": self.designs_per_s,
            "render_s": self.render_s,
            "pictures": self.pictures,
            "score_per_render_s": score_per_s,
        }
