"""A model file that is installed after training: does the designer use it after one short turn?

    python -m benchmarks.new_model [--file NAME] [--recipe NAME] [--renders N] [--share X]
                                   [--prompts N] [--seeds N] [--no-full] [--quick] [--json]
                                   [--home DIR]

The world is trained without the file, then it is installed. Compared on the same held-out prompts
and noise, each policy's first of four designs (GRPO + guidance):

before     the designer that does not know the file
installed  the same, the file's rows being the mean of its kin: nothing was trained
carried    the old tuning on a reference that was trained on (below): no policy optimisation yet
turn       one short turn
full       everything trained again from scratch, with the file, as long as before

The short turn renders `--renders` pictures with the new file, on train prompts of every kind: it
is not told what the file is good at. Half are the prompt's best workflow so far with its checkpoint
replaced, half the designer's own choice where the file is required. Then `--share` of the recipe's
steps each: the reward members go on from their weights, with old and new renders; SFT goes on from
the old reference, with the best workflows of the prompts that were rendered; GRPO goes on from the
old tuning, put on that reference as a difference (`designer.extension.carry_adapter`).

Printed: the share of designs that use the file, and their rendered score, on the prompts of its
concept and on all others; seconds of the turn, rendering included, and of full retraining.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from flowloom import recipes, stages
from flowloom.dataset import triplets as triplet_data
from flowloom.dataset.cells import CALIBRATION, render_seed
from flowloom.dataset.splits import TRAIN
from flowloom.dataset.tables import write_table
from flowloom.dataset.triplet_rows import schema
from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.designer.extension import carry_adapter
from flowloom.designer.selection import best_cells, shrunk_means
from flowloom.evaluation.config import EvaluateConfig
from flowloom.evaluation.frame import Choice, Frame, make_frame
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.evaluation.scores import ScoreBook
from flowloom.evaluation.statistics import paired_interval
from flowloom.recipes.recipe import Recipe
from flowloom.render.model_records import save_catalogue
from flowloom.runs import Run
from flowloom.score.rubric import get_rubric
from flowloom.shapes.prompts import PromptSpec, parse, prompt_concepts
from flowloom.workflow import Catalogue, Grammar, Node, Workflow, encode

CONCEPTS: dict[str, Callable[[PromptSpec], bool]] = {
    "shapes-position.safetensors": lambda spec: spec.kind in ("two", "position"),
    "shapes-cool.safetensors": lambda spec: (
        len(spec.objects) == 1 and prompt_concepts(spec)["colors"] == "cool"
    ),
    "shapes-counting.safetensors": lambda spec: spec.kind == "counting",
}
"""What a file is good at, by its card: for the table alone, no part of training knows it."""
NUM_DESIGNS = 4
SEEDS_PER_CELL = 2
COPIED = ("prompts.json", "unrendered_prompts.json", "best_fixed.json", "standard.json")


@dataclasses.dataclass
class Trained:
    """Artifacts of one designer, and what they took."""

    parts: dict[str, Path]
    """Folders by input name; `members` of the ensemble apart."""
    members: list[Path]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """By stage."""

    def designer(self) -> Designer:
        """Ready to design."""
        names = ("catalogue", "designer", "adapter", "reward")
        stored = stored_policies(self.parts["triplets"])
        return Designer.from_parts(*(self.parts[name] for name in names), stored)


class Turn:
    """Runs stages and adds up their seconds; a stage that was run before counts what it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, stage: str, config: Any, **inputs: Any) -> Path:
        """Run a stage; its artifact."""
        out = stages.run(stage, config, inputs).out_dir
        spent = json.loads((out.parent / "timing.json").read_text())["seconds"]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return out


def train(recipe: Recipe, num_members: int, catalogue: Path) -> Trained:
    """Everything from scratch, over one catalogue."""
    turn = Turn()
    pairs = turn.run("build_pairs", recipe.build_pairs, catalogue=catalogue)
    triplets = turn.run("build_triplets", recipe.build_triplets, catalogue=catalogue, pairs=pairs)
    data = {"catalogue": catalogue, "triplets": triplets}
    designer = turn.run("train_sft", recipe.train_sft, pairs=pairs, **data)
    members = [
        turn.run("train_reward", dataclasses.replace(recipe.train_reward, member=k), **data)
        for k in range(num_members)
    ]
    reward = turn.run("calibrate_reward", recipe.calibrate_reward, members=members, **data)
    adapter = turn.run("train_grpo", recipe.train_grpo, designer=designer, reward=reward, **data)
    parts = data | {"pairs": pairs, "designer": designer, "reward": reward, "adapter": adapter}
    return Trained(parts, members, turn.seconds)


def short_turn(
    recipe: Recipe, old: Trained, catalogue: Path, file: str, renders: int, share: float, work: Path
) -> tuple[Trained, Trained]:
    """One turn from the old weights: before its policy optimisation, and after."""
    began = time.perf_counter()
    merged, fresh = render_new(old, catalogue, file, renders, work)
    turn = Turn()
    turn.seconds["render"] = time.perf_counter() - began
    data = {"catalogue": catalogue, "triplets": merged}
    config = recipe.train_reward
    config = dataclasses.replace(config, num_steps=_part(config.num_steps, share))
    members = [
        turn.run("train_reward", dataclasses.replace(config, member=k), start=start, **data)
        for k, start in enumerate(old.members)
    ]
    reward = turn.run("calibrate_reward", recipe.calibrate_reward, members=members, **data)
    sft = recipe.train_sft
    sft = dataclasses.replace(sft, prior_steps=0, best_steps=_part(sft.best_steps, share))
    designer = turn.run(
        "train_sft", sft, catalogue=catalogue, pairs=old.parts["pairs"], triplets=fresh,
        start=old.parts["designer"],
    )  # fmt: skip
    carried = work / "carried"
    shutil.rmtree(carried, ignore_errors=True)
    carry_adapter(old.parts["designer"], old.parts["adapter"], designer, carried)
    parts = data | {"pairs": old.parts["pairs"], "designer": designer, "reward": reward}
    before = Trained(parts | {"adapter": carried}, members, dict(turn.seconds))
    grpo = recipe.train_grpo
    grpo = dataclasses.replace(grpo, num_steps=_part(grpo.num_steps, share))
    adapter = turn.run("train_grpo", grpo, designer=designer, reward=reward, start=carried, **data)
    return before, Trained(parts | {"adapter": adapter}, members, turn.seconds)


def render_new(old: Trained, catalogue: Path, file: str, num: int, work: Path) -> tuple[Path, Path]:
    """Render the new file on train and calibration prompts.

    Returns:
        Two folders as `build_triplets` writes: old and new renders; and those of the prompts that
        were rendered now.
    """
    rows = triplet_data.load(old.parts["triplets"])
    designer = old.designer().extended(Catalogue.load(catalogue / "catalogue.json.gz"))
    budget = designer.reference.config.num_workflow_tokens
    grammar = Grammar(designer.catalogue, designer.vocabulary, budget)
    best = _best_of(rows)
    cells: list[tuple[str, str, str, Workflow]] = []
    for split, share in ((TRAIN, 0.8), (CALIBRATION, 0.2)):
        prompts = _in_turn(rows, split, max(round(num * share / (2 * SEEDS_PER_CELL)), 2))
        texts = [prompt for prompt, _ in prompts]
        own = designer.design(texts, n=1, require=[f"ckpt_name={file}"])
        for (prompt, kind), designs in zip(prompts, own, strict=True):
            found = [designs[0].workflow]
            # Of a calibration prompt no workflow may be looked up: the most common best one.
            found.append(swapped(best.get(prompt, best[""]), file))
            for workflow in found:
                template = workflow.canonical(designer.catalogue)
                if grammar.accepts(encode(template, grammar).tokens):
                    cells.append((prompt, kind, split, template))
    new = _render(cells, rows, catalogue, work)
    asked = {prompt for prompt, *_ in cells}
    folders = work / "merged", work / "fresh"
    columns = {name: [*rows[name], *new[name]] for name in rows}
    _write(folders[0], columns, range(len(columns["prompt"])), old)
    kept = [k for k, prompt in enumerate(columns["prompt"]) if prompt in asked]
    _write(folders[1], columns, kept, old)
    return folders


def swapped(workflow: Workflow, file: str) -> Workflow:
    """The workflow with another checkpoint in the place of each of its own."""
    nodes = {
        node_id: Node(
            node.class_type, {**node.inputs, "ckpt_name": file}
        ) if "ckpt_name" in node.inputs else node
        for node_id, node in workflow.nodes.items()
    }  # fmt: skip
    return Workflow(nodes)


def _best_of(rows: Mapping[str, Sequence[Any]]) -> dict[str, Workflow]:
    """Best train workflow of each prompt by shrunk mean; under "" the most common of these."""
    train = [k for k, split in enumerate(rows["split"]) if split == TRAIN]
    names = ("prompt", "kind", "fingerprint", "score")
    chosen = best_cells(shrunk_means(*([rows[n][k] for k in train] for n in names)), 1)
    text_of = dict(zip(rows["fingerprint"], rows["workflow"], strict=True))
    flows = {prompt: Workflow.from_api(json.loads(text_of[name])) for prompt, name in chosen}
    names = [name for _, name in chosen]
    common = max(dict.fromkeys(names), key=names.count)
    return flows | {"": Workflow.from_api(json.loads(text_of[common]))}


def _in_turn(rows: Mapping[str, Sequence[Any]], split: str, num: int) -> list[tuple[str, str]]:
    """Different prompts of a split with their kinds, kinds in turn."""
    columns = zip(rows["prompt"], rows["kind"], rows["split"], strict=True)
    by_kind: dict[str, list[str]] = {}
    for prompt, kind in dict.fromkeys((p, k) for p, k, s in columns if s == split):
        by_kind.setdefault(kind, []).append(prompt)
    longest = max(map(len, by_kind.values()))
    turns = [(p[at], k) for at in range(longest) for k, p in by_kind.items() if at < len(p)]
    return turns[:num]


def _render(
    cells: Sequence[tuple[str, str, str, Workflow]],
    rows: Mapping[str, Sequence[Any]],
    catalogue: Path,
    work: Path,
) -> dict[str, list[Any]]:
    """Triplet rows of new cells."""
    new: dict[str, list[Any]] = {name: [] for name in rows}
    jobs: dict[str, JudgedJob] = {}
    first = max(rows["cell"]) + 1
    for number, (prompt, kind, split, template) in enumerate(cells):
        fingerprint = template.template_fingerprint()
        text = json.dumps(template.to_api(), separators=(",", ":"))
        for k in range(SEEDS_PER_CELL):
            seed = render_seed(1, prompt, fingerprint, k)
            name = f"{first + number:06d}-{k}"
            jobs[name] = JudgedJob(template.fill(prompt, seed=seed), name, prompt, False)
            values = (first + number, prompt, kind, text, fingerprint, seed, split, "new")
            columns = (
                "cell",
                "prompt",
                "kind",
                "workflow",
                "fingerprint",
                "seed",
                "split",
                "origin",
            )
            for column, value in zip(columns, values, strict=True):
                new[column].append(value)
    run = Run("new_model", work / "renders")
    run.work.mkdir(exist_ok=True)
    scored = render_and_score(
        list(jobs.values()), run, "new", catalogue_dir=catalogue, rubric="shapes",
        chunk_size=64, num_processes=2,
    )  # fmt: skip
    for name in jobs:
        for column, value in scored[name].items():
            new[column].append(value)
    return new


def _write(
    folder: Path, columns: Mapping[str, Sequence[Any]], kept: Sequence[int], old: Trained
) -> None:
    folder.mkdir(exist_ok=True)
    terms = [term.name for term in get_rubric("shapes").terms]
    chosen = {name: [values[k] for k in kept] for name, values in columns.items()}
    write_table(folder / "triplets-00000-of-00001.parquet", chosen, schema(terms))
    for name in COPIED:
        if (old.parts["triplets"] / name).is_file():
            shutil.copyfile(old.parts["triplets"] / name, folder / name)


def measure(
    designers: Mapping[str, Designer], frame: Frame, file: str, book: ScoreBook, guidance: float
) -> dict[str, dict[str, Any]]:
    """What each designer makes of the frame's prompts, by rendering."""
    wanted = CONCEPTS[file]
    inside_P = np.array([wanted(parse(prompt)) for prompt in frame.prompts])
    choices = {}
    for name, designer in designers.items():
        found = designer.design(frame.prompts, n=NUM_DESIGNS, guidance=guidance)
        choices[name] = [Choice.of(designs[0]) for designs in found]
        book.want(choices[name], frame.prompts, frame.seeds_PS)
    table, first_PS = {}, None
    for name, row in choices.items():
        scores_PS = book.scores(row, frame.prompts, frame.seeds_PS)
        first_PS = scores_PS if first_PS is None else first_PS
        uses_P = np.array([file in json.dumps(choice.workflow.to_api()) for choice in row])
        table[name] = {
            part: {
                "prompts": int(at_P.sum()),
                "uses": float(uses_P[at_P].mean()),
                "score": float(scores_PS[at_P].mean()),
                "predicted": float(
                    np.mean([c.predicted for c, k in zip(row, at_P, strict=True) if k])
                ),
                "gain": dataclasses.asdict(paired_interval(scores_PS[at_P], first_PS[at_P])),
            }
            for part, at_P in (("concept", inside_P), ("others", ~inside_P))
            if at_P.any()
        }
    return table


def show(table: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float], file: str) -> None:
    """Print the table."""
    print(f"{file}, {NUM_DESIGNS} designs per prompt, the first is rendered")
    print(f"{'':10}{'concept: uses':>14}{'score':>7}{'gain':>24}{'others: uses':>14}{'score':>7}"
          f"{'gain':>24}{'seconds':>9}")  # fmt: skip
    for name, parts in table.items():
        line = f"{name:10}"
        for part, width in (("concept", 14), ("others", 14)):
            row = parts.get(part)
            if row is None:
                line += " " * (width + 31)
                continue
            gain = row["gain"]
            said = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
            line += f"{row['uses']:>{width}.0%}{row['score']:>7.3f}{said:>24}"
        print(line + f"{seconds.get(name, 0.0):>9.0f}")


def _part(steps: int, share: float) -> int:
    return max(round(steps * share), 1)


def write_catalogue(folder: Path, without: str | None = None) -> Path:
    """A catalogue folder of the shipped world, with or without one file."""
    whole = Catalogue.load("embedded")
    files = tuple(file for file in whole.files if file.name != without)
    (folder / "models").mkdir(parents=True, exist_ok=True)
    save_catalogue(folder / "catalogue.json.gz", dataclasses.replace(whole, files=files))
    return folder


def main() -> None:
    """Train, install, take a turn, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", choices=CONCEPTS, default=next(iter(CONCEPTS)))
    parser.add_argument("--recipe", default="bench")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--renders", type=int, default=640)
    parser.add_argument("--share", type=float, default=0.15, help="of the recipe's steps")
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--no-full", action="store_true", help="leave out full retraining")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--home", type=Path, help="runs are kept there, and found again")
    args = parser.parse_args()
    if args.quick:
        args.recipe, args.members, args.renders, args.prompts, args.seeds = "smoke", 1, 24, 8, 1
    with tempfile.TemporaryDirectory() as temporary:
        home = args.home or Path(temporary)
        os.environ["FLOWLOOM_HOME"] = str(home.absolute())
        recipe = recipes.resolve(args.recipe)
        work = home / "new_model" / f"{args.file}-{args.recipe}-{args.renders}-{args.share}"
        work.mkdir(parents=True, exist_ok=True)
        poor, rich = (
            write_catalogue(work / name, without)
            for name, without in (("without", args.file), ("with", None))
        )
        old = train(recipe, args.members, poor)
        before = old.designer()
        carried, turn = short_turn(recipe, old, rich, args.file, args.renders, args.share, work)
        installed = before.extended(Catalogue.load(rich / "catalogue.json.gz"))
        designers = {"before": before, "installed": installed}
        designers |= {"carried": carried.designer(), "turn": turn.designer()}
        seconds = {"before": sum(old.seconds.values()), "carried": sum(carried.seconds.values())}
        seconds["turn"] = sum(turn.seconds.values())
        detail = {"before": old.seconds, "turn": turn.seconds}
        if not args.no_full:
            full = train(recipe, args.members, rich)
            designers["full"], detail["full"] = full.designer(), full.seconds
            seconds["full"] = sum(full.seconds.values())
        config = EvaluateConfig(num_prompts=args.prompts, num_seeds=args.seeds)
        frame = make_frame(config, triplet_data.load_prompts(old.parts["triplets"]))
        scores = Run("new_model", work / "scores")
        scores.work.mkdir(exist_ok=True)
        guidance = recipe.evaluate.guidance
        table = measure(designers, frame, args.file, ScoreBook(scores, rich), guidance)
    show(table, seconds, args.file)
    if "full" in seconds:
        print(f"full retraining takes {seconds['full'] / seconds['turn']:.1f} times the turn")
    if args.json:
        record = {"file": args.file, "recipe": args.recipe, "renders": args.renders}
        print(json.dumps(record | {"policies": table, "seconds": seconds, "stages": detail}))


if __name__ == "__main__":
    main()
