"""Policies compared by rendering: the same held-out prompts, the same noise, one frame.

| policy | its design for a prompt |
|---|---|
| grpo | GRPO with guidance: best of n by predicted score, first in `flowloom design` |
| grpo_unguided | the same without guidance (w = 1) |
| sft, sft_cold | the same from the SFT model, at temperature 1 and at a low one |
| retrieval | the best workflow of the most similar train prompt |
| best_fixed | one workflow for all prompts, the best on the train prompts |
| random | one random valid workflow |
| champion | what the registry serves now, with its own catalogue, models and guidance |

Every (prompt, seed) has noise of its own, which all policies share: prompts that shared their noise
would not be independent, and the intervals would be too narrow. Prompts are what is resampled.

One process: flowloom run evaluate --recipe demo.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from flowloom.dataset.triplets import load_prompts
from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.evaluation.comparison import (
    compare,
    describe_catalogue,
    final_metrics,
    write_examples,
    write_rows,
)
from flowloom.evaluation.config import CANDIDATE, CHAMPION, EvaluateConfig
from flowloom.evaluation.frame import Choice, Frame, make_frame
from flowloom.evaluation.grids import write_pair_grid
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.evaluation.unrendered import check_policies
from flowloom.runs import Run, write_json
from flowloom.workflow import Workflow


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

    Returns:
        Mean scores and the paired differences with their lower ends.

    Raises:
        ValueError: Fewer held-out prompts than asked for.
        FloatingPointError: A picture or a score is not finite.
    """
    torch.set_num_threads(config.num_threads)

    # Load.
    held_out = load_prompts(triplets)
    frame = make_frame(config, held_out)
    ours = Designer.from_parts(catalogue, designer, adapter, reward, stored_policies(triplets))
    theirs = None if champion is None else Designer.load(champion)

    # Design, before anything is rendered.
    designs = _designs(config, run, frame, ours)
    if champion is not None and theirs is not None:
        designs[CHAMPION] = _champion_designs(config, run, frame, theirs, champion)
    opponent = "best_fixed" if champion is None else CHAMPION

    # Render in other processes; check unrendered designs here meanwhile.
    shown = (CANDIDATE, opponent)
    with ThreadPoolExecutor(1) as executor:
        rendering = executor.submit(
            _render, config, run, frame, designs, catalogue, champion, shown
        )
        checked = _checked(config, run, ours, [row["prompt"] for row in held_out])
        rows = rendering.result()

    # Compare.
    evaluation = compare(config, frame, designs, rows, opponent)
    evaluation["designs"], evaluation["random_designs"] = checked["candidate"], checked["random"]
    evaluation["catalogue"] = describe_catalogue(ours.catalogue)

    # Write.
    write_json(run.out / "evaluation.json", evaluation)
    write_rows(run.out / "rows.parquet", frame, designs, rows)
    examples = write_examples(run, frame, designs, rows, shown, config.num_grid_prompts)
    if examples:
        sides = [(CANDIDATE, "design (GRPO + guidance)"), (opponent, opponent.replace("_", " "))]
        write_pair_grid(run.out / "grid.png", run.out, examples, sides)
    for name, interval in evaluation["paired"].items():
        low, high = interval["low"], interval["high"]
        run.log(f"{CANDIDATE} {name}: {interval['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return final_metrics(evaluation)


def _designs(
    config: EvaluateConfig, run: Run, frame: Frame, ours: Designer
) -> dict[str, list[Choice]]:
    """First choice of every policy for every prompt."""
    several = {"n": config.num_designs, "seed": config.seed}
    calls: dict[str, dict[str, Any]] = {
        "grpo": {"policy": "grpo", "guidance": config.guidance, **several},
        "grpo_unguided": {"policy": "grpo", "guidance": 1.0, **several},
        "sft": {"policy": "sft", **several},
        "sft_cold": {"policy": "sft", "temperature": config.cold_temperature, **several},
        "retrieval": {"policy": "retrieval", "n": 1},
        "best_fixed": {"policy": "best_fixed", "n": 1},
        "random": {"policy": "random", "n": 1, "seed": config.seed},
    }
    chosen = {policy: calls[policy] for policy in config.policies}
    return _first_choices(run.work / "designs.json", frame, ours, chosen)


def _champion_designs(
    config: EvaluateConfig, run: Run, frame: Frame, theirs: Designer, champion: Path
) -> list[Choice]:
    """As the champion is served: with the guidance it was registered with."""
    record = json.loads((champion / "config.json").read_text())
    guidance = record.get("guidance", config.guidance)
    call = {"policy": "grpo", "guidance": guidance, "n": config.num_designs, "seed": config.seed}
    path = run.work / "champion-designs.json"
    return _first_choices(path, frame, theirs, {CHAMPION: call})[CHAMPION]


def _first_choices(
    path: Path, frame: Frame, designer: Designer, calls: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Choice]]:
    """What each call of `design` lists first; read from `path` if an earlier process got there.

    All calls or none: the ensemble remembers predictions, and so a call's last bits depend on the
    calls before it.
    """
    if not path.is_file():
        rows = {}
        for policy, call in calls.items():
            found = [designs[0] for designs in designer.design(frame.prompts, **call)]
            rows[policy] = [[d.workflow.to_api(), d.fingerprint, d.score] for d in found]
        write_json(path, rows)
    rows = json.loads(path.read_text())
    return {
        policy: [
            Choice(Workflow.from_api(api), digest, score) for api, digest, score in rows[policy]
        ]
        for policy in calls
    }


def _render(
    config: EvaluateConfig,
    run: Run,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    catalogue: Path,
    champion: Path | None,
    shown: Sequence[str],
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
