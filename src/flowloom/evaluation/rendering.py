"""Designs rendered and scored in fixed chunks on several processes, resumed chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from flowloom.render.engine import RenderJob, RenderResult, batch_key
from flowloom.render.pool import RenderPool
from flowloom.runs import Run, write_json


@dataclasses.dataclass(frozen=True)
class JudgedJob(RenderJob):
    """A picture to render and score."""

    prompt: str
    """What it is judged by."""
    keep: bool
    """Whether the picture itself is wanted."""


def render_and_score(
    jobs: Sequence[JudgedJob],
    run: Run,
    name: str,
    *,
    catalogue_dir: Path,
    rubric: str,
    chunk_size: int,
    num_processes: int,
) -> dict[str, dict[str, float]]:
    """Render and score jobs; chunks that an earlier process finished are read, not done again.

    Args:
        jobs: What to render, ids unique; the list fixes the chunks, and so the pictures' last bits.
        run: Its `work` folder keeps `<name>-<chunk>.json`, and `pictures/<id>.png` of kept jobs.
        name: Tells several calls of one run apart.
        catalogue_dir: Folder with the catalogue and its models.
        rubric: Name of the rubric.
        chunk_size: Jobs per chunk.
        num_processes: Processes that render.

    Returns:
        Id to the rubric's row: score, its terms, flops.

    Raises:
        FloatingPointError: If a picture or a score is not finite; names the jobs.
    """
    # Jobs whose samplers can share a batch lie together.
    jobs = sorted(jobs, key=lambda job: (batch_key(job.workflow), job.id))
    chunks = [jobs[first : first + chunk_size] for first in range(0, len(jobs), chunk_size)]
    paths = [run.work / f"{name}-{index:04d}.json" for index in range(len(chunks))]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    if missing:
        if len(missing) < len(chunks):
            run.log(
                f"{name}: {len(chunks) - len(missing)} of {len(chunks)} chunks were done before"
            )
        pictures = run.work / "pictures"
        pictures.mkdir(exist_ok=True)
        then = functools.partial(score_chunk, rubric, pictures)
        with RenderPool(catalogue_dir, min(num_processes, len(missing)), then) as pool:
            rendered = pool.map([chunks[index] for index in missing])
            for index, rows in zip(missing, rendered, strict=True):
                write_json(paths[index], rows)
    rows: dict[str, dict[str, float]] = {}
    for path in paths:
        rows.update(json.loads(path.read_text()))
    return rows


def score_chunk(
    rubric: str, pictures: Path, jobs: Sequence[JudgedJob], results: Sequence[RenderResult]
) -> dict[str, dict[str, float]]:
    """Score a rendered chunk where it was rendered; kept pictures are written there too."""
    from flowloom.render import png
    from flowloom.score.rubric import get_rubric

    for job, result in zip(jobs, results, strict=True):
        if job.keep:
            png.write(pictures / f"{job.id}.png", result.image, job.workflow)
    rows = get_rubric(rubric).score(
        [job.prompt for job in jobs],
        [result.image for result in results],
        [result.flops for result in results],
    )
    return {job.id: row for job, row in zip(jobs, rows, strict=True)}
