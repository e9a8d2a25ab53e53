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

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from flowloom.config import check
from flowloom.dataset.tables import write_table
from flowloom.dataset.triplets import load_prompts
from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.designer.rollout import rollout
from flowloom.evaluation.choices import choices
from flowloom.evaluation.config import CANDIDATE, CHAMPION, EvaluateConfig
from flowloom.evaluation.describe import describe
from flowloom.evaluation.grids import write_pair_grid
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.evaluation.statistics import paired_interval, spearman, standard_error
from flowloom.runs import Run, write_json
from flowloom.workflow import (
    Catalogue,
    Grammar,
    Workflow,
    decode,
    encode,
    random_workflows,
    validate,
)

SEED_BASE = 1 << 40
"""Render seeds start here: far from those of training data."""
SEED_STRIDE = 16
"""Between two renders' seeds, so that a workflow's second sampler (seed + 1) has its own noise."""
CHECKED_AT_ONCE = 512
SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("faithfulness", pa.float64()),
        ("crispness", pa.float64()),
        ("flops", pa.int64()),
        ("fingerprint", pa.string()),
        ("predicted", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What every policy is rendered on."""

    prompts: list[str]
    """P prompts, kinds in turn."""
    kinds: list[str]
    """Their kinds."""
    seeds_PS: np.ndarray
    """Render seeds."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The design a policy renders for one prompt."""

    workflow: Workflow
    """A template."""
    fingerprint: str
    """Its template fingerprint."""
    predicted: float
    """Predicted score of a single render."""


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
    frame = make_frame(config, load_prompts(triplets))
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
        checked = _checked(config, run, ours, load_prompts(triplets))
        rows = rendering.result()

    # Compare.
    scores = {policy: _column(rows[policy], "score") for policy in designs}
    evaluation: dict[str, Any] = {
        "candidate": CANDIDATE,
        "opponent": opponent,
        "level": config.level,
        "guidance": config.guidance,
        "num_designs": config.num_designs,
        "num_prompts": len(frame.prompts),
        "num_seeds": config.num_seeds,
        "rubric": config.rubric,
        "paired": {
            f"vs_{policy}": dataclasses.asdict(
                paired_interval(
                    scores[CANDIDATE],
                    scores[policy],
                    level=config.level,
                    num_resamples=config.num_resamples,
                    seed=config.seed,
                )
            )
            for policy in designs
            if policy != CANDIDATE
        },
        "policies": {
            policy: _summary(frame, scores[policy], rows[policy], designs[policy])
            for policy in designs
        },
        "designs": checked["candidate"],
        "random_designs": checked["random"],
        "predicted_vs_true": _honesty(designs, scores),
        "choices": choices(frame.prompts, [c.workflow for c in designs[CANDIDATE]]),
        "catalogue": _catalogue(ours.catalogue),
    }

    # Write.
    write_json(run.out / "evaluation.json", evaluation)
    _write_rows(run.out / "rows.parquet", frame, designs, rows)
    examples = _examples(config, run, frame, designs, rows, shown)
    write_json(run.out / "examples.json", {"examples": examples})
    if examples:
        sides = [(CANDIDATE, "design (GRPO + guidance)"), (opponent, opponent.replace("_", " "))]
        write_pair_grid(run.out / "grid.png", run.out, examples, sides)
    for name, interval in evaluation["paired"].items():
        low, high = interval["low"], interval["high"]
        run.log(f"{CANDIDATE} {name}: {interval['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return _metrics(evaluation)


def make_frame(config: EvaluateConfig, held_out: Sequence[Mapping[str, str]]) -> Frame:
    """The first prompts (kinds are in turn) with a render seed of its own for each render.

    Raises:
        ValueError: There are fewer prompts than asked for.
    """
    number = config.num_prompts
    expected = f"at most {len(held_out)}, the held-out prompts of the triplets"
    check(number <= len(held_out), "num_prompts", number, expected)
    count = np.arange(number * config.num_seeds).reshape(number, config.num_seeds)
    first = SEED_BASE + (config.seed << 24)
    return Frame(
        [row["prompt"] for row in held_out[:number]],
        [row["kind"] for row in held_out[:number]],
        first + SEED_STRIDE * count,
    )


def _designs(
    config: EvaluateConfig, run: Run, frame: Frame, ours: Designer
) -> dict[str, list[Choice]]:
    """First choice of every policy for every prompt; kept in `work`."""
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
    return {
        policy: _first_choices(run, policy, frame, ours, calls[policy])
        for policy in config.policies
    }


def _champion_designs(
    config: EvaluateConfig, run: Run, frame: Frame, theirs: Designer, champion: Path
) -> list[Choice]:
    """As the champion is served: with the guidance it was registered with."""
    record = json.loads((champion / "config.json").read_text())
    guidance = record.get("guidance", config.guidance)
    call = {"policy": "grpo", "guidance": guidance, "n": config.num_designs, "seed": config.seed}
    return _first_choices(run, CHAMPION, frame, theirs, call)


def _first_choices(
    run: Run, policy: str, frame: Frame, designer: Designer, call: Mapping[str, Any]
) -> list[Choice]:
    path = run.work / f"designs-{policy}.json"
    if not path.is_file():
        found = [designs[0] for designs in designer.design(frame.prompts, **call)]
        rows = [[d.workflow.to_api(), d.fingerprint, d.score] for d in found]
        write_json(path, rows)
    rows = json.loads(path.read_text())
    return [Choice(Workflow.from_api(api), print_, score) for api, print_, score in rows]


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
    config: EvaluateConfig, run: Run, ours: Designer, held_out: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Counts over designs that are not rendered: of the candidate, and of the random policy."""
    path = run.work / "checked.json"
    if not path.is_file():
        budget = ours.tuned.config.num_workflow_tokens
        grammar = Grammar(ours.catalogue, ours.vocabulary, budget)
        texts = [row["prompt"] for row in held_out]
        sampled: list[list[int]] = []
        for start in range(0, config.num_unrendered, CHECKED_AT_ONCE):
            stop = min(start + CHECKED_AT_ONCE, config.num_unrendered)
            drawn = rollout(
                ours.tuned,
                grammar,
                [texts[i % len(texts)] for i in range(start, stop)],
                reference=ours.reference,
                guidance=config.guidance,
                seed=(config.seed << 32) + start,
            )
            sampled += drawn.tokens
        random = random_workflows(grammar, config.num_unrendered, config.seed)
        counts = {
            "candidate": check_designs(sampled, grammar),
            "random": check_designs([encoded.tokens for encoded in random], grammar),
        }
        write_json(path, counts)
    return json.loads(path.read_text())


def check_designs(rows: Sequence[Sequence[int]], grammar: Grammar) -> dict[str, Any]:
    """Count valid and decodable token rows, and the share of distinct workflows among them.

    A row is decodable if it reads as a workflow which, written and read again, has the same
    fingerprint; it is valid if the independent checker finds no error.
    """
    valid = decodable = 0
    fingerprints = set()
    for tokens in rows:
        try:
            workflow = decode(tokens, grammar)
            again = decode(encode(workflow, grammar).tokens, grammar)
        except ValueError:
            continue
        decodable += again.fingerprint() == workflow.fingerprint()
        problems = validate(workflow, grammar.catalogue)
        valid += not any(problem.severity == "error" for problem in problems)
        fingerprints.add(workflow.template_fingerprint())
    unique_frac = len(fingerprints) / len(rows) if rows else 0.0
    return {"n": len(rows), "valid": valid, "decodable": decodable, "unique_frac": unique_frac}


def _column(rows_PS: Sequence[Sequence[Mapping[str, Any]]], name: str) -> np.ndarray:
    return np.array([[row[name] for row in rows] for rows in rows_PS], float)


def _summary(
    frame: Frame,
    scores_PS: np.ndarray,
    rows_PS: Sequence[Sequence[Mapping[str, Any]]],
    choices_P: Sequence[Choice],
) -> dict[str, Any]:
    kinds_P = np.array(frame.kinds)
    return {
        "mean": float(scores_PS.mean()),
        "se": standard_error(scores_PS),
        "by_kind": {
            str(kind): float(scores_PS[kinds_P == kind].mean()) for kind in sorted(set(frame.kinds))
        },
        "faithfulness": float(_column(rows_PS, "faithfulness").mean()),
        "crispness": float(_column(rows_PS, "crispness").mean()),
        "flops_mean": float(_column(rows_PS, "flops").mean()),
        "predicted": float(np.mean([choice.predicted for choice in choices_P])),
        "num_workflows": len({choice.fingerprint for choice in choices_P}),
    }


def _honesty(
    designs: Mapping[str, Sequence[Choice]], scores: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Predicted against rendered means: rank correlation over all, gap of the candidate's."""
    own = [policy for policy in designs if policy != CHAMPION]
    predicted = {policy: np.array([c.predicted for c in designs[policy]]) for policy in own}
    true = {policy: scores[policy].mean(axis=1) for policy in own}
    return {
        "spearman": spearman(
            np.concatenate([predicted[p] for p in own]), np.concatenate([true[p] for p in own])
        ),
        "gap": float((predicted[CANDIDATE] - true[CANDIDATE]).mean()),
    }


def _catalogue(catalogue: Catalogue) -> dict[str, Any]:
    keys = ("folder", "name", "sha256", "role", "card")
    files = [{key: getattr(file, key) for key in keys} for file in catalogue.files]
    return {"hash": catalogue.hash, "files": files}


def _write_rows(
    path: Path,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for policy, choices_P in designs.items():
        for p, choice in enumerate(choices_P):
            for s, row in enumerate(rows[policy][p]):
                values = {
                    **row,
                    "policy": policy,
                    "prompt": frame.prompts[p],
                    "kind": frame.kinds[p],
                    "seed": int(frame.seeds_PS[p, s]),
                    "fingerprint": choice.fingerprint,
                    "predicted": choice.predicted,
                }
                for name, column in columns.items():
                    column.append(values[name])
    write_table(path, columns, SCHEMA)


def _examples(
    config: EvaluateConfig,
    run: Run,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    shown: Sequence[str],
) -> list[dict[str, Any]]:
    """The first prompts with the designs and pictures of the policies shown."""
    examples = []
    (run.out / "pictures").mkdir()
    for p in range(min(config.num_grid_prompts, len(frame.prompts))):
        by_policy = {}
        for policy in shown:
            choice = designs[policy][p]
            renders = []
            for s, row in enumerate(rows[policy][p]):
                name = f"pictures/{p:02d}-{policy}-{s}.png"
                shutil.copyfile(run.work / "pictures" / f"{row['id']}.png", run.out / name)
                seed = int(frame.seeds_PS[p, s])
                renders.append({"seed": seed, "score": row["score"], "picture": name})
            by_policy[policy] = {
                **dataclasses.asdict(describe(choice.workflow)),
                "workflow": choice.workflow.to_api(),
                "predicted": choice.predicted,
                "score": float(np.mean([render["score"] for render in renders])),
                "renders": renders,
            }
        examples.append({"prompt": frame.prompts[p], "kind": frame.kinds[p], "designs": by_policy})
    return examples


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    metrics = {f"score/{name}": row["mean"] for name, row in evaluation["policies"].items()}
    for name, interval in evaluation["paired"].items():
        metrics[f"paired/{name}"] = interval["mean"]
        metrics[f"paired/{name}_low"] = interval["low"]
    for name in ("n", "valid", "decodable", "unique_frac"):
        metrics[f"designs/{name}"] = float(evaluation["designs"][name])
    for name, value in evaluation["predicted_vs_true"].items():
        metrics[f"predicted/{name}"] = value
    return metrics
