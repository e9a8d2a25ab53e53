"""What a render worker makes of a chunk of pictures: their scores, in columns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowloom.render.engine import RenderJob, RenderResult


@dataclasses.dataclass(frozen=True)
class ScoredJob(RenderJob):
    """A render job that knows what the picture should show."""

    prompt: str


class Scored(NamedTuple):
    """The scores of a chunk."""

    columns: dict[str, list[Any]]
    """`score`, each term of the rubric by name, and `flops`."""
    cpu_s: float
    """CPU seconds of this process since the chunk before: rendering and scoring."""


class Scorer:
    """Scores pictures where they were rendered; travels to the workers."""

    def __init__(self, rubric: str):
        """Take the name of a rubric."""
        self.rubric = rubric
        self._counted_s: float | None = None

    def __call__(self, jobs: Sequence[ScoredJob], results: list[RenderResult]) -> Scored:
        """Score a rendered chunk.

        Raises:
            ValueError: A prompt is outside what the rubric can judge.
            FloatingPointError: A score is not finite; names the jobs.
        """
        from flowloom.score.rubric import get_rubric

        rubric = get_rubric(self.rubric)
        prompts = [job.prompt for job in jobs]
        images = [result.image for result in results]
        flops = [result.flops for result in results]
        try:
            rows = rubric.score(prompts, images, flops)
        except FloatingPointError as error:
            names = []
            for job, image, cost in zip(jobs, images, flops, strict=True):
                try:
                    rubric.score([job.prompt], [image], [cost])
                except FloatingPointError:
                    names.append(job.id)
            raise FloatingPointError(f"{error}; jobs {'; '.join(names)}") from None
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        now = time.process_time()
        spent, self._counted_s = now - (self._counted_s or 0.0), now
        return Scored(columns, spent)
