"""Triplets of prompt, workflow and score: cells planned in rounds, rendered in shards, scored.

A round's renders are sorted so that equal samplers lie together and cut into shards of fixed size.
A finished shard is a file in the run's work folder; the same command renders only what is missing.
Every decision is made from the stored scores, so an interrupted run ends with the same bytes.

    flowloom run build_triplets --recipe demo

N machines share the work by parts. A plain plan is one round, and so are a policy's designs; in a
plan of several each machine renders its share of the first round that is not whole, so this is done
once per round, or what is missing at the end is rendered by the run that joins the parts:

    flowloom run build_triplets --set mode=plain --set part=0/4       # on machine 0 of 4, and so on
    flowloom run build_triplets --set mode=plain --input parts=A --input parts=B ...

Between two rounds of policy optimisation, the policy's designs join the triplets (`designed`):

    flowloom run build_triplets --input earlier=TRIPLETS --input proposals=ADAPTER
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flowloom.dataset.cells import Pairs, Rendered, Template
from flowloom.dataset.config import BuildTripletsConfig, PromptsConfig, check_part
from flowloom.dataset.designed import DesignedPlan
from flowloom.dataset.pairs import stream_pairs
from flowloom.dataset.plan import Plan
from flowloom.dataset.prompts import Prompt, as_prompts, draw_unrendered, list_prompts
from flowloom.dataset.scoring import Scored, Scorer
from flowloom.dataset.shards import PART_FILE, Round, Scores, Shard, ShardFiles
from flowloom.dataset.splits import HELD_OUT_WORKFLOW, TRAIN
from flowloom.dataset.triplet_files import (
    load,
    load_calibration_prompts,
    load_prompts,
    load_unrendered_prompts,
)
from flowloom.dataset.triplet_rows import Rows, make_card, schema, shard_schema
from flowloom.render.pool import RenderPool
from flowloom.runs import Run, write_json
from flowloom.score.rubric import get_rubric
from flowloom.score.standard import STANDARD_FILE, Standard
from flowloom.workflow import Catalogue, Workflow

SECONDS_FILE = "shard_seconds.jsonl"
FILES_FILE = "files.json"
"""Model files, by "folder/name", to their sha256."""

__all__ = [
    "build_triplets",
    "load",
    "load_calibration_prompts",
    "load_prompts",
    "load_unrendered_prompts",
    "schema",
]


def build_triplets(
    config: BuildTripletsConfig,
    run: Run,
    *,
    catalogue: Path,
    pairs: Path,
    parts: Path | Sequence[Path] = (),
    earlier: Path | None = None,
    proposals: Path | None = None,
) -> dict[str, float]:
    """Render and score workflows on train and calibration prompts.

    Args:
        config: What to render.
        run: Run folder; `out` gets `triplets-00000-of-00001.parquet` and so on, `prompts.json`
            (held-out prompts), `unrendered_prompts.json` (train prompts for policy optimisation),
            `best_fixed.json` (a template), `standard.json` (means and deviations of train scores),
            `card.json` and `card.md`; with `config.part`, shards for another run.
        catalogue: Folder that `publish_generator` wrote.
        pairs: Folder of `build_pairs`; its first pairs of each prompt are the random cells.
        parts: Folders of runs with a `part`, whose shards are taken instead of rendered.
        earlier: Folder of `build_triplets` whose rows are kept; with `proposals` alone.
        proposals: Folder with a policy's designs, rendered in place of the plan's cells.

    Returns:
        Counts, mean scores by origin and the best fixed workflow's mean.

    Raises:
        ValueError: A model file is missing, a workflow cannot be rendered, the pairs are of other
            prompts, a part is damaged or of another plan, or of `earlier` and `proposals` there is
            one alone or the earlier triplets were rendered with files that are there no more.
        FloatingPointError: A picture or a score is not finite; names the jobs.
        OSError: A file cannot be written; names it.
    """
    facts = Catalogue.load(catalogue / "catalogue.json.gz")
    given = [parts] if isinstance(parts, Path) else list(parts)
    with _Renderer(config, catalogue, run) as renderer:
        if not given:
            renderer.start()  # Workers start while the first round is planned.
        files = ShardFiles(run.work, given, run.log)
        if earlier is None and proposals is None:
            plan = Plan(config, facts, read_templates(pairs, facts, config.random_cells))
            builder = _Builder(config, run, plan, files, renderer)
        elif earlier is None or proposals is None:
            raise ValueError("earlier, proposals: got one of these inputs, expected both or none")
        else:
            check_catalogue(earlier, facts)
            rows = load(earlier)
            prompts = [*_unrendered(config.prompts), *list_prompts(config.prompts, "calibration")]
            plan = DesignedPlan(config, facts, proposals, earlier, rows, prompts)
            builder = _Builder(config, run, plan, files, renderer)
            builder.rows.keep(rows)
        whole = builder.build()
    if config.part is not None:
        return builder.hand_over()
    assert whole
    return builder.write()


def check_catalogue(earlier: Path, catalogue: Catalogue) -> None:
    """Whether rows of earlier triplets still say what is: models may have joined, none changed.

    Raises:
        ValueError: A file that a row's workflow may load is not there, or is another one.
    """
    before = json.loads((earlier / FILES_FILE).read_text())
    now = {f"{file.folder}/{file.name}": file.sha256 for file in catalogue.files}
    for name, digest in before.items():
        if now.get(name) != digest:
            found = now.get(name, "none")[:12]
            raise ValueError(
                f"earlier: {name}: got {found} in the catalogue, expected {digest[:12]}, with "
                f"which {str(earlier)!r} was rendered"
            )


def read_templates(path: Path, catalogue: Catalogue, per_prompt: int) -> Pairs:
    """The first pairs of each train prompt, and as many with held-out workflows.

    Args:
        path: Folder of `build_pairs`.
        catalogue: Gives the canonical form.
        per_prompt: Most pairs of a prompt, of either sort.

    Raises:
        ValueError: There are no pairs.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for split in (TRAIN, HELD_OUT_WORKFLOW):
        known: Counter[str] = Counter()
        for some in stream_pairs(path, split, ("prompt", "workflow", "fingerprint")):
            for prompt, text, fingerprint in zip(*some.values(), strict=True):
                known[prompt] += 1
                if known[prompt] <= per_prompt:
                    rows.setdefault(prompt, []).append((text, fingerprint))
    if not rows:
        raise ValueError(f"pairs: got {str(path)!r} without train pairs, expected some")
    return {
        prompt: [
            Template(Workflow.from_api(json.loads(text)).canonical(catalogue), fingerprint)
            for text, fingerprint in found
        ]
        for prompt, found in rows.items()
    }


class _Renderer:
    """The render workers, started when they are first needed; a context manager."""

    def __init__(self, config: BuildTripletsConfig, catalogue: Path, run: Run):
        self._config, self._catalogue, self._run = config, catalogue, run
        self._pool: RenderPool | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Renderer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def start(self) -> RenderPool:
        if self._pool is None:
            scorer, processes = Scorer(self._config.rubric), self._config.num_processes
            pool = RenderPool(self._catalogue, processes, scorer)
            self._pool = self._stack.enter_context(pool)
        return self._pool

    def render(self, round_: Round, shards: Sequence[Shard]) -> Iterator[Scored]:
        """What the workers make of each shard, in order."""
        if not shards:
            return
        answers = self.start().map([round_.jobs(shard) for shard in shards])
        with (self._run.dir / SECONDS_FILE).open("a") as file:
            for shard, scored in zip(shards, answers, strict=True):
                row = {"shard": shard.name, "renders": len(shard.places), "cpu_s": scored.cpu_s}
                file.write(json.dumps(row) + "\n")
                file.flush()
                yield scored


class _Builder:
    """The build of one dataset, or of one part of it."""

    def __init__(
        self,
        config: BuildTripletsConfig,
        run: Run,
        plan: Plan | DesignedPlan,
        files: ShardFiles,
        renderer: _Renderer,
    ):
        self.config, self.run, self.plan, self.files = config, run, plan, files
        self.renderer = renderer
        self.rubric = get_rubric(config.rubric)
        self.terms = [term.name for term in self.rubric.terms]
        self.scored = shard_schema(self.terms)
        self.rows = Rows(self.terms)
        self.history: list[Rendered] = []
        self._index, self._step = check_part(config.part) if config.part else (0, 1)

    def build(self) -> bool:
        """Go through the rounds; False where one lacks shards of other machines."""
        plan, config = self.plan, self.config
        context = f"{plan.catalogue.hash} {config.rubric} {' '.join(self.terms)}"
        cells = plan.cells(0, [])
        for number in range(plan.num_rounds):
            round_ = Round(number, cells, config.shard_size, context)
            scores = self._empty(round_)
            answers = self._scores(round_)
            steering = itertools.islice(answers, round_.num_steering)
            whole = _collect(steering, scores)
            if whole:
                self.history += round_.rendered(scores["score"])
                if number + 1 < plan.num_rounds:
                    # The workers go on meanwhile with what steers nothing.
                    cells = plan.cells(number + 1, self.history)
            whole = _collect(answers, scores) and whole
            if not whole:
                return False
            self.rows.add(round_.cells, scores)
            self._log(round_)
        return True

    def write(self) -> dict[str, float]:
        """Write the dataset; returns the final metrics."""
        run, config, columns = self.run, self.config, self.rows.columns
        best, panel = self.plan.best_fixed(self.history)
        paths = self.rows.write(run.out, config.rows_per_file)
        write_json(run.out / "best_fixed.json", best.to_api())
        held_out = list_prompts(config.prompts, "test")
        write_json(run.out / "prompts.json", _as_rows(held_out))
        write_json(run.out / "unrendered_prompts.json", _as_rows(_unrendered(config.prompts)))
        models = self.plan.catalogue.files
        write_json(run.out / FILES_FILE, {f"{f.folder}/{f.name}": f.sha256 for f in models})
        catalogue = self.plan.catalogue.hash
        train = self.rows.of_split(TRAIN, self.rubric.columns)
        Standard.fit(self.rubric, catalogue, train, TRAIN).save(run.out / STANDARD_FILE)
        make_card(config, self.rows, paths, catalogue, panel).write(run.out)
        run.log(f"best fixed: {panel[0]['mean']:.3f} over {panel[0]['num_renders']} renders")
        return {
            "triplets/renders": float(len(columns["cell"])),
            "triplets/cells": float(self.rows.num_cells),
            "triplets/best_fixed_mean": panel[0]["mean"],
            "triplets/test_prompts": float(len(held_out)),
        } | {f"triplets/{name}_mean": mean for name, mean in self.rows.means().items()}

    def hand_over(self) -> dict[str, float]:
        """Make the shards of this part the artifact."""
        for path in self.files.own_paths:
            shutil.copyfile(path, self.run.out / path.name)
        names = sorted(path.name for path in self.files.own_paths)
        write_json(self.run.out / PART_FILE, {"part": self.config.part, "shards": names})
        self.run.log(f"part {self.config.part}: {len(names)} shards")
        return {"triplets/shards": float(len(names))}

    def _scores(self, round_: Round) -> Iterator[tuple[Shard, Scores | None]]:
        """The shards in order, rendering this machine's that no file has; None: another's."""
        found = {shard.name: self.files.read(shard) for shard in round_.shards}
        absent = [shard for shard in round_.shards if found[shard.name] is None]
        mine = [shard for shard in absent if shard.number % self._step == self._index]
        if len(absent) < len(round_.shards):
            there = len(round_.shards) - len(absent)
            self.run.log(f"{there} of {len(round_.shards)} shards were rendered before")
        answers = self.renderer.render(round_, mine)
        names = {shard.name for shard in mine}
        for shard in round_.shards:
            scores = found[shard.name]
            if shard.name in names:
                scores = self.files.write(shard, next(answers).columns, self.scored)
            yield shard, scores

    def _empty(self, round_: Round) -> Scores:
        return {
            field.name: np.zeros(round_.num_renders, field.type.to_pandas_dtype())
            for field in self.scored
        }

    def _log(self, round_: Round) -> None:
        done = len(self.rows.columns["cell"])
        found = self.rows.means(done - round_.num_renders)
        means = {f"triplets/{name}_mean": mean for name, mean in found.items()}
        self.run.metric(round_.number, {"triplets/renders": float(done), **means})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        self.run.log(f"round {round_.number}: {len(round_.cells)} cells, {shown}")


def _unrendered(lists: PromptsConfig) -> list[Prompt]:
    if lists.prompts_file is not None:
        return list_prompts(lists, "train", lists.num_unrendered)
    return as_prompts(draw_unrendered(lists.num_unrendered, lists.kinds, lists.seed))


def _collect(found: Iterable[tuple[Shard, Scores | None]], scores: Scores) -> bool:
    """Put the scores of shards into their places; False if one has none."""
    whole = True
    for shard, values in found:
        if values is None:
            whole = False
            continue
        for name, column in scores.items():
            column[shard.places] = values[name]
    return whole


def _as_rows(prompts: Sequence[Prompt]) -> list[dict[str, str]]:
    return [{"prompt": prompt.text, "kind": prompt.kind} for prompt in prompts]
